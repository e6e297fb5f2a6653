"""Interruptions, full disks and unwritable folders: one line, and nothing is lost.

Everything goes through the command line, as a user would.
"""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from pretrain import batches, startup
from pretrain.checkpoint import storage
from pretrain.data.tokenizer import Tokenizer
from pretrain.metrics import read
from pretrain.model.multimodal import MicroBatch
from pretrain.runtime.run_lock import RunLock
from tests.distributed import training
from tests.distributed.launch import launch
from tests.distributed.test_faults import BRIEF

# Longer than any test takes.
LONG = (*BRIEF, "steps=100000", "checkpoint.every=100000")


def start(folder: Path, run_dir: str, *overrides: str, ranks: int = 2) -> "subprocess.Popen[str]":
    """Start a job in a new process group, as a shell does."""
    launcher = ["--processes", str(ranks)] if ranks > 1 else []
    settings = [f"data.cache_dir={folder}/cache", f"run_dir={folder / run_dir}", *overrides]
    settings += ["parallel.expert=1"] if ranks == 1 else []
    run = subprocess.Popen(
        [
            *(sys.executable, "-m", "pretrain", "train", str(folder / "tiny.yaml"), *launcher),
            *(*LONG, *settings),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    STARTED.append(run)
    return run


STARTED: list["subprocess.Popen[str]"] = []


@pytest.fixture(autouse=True)
def end_remaining_runs() -> Iterator[None]:
    yield
    while STARTED:
        run = STARTED.pop()
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()


def reach(run: "subprocess.Popen[str]", metrics: Path, number: int) -> None:
    deadline = time.monotonic() + 240
    while not ((records := read(metrics)) and records[-1]["step"] >= number):
        assert run.poll() is None, f"the run ended early: {run.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Other signals are those of tests/pretrain/runtime/test_stopping.py.
@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGHUP), (2, signal.SIGINT)])
def test_ctrl_c_and_a_lost_terminal_save_the_step(
    folder: Path, ranks: int, number: signal.Signals
) -> None:
    """A terminal sends the signal to all processes, and the launcher passes it on as well."""
    name = f"{number.name}-{ranks}"
    run = start(folder, name, ranks=ranks)
    reach(run, folder / name / "metrics.jsonl", 3)
    os.killpg(run.pid, number)
    said, stderr = run.communicate(timeout=120)
    last = read(folder / name / "metrics.jsonl")[-1]["step"]
    assert storage.steps(folder / name / "checkpoints") == [last], stderr
    assert f"{number.name}: saved after step {last}; start it again to continue" in said
    assert run.returncode == 128 + number
    # torch's build for CUDA warns where it finds CUDA but no GPU.
    ours = [line for line in stderr.splitlines() if "CUDA_HOME" not in line]
    assert ours == [f"{number.name}: saving after this step; Ctrl-C exits without saving"]


def test_a_second_job_is_refused_and_ranks_end_with_a_killed_launcher(folder: Path) -> None:
    run_dir = folder / "shared"
    run = start(folder, "shared")
    reach(run, run_dir / "metrics.jsonl", 2)
    file = (run_dir / "metrics.jsonl").stat().st_ino
    overrides = (f"data.cache_dir={folder}/cache", f"run_dir={run_dir}")
    ((status, stderr),) = launch(training.command, 1, "train", f"{folder}/tiny.yaml", *overrides)
    assert status == 1
    assert stderr.startswith(f"error: another job is writing into run_dir={run_dir}: process ")
    assert "\n" not in stderr
    assert run.poll() is None and (run_dir / "metrics.jsonl").stat().st_ino == file

    ranks = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    gone, alive = psutil.wait_procs(ranks, timeout=30)
    assert len(gone) >= 2 and not alive
    run.communicate()
    with RunLock(run_dir):  # a job that has died leaves a lock that is free
        pass


