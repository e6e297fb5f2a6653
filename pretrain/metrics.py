"""Metrics of a run: the meaning and format of each one, and reading metrics.jsonl.

metrics.jsonl has one JSON object per line. A training step records ``step`` and most of
:data:`METRICS`; a held-out evaluation adds its losses to the record of its step, or to step 0
before training. A value is null if there was nothing to measure.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.errors import PretrainError

Record = Mapping[str, Any]


class Metric(NamedTuple):
    """Presentation and meaning of a metric.

    Attributes:
        label: short name, for lines, legends and table headers.
        format: format specification of one value.
        description: meaning and unit; also the title of its plot.
    """

    label: str
    format: str
    description: str


METRICS = {
    # Means over the labels of the global batch.
    "loss": Metric("loss", ".3f", "loss, nats per token"),
    "text_loss": Metric("text", ".3f", "loss of text, nats per token"),
    "caption_loss": Metric("caption", ".3f", "loss of captions, nats per token"),
    # By index in data.sources, if it is set; null: no label of the source. Tokens include images.
    "source_losses": Metric("loss", ".3f", "loss by source, nats per token"),
    "source_tokens": Metric("tokens", ",d", "tokens by source, since the start of the run"),
    "grad_norm": Metric("gradient norm", ".2f", "gradient norm before clipping"),
    "lr": Metric("learning rate", ".1e", "learning rate"),
    # The largest attention logit, before QK-Clip; per layer: null for the encoder without images.
    "max_logit": Metric("max logit", "5.1f", "max logit"),
    "language_max_logits": Metric("language", "5.1f", "max logit by layer: language model"),
    "vision_max_logits": Metric("vision", "5.1f", "max logit by layer: vision encoder"),
    "heads_clipped": Metric("heads clipped", "d", "attention heads clipped in a step"),
    "heads": Metric("heads", "d", "attention heads of the model"),
    # Tokens of the busiest expert divided by the mean over experts.
    "expert_load": Metric("expert load", ".2f", "expert load, max / mean, mean over layers"),
    "expert_loads": Metric("expert load", ".2f", "expert load, max / mean, by layer"),
    "load_balancing_loss": Metric(
        "load balancing", ".3f", "load-balancing loss, mean over layers; 1: balanced"
    ),
    # The dispatcher has no capacity limit: any value but 0 is a fault.
    "dropped_tokens": Metric("tokens dropped by routers", ",d", "assignments to experts dropped"),
    # Change of the weights divided by the learning rate, without weight decay; estimated from a
    # sample of each parameter, every log_every steps.
    "update_rms_muon": Metric("Muon", ".3f", "update RMS of Muon's matrices (sampled)"),
    "update_rms_adamw": Metric("AdamW", ".3f", "update RMS of AdamW's parameters (sampled)"),
    "memory_gib": Metric("memory (GiB)", ".2f", "peak memory of a process, GiB"),
    "model_flops": Metric("FLOPs", ".3g", "FLOPs of a step, recomputation not counted"),
    # Estimated cost of the images of the busiest rank divided by the mean over ranks.
    "encoder_balance": Metric("encoder balance", ".3f", "encoder load, max / mean over ranks"),
    "encoder_least_balance": Metric("lower bound", ".3f", "encoder load of an ideal plan"),
    "encoder_oversized": Metric("oversized", "d", "images that cost more than a rank's fair share"),
    "tokens": Metric("tokens", ",d", "tokens of the global batch, padding included"),
    # Totals since the start of the run.
    "skipped_steps": Metric("steps skipped after a fault", "d", "steps skipped after a fault"),
    "empty_steps": Metric("steps without a label", "d", "steps without a label"),
    "skipped_batches": Metric("skipped batches", "d", "batches skipped by rolling back"),
    "tokens_per_second": Metric("tokens/s", "6,.0f", "tokens per second"),
    "mfu": Metric("MFU", ".1%", "model FLOP utilization"),
    # Every log_every steps, if a pipeline stage has several ranks: the rank that is slowest in
    # comparison with the median of its stage. slowest_host, a text, is its host.
    "own_seconds": Metric("own time", ".3f", "seconds of a step without communication, median"),
    "slowest_ratio": Metric("slowest rank", ".2f", "own time of the slowest rank / median"),
    "slowest_rank": Metric("slowest rank", "d", "slowest rank"),
    # Means over held-out labels, in nats per token. The last two evaluate the same captions next
    # to their own image and next to the image of another sample.
    "held_out_loss": Metric("held-out loss", ".3f", "held-out loss"),
    "held_out_text_loss": Metric("text", ".3f", "held-out loss of text"),
    "held_out_caption_loss": Metric("captions", ".3f", "held-out loss of captions"),
    "held_out_source_losses": Metric("held-out loss", ".3f", "held-out loss by source"),
    "right_caption_loss": Metric("captions with the right image", ".3f", "loss with own image"),
    "swapped_caption_loss": Metric("captions with another image", ".3f", "loss with another image"),
    # Of transcriptions of held-out images by greedy decoding; not before the first step.
    "exact_match": Metric("images read exactly", ".1%", "held-out images read exactly"),
    "character_error_rate": Metric(
        "character error rate", ".1%", "character error rate on held-out images"
    ),
}

# These have a list of values, of sources or layers.
_LISTS = {
    *("source_losses", "source_tokens", "held_out_source_losses"),
    *("language_max_logits", "vision_max_logits", "expert_loads"),
}
HELD_OUT = (
    "held_out_text_loss",
    "held_out_caption_loss",
    "right_caption_loss",
    "swapped_caption_loss",
)
READING = ("exact_match", "character_error_rate")


def formatted(record: Record, name: str) -> str:
    """The value of a metric as text; ``-`` if the record has none."""
    value = record.get(name)
    return "-" if value is None else format(value, METRICS[name].format)


def training_records(records: Iterable[Record]) -> list[Record]:
    """The records of training steps."""
    return [record for record in records if "grad_norm" in record]


def held_out_records(records: Iterable[Record]) -> list[Record]:
    """The records with held-out losses."""
    return [record for record in records if HELD_OUT[0] in record]


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record by name, those of layers as ``name/layer``."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            width = len(str(len(value) - 1))
            by_layer = ((f"{name}/{layer:0{width}}", item) for layer, item in enumerate(value))
            numbers.update((key, item) for key, item in by_layer if item is not None)
        elif isinstance(value, int | float) and name != "step":
            numbers[name] = value
    return numbers


def run_name(run_dir: Path) -> str:
    """The name of a run: that of its folder."""
    return os.path.basename(os.path.abspath(run_dir))  # resolve() raises in a loop of links


def read_run(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of a run's metrics.jsonl and of its starts.jsonl.

    Raises:
        PretrainError: the folder contains no run, or a metric is damaged.
    """
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        raise PretrainError(f"{run_dir} has no metrics.jsonl: give the run_dir of a training run")
    return read(file), read_lines(run_dir / "starts.jsonl")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, ordered by step.

    After resuming from an earlier checkpoint, steps are recorded again: the later record counts,
    and earlier records of the same and of later steps are dropped.

    Raises:
        PretrainError: see :func:`step_records`.
    """
    records: list[dict[str, Any]] = []
    for record in step_records(path):
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    return records


def step_records(path: Path, known: Mapping[str, Metric] = METRICS) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl that have a step, in the order of the file.

    Raises:
        PretrainError: a known metric is not a number, or not a list of numbers.
    """
    for number, record in _objects(path):
        if type(record.get("step")) is not int:
            continue
        for name, value in record.items():
            if name in known and not _has_type(name, value, known[name]):
                raise PretrainError(
                    f"{path}, line {number}: {name} cannot be {value!r:.80}: correct the line, "
                    "or remove it"
                )
        yield record


def _has_type(name: str, value: Any, metric: Metric) -> bool:
    types = int if metric.format.endswith("d") else (int, float)
    if name in _LISTS and value is not None:
        return isinstance(value, list) and all(x is None or isinstance(x, types) for x in value)
    return value is None or isinstance(value, types)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; incomplete lines of killed runs are left out."""
    return [value for _, value in _objects(path)]


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """:func:`read_lines`, with the number of each line."""
    if path.is_file():  # reading a pipe could block forever
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield number, value
