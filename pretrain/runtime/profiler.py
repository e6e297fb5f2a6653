"""Traces of selected steps, for Perfetto (ui.perfetto.dev) or Chrome (chrome://tracing)."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pretrain.runtime.output import warn


class Profiler:
    """Records steps ``first`` to ``last`` with torch's profiler, one file for each rank.

    Args:
        steps: (first, last), both included; None: no trace.
        folder: folder of the traces, for example ``steps-5-7-rank-0.json.gz``.
        rank: rank of this process.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, rank: int) -> None:
        self._first, self._last = steps or (0, -1)
        self._folder, self._rank = folder, rank
        self._recording: profile | None = None
        self._start = 0

    def before(self, step: int) -> None:
        """Call before each step. A run resumed between the two steps records the rest."""
        if self._recording is None and self._first <= step <= self._last:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._recording, self._start = profile(activities=activities), step
            self._recording.start()

    def after(self, step: int) -> None:
        """Call after each step. A trace that cannot be written causes a warning."""
        if self._recording is None or step < self._last:
            return
        recording, self._recording = self._recording, None
        recording.stop()
        path = self._folder / f"steps-{self._start}-{step}-rank-{self._rank}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            recording.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            warn(f"cannot write the trace {path}: {error}")
