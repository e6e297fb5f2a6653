"""Plots of a run's metrics: curves.png and the plots of the HTML report."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.errors import PretrainError
from pretrain.metrics import METRICS, READING, Record, read_run, run_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Record]
Plot = tuple[str, Callable[["Axes"], None]]
"""Title and drawing function."""

# Maximum number of points of a line; a longer run is divided into that many intervals, drawn as
# their means and ranges.
_MAX_POINTS = 600
# Maximum number of layers drawn as lines; more are drawn as a heat map.
_MAX_LINES = 6
_COUNTS = ("skipped_steps", "empty_steps", "skipped_batches")


def save_curves(records: Records, path: Path) -> None:
    """Write an image of the losses, the max logit, and how well images are read.

    In runs without transcriptions, the encoder balance takes the place of the latter.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    reads = any(record.get("exact_match") is not None for record in records)
    plots: list[Plot] = [
        ("Loss, nats per token", partial(draw_losses, records=records)),
        _single(records, "max_logit"),
        _reading(records) if reads else _single(records, "encoder_balance"),
    ]
    for axes, (title, draw) in zip(figure.subplots(1, len(plots)), plots, strict=True):
        draw(axes)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def compare(run_dirs: Sequence[Path], names: Sequence[str], path: Path) -> Path:
    """Write an image of metrics of several runs: a panel for each metric, a line for each run.

    Thresholds of QK-Clip within the range of ``max_logit`` are drawn with it.

    Args:
        run_dirs: folders of the runs. Their names are the titles of the lines, or their paths if
            names are equal.
        names: metrics with one number for a step.
        path: the image, in the format of its ending; without one, .png is added.

    Returns:
        The image's path.

    Raises:
        PretrainError: a folder contains no run, no run has one of the metrics, or the image cannot
            be written.
    """
    from matplotlib.figure import Figure

    path = path if path.suffix else path.with_suffix(".png")  # as matplotlib does
    titles = [run_name(run_dir) for run_dir in run_dirs]
    if len(set(titles)) < len(titles):
        titles = list(map(str, run_dirs))
    runs = dict(zip(titles, map(read_run, run_dirs), strict=True))
    figure = Figure(figsize=(1 + 6 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for title, (records, _) in runs.items():
            draw_line(axes, records, name, _verbatim(title))
        if name not in METRICS or not axes.has_data():
            raise PretrainError(f"none of the runs has a metric {name} with one number for a step")
        if name == "max_logit":
            _draw_thresholds(axes, [starts[-1] for _, starts in runs.values() if starts])
        axes.set(title=_title(name), xlabel="step")
        axes.grid(alpha=0.3)
        _add_legend(axes)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PretrainError(f"cannot write {path}: {reason}") from error
    return path


def _verbatim(title: str) -> str:
    """A label that matplotlib draws as the title: it leaves out labels that begin with an
    underscore, and reads text between dollar signs as a formula."""
    return (" " * title.startswith("_") + title).replace("$", r"\$")


def _draw_thresholds(axes: "Axes", starts: Records) -> None:
    """QK-Clip's thresholds, unless far above the logits."""
    values = {
        start.get("config", {}).get("optimizer", {}).get("qk_clip_threshold") for start in starts
    }
    largest = axes.get_ylim()[1]
    for value in sorted(value for value in values if value is not None and value < largest):
        axes.axhline(value, color="black", linestyle="--", linewidth=0.8, label=f"τ = {value:g}")


def report_plots(records: Records, config: Mapping[str, Any]) -> list[Plot]:
    """The plots of the report; some may have nothing to draw."""
    threshold = config.get("optimizer", {}).get("qk_clip_threshold")
    dense_layers = config.get("language", {}).get("dense_layers", 0)
    counts = [name for name in _COUNTS if any(record.get(name) for record in records)]

    def lines(title: str, *names: str) -> Plot:
        return title, partial(draw_lines, records=records, names=names)

    def layers(name: str, **options: Any) -> Plot:
        return _title(name), partial(draw_layers, records=records, name=name, **options)

    return [
        ("Loss, nats per token", partial(draw_losses, records=records)),
        layers("source_losses", label="data.sources[{}]"),
        layers("held_out_source_losses", label="data.sources[{}]"),
        _single(records, "grad_norm"),
        _single(records, "lr"),
        lines("Update RMS (sampled)", "update_rms_muon", "update_rms_adamw"),
        layers("language_max_logits", threshold=threshold),
        layers("vision_max_logits", threshold=threshold),
        _single(records, "heads_clipped"),
        lines("Steps and batches left out, so far", *counts),
        layers("expert_loads", first_layer=dense_layers),
        _single(records, "load_balancing_loss"),
        _reading(records),
        lines(_title("encoder_balance"), "encoder_balance", "encoder_least_balance"),
        _single(records, "tokens_per_second"),
        _single(records, "mfu"),
        _single(records, "memory_gib"),
        _single(records, "slowest_ratio"),
    ]


def _title(name: str) -> str:
    description = METRICS[name].description
    return description[0].upper() + description[1:]


def _single(records: Records, name: str) -> Plot:
    return _title(name), partial(draw_line, records=records, name=name)


def _reading(records: Records) -> Plot:
    return "Held-out images", partial(draw_lines, records=records, names=READING)


def draw_losses(axes: "Axes", records: Records) -> None:
    """Training and held-out losses of text and captions."""
    for kind, color in (("text", "tab:blue"), ("caption", "tab:orange")):
        draw_line(axes, records, f"{kind}_loss", kind, color)
        draw_line(axes, records, f"held_out_{kind}_loss", f"{kind}, held out", color, "o--")
    draw_line(axes, records, "swapped_caption_loss", "caption, another image", "tab:red", "x:")
    _add_legend(axes)


def draw_lines(axes: "Axes", records: Records, names: Sequence[str]) -> None:
    """One labeled line per metric."""
    for name in names:
        draw_line(axes, records, name, METRICS[name].label)
    _add_legend(axes)


def draw_line(
    axes: "Axes",
    records: Records,
    name: str,
    label: str = "",
    color: str | None = None,
    style: str = "-",
) -> None:
    """A metric over steps: means of intervals, with the range of their values."""
    points = [
        (record["step"], record[name])
        for record in records
        if isinstance(record.get(name), int | float) and math.isfinite(record[name])
    ]
    if not points:
        return
    intervals = _intervals(points)
    steps = [statistics.fmean(step for step, _ in interval) for interval in intervals]
    means = [statistics.fmean(value for _, value in interval) for interval in intervals]
    (line,) = axes.plot(steps, means, style, color=color, label=label, linewidth=1, markersize=4)
    if len(points) > len(intervals):
        low = [min(value for _, value in interval) for interval in intervals]
        high = [max(value for _, value in interval) for interval in intervals]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def draw_layers(
    axes: "Axes",
    records: Records,
    name: str,
    first_layer: int = 0,
    threshold: float | None = None,
    label: str = "layer {}",
) -> None:
    """A metric by layer: a line for each layer, or a heat map of many layers.

    Intervals show their maximum, because peaks matter.

    Args:
        first_layer: number of the first layer that has the metric.
        threshold: drawn as a horizontal line.
        label: of a line; also the name of the vertical axis of a heat map.
    """
    points = [(record["step"], record[name]) for record in records if record.get(name)]
    if not points:
        return
    num_layers = max(len(values) for _, values in points)
    intervals = _intervals(points)
    largest = [
        [
            max(
                (v[layer] for _, v in interval if layer < len(v) and v[layer] is not None),
                default=math.nan,
            )
            for interval in intervals
        ]
        for layer in range(num_layers)
    ]
    steps = [interval[0][0] for interval in intervals]
    if num_layers <= _MAX_LINES:
        for layer, values in enumerate(largest, first_layer):
            axes.plot(steps, values, linewidth=1, label=label.format(layer))
        # A threshold far above the lines would only flatten them.
        if threshold is not None and any(v > threshold / 4 for layer in largest for v in layer):
            axes.axhline(threshold, color="black", linestyle="--", linewidth=0.8, label="threshold")
        _add_legend(axes)
        return
    last = first_layer + num_layers - 0.5
    extent = (steps[0], points[-1][0] + 1, last, first_layer - 0.5)
    image = axes.imshow(largest, aspect="auto", extent=extent, interpolation="nearest")
    axes.set_ylabel(label.format("").strip())
    axes.figure.colorbar(image, ax=axes)


def _intervals(points: Sequence[tuple[int, Any]]) -> list[Sequence[tuple[int, Any]]]:
    """The points in at most ``_MAX_POINTS`` intervals of about equal length."""
    size = -(-len(points) // _MAX_POINTS)
    return [points[start : start + size] for start in range(0, len(points), size)]


def _add_legend(axes: "Axes") -> None:
    if any(axes.get_legend_handles_labels()[1]):
        axes.legend(fontsize=8)
