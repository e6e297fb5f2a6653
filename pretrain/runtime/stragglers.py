"""Slow ranks: the time that each rank spends on a step without waiting for others.

All ranks need the same time for a step, because they wait for the slowest one in collectives. The
*own time* of a rank is the duration of a step minus the time in which it only communicates. It
includes waiting for data, the host's work and everything else that can make one rank late.
"""

import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from pretrain.runtime.patches import Patches

# Methods of a ProcessGroup that communicate; the names of some depend on torch's version.
_COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "allgather", "allgather_coalesced", "_allgather_base",
    "allgather_into_tensor_coalesced", "all_gather_single", "reduce_scatter",
    "reduce_scatter_single", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "alltoall",
    "alltoall_base", "all_to_all_single", "broadcast", "reduce", "gather", "scatter", "send",
    "recv", "recv_anysource", "barrier", "_end_coalescing",
)  # fmt: skip
_HOST_BYTES = 64


class CommunicationClock:
    """Measures how long this rank, or its GPU's current stream, only communicates.

    Communication that overlaps with computation counts as far as something waits for it. While
    running, it replaces methods of torch's process groups, at a cost of some microseconds for each
    call.

    Args:
        device: of the tensors that are communicated.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._patches = Patches()
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._inside = False

    def start(self) -> None:
        """Begin to measure, from zero."""
        self._patches.undo()
        self._seconds = 0.0
        for name in _COLLECTIVES:
            if hasattr(dist.ProcessGroup, name):
                self._time_calls(dist.ProcessGroup, name)
        self._time_calls(dist.Work, "wait")

    def stop(self) -> float:
        """Stop, and return the seconds spent in communication since :meth:`start`."""
        self._patches.undo()
        if self._events:
            self._events[-1][1].synchronize()
            milliseconds = sum(begin.elapsed_time(end) for begin, end in self._events)
            self._seconds += milliseconds / 1000
            self._events.clear()
        return self._seconds

    def _time_calls(self, owner: type, name: str) -> None:
        method = getattr(owner, name)

        @wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._interval():
                return method(*args, **kwargs)

        self._patches.replace(owner, name, timed)

    @contextlib.contextmanager
    def _interval(self) -> Iterator[None]:
        if self._inside or not _is_training_thread():
            yield
            return
        self._inside = True
        begin = self._mark()
        try:
            yield
        finally:
            self._inside = False
            end = self._mark()
            if isinstance(begin, float) and isinstance(end, float):
                self._seconds += end - begin
            else:
                self._events.append((begin, end))

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _is_training_thread() -> bool:
    """Whether this is the main thread or one of autograd's, which Python has not started."""
    thread = threading.current_thread()
    return thread is threading.main_thread() or isinstance(thread, threading._DummyThread)


class StepClock:
    """Measures steps, and compares the own times of all ranks in some of them.

    Ranks of the same pipeline stage are compared, because stages have different work. Nothing is
    compared if a stage has a single rank.

    Args:
        device: of the tensors that are communicated.
        stages: number of pipeline stages.
        every: steps between comparisons.
    """

    def __init__(self, device: torch.device, stages: int, every: int) -> None:
        self._device, self._stages, self._every = device, stages, every
        self._world_size = dist.get_world_size()
        self._compares = self._world_size > stages
        self._clock = CommunicationClock(device)
        self._started = time.monotonic()
        self._measures = False
        self._hosts = _host_names(device) if self._compares else []

    def close(self) -> None:
        """Stop measuring."""
        self._clock.stop()

    def start(self, step: int) -> None:
        """Begin a step, before its data is awaited."""
        self._measures = self._compares and step % self._every == 0
        if self._measures:
            self._clock.start()
        self._started = time.monotonic()

    def stop(self) -> tuple[float, dict[str, Any]]:
        """End a step; a collective of all ranks in steps that are compared.

        Returns:
            Seconds of the step on this rank, and the metrics of the comparison, the same on all
            ranks; none in other steps.
        """
        seconds = time.monotonic() - self._started
        if not self._measures:
            return seconds, {}
        own = max(seconds - self._clock.stop(), 1e-6)  # they are measured by different clocks
        # 8 bytes for each rank of the run, on every rank: one collective of constant latency.
        times = torch.zeros(self._world_size, dtype=torch.float64, device=self._device)
        times[dist.get_rank()] = own
        dist.all_reduce(times)
        return seconds, slowest_rank(times.tolist(), self._stages, self._hosts)


def slowest_rank(times: Sequence[float], stages: int, hosts: Sequence[str]) -> dict[str, Any]:
    """Metrics of the rank that is slowest compared with the ranks of its pipeline stage.

    Args:
        times: own seconds by rank; megatron-core gives consecutive ranks to a stage.
        stages: number of pipeline stages.
        hosts: host names by rank.
    """
    size = len(times) // stages
    medians = [
        statistics.median_low(times[first : first + size]) for first in range(0, len(times), size)
    ]
    ratios = [seconds / medians[rank // size] for rank, seconds in enumerate(times)]
    rank = max(range(len(ratios)), key=ratios.__getitem__)
    return {
        "own_seconds": medians[rank // size],
        "slowest_ratio": ratios[rank],
        "slowest_rank": rank,
        "slowest_host": hosts[rank],
    }


def report(metrics: dict[str, Any], threshold: float) -> str | None:
    """A line about a rank that is slower than the others; None if there is none."""
    ratio = metrics.get("slowest_ratio", 0.0)
    if ratio < threshold:
        return None
    seconds = ratio * metrics["own_seconds"]
    return (
        f"step {metrics['step']}: rank {metrics['slowest_rank']} on {metrics['slowest_host']} is "
        f"slow: it computed for {seconds:.3g} s, {ratio:.2f} times the median"
    )


def _host_names(device: torch.device) -> list[str]:
    """The host name of every rank: 64 bytes for each rank of the run, once."""
    name = socket.gethostname().encode()[:_HOST_BYTES].ljust(_HOST_BYTES)
    local = torch.tensor(list(name), dtype=torch.uint8, device=device)
    names = local.new_empty(dist.get_world_size() * _HOST_BYTES)
    dist.all_gather_into_tensor(names, local)
    rows = names.view(-1, _HOST_BYTES).tolist()
    return [bytes(row).decode(errors="replace").rstrip() for row in rows]
