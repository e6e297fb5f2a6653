"""Run a function in several real processes joined by gloo, for tests of distributed code."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_TIMEOUT_SECONDS = 300

# A fork server imports the heavy packages once; every rank of every test then starts in
# milliseconds, from a process that has never run a torch operation.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed.preloaded"])


def _rank_main(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, folder: str
) -> None:
    import torch
    import torch.distributed as dist

    from muonclip.kernels import support

    support._prefers_bfloat16 = lambda: False  # type: ignore[assignment]  # as in conftest.py
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    dist.barrier()  # a rank that has nothing to do must not leave while others still connect to it
    outcome: tuple[str, Any]
    try:
        outcome = ("value", function(*args))
    except BaseException:
        outcome = ("error", traceback.format_exc())
    # Written before the group is torn down: a rank stuck in there must not hide the result.
    Path(folder, f"rank{rank}").write_bytes(pickle.dumps(outcome))
    if outcome[0] == "error":
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Return what ``function(*args)`` gives on each of ``world_size`` gloo ranks, in rank order.

    ``function`` is a module's top-level function; it finds ``torch.distributed`` initialised.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died, or ran too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = _start(function, args, world_size, folder)
        alive = list(processes)
        waited = 0.0
        while alive and waited < _TIMEOUT_SECONDS:
            alive[0].join(0.05)
            waited += 0.05
            failed = any(process.exitcode not in (None, 0) for process in processes)
            alive = [process for process in alive if process.is_alive()]
            if failed:
                break
        _kill(processes)
        outcomes = []
        for rank, process in enumerate(processes):
            path = Path(folder, f"rank{rank}")
            if path.exists():
                outcomes.append(pickle.loads(path.read_bytes()))
            else:
                outcomes.append(
                    ("missing", f"rank {rank} ended with {process.exitcode}, no result")
                )
        errors = [text for kind, text in outcomes if kind == "error"]
        errors = errors or [text for kind, text in outcomes if kind == "missing"]
        assert not errors, "\n".join(errors)
        return [value for _, value in outcomes]


def launch_and_kill(
    function: Callable[..., Any], world_size: int, when: Callable[[], bool], *args: Any
) -> None:
    """Begin as :func:`launch` does, and kill all ranks at once (SIGKILL) as soon as ``when()``.

    Raises:
        AssertionError: a rank ended before, or ``when()`` was too long in coming.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = _start(function, args, world_size, folder)
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        try:
            while not when():
                assert all(process.is_alive() for process in processes), "ended before its time"
                assert time.monotonic() < deadline, "it was never time to kill them"
                time.sleep(0.01)
        finally:
            _kill(processes)


def _start(
    function: Callable[..., Any], args: tuple[Any, ...], world_size: int, folder: str
) -> list[ForkServerProcess]:
    processes = [
        _context.Process(target=_rank_main, args=(function, args, rank, world_size, folder))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def _kill(processes: list[ForkServerProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()
