"""A run as one HTML page: its plots, configuration, versions, held-out results and restarts.

Everything is in the file: no script, and nothing that a browser would have to fetch.
"""

import html
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pretrain import untrusted_files
from pretrain.errors import PretrainError
from pretrain.runtime import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]

_MAX_BYTES = 64 << 20

# Points that a line is drawn with; longer runs are drawn as means and ranges of so many stretches.
_POINTS = 600
# Up to so many layers each has a line; more are drawn as a map of colours.
_LINES = 6

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  color: #1c1e21; }
h1 { margin-bottom: 0; } h2 { margin: 2rem 0 .5rem; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.facts div { background: #f2f4f7; border-radius: .5rem; padding: .5rem .9rem; }
.facts b { display: block; font-size: 1.15rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
.plots svg { width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem; text-align: right;
  border-bottom: 1px solid #dde1e6; vertical-align: top; }
td:first-child, th:first-child, .text td, .text th { text-align: left; }
pre { background: #f2f4f7; border-radius: .5rem; padding: .8rem; overflow: auto; }
"""


def write(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of a run, whether it has ended or is still going.

    Args:
        run_dir: the run's folder.
        out: the page; default: ``report.html`` in the run's folder.

    Returns:
        The page's path.

    Raises:
        PretrainError: there is no run in the folder, or the page cannot be written.
    """
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        raise PretrainError(
            f"{run_dir} is no run: it has no metrics.jsonl; give the run_dir of a training"
        )
    out = out or run_dir / "report.html"
    try:
        page = render(
            run_dir.resolve().name,
            metrics.read(file),
            metrics.read_lines(run_dir / "starts.jsonl"),
            _transcriptions(run_dir / "transcriptions.json"),
        )
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise PretrainError(f"cannot write the report {out}: {error.strerror}") from error
    return out


def _transcriptions(path: Path) -> list[list[str]]:
    try:
        pairs = json.loads(untrusted_files.read_bytes(path, _MAX_BYTES))
        return [[str(truth), str(answer)] for truth, answer in pairs]
    except (OSError, ValueError, TypeError, RecursionError):  # not there yet, or being written
        return []


def render(
    name: str, records: Records, starts: Records, transcriptions: Sequence[Sequence[str]]
) -> str:
    """The page's text.

    Args:
        name: of the run.
        records: its metrics, see :func:`pretrain.runtime.metrics.read`.
        starts: what it noted each time that it started (``starts.jsonl``).
        transcriptions: (truth, transcription) of held-out images.
    """
    training = [record for record in records if "grad_norm" in record]
    held_out = [record for record in records if "held_out_text_loss" in record]
    config = starts[-1].get("config", {}) if starts else {}
    parts = [
        f"<h1>{_text(name)}</h1>",
        _facts(training, starts),
        "<h2>Training</h2>",
        f'<div class="plots">{"".join(_plots(training, held_out, config))}</div>'
        if training
        else "<p>No step has been recorded yet.</p>",
        "<h2>Held out</h2>",
        _held_out(held_out),
        "<h2>What the model reads in held-out images</h2>" if transcriptions else "",
        _table(("the image says", "the model reads"), transcriptions, "text")
        if transcriptions
        else "",
        "<h2>Starts</h2>",
        _starts(starts),
        "<h2>Configuration</h2>",
        f"<pre>{_text(yaml.safe_dump(config, sort_keys=False))}</pre>"
        if config
        else "<p>Not recorded.</p>",
    ]
    head = f'<meta charset="utf-8"><title>{_text(name)}</title><style>{_STYLE}</style>'
    body = "\n".join(filter(None, parts))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


# ---------------------------------------------------------------------- words and tables


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    def line(cells: Iterable[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<table class="{kind}">{line(header, "th")}\n{body}</table>'


def _facts(training: Records, starts: Records) -> str:
    facts: list[tuple[str, str]] = []
    if training:
        last = training[-1]
        whole = starts[-1].get("config", {}).get("steps") if starts else None
        recent = training[-100:]
        facts = [
            ("step", f"{last['step']:,}" + (f" of {whole:,}" if whole else "")),
            ("tokens", f"{sum(record.get('tokens', 0) for record in training):,}"),
            ("loss", _number(last["loss"], ".3f")),
        ]
        for key, label, form in (
            ("tokens_per_second", "tokens/s, median of the last steps", ",.0f"),
            ("mfu", "model FLOP utilisation, the same", ".1%"),
        ):
            values = [record[key] for record in recent if record.get(key) is not None]
            if values:
                facts.append((label, format(statistics.median(values), form)))
        if "memory_gib" in last:
            peak = max(record.get("memory_gib", 0.0) for record in training)
            facts.append(("peak memory of a process", f"{peak:.2f} GiB"))
        dropped = [r["dropped_tokens"] for r in training if "dropped_tokens" in r]
        if dropped:
            facts.append(("tokens dropped by routers", f"{sum(dropped):,}"))
    cells = "".join(f"<div>{_text(label)}<b>{_text(value)}</b></div>" for label, value in facts)
    return f'<div class="facts">{cells}</div>'


def _number(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def _held_out(records: Records) -> str:
    if not records:
        return "<p>Nothing has been evaluated yet.</p>"
    columns = {
        "held_out_text_loss": "text",
        "held_out_caption_loss": "captions",
        "right_caption_loss": "captions with their own image",
        "swapped_caption_loss": "with another's",
    }
    rows = [
        [f"step {record['step']}", *(_number(record.get(key), ".3f") for key in columns)]
        for record in records
    ]
    return _table(["loss, nats a token", *columns.values()], rows)


def _starts(starts: Records) -> str:
    if not starts:
        return "<p>Not recorded.</p>"
    rows = []
    before: Mapping[str, Any] = {}
    for start in starts:
        now = _flat(start.get("config", {}))
        changes = [f"{k}={now[k]}" for k in now if before and before.get(k) != now[k]]
        before = now
        versions = ", ".join(f"{k} {v}" for k, v in start.get("versions", {}).items())
        rows.append(
            (
                start.get("time", ""),
                f"after step {start['step']}" if start.get("step") else "at step 0",
                start.get("processes", ""),
                start.get("processor", ""),
                f"{start.get('peak_flops', 0.0) / 1e12:.3g}",
                versions,
                ", ".join(changes) or "-",
            )
        )
    header = (
        "time (UTC)", "from", "processes", "on", "TFLOP/s at most", "versions", "settings changed"
    )  # fmt: skip
    return _table(header, rows, "text")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


# ---------------------------------------------------------------------- plots


def _plots(training: Records, held_out: Records, config: Mapping[str, Any]) -> Iterable[str]:
    def lines(**named: str) -> Callable[["Axes"], None]:
        def draw(axes: "Axes") -> None:
            for key, label in named.items():
                _line(axes, training, key, label)
            _legend(axes)

        return draw

    def losses(axes: "Axes") -> None:
        for name, colour in (("text", "tab:blue"), ("caption", "tab:orange")):
            _line(axes, training, f"{name}_loss", name, colour)
            _line(axes, held_out, f"held_out_{name}_loss", f"{name}, held out", colour, "o--")
        _line(axes, held_out, "swapped_caption_loss", "caption, another's image", "tab:red", "x:")
        _legend(axes)

    threshold = config.get("optimizer", {}).get("qk_clip_threshold")

    def logits(key: str) -> Callable[["Axes"], None]:
        return lambda axes: _layers(axes, training, key, "layer", 0, threshold)

    left_out = {
        key: label
        for key, label in (
            ("skipped_steps", "steps skipped after a fault"),
            ("empty_steps", "steps without a label"),
            ("skipped_batches", "skipped batches"),
        )
        if any(record.get(key) for record in training)
    }
    dense = config.get("language", {}).get("dense_layers", 0)
    for title, draw in (
        ("Loss, nats a token", losses),
        ("Gradient norm", lines(grad_norm="")),
        ("Learning rate", lines(lr="")),
        ("Update RMS (sampled)", lines(update_rms_muon="Muon", update_rms_adamw="AdamW")),
        ("Largest logit by layer: language model", logits("language_max_logits")),
        ("Largest logit by layer: vision encoder", logits("vision_max_logits")),
        ("Heads clipped in a step", lines(heads_clipped="")),
        ("Steps left out, so far", lines(**left_out)),
        (
            "Expert load, max / mean over experts",
            lambda axes: _layers(axes, training, "expert_loads", "layer", dense, None),
        ),
        (
            "Encoder load, max / mean over ranks",
            lines(encoder_balance="as planned", encoder_least_balance="what no plan betters"),
        ),
        ("Tokens per second", lines(tokens_per_second="")),
        ("Model FLOP utilisation", lines(mfu="")),
        ("Peak memory of a process, GiB", lines(memory_gib="")),
    ):
        picture = _svg(title, draw)
        if picture:
            yield picture


def _svg(title: str, draw: Callable[["Axes"], None]) -> str:
    """The plot as an <svg> element; empty where there was nothing to draw."""
    import matplotlib
    from matplotlib.figure import Figure

    # The same data give the same page; ids differ between the plots that share it.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if not axes.has_data():
            return ""
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # What stands before the element names a file on the web; metadata does too.
    drawn = text.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)


def _legend(axes: "Axes") -> None:
    if any(label for label in axes.get_legend_handles_labels()[1]):
        axes.legend(fontsize=8)


def _line(
    axes: "Axes", records: Records, key: str, label: str, colour: str | None = None, form: str = "-"
) -> None:
    points = [
        (record["step"], record[key])
        for record in records
        if record.get(key) is not None and math.isfinite(record[key])
    ]
    if not points:
        return
    stretches = _stretches(points)
    steps = [statistics.fmean(step for step, _ in part) for part in stretches]
    means = [statistics.fmean(value for _, value in part) for part in stretches]
    (drawn,) = axes.plot(steps, means, form, color=colour, label=label, linewidth=1, markersize=4)
    if len(points) > len(stretches):
        least = [min(value for _, value in part) for part in stretches]
        most = [max(value for _, value in part) for part in stretches]
        axes.fill_between(steps, least, most, color=drawn.get_color(), alpha=0.2, linewidth=0)


def _stretches(points: Sequence[tuple[int, Any]]) -> list[Sequence[tuple[int, Any]]]:
    """The points in at most ``_POINTS`` parts of about equal length."""
    size = -(-len(points) // _POINTS)
    return [points[start : start + size] for start in range(0, len(points), size)]


def _layers(
    axes: "Axes", records: Records, key: str, what: str, first: int, threshold: float | None
) -> None:
    """A list by layer in each step: a line for each layer, or for many of them colours."""
    points = [(record["step"], record[key]) for record in records if record.get(key)]
    if not points:
        return
    count = max(len(values) for _, values in points)
    stretches = _stretches(points)
    # Of each stretch the largest: a peak is what one looks for.
    largest = [
        [
            max(
                (v[layer] for _, v in part if layer < len(v) and v[layer] is not None),
                default=float("nan"),
            )
            for part in stretches
        ]
        for layer in range(count)
    ]
    steps = [part[0][0] for part in stretches]
    if count <= _LINES:
        for layer, values in enumerate(largest):
            axes.plot(steps, values, linewidth=1, label=f"{what} {layer + first}")
        # Far below it, it would only flatten the lines.
        if threshold is not None and any(v > threshold / 4 for layer in largest for v in layer):
            axes.axhline(threshold, color="black", linestyle="--", linewidth=0.8, label="threshold")
        _legend(axes)
        return
    extent = (steps[0], points[-1][0] + 1, first + count - 0.5, first - 0.5)
    image = axes.imshow(largest, aspect="auto", extent=extent, interpolation="nearest")
    axes.set_ylabel(what)
    axes.figure.colorbar(image, ax=axes)
