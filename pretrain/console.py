"""Messages at the start and the end of a run."""

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pretrain import metrics
from pretrain.build import Run
from pretrain.config import Config, LanguageConfig, to_dict
from pretrain.data import Data
from pretrain.metrics import HELD_OUT, METRICS, Record, formatted
from pretrain.model.kernels import choose_kernels
from pretrain.reading import Reading, listing
from pretrain.runtime import machine

# The model sees if its caption loss is lower by this much, in nats per token, with the right image
# than with another one.
_SEES = 0.5


def opening(run: Run, done: int) -> str:
    """Summary of the model and the run."""
    config = run.config
    parameters = sum(tensor.numel() for _, tensor in run.parameters())
    tokens = config.global_batch_size * config.data.seq_length
    by_algorithm = "; ".join(run.assignment.splitlines()[-2:])
    dep = "on" if config.encoder_process.enabled else "off"
    sources = run.data.describe()
    lines = [
        f"{parameters:,} parameters on rank 0 of {run.context.world_size} ({by_algorithm}), "
        f"expert parallel {config.parallel.expert}, DEP {dep}, kernels {choose_kernels(config)}",
        f"{config.steps} steps of {tokens:,} tokens, "
        f"{_images(run.data)}; "
        f"{_start(config, done)}; writing to {config.run_dir}",
    ]
    return "\n".join([*lines, *filter(None, [sources]), *_notes(config.language)])


def _start(config: Config, done: int) -> str:
    """The step at which the run starts."""
    if done >= config.steps:
        return f"nothing is left to train after step {done}: to continue, raise steps"
    if done:
        return f"resuming after step {done}"
    weights = f" with the weights of {config.start_from}" if config.start_from else ""
    return f"starting at step 0{weights}"


def _images(data: Data) -> str:
    """The share of images among the tokens of a step."""
    share = data.image_share
    if not data.has_images:
        return "text only"
    if share is None:
        return "some of them images"
    filled = share != data.config.vision_share  # by images alone
    return f"{share:.0%} of them images" + " (without padding)" * filled


def _notes(language: LanguageConfig) -> list[str]:
    """Consequences of the model's settings that are easily overlooked."""
    notes = []
    if language.qk_norm:
        notes.append(
            "QK-Clip only reports the language model's max logits, since language.qk_norm makes "
            "them independent of the scale of its weights"
        )
    remedies = {"load_balancing_loss": language.load_balancing_loss}
    if language.router_score == "sigmoid":
        remedies["expert_bias_update_rate"] = language.expert_bias_update_rate
    if language.moe_layers and not any(remedies.values()):
        names = " or ".join(f"language.{name}" for name in remedies)
        notes.append(f"nothing balances the experts: to do so, set {names} above 0")
    return notes


def start_record(run: Run, done: int) -> dict[str, Any]:
    """Record for starts.jsonl, appended whenever a run starts or resumes."""
    return {
        "time": datetime.now(UTC).isoformat(sep=" ", timespec="seconds")[:19],
        "step": done,
        "processes": run.context.world_size,
        "processor": machine.processor(),
        "peak_flops": run.step_metrics.peak_flops,
        "versions": machine.versions(),
        "config": to_dict(run.config),
    }


def closing(records: Sequence[Record], transcriptions: Sequence[Reading]) -> str:
    """Summary of the training: held-out losses, whether the model sees, and what it reads.

    Args:
        records: the run's metrics.
        transcriptions: those of held-out images.
    """
    training, held_out = metrics.training_records(records), metrics.held_out_records(records)
    lines = held_out_summary(held_out[0], held_out[-1]) if held_out else []
    if empty := sum(record["loss"] is None for record in training):
        lines.append(f"{empty} of {len(training)} steps had a batch without labels: no update")
    if training:
        balances = [record["encoder_balance"] for record in training]
        lines.append(
            f"encoder load, max / mean over ranks: {statistics.fmean(balances):.3f} on average, "
            f"{max(balances):.3f} at worst"
        )
    return "\n".join([*lines, listing(transcriptions)])


def held_out_summary(first: Record, last: Record) -> list[str]:
    """Lines that compare two held-out evaluations, and whether the model sees in the last one."""
    headers = [f"at step {record['step']}" for record in (first, last)]
    lines = ["", f"held-out loss, nats per token  {headers[0]:>20}{headers[1]:>20}"]
    lines += [
        f"  {METRICS[name].label:<29}{formatted(first, name):>20}{formatted(last, name):>20}"
        for name in HELD_OUT
        if first[name] is not None and last[name] is not None
    ]
    if last["right_caption_loss"] is not None:
        gap = last["swapped_caption_loss"] - last["right_caption_loss"]
        verdict = "the model sees" if gap >= _SEES else "the model does not see (yet)"
        lines.append(f"the right image is worth {gap:.3f} nats per token: {verdict}")
    return lines
