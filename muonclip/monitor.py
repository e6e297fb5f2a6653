"""A history of the largest attention logits: per layer and head, as a table and as a picture."""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonclip.qk_clip import ClipResult, QKClip


class _Entry(NamedTuple):
    """Some consecutive steps: a bound on each head's largest logit, [heads], and clips in all."""

    first_step: int
    last_step: int
    bounds: Tensor
    num_clipped: int

    def join(self, later: "_Entry") -> "_Entry":
        return _Entry(
            self.first_step,
            later.last_step,
            torch.maximum(self.bounds, later.bounds),
            self.num_clipped + later.num_clipped,
        )


class MaxLogitMonitor:
    """Keeps what each step of a ``QKClip`` saw, reports it and plots it.

    From its making on it takes in every ``clip.step()`` by itself. Results stay on their device
    and are fetched many steps at a time, so that no step waits. The history is bounded: when full,
    neighbouring entries are joined, each then holding the largest of twice as many steps.

    Of a head whose logits were not all computed (see ``exact`` of ``QKClip``), what is shown is a
    bound that no logit exceeded, marked as such; it is at most the threshold.

    Args:
        clip: whose steps to take in. A copy of the monitor takes in those of the copied clip.
        capacity: entries of history to keep, at least 2.
        fetch_every: steps whose results wait on the device; reading in between fetches them too.

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
    largest logits after 2 steps; threshold 100; 1 of 2 heads over it in the last step
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
        # Rows: the largest logit that was computed, and a bound on all.
        self._latest = torch.full((2, total), -math.inf, dtype=torch.float32, device="cpu")
        self._peak = self._latest.clone()
        self._peak_step = torch.zeros(total, dtype=torch.int64, device="cpu")
        self._clipped = torch.zeros(total, dtype=torch.int64, device="cpu")
        self._handle = clip.register_step_post_hook(self._take)

    def close(self) -> None:
        """Take in no more steps."""
        self._handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handle = self.clip.register_step_post_hook(self._take)

    # ------------------------------------------------------------------ reading

    @property
    def steps(self) -> int:
        """Steps taken in."""
        self._fetch()
        return self._steps

    @property
    def latest(self) -> dict[str, Tensor]:
        """Per layer, float32 [heads]: a bound on the last step's logits, tight where ``exact``.

        -inf for layers that the step did not observe.
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
        """Per layer, int64 [heads]: in how many steps the head was over the threshold."""
        self._fetch()
        return self._by_layer(self._clipped)

    def history(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The last step of each entry, int64 [entries], and per layer, float32 [entries, heads].

        An entry bounds the logits of its steps.
        """
        self._fetch()
        steps = torch.tensor([entry.last_step for entry in self._entries], dtype=torch.int64)
        return steps, self._by_layer(self._bounds())

    def report(self, limit: int = 20) -> str:
        """A table of heads, the largest latest logit first; ≤ marks bounds.

        Args:
            limit: heads to list.
        """
        self._fetch()
        largest, bounds = self._latest
        over = int((largest > self.clip.threshold).sum())
        title = (
            f"largest logits after {self._steps} steps; threshold {self.clip.threshold:g}; "
            f"{over} of {len(bounds)} heads over it in the last step"
        )
        labels = [
            (name, str(head))
            for name, heads in zip(self._names, self._heads, strict=True)
            for head in range(heads)
        ]
        order = bounds.sort(descending=True, stable=True).indices[:limit].tolist()
        rows = [("layer", "head", "latest", "peak", "at step", "clipped")]
        for i in order:
            seen = _shown(largest[i], bounds[i]), _shown(*self._peak[:, i])
            counts = str(int(self._peak_step[i])), str(int(self._clipped[i]))
            rows.append((*labels[i], *seen, *counts))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        if len(order) < len(labels):
            lines.append(f"and {len(labels) - len(order)} heads with smaller logits")
        return "\n".join([title, *lines])

    def plot(self, path: "str | os.PathLike[str]") -> None:
        """Draw the latest logits, layer by head, and their course over the steps.

        Args:
            path: of the picture; its ending says the format.

        Raises:
            ImportError: without matplotlib.
            ValueError: if no step was taken in yet.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install matplotlib") from error
        if self.steps == 0:
            raise ValueError("nothing to plot: no clip.step() was taken in yet")
        layers = len(self._names)
        figure = Figure(figsize=(12, max(4.5, min(1.5 + 0.22 * layers, 12))), layout="constrained")
        heads, courses = figure.subplots(1, 2, width_ratios=(1, 1.25))
        self._draw_heads(heads)
        self._draw_courses(courses)
        figure.savefig(path, dpi=150)

    # ------------------------------------------------------------------ drawing

    def _draw_heads(self, axes: Any) -> None:
        """The last step: a cell a head; dots on those whose value is a bound."""
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
        # Blue under the threshold, red over it.
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
            axes.plot(
                columns,
                rows,
                ".",
                color="0.35",
                markersize=2.5,
                label="a bound: the logits are below",
            )
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(0, 1),
                fontsize="small",
                frameon=False,
                borderaxespad=0,
            )
        axes.set_xlabel("head")
        axes.xaxis.get_major_locator().set_params(integer=True)
        labels = _short(self._names)
        every = math.ceil(len(labels) / 32)
        axes.set_yticks(range(0, len(labels), every), labels[::every])
        axes.set_ylabel("layer")
        axes.set_title(f"largest logit of each head, step {self._steps}", pad=18)

    def _draw_courses(self, axes: Any) -> None:
        """Each layer's largest head over the steps, and how many heads were clipped."""
        from matplotlib import colormaps

        last_steps, bounds = self.history()
        steps = last_steps.numpy()
        shades = colormaps["viridis"].resampled(len(bounds))
        for index, (name, layer) in enumerate(
            zip(_short(self._names), bounds.values(), strict=True)
        ):
            course = layer.amax(1)
            label = name if index in (0, len(bounds) - 1) else None
            axes.plot(
                steps,
                course.where(course.isfinite(), math.nan).numpy(),
                color=shades(index),
                lw=1,
                label=label,
            )
        axes.axhline(self.clip.threshold, color="black", ls="--", lw=1, label="τ")
        clips = [e.num_clipped / (e.last_step - e.first_step + 1) for e in self._entries]
        right = axes.twinx()
        right.fill_between(steps, clips, step="pre", color="tab:red", alpha=0.25, lw=0)
        right.set_ylim(0, max(4 * max(clips), 1))
        right.set_ylabel("heads clipped a step", color="tab:red")
        axes.set_zorder(1)
        axes.patch.set_visible(False)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("largest logit of a layer")
        axes.legend(title="layer", fontsize="small")
        axes.set_title("course of each layer's largest head")

    # ------------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, Any]:
        """The history, as plain values and tensors on the CPU."""
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
        """Go on from a saved history; what was taken in before is dropped.

        Raises:
            ValueError: if it is of other layers or heads; nothing is changed then.
        """
        if (list(state["names"]), list(state["heads"])) != (self._names, self._heads):
            raise ValueError(
                f"the saved history is of other layers: of {len(state['names'])} with "
                f"{sum(state['heads'])} heads, and this clip has {len(self._names)} with "
                f"{sum(self._heads)} heads, or other names"
            )
        self._waiting.clear()
        self._steps, self._entry_steps = state["steps"], state["entry_steps"]
        columns = (state[key] for key in ("first_steps", "last_steps", "bounds", "num_clipped"))
        self._entries = [_Entry(*values) for values in zip(*columns, strict=True)]
        self._latest, self._peak = state["latest"].clone(), state["peak"].clone()
        self._peak_step, self._clipped = state["peak_step"].clone(), state["clipped"].clone()

    # ------------------------------------------------------------------ taking in

    def _take(self, result: ClipResult) -> None:
        self._waiting.append(result)
        if len(self._waiting) >= self.fetch_every:
            self._fetch()

    @torch.no_grad()
    def _fetch(self) -> None:
        if not self._waiting:
            return
        sides = [
            torch.cat(
                [
                    *result.max_logits.values(),
                    *result.upper_bounds.values(),
                    *result.factors.values(),
                ]
            )
            for result in self._waiting
        ]
        self._waiting.clear()
        # One transfer. [steps, largest computed, bound and factor, heads].
        for step in torch.stack(sides).float().cpu().unflatten(1, (3, -1)):  # type: ignore[no-untyped-call]
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
            self._entries[-1] = last.join(entry)
            return
        self._entries.append(entry)
        if len(self._entries) > self.capacity:
            self._entry_steps *= 2
            old = self._entries
            self._entries = [a.join(b) for a, b in zip(old[::2], old[1::2], strict=False)]
            self._entries += old[len(self._entries) * 2 :]

    def _bounds(self) -> Tensor:
        bounds = [entry.bounds for entry in self._entries]
        return torch.stack(bounds) if bounds else self._latest.new_empty(0, sum(self._heads))

    def _by_layer(self, values: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._names, torch.split(values, self._heads, -1), strict=True))


def _shown(largest: Tensor, bound: Tensor) -> str:
    if bound == -math.inf:
        return "-"
    return f"{bound:.1f}" if largest == bound else f"≤{bound:.1f}"


def _short(names: Sequence[str]) -> list[str]:
    """Names without what all of them begin or end with, cut at dots."""
    parts = [name.split(".") for name in names]
    if len(parts) == 1:
        return list(names)
    start, end = _shared(parts), _shared([part[::-1] for part in parts])
    return [".".join(part[start : max(len(part) - end, start + 1)]) for part in parts]


def _shared(lists: Sequence[Sequence[str]]) -> int:
    """How many first items are the same in all lists."""
    same = (len(set(items)) == 1 for items in zip(*lists, strict=False))
    return sum(1 for _ in takewhile(bool, same))
