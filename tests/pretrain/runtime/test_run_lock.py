"""One job at a time writes into a run's folder, and locks of dead jobs do not block."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import PretrainError
from pretrain.runtime import run_lock
from pretrain.runtime.run_lock import FILE, RunLock


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunLock, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(RunLock, "BEAT_SECONDS", 0.05)


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def write_lock(run_dir: Path, **changed: Any) -> None:
    """Write the lock of a process on this machine, with some values changed."""
    content = {
        "host": "elsewhere", "machine": run_lock._machine(), "pid": os.getpid(),
        "started": run_lock._started(os.getpid()), "since": "then", "token": "x", **changed,
    }  # fmt: skip
    (run_dir / FILE).write_text(json.dumps(content))


def test_running_jobs_lock_their_folder_and_are_named(
    tmp_path: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    write_lock(tmp_path, pid=sleeper.pid, started=run_lock._started(sleeper.pid))
    before = (tmp_path / FILE).read_text()
    with pytest.raises(PretrainError, match=f"process {sleeper.pid} on elsewhere, since then"):
        RunLock(tmp_path).__enter__()
    assert (tmp_path / FILE).read_text() == before


@pytest.mark.parametrize("death", ["killed", "zombie", "process number reused"])
def test_locks_of_dead_jobs_are_taken_over(
    tmp_path: Path, sleeper: "subprocess.Popen[bytes]", death: str
) -> None:
    started = run_lock._started(sleeper.pid)
    write_lock(tmp_path, pid=sleeper.pid, started=started)
    if death == "process number reused":
        write_lock(tmp_path, pid=sleeper.pid, started="1")
    else:
        sleeper.kill()
        if death == "killed":
            sleeper.wait()
        while run_lock._started(sleeper.pid) is not None:
            time.sleep(0.01)
    with RunLock(tmp_path), pytest.raises(PretrainError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path).__enter__()


def test_jobs_on_other_machines_are_alive_while_they_update_their_lock(
    tmp_path: Path,
) -> None:
    write_lock(tmp_path, machine="another machine")
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            os.utime(tmp_path / FILE, (0, time.monotonic()))  # the clock of another machine

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(PretrainError, match="on elsewhere"):
        RunLock(tmp_path).__enter__()
    ended.set()
    thread.join()
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": "x"}', "\x00\x00"])
def test_unreadable_locks_do_not_block(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with RunLock(tmp_path):
        pass
    with RunLock(tmp_path):  # the first one released it
        pass


def test_deleted_locks_are_restored_or_reported_as_lost(tmp_path: Path) -> None:
    def until(condition: Any) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    with RunLock(tmp_path) as lock:
        (tmp_path / FILE).unlink()
        until(lock._is_ours)
        assert not lock.lost
        write_lock(tmp_path)
        until(lambda: lock.lost)
    assert json.loads((tmp_path / FILE).read_text())["token"] == "x"


def _try_lock(run_dir: Path, start: Any, end: Any) -> bool:
    start.wait()
    try:
        with RunLock(run_dir):
            end.wait()
    except PretrainError:
        end.wait()
        return False
    return True


def test_one_of_several_simultaneous_jobs_gets_the_lock(tmp_path: Path) -> None:
    with multiprocessing.Manager() as manager:
        jobs = 4
        start, end = manager.Barrier(jobs), manager.Barrier(jobs)
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            locked = pool.starmap(_try_lock, [(tmp_path / "new" / "run", start, end)] * jobs)
    assert sum(locked) == 1


def test_invalid_run_dirs_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/no/run")):
        with pytest.raises(PretrainError, match=f"cannot write into run_dir={path}: "):
            RunLock(path).__enter__()


def test_pipes_in_place_of_the_lock_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.lock")
    with pytest.raises(PretrainError, match=r"cannot write into .*: run\.lock is not a file"):
        RunLock(tmp_path).__enter__()
