"""Messages at the start and the end of a run."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pretrain.build import Run
from pretrain.config import to_dict
from pretrain.runtime import machine

# Nats a token by which a caption must be likelier beside its own image than beside another one.
_SEES = 0.5


def opening(run: Run, done: int) -> str:
    """Summary of the model and of the run that starts."""
    config = run.config
    parameters = sum(tensor.numel() for _, tensor in run.parameters())
    tokens = config.global_batch_size * config.data.seq_length
    by_algorithm = "; ".join(run.assignment.splitlines()[-2:])
    dep = "on" if config.encoder_process.enabled else "off"
    sources = run.data.describe()
    share = f"{config.data.vision_share:.0%} of them images"
    start = f"going on after step {done}" if done else "starting at step 0"
    if not done and config.start_from:
        start += f" with the weights of {config.start_from}"
    return (
        f"{parameters:,} parameters on rank 0 of {run.context.world_size} ({by_algorithm}), "
        f"expert parallel {config.parallel.expert}, DEP {dep}\n"
        f"{config.steps} steps of {tokens:,} tokens, "
        f"{share if run.data.has_images else 'all of them text'}; "
        f"{start}; writing to {config.run_dir}" + (f"\n{sources}" if sources else "")
    )


def start(run: Run, done: int) -> dict[str, Any]:
    """Record for starts.jsonl, written each time that a run starts or resumes."""
    return {
        "time": datetime.now(UTC).isoformat(sep=" ", timespec="seconds")[:19],
        "step": done,
        "processes": run.context.world_size,
        "processor": machine.processor(),
        "peak_flops": run.step_metrics.peak_flops,
        "versions": machine.versions(),
        "config": to_dict(run.config),
    }


def closing(records: Sequence[dict[str, Any]], transcriptions: Sequence[tuple[str, str]]) -> str:
    """Summary of the training: held-out losses, whether the model sees, and what it reads.

    Args:
        records: the run's metrics, some with held-out losses.
        transcriptions: (truth, transcription) of held-out images.
    """
    held_out = [record for record in records if "held_out_text_loss" in record]
    balances = [record["encoder_balance"] for record in records if "encoder_balance" in record]
    lines = []
    if held_out:
        first, last = held_out[0], held_out[-1]
        columns = [f"at step {record['step']}" for record in (first, last)]
        lines += [
            "",
            f"held-out loss, nats a token{columns[0]:>20}{columns[1]:>20}",
        ]
        lines += [
            f"  {label:<25}{first[key]:>20.3f}{last[key]:>20.3f}"
            for label, key in (
                ("text", "held_out_text_loss"),
                ("captions", "held_out_caption_loss"),
                ("  with the right image", "right_caption_loss"),
                ("  with another's image", "swapped_caption_loss"),
            )
            if first[key] is not None and last[key] is not None
        ]
        if last["right_caption_loss"] is not None:
            gap = last["swapped_caption_loss"] - last["right_caption_loss"]
            verdict = "the model sees" if gap >= _SEES else "the model does not see (yet)"
            lines.append(f"the right image is worth {gap:.3f} nats a token: {verdict}")
    training = [record for record in records if "grad_norm" in record]
    if empty := sum(record["loss"] is None for record in training):
        lines.append(
            f"{empty} of {len(training)} steps had no label in their batch, and updated nothing"
        )
    if balances:
        lines.append(
            f"encoder load, max / mean over ranks: {sum(balances) / len(balances):.3f} on average, "
            f"{max(balances):.3f} at worst"
        )
    return "\n".join([*lines, readings(transcriptions)])


def readings(transcriptions: Sequence[tuple[str, str]]) -> str:
    """The texts of held-out images next to the model's transcriptions; empty without any."""
    if not transcriptions:
        return ""
    width = max((len(truth) for truth, _ in transcriptions), default=0)
    lines = [f"  {truth:<{width}} | {answer}" for truth, answer in transcriptions]
    return "\n".join(["held-out images: what they say | what the model reads", *lines])
