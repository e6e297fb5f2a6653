"""What a run says to people when it starts and when it ends."""

from collections.abc import Sequence
from typing import Any

from pretrain.build import Run


def opening(run: Run, done: int) -> str:
    """What is about to be trained, and how."""
    config = run.config
    parameters = sum(tensor.numel() for _, tensor in run.parameters())
    tokens = config.global_batch_size * config.data.seq_length
    start = f"going on after step {done}" if done else "starting at step 0"
    return (
        f"{run.assignment}\n\n"
        f"{parameters:,} parameters on rank 0 of {run.processes.world_size}, "
        f"expert parallel {config.parallel.expert}, "
        f"DEP {'on' if config.encoder_process.enabled else 'off'}\n"
        f"{config.steps} steps of {tokens:,} tokens, {config.data.vision_share:.0%} of them images;"
        f" {start}; writing to {config.run_dir}"
    )


def closing(records: Sequence[dict[str, Any]], transcriptions: Sequence[tuple[str, str]]) -> str:
    """What was learned: held-out losses, whether the model sees, and what it reads.

    Args:
        records: the run's metrics; the first and the last have held-out losses.
        transcriptions: (truth, transcription) of held-out images.
    """
    first, last = records[0], records[-1]
    gap = last["swapped_caption_loss"] - last["right_caption_loss"]
    balances = [record["encoder_balance"] for record in records if "encoder_balance" in record]
    lines = [
        f"\nheld-out loss, nats a token{'at step ' + str(first['step']):>20}"
        f"{'at step ' + str(last['step']):>20}",
        *(
            f"  {label:<24}{first[key]:>20.3f}{last[key]:>20.3f}"
            for label, key in (
                ("text", "held_out_text_loss"),
                ("captions", "held_out_caption_loss"),
                ("  with the right image", "right_caption_loss"),
                ("  with another's image", "swapped_caption_loss"),
            )
        ),
        f"the right image is worth {gap:.3f} nats a token"
        + (": the model sees" if gap >= 0.5 else ": the model does not see (yet)"),
        f"encoder load, max / mean over ranks: {sum(balances) / len(balances):.3f} on average, "
        f"{max(balances):.3f} at worst",
    ]
    return "\n".join([*lines, readings(transcriptions)])


def readings(transcriptions: Sequence[tuple[str, str]]) -> str:
    """What held-out images say, beside what the model reads in them."""
    width = max((len(truth) for truth, _ in transcriptions), default=0)
    lines = [f"  {truth:<{width}} | {answer}" for truth, answer in transcriptions]
    return "\n".join(["held-out images: what they say | what the model reads", *lines])
