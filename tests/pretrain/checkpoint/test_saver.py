"""A run that ends finishes its last checkpoint, unless other ranks do not answer."""

import re
import threading
from pathlib import Path

import pytest

from pretrain.checkpoint.saver import Saver
from pretrain.runtime import background

LATE = (  # as gloo says it
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for "
    "recv operation to complete"
)


@pytest.mark.parametrize(
    ("error", "waits"), [(LATE, False), ("out of memory", True)], ids=["late", "other"]
)
def test_an_error_waits_for_the_checkpoint_only_if_ranks_answer(
    tmp_path: Path, error: str, waits: bool
) -> None:
    answer = threading.Event()
    saver = Saver(tmp_path, keep=1, asynchronous=True)

    def write() -> None:
        answer.wait()

    def end() -> None:
        with saver:
            saver._pending = background.start(write, "writes")
            raise RuntimeError(error)

    ended = background.start(end, "ends")
    if waits:
        with pytest.raises(TimeoutError):
            ended.result(timeout=0.5)
        answer.set()
    with pytest.raises(RuntimeError, match=re.escape(error)):
        ended.result(timeout=60)
    answer.set()
