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

# An interpreter that ends in the usual way calls the function, whatever the status.
ENDS = """
import atexit, os, sys, threading
from pretrain.runtime import background
atexit.register(os._exit, 9)
action = threading.Event().wait if sys.argv[1] == "waits" else int
call = background.start(action, "call")
if sys.argv[1] != "waits":
    call.result()
    while background._running: pass
with background.ending_process():
    print("printed")
    exec(sys.argv[2])
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


def _end(call: str, statement: str) -> tuple[int, str, str]:
    command = [sys.executable, "-c", ENDS, call, statement]
    ended = subprocess.run(command, timeout=120, capture_output=True, text=True)
    return ended.returncode, ended.stdout, ended.stderr


def test_a_waiting_call_does_not_change_the_status() -> None:
    """Finalizing the interpreter would abort a thread that returns from C++ meanwhile."""
    assert _end("waits", "sys.exit(143)") == (143, "printed\n", "")
    assert _end("waits", "sys.exit()") == (0, "printed\n", "")
    assert _end("waits", "pass") == (0, "printed\n", "")
    status, printed, errors = _end("waits", "raise ValueError('bad')")
    assert (status, printed) == (1, "printed\n")
    assert errors.endswith("ValueError: bad\n")
    assert _end("returned", "sys.exit(3)") == (9, "printed\n", "")