def _train_with_a_full_disk(folder: str, name: str) -> tuple[int, str]:
    run_dir = Path(folder, f"full-{name}")
    save = Tokenizer.save

    def full(tokenizer: Tokenizer, path: Path) -> None:
        if path.is_relative_to(run_dir):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tokenizer, path)

    if name == "tokenizer.json":
        Tokenizer.save = full  # type: ignore[method-assign]
    settings = (f"data.cache_dir={folder}/cache", f"run_dir={run_dir}")
    return training.command("train", f"{folder}/tiny.yaml", *LONG, *settings)


@pytest.mark.parametrize("name", ["tokenizer.json", "starts.jsonl"])
def test_a_full_disk_at_the_start_is_one_line_on_all_ranks(folder: Path, name: str) -> None:
    run_dir = folder / f"full-{name}"
    run_dir.mkdir()
    if name == "starts.jsonl":
        (run_dir / name).symlink_to("/dev/full")
    (status, line), (other, nothing) = launch(_train_with_a_full_disk, 2, str(folder), name)
    assert (status, other, nothing) == (1, 1, "")
    assert line in (
        f"error: cannot write {run_dir}/tokenizer.json: No space left on device",
        f"error: cannot write into run_dir={run_dir}: No space left on device",
    )


def _train_with_a_temporarily_full_disk(folder: str, *overrides: str) -> tuple[int, str]:
    make_batch = batches.for_step

    def limited(config: Any, context: Any, data: Any, number: int) -> list[MicroBatch]:
        if context.is_main and number in (3, 6):
            limit = 200 if number == 3 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return make_batch(config, context, data, number)

    batches.for_step = limited
    cache = f"data.cache_dir={folder}/cache"
    return training.command("train", f"{folder}/tiny.yaml", cache, *BRIEF, *overrides)


def test_a_temporarily_full_disk_loses_no_record(folder: Path) -> None:
    settings = (str(folder), "steps=9")
    calm = launch(training.train_and_read, 2, *settings, *BRIEF, f"run_dir={folder}/calm")[0]
    run_dir = f"run_dir={folder}/while"
    full = launch(_train_with_a_temporarily_full_disk, 2, *settings, run_dir, "checkpoint.every=99")
    assert full == [(0, "")] * 2
    assert training.comparable(folder / "while" / "metrics.jsonl") == calm
    assert storage.steps(folder / "while" / "checkpoints") == [9]


def _prepare_data_slowly_on_the_main_rank(folder: str) -> int:
    settings = training.tiny(folder, *BRIEF)
    context = startup.join(settings)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=4), dist.group.WORLD)
    open_data = startup.open_data

    def slowly(*arguments: Any) -> Any:
        if context.is_main:
            time.sleep(8)
        return open_data(*arguments)

    startup.open_data = slowly
    startup.prepare_data(settings, context)
    return context.rank


def test_ranks_wait_for_the_data_longer_than_the_timeout_of_collectives(folder: Path) -> None:
    assert launch(_prepare_data_slowly_on_the_main_rank, 2, str(folder)) == [0, 1]


def test_a_port_in_use_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"),
                            ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):  # fmt: skip
            monkeypatch.setenv(name, value)
        status, stderr = training.command("train", f"{folder}/tiny.yaml")
    assert status == 1
    assert stderr.startswith("error: rank 0 cannot join the other processes at 127.0.0.1:")
    assert "\n" not in stderr


def test_an_invalid_world_size_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert training.command("train", f"{folder}/tiny.yaml") == (
        1, "error: the environment variable WORLD_SIZE='two' must be a number"
    )  # fmt: skip


def test_an_unwritable_run_dir_is_one_line_on_all_ranks(folder: Path) -> None:
    (folder / "file").write_text("not a folder")
    outcomes: Sequence[tuple[int, str]] = launch(
        training.command, 2, "train", f"{folder}/tiny.yaml", *LONG,
        f"data.cache_dir={folder}/cache", f"run_dir={folder}/file/run",
    )  # fmt: skip
    assert [status for status, _ in outcomes] == [1, 1]
    assert outcomes[0][1].startswith(f"error: cannot write into run_dir={folder}/file/run: ")
    assert outcomes[1][1] == ""
