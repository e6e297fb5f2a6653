"""The HTML report of a run: before and after, plots, transcriptions and settings."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from posttrain import metrics
from posttrain.config import TASK_NAMES
from posttrain.metrics import HELD_OUT, METRICS, SWARM
from pretrain import html_report, untrusted_files
from pretrain.errors import PretrainError
from pretrain.metrics import Record, run_name
from pretrain.plots import draw_line

_PLOTS = (
    *(
        "reward",
        "accuracy",
        "reward_spread",
        "response_tokens",
        "cut_off",
        "entropy",
        "out_of_range",
    ),
    *("logit_bound", "grad_norm", "lr", "loss", "held_out_text_loss"),
    *(
        "character_error_rate",
        "changed_character_error_rate",
        "thinking_accuracy",
        "thinking_tokens",
    ),
    *(f"{task}_{key}" for task in TASK_NAMES for key in ("reward", "accuracy", "response_tokens")),
    *SWARM,
)
_MAX_BYTES = 1 << 20


def write(run_dir: Path) -> Path:
    """Write ``report.html`` into a run's folder; the run may still be training.

    Raises:
        PretrainError: the folder contains no run.
    """
    records = metrics.read(run_dir / "metrics.jsonl")
    if not records:
        raise PretrainError(f"{run_dir} has no metrics.jsonl: give the run_dir of a run")
    try:
        settings = json.loads(untrusted_files.read_bytes(run_dir / "config.json", _MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        settings = {}
    evaluations = [record for record in records if HELD_OUT[0] in record]
    shown = [name for name in _PLOTS if any(record.get(name) is not None for record in records)]
    out = run_dir / "report.html"
    page = html_report.page(
        run_name(run_dir),
        [
            f"<h1>{html_report.escape(run_name(run_dir))}</h1>",
            "<h2>Held-out evaluation</h2>",
            _evaluations(evaluations),
            "<h2>Training</h2>",
            f'<div class="plots">{"".join(_plot(records, name) for name in shown)}</div>',
            *html_report.transcription_table(
                html_report.read_transcriptions(run_dir / "transcriptions.json")
            ),
            "<h2>Configuration</h2>",
            f"<pre>{html_report.escape(yaml.safe_dump(settings, sort_keys=False))}</pre>",
        ],
    )
    out.write_text(page, encoding="utf-8")
    return out


def _evaluations(records: Sequence[Record]) -> str:
    if not records:
        return "<p>No evaluation has been recorded yet.</p>"
    names = [name for name in HELD_OUT if any(r.get(name) is not None for r in records)]
    header = ["after", *(METRICS[name].description for name in names)]
    rows: list[list[Any]] = [
        [f"step {record['step']}", *(metrics.formatted(record, name) for name in names)]
        for record in records
    ]
    return html_report.table(header, rows)


def _plot(records: Sequence[Record], name: str) -> str:
    description = METRICS[name].description
    title = description[0].upper() + description[1:]
    return html_report.svg_plot(title, partial(draw_line, records=records, name=name))
