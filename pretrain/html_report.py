"""HTML report of a run: plots, held-out results, restarts, versions and configuration.

The page is one self-contained file without scripts or external resources.
"""

import html
import io
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pretrain import metrics, untrusted_files
from pretrain.errors import PretrainError
from pretrain.metrics import HELD_OUT, METRICS, READING, formatted
from pretrain.plots import Records, report_plots
from pretrain.reading import Reading, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_BYTES = 64 << 20
_MAX_SLOW_RANKS = 20
_MAX_READINGS = 1000
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  color: #1c1e21; }
h1 { margin-bottom: 0; } h2 { margin: 2rem 0 .5rem; }
.summary { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.summary div { background: #f2f4f7; border-radius: .5rem; padding: .5rem .9rem; }
.summary b { display: block; font-size: 1.15rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
.plots svg { width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem; text-align: right;
  border-bottom: 1px solid #dde1e6; vertical-align: top; }
td:first-child, th:first-child, .text td, .text th { text-align: left; }
.wrong td:last-child { color: #b3261e; }
pre { background: #f2f4f7; border-radius: .5rem; padding: .8rem; overflow: auto; }
"""


def write(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run, which may still be training.

    Args:
        run_dir: folder of the run.
        out: the HTML file; default: ``report.html`` in the run's folder.

    Returns:
        The path of the HTML file.

    Raises:
        PretrainError: the folder contains no run, or the file cannot be written.
    """
    out = out or run_dir / "report.html"
    try:
        page = render(
            metrics.run_name(run_dir),
            *metrics.read_run(run_dir),
            read_transcriptions(run_dir / "transcriptions.json"),
        )
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise PretrainError(f"cannot write the report {out}: {error.strerror}") from error
    return out


def read_transcriptions(path: Path) -> list[Reading]:
    """The transcriptions in a file; none if it is missing or incomplete."""
    try:
        rows = json.loads(untrusted_files.read_bytes(path, _MAX_BYTES))
        return [Reading(*map(str, row)) for row in rows]
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def render(name: str, records: Records, starts: Records, transcriptions: Sequence[Reading]) -> str:
    """The HTML text.

    Args:
        name: name of the run.
        records: metrics, from :func:`pretrain.metrics.read`.
        starts: records of starts.jsonl.
        transcriptions: those of held-out images.
    """
    training, held_out = metrics.training_records(records), metrics.held_out_records(records)
    config = starts[-1].get("config", {}) if starts else {}
    plots = (svg_plot(title, draw) for title, draw in report_plots(records, config))
    parts = [
        f"<h1>{escape(name)}</h1>",
        _summary(training, config.get("steps")),
        "<h2>Training</h2>",
        f'<div class="plots">{"".join(plots)}</div>'
        if training
        else "<p>No step has been recorded yet.</p>",
        *_sources(training, held_out, config.get("data", {}).get("sources", ())),
        *_slow_ranks(training, config.get("faults", {}).get("straggler_ratio")),
        "<h2>Held-out evaluation</h2>",
        _held_out(held_out),
        *transcription_table(transcriptions),
        "<h2>Starts</h2>",
        _starts(starts),
        "<h2>Configuration</h2>",
        f"<pre>{escape(yaml.safe_dump(config, sort_keys=False))}</pre>"
        if config
        else "<p>Not recorded.</p>",
    ]
    return page(name, parts)


def page(title: str, parts: Iterable[str]) -> str:
    """A page of HTML elements, in the style of all reports; empty ones are left out."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(filter(None, parts))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def escape(value: object) -> str:
    """A value as text of an HTML element."""
    return html.escape(str(value))


def table(header: Sequence[str], rows: Iterable[Sequence[object]], css_class: str = "") -> str:
    """A table; its texts are escaped."""

    def row(cells: Iterable[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f'<table class="{css_class}">{row(header, "th")}\n{body}</table>'


def _summary(training: Records, steps: int | None) -> str:
    """The key numbers of the run so far; nothing before the first step."""
    if not training:
        return ""
    last = training[-1]
    entries = [
        ("step", f"{last['step']:,}" + (f" of {steps:,}" if steps else "")),
        ("tokens", f"{sum(record.get('tokens', 0) for record in training):,}"),
        ("loss", formatted(last, "loss")),
    ]

    def add(name: str, note: str, reduce: Callable[[list[Any]], Any], records: Records) -> None:
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            entries.append((METRICS[name].label + note, formatted({name: reduce(values)}, name)))

    add("tokens_per_second", ", median of the last 100 steps", statistics.median, training[-100:])
    add("mfu", ", median of the last 100 steps", statistics.median, training[-100:])
    add("memory_gib", ", peak of a process", max, training)
    add("dropped_tokens", "", sum, training)
    cells = "".join(f"<div>{escape(label)}<b>{escape(value)}</b></div>" for label, value in entries)
    return f'<div class="summary">{cells}</div>'


def _sources(training: Records, held_out: Records, sources: Sequence[Any]) -> list[str]:
    """Tokens and losses of each source; empty with the built-in data, and before the first step.

    Args:
        sources: the entries of ``data.sources``.
    """

    def last(records: Records, name: str) -> list[Any]:
        found: list[Any] = next((r[name] for r in reversed(records) if name in r), [])
        return found + [None] * (len(sources) - len(found))

    counts = [count or 0 for count in last(training, "source_tokens")]
    columns = {"source_losses": training, "held_out_source_losses": held_out}
    losses = {name: last(records, name) for name, records in columns.items()}
    if not sum(counts):
        return []
    rows = []
    for number, (entry, count) in enumerate(zip(sources, counts, strict=False)):
        source = f"data.sources[{number}]: {entry.get('path') or entry.get('type', '')}"
        cells = (formatted({name: losses[name][number]}, name) for name in columns)
        rows.append((source, f"{count:,}", f"{count / sum(counts):.1%}", *cells))
    header = ("source", "tokens", "share", "loss", "held-out loss")
    return ["<h2>Sources</h2>", table(header, rows)]


def _slow_ranks(training: Records, threshold: float | None) -> list[str]:
    """The ranks that were slow most often; empty if none was, or ranks were not compared."""
    ratios: dict[tuple[int, str], list[float]] = defaultdict(list)
    compared = [record for record in training if record.get("slowest_ratio") is not None]
    for record in compared:
        if threshold is not None and record["slowest_ratio"] >= threshold:
            ratios[record["slowest_rank"], record["slowest_host"]].append(record["slowest_ratio"])
    if not ratios:
        return []
    most_often = sorted(ratios.items(), key=lambda item: -len(item[1]))[:_MAX_SLOW_RANKS]
    rows = (
        (rank, host, f"{len(values)} of {len(compared)}", f"{statistics.median(values):.2f}",
         f"{max(values):.2f}")
        for (rank, host), values in most_often
    )  # fmt: skip
    header = ("rank", "host", "slowest in comparisons", "own time / median", "at most")
    return ["<h2>Slow ranks</h2>", table(header, rows)]


def _held_out(records: Records) -> str:
    if not records:
        return "<p>No evaluation has been recorded yet.</p>"
    names = (*HELD_OUT, *READING)
    header = ["losses in nats per token", *(METRICS[name].label for name in names)]
    rows = ([f"step {row['step']}", *(formatted(row, name) for name in names)] for row in records)
    return table(header, rows)


def transcription_table(transcriptions: Sequence[Reading]) -> list[str]:
    """Held-out images, the text in them, and what the model reads; wrong readings are marked."""
    if not transcriptions:
        return []
    rows = "\n".join(
        f"<tr{'' if reading.is_exact else ' class=wrong'}><td>{_picture(reading.picture)}</td>"
        f"<td>{escape(reading.expected)}</td><td>{escape(reading.text)}</td></tr>"
        for reading in transcriptions[:_MAX_READINGS]
    )
    more = len(transcriptions) > _MAX_READINGS
    return [
        "<h2>Transcriptions of held-out images</h2>",
        f"<p>{summary(transcriptions)}.{f' The first {_MAX_READINGS:,} are shown.' * more}</p>",
        '<table class="text"><tr><th>image</th><th>the image says</th><th>the model reads</th></tr>'
        f"\n{rows}</table>",
    ]


def _picture(encoded: str) -> str:
    """An image element of a PNG file in base64; empty without one."""
    if not _BASE64.fullmatch(encoded):
        return ""
    return f'<img alt="" src="data:image/png;base64,{encoded}">'


def _starts(starts: Records) -> str:
    if not starts:
        return "<p>Not recorded.</p>"
    rows = []
    previous: Mapping[str, Any] = {}
    for start in starts:
        config = _flatten(start.get("config", {}))
        changes = [f"{k}={v}" for k, v in config.items() if previous and previous.get(k) != v]
        previous = config
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
        "time (UTC)", "from", "processes", "processor", "peak TFLOP/s", "versions",
        "changed settings",
    )  # fmt: skip
    return table(header, rows, "text")


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    settings: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            settings |= _flatten(value, f"{prefix}{key}.")
        else:
            settings[prefix + key] = value
    return settings


def svg_plot(title: str, draw: Callable[["Axes"], None]) -> str:
    """The plot as an <svg> element; empty if there is nothing to draw."""
    import matplotlib
    from matplotlib.figure import Figure

    # Reproducible output; the salt makes ids unique among the plots of a page.
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
    # The XML prologue and the metadata refer to external resources: remove them.
    svg = text.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
