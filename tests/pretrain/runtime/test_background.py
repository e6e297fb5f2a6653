"""A call in the background has a result or an error, and does not keep its process from ending."""

import subprocess
import sys

import pytest

from pretrain.runtime import background

WAITS_FOREVER = """
import threading
from pretrain.runtime import background
background.start(threading.Event().wait, "waits")
raise SystemExit(3)
"""


def test_the_result_and_every_kind_of_error_reach_the_caller() -> None:
    assert background.start(lambda: 7, "seven").result() == 7
    for error in (ValueError("bad"), SystemExit(2), KeyboardInterrupt()):

        def fail(error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)) as raised:
            background.start(fail, "fails").result()
        assert raised.value is error


def test_a_process_ends_while_the_call_waits() -> None:
    ended = subprocess.run([sys.executable, "-c", WAITS_FOREVER], timeout=120)
    assert ended.returncode == 3
