"""A history of the largest attention logits, per layer and head, as a table and as a plot."""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonclip.qk_clip import ClipResult, QKClip


class _Entry(NamedTuple):
    """Consecutive steps of the history."""

    first_step: int
    last_step: int
    bounds: Tensor  # [heads], on the largest logits
    num_clipped: int  # heads clipped, summed over the steps

    def merge(self, later: "_Entry") -> "_Entry":
        return _Entry(
            self.first_step,
            later.last_step,
            torch.maximum(self.bounds, later.bounds),
            self.num_clipped + later.num_clipped,
        )


class MaxLogitMonitor:
    """Records the largest logits of each step of a ``QKClip``, for a report and a plot.

    Every ``clip.step()`` is recorded through a hook. Results stay on their device and are fetched
    for many steps at a time, so that no step waits. The history is bounded: when it is full,
    neighbouring entries are merged, and each entry covers twice as many steps.

    For a head whose logits were not all computed (see ``exact`` of ``QKClip``), an upper bound is
    shown instead, and marked; it is at most the threshold.

    Args:
        clip: the clip to record. A copy of the monitor records the copied clip.
        capacity: number of history entries to keep, at least 2.
        fetch_every: number of steps between fetches; reading fetches, too.

    Raises:
        ValueError: if a count is too small.

    >>> from muonclip import AttentionLayout
    >>> layout = AttentionLayout.separate(torch.ones(4, 2), torch.ones(4, 2), num_heads=2)
    >>> clip = QKClip({"layer": layout}, threshold=100.0)
    >>> monitor = MaxLogitMonitor(clip)
    >>> for logit in (90.0, 130.0):
    ...     clip.observe("layer", torch.tensor([logit, 1.0]))
    ...     _ = clip.step()
    >>> print(monitor.report())
    largest logits after 2 steps; threshold 100; 1 of 2 heads above it in the last step
    layer  head  latest   peak  at step  clipped
    layer     0   130.0  130.0        2        1
    layer     1     1.0    1.0        1        0
    """

    def __init__(self, clip: QKClip, *, capacity: int = 1024, fetch_every: int = 64) -> None:
        if capacity < 2:
            raise ValueError(f"capacity must be at least 2, got {capacity}")
        if fetch_every < 1:
            raise ValueError(f"fetch_every must be at least 1, got {fetch_every}")
        self.clip = clip
        self.capacity, self.fetch_every = capacity, fetch_every
        self._names = list(clip.layouts)
        self._heads = [layout.num_heads for layout in clip.layouts.values()]
        total = sum(self._heads)
        self._waiting: list[ClipResult] = []
        self._steps, self._entry_steps = 0, 1
        self._entries: list[_Entry] = []
        # Rows: the largest computed logits, and upper bounds.
        self._latest = torch.full((2, total), -math.inf, dtype=torch.float32, device="cpu")
        self._peak = self._latest.clone()
        self._peak_step = torch.zeros(total, dtype=torch.int64, device="cpu")
        self._clipped = torch.zeros(total, dtype=torch.int64, device="cpu")
        self._handle = clip.register_step_post_hook(self._record)

    def close(self) -> None:
        """Stop recording."""
        self._handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handle = self.clip.register_step_post_hook(self._record)

    # ------------------------------------------------------------------ reading

    @property
    def steps(self) -> int:
        """Number of recorded steps."""
        self._fetch()
        return self._steps

    @property
    def latest(self) -> dict[str, Tensor]:
        """Per layer, float32 [heads]: bounds on the last step's logits, tight where ``exact``.

        -inf for layers that were not observed.
        """
        self._fetch()
        return self._by_layer(self._latest[1])

    @property
    def exact(self) -> dict[str, Tensor]:
        """Per layer, boolean [heads]: whether ``latest`` is the largest logit itself."""
        self._fetch()
        return self._by_layer(self._latest[0] == self._latest[1])

    @property
    def clipped(self) -> dict[str, Tensor]:
        """Per layer, int64 [heads]: number of steps in which the head was clipped."""
        self._fetch()
        return self._by_layer(self._clipped)

    def history(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The last step of each entry, int64 [entries], and per layer, float32 [entries, heads].

        The second are bounds on the logits of the entry's steps.
        """
        self._fetch()
        steps = torch.tensor([entry.last_step for entry in self._entries], dtype=torch.int64)
        return steps, self._by_layer(self._bounds())

    def report(self, limit: int = 20) -> str:
        """A table of the heads with the largest logits in the last step; ≤ marks bounds.

        Args:
            limit: number of heads.
        """
        self._fetch()
        largest, bounds = self._latest
        over = int((largest > self.clip.threshold).sum())
        title = (
            f"largest logits after {self._steps} steps; threshold {self.clip.threshold:g}; "
            f"{over} of {len(bounds)} heads above it in the last step"
        )
        labels = [
            (name, str(head))
            for name, heads in zip(self._names, self._heads, strict=True)
            for head in range(heads)
        ]
        order = bounds.sort(descending=True, stable=True).indices[:limit].tolist()
        rows = [("layer", "head", "latest", "peak", "at step", "clipped")]
        for i in order:
            logits = _format(largest[i], bounds[i]), _format(*self._peak[:, i])
            counts = str(int(self._peak_step[i])), str(int(self._clipped[i]))
            rows.append((*labels[i], *logits, *counts))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        if len(order) < len(labels):
            lines.append(f"and {len(labels) - len(order)} heads with smaller logits")
        return "\n".join([title, *lines])

    def plot(self, path: "str | os.PathLike[str]") -> None:
        """Plot the latest logits by layer and head, and their history.

        Args:
            path: image file; its suffix determines the format.

        Raises:
            ImportError: without matplotlib.
            ValueError: if no step has been recorded.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install matplotlib") from error
        if self.steps == 0:
            raise ValueError("nothing to plot: no clip.step() has been recorded yet")
        layers = len(self._names)
        figure = Figure(figsize=(12, max(4.5, min(1.5 + 0.22 * layers, 12))), layout="constrained")
        heads, history = figure.subplots(1, 2, width_ratios=(1, 1.25))
        self._draw_heads(heads)
        self._draw_history(history)
        figure.savefig(path, dpi=150)

    # ------------------------------------------------------------------ drawing

    def _draw_heads(self, axes: Any) -> None:
        """The last step: one cell per head, with a dot if its value is a bound."""
        import numpy as np
        from matplotlib import colormaps
        from matplotlib.colors import ListedColormap, TwoSlopeNorm

        threshold, widest = self.clip.threshold, max(self._heads)
        grid = torch.full(
            (2, len(self._names), widest), math.nan, dtype=torch.float32, device="cpu"
        )
        for side, values in zip(grid, self._latest, strict=True):
            for row, layer in zip(side, self._by_layer(values).values(), strict=True):
                row[: len(layer)] = layer.where(layer.isfinite(), math.nan)
        largest, bounds = grid
        finite = bounds[~bounds.isnan()]
        low = min(0.0, float(finite.min())) if finite.numel() else 0.0
        high = max(2 * threshold, float(finite.max())) if finite.numel() else 2 * threshold
        # Blue below the threshold, red above it.
        shades = [*colormaps["Blues"](np.linspace(0, 0.85, 128))]
        shades += [*colormaps["Reds"](np.linspace(0.5, 1, 128))]
        norm, colors = TwoSlopeNorm(threshold, low, high), ListedColormap(shades)
        axes.set_facecolor("0.85")
        image = axes.imshow(
            bounds.numpy(), aspect="auto", cmap=colors, norm=norm, interpolation="none"
        )
        bar = axes.figure.colorbar(image, ax=axes, ticks=[low, threshold / 2, threshold, high])
        bar.ax.set_yticklabels(
            [f"{v:g}" for v in (low, threshold / 2)] + [f"τ = {threshold:g}", f"{high:.4g}"]
        )
        rows, columns = ((bounds != largest) & ~bounds.isnan()).numpy().nonzero()
        if len(rows):
            label = "upper bound, logits are lower"
            axes.plot(columns, rows, ".", color="0.35", markersize=2.5, label=label)
            legend = {"fontsize": "small", "frameon": False, "borderaxespad": 0}
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), **legend)
        axes.set_xlabel("head")
        axes.xaxis.get_major_locator().set_params(integer=True)
        labels = _short(self._names)
        every = math.ceil(len(labels) / 32)
        axes.set_yticks(range(0, len(labels), every), labels[::every])
        axes.set_ylabel("layer")
        axes.set_title(f"largest logit of each head, step {self._steps}", pad=18)

    def _draw_history(self, axes: Any) -> None:
        """The largest head of each layer and the number of clipped heads, by step."""
        from matplotlib import colormaps

        last_steps, bounds = self.history()
        steps = last_steps.numpy()
        shades = colormaps["viridis"].resampled(len(bounds))
        for index, (name, layer) in enumerate(
            zip(_short(self._names), bounds.values(), strict=True)
        ):
            largest = layer.amax(1)
            largest = largest.where(largest.isfinite(), math.nan)
            label = name if index in (0, len(bounds) - 1) else None
            axes.plot(steps, largest.numpy(), color=shades(index), lw=1, label=label)
        axes.axhline(self.clip.threshold, color="black", ls="--", lw=1, label="τ")
        clips = [e.num_clipped / (e.last_step - e.first_step + 1) for e in self._entries]
        right = axes.twinx()
        right.fill_between(steps, clips, step="pre", color="tab:red", alpha=0.25, lw=0)
        right.set_ylim(0, max(4 * max(clips), 1))
        right.set_ylabel("heads clipped per step", color="tab:red")
        axes.set_zorder(1)
        axes.patch.set_visible(False)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("largest logit of a layer")
        axes.legend(title="layer", fontsize="small")
        axes.set_title("largest logit of each layer by step")

    # ------------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, Any]:
        """The history as plain values and CPU tensors."""
        self._fetch()
        return {
            "names": list(self._names),
            "heads": list(self._heads),
            "steps": self._steps,
            "entry_steps": self._entry_steps,
            "first_steps": [entry.first_step for entry in self._entries],
            "last_steps": [entry.last_step for entry in self._entries],
            "num_clipped": [entry.num_clipped for entry in self._entries],
            "bounds": self._bounds(),
            "latest": self._latest.clone(),
            "peak": self._peak.clone(),
            "peak_step": self._peak_step.clone(),
            "clipped": self._clipped.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved history, which replaces the present one.

        Raises:
            ValueError: if its layers or heads differ. Then nothing is changed.
        """
        if (list(state["names"]), list(state["heads"])) != (self._names, self._heads):
            raise ValueError(
                f"the saved history has {len(state['names'])} layers with {sum(state['heads'])} "
                f"heads, this clip {len(self._names)} layers with {sum(self._heads)} heads, or "
                "their names differ: load the history of the same model"
            )
        self._waiting.clear()
        self._steps, self._entry_steps = state["steps"], state["entry_steps"]
        columns = (state[key] for key in ("first_steps", "last_steps", "bounds", "num_clipped"))
        self._entries = [_Entry(*values) for values in zip(*columns, strict=True)]
        self._latest, self._peak = state["latest"].clone(), state["peak"].clone()
        self._peak_step, self._clipped = state["peak_step"].clone(), state["clipped"].clone()

    # ------------------------------------------------------------------ recording

    def _record(self, result: ClipResult) -> None:
        self._waiting.append(result)
        if len(self._waiting) >= self.fetch_every:
            self._fetch()

    @torch.no_grad()
    def _fetch(self) -> None:
        if not self._waiting:
            return
        results = [
            torch.cat([*r.max_logits.values(), *r.upper_bounds.values(), *r.factors.values()])
            for r in self._waiting
        ]
        self._waiting.clear()
        # One transfer of [steps, (largest, bound, factor), heads].
        for step in torch.stack(results).float().cpu().unflatten(1, (3, -1)):  # type: ignore[no-untyped-call]
            self._add(step[:2], step[2] < 1)

    def _add(self, step: Tensor, clipped: Tensor) -> None:
        self._steps += 1
        self._latest = step
        self._peak_step[step[1] > self._peak[1]] = self._steps
        self._peak = torch.maximum(self._peak, step)
        self._clipped += clipped
        entry = _Entry(self._steps, self._steps, step[1], int(clipped.sum()))
        last = self._entries[-1] if self._entries else None
        if last is not None and last.last_step - last.first_step + 1 < self._entry_steps:
            self._entries[-1] = last.merge(entry)
            return
        self._entries.append(entry)
        if len(self._entries) > self.capacity:
            self._entry_steps *= 2
            old = self._entries
            self._entries = [a.merge(b) for a, b in zip(old[::2], old[1::2], strict=False)]
            self._entries += old[len(self._entries) * 2 :]

    def _bounds(self) -> Tensor:
        bounds = [entry.bounds for entry in self._entries]
        return torch.stack(bounds) if bounds else self._latest.new_empty(0, sum(self._heads))

    def _by_layer(self, values: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._names, torch.split(values, self._heads, -1), strict=True))


def _format(largest: Tensor, bound: Tensor) -> str:
    if bound == -math.inf:
        return "-"
    return f"{bound:.1f}" if largest == bound else f"≤{bound:.1f}"


def _short(names: Sequence[str]) -> list[str]:
    """Names without their common first and last components."""
    paths = [name.split(".") for name in names]
    if len(paths) == 1:
        return list(names)
    start, end = _common_prefix(paths), _common_prefix([path[::-1] for path in paths])
    return [".".join(path[start : max(len(path) - end, start + 1)]) for path in paths]


def _common_prefix(lists: Sequence[Sequence[str]]) -> int:
    """Number of leading items that all lists have in common."""
    same = (len(set(items)) == 1 for items in zip(*lists, strict=False))
    return sum(1 for _ in takewhile(bool, same))
