"""One job at a time writes into a run's folder, and a dead one is in nobody's way."""

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
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunLock, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(RunLock, "BEAT_SECONDS", 0.05)


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def owned(run_dir: Path, **changed: Any) -> None:
    """Leave a lock as a process of this machine would, with other values."""
    content = {
        "host": "elsewhere", "machine": run_lock._machine(), "pid": os.getpid(),
        "started": run_lock._started(os.getpid()), "since": "then", "token": "x", **changed,
    }  # fmt: skip
    (run_dir / FILE).write_text(json.dumps(content))


def test_a_running_job_keeps_others_out_with_its_name(
    tmp_path: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    owned(tmp_path, pid=sleeper.pid, started=run_lock._started(sleeper.pid))
    before = (tmp_path / FILE).read_text()
    with pytest.raises(PretrainError, match=f"process {sleeper.pid} on elsewhere, since then"):
        RunLock(tmp_path).__enter__()
    assert (tmp_path / FILE).read_text() == before


@pytest.mark.parametrize("death", ["killed", "not yet waited for", "its number was given again"])
def test_the_lock_of_a_dead_job_is_taken_over(
    tmp_path: Path, sleeper: "subprocess.Popen[bytes]", death: str
) -> None:
    started = run_lock._started(sleeper.pid)
    owned(tmp_path, pid=sleeper.pid, started=started)
    if death == "its number was given again":
        owned(tmp_path, pid=sleeper.pid, started="1")
    else:
        sleeper.kill()
        if death == "killed":
            sleeper.wait()
        while run_lock._started(sleeper.pid) is not None:
            time.sleep(0.01)
    with RunLock(tmp_path), pytest.raises(PretrainError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path).__enter__()


def test_a_job_on_another_machine_is_alive_for_as_long_as_it_touches_its_lock(
    tmp_path: Path,
) -> None:
    owned(tmp_path, machine="another one")
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            os.utime(tmp_path / FILE, (0, time.monotonic()))  # by another clock

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(PretrainError, match="on elsewhere"):
        RunLock(tmp_path).__enter__()
    ended.set()
    thread.join()
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": "x"}', "\x00\x00"])
def test_a_lock_that_cannot_be_read_is_in_nobodys_way(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with RunLock(tmp_path):
        pass
    with RunLock(tmp_path):  # left free
        pass


def test_a_job_whose_lock_was_deleted_has_it_again_or_learns_who_has(tmp_path: Path) -> None:
    def until(condition: Any) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    with RunLock(tmp_path) as lock:
        (tmp_path / FILE).unlink()
        until(lock._is_ours)
        assert not lock.lost
        owned(tmp_path)
        until(lambda: lock.lost)
    assert json.loads((tmp_path / FILE).read_text())["token"] == "x"


def _take(run_dir: Path, start: Any, end: Any) -> bool:
    start.wait()
    try:
        with RunLock(run_dir):
            end.wait()
    except PretrainError:
        end.wait()
        return False
    return True


def test_of_jobs_that_start_at_once_one_has_the_folder(tmp_path: Path) -> None:
    with multiprocessing.Manager() as manager:
        jobs = 4
        start, end = manager.Barrier(jobs), manager.Barrier(jobs)
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            taken = pool.starmap(_take, [(tmp_path / "new" / "run", start, end)] * jobs)
    assert sum(taken) == 1


def test_a_run_dir_that_cannot_be_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/no/run")):
        with pytest.raises(PretrainError, match=f"cannot write into run_dir={path}: "):
            RunLock(path).__enter__()


def test_a_pipe_in_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.lock")
    with pytest.raises(PretrainError, match=r"cannot write into .*: run\.lock is not a file"):
        RunLock(tmp_path).__enter__()
