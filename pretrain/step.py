"""One training step: encoder, backbone, encoder again, optimizer, clip."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn
from torch.profiler import record_function

from muonclip import ClipResult
from pretrain.build import Run
from pretrain.config import OptimizerConfig
from pretrain.data import CAPTION, TEXT
from pretrain.errors import PretrainError
from pretrain.model import multimodal
from pretrain.model.multimodal import MicroBatch
from pretrain.runtime import apex
from pretrain.runtime.faults import Fault, Guard, RollBack


def loss_sums(losses: Tensor, kinds: Tensor) -> Tensor:
    """[4] float64: summed loss and count of text labels, then of caption labels."""
    parts = []
    for kind in (TEXT, CAPTION):
        counted = kinds == kind
        parts += [(losses.detach() * counted).sum(dtype=torch.float64), counted.sum()]
    return torch.stack([part.double() for part in parts])


def mean_losses(sums: Tensor) -> dict[str, float | None]:
    """Means per token from :func:`loss_sums`; None where there was no such token."""
    text, texts, caption, captions = sums.tolist()
    return {
        "loss": (text + caption) / (texts + captions) if texts + captions else None,
        "text_loss": text / texts if texts else None,
        "caption_loss": caption / captions if captions else None,
    }


Output = Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor, dict[str, Any]]]


def run_schedule(
    run: Run,
    micro_batches: Sequence[MicroBatch],
    features: Sequence[Tensor],
    take: Output,
    *,
    forward_only: bool,
    logits: bool = False,
) -> None:
    """Pass micro-batches through the language model, under megatron-core's own schedule.

    Args:
        features: of each micro-batch.
        take: called where the model ends with each micro-batch and the model's output; returns a
            loss, the number of labels it is summed over, and an empty dictionary.
        forward_only: no backward.
        logits: the output is logits in place of losses; see ``multimodal.forward``.
    """

    placeholder = run.data.tokenizer.media_pad

    def forward_step(
        batches: Iterator[tuple[MicroBatch, Tensor]], model: nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Any]]]]:
        batch, batch_features = next(batches)
        output = multimodal.forward(model, batch, batch_features, placeholder, logits=logits)
        return output, partial(take, batch)

    # Every run of layers on this rank goes through all micro-batches.
    iterators = [iter(zip(micro_batches, features, strict=True)) for _ in run.language]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=run.language,
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].tokens.shape[1],
        micro_batch_size=micro_batches[0].tokens.shape[0],
        forward_only=forward_only,
    )


def backbone(
    run: Run,
    micro_batches: Sequence[MicroBatch],
    features: Sequence[Tensor],
    *,
    forward_only: bool = False,
) -> Tensor:
    """Forward and backward of the language model.

    Its gradients are summed over the global batch and divided by the number of labels there.

    Returns:
        [4], the :func:`loss_sums` of this rank's micro-batches; zeros where another rank has them.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=run.context.device)

    def total_loss(batch: MicroBatch, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        if run.context.tensor_rank == 0:  # the others of its group have the same losses
            sums.add_(loss_sums(losses, batch.kinds))
        counted = batch.kinds > 0
        return (losses * counted).sum(), counted.sum().int(), {}

    run_schedule(run, micro_batches, features, total_loss, forward_only=forward_only)
    return sums


def gradient_norm(run: Run) -> Tensor:
    """The norm of the whole model's gradient, of which every rank has a part."""
    squares = torch.zeros((), dtype=torch.float64, device=run.context.device)
    by_copies: dict[int, list[Tensor]] = defaultdict(list)
    for name, parameter in run.parameters():
        if parameter.grad is not None:
            by_copies[run.copies[name]].append(parameter.grad)
    for copies, gradients in by_copies.items():
        squares += apex.total_norm(gradients).double().square() / copies
    dist.all_reduce(squares)
    return squares.sqrt()


def _stop(run: Run, step: int, loss: float | None, fault: Fault) -> None:
    """Say why the run ends; where gradients are not finite, name their parameters.

    Raises:
        PretrainError: the same on every rank.
    """
    before = f", after {fault.skipped} steps skipped in a row" if fault.skipped else ""
    advice = (
        f"nothing was updated{before}. Lower optimizer.lr, or look at the data of this step; the "
        "last checkpoint is intact"
    )
    if fault.kind == "spike":
        raise PretrainError(f"{fault.reason}, at step {step}; {advice}")
    local = [n for n, p in run.parameters() if p.grad is not None and not p.grad.isfinite().all()]
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, local)
    names = sorted({name for names in found for name in names})
    whose = f"gradient of {names[0]} (and {len(names) - 1} other parameters)" if names else "loss"
    if not names and math.isfinite(loss or 0.0):
        whose = "norm of the gradient"
    raise PretrainError(f"the {whose} is not finite at step {step} (loss {loss}); {advice}")


def learning_rate_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Warm-up, stable, decay: the factor on the peak rates for update ``step`` of 1..``steps``.

    Linear from 0 over ``warmup_steps``, one, and over the last ``decay_steps`` a cosine down to
    ``final_lr_fraction``, as in the Kimi K2 report (section 2.5).
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    decayed = step - (steps - config.decay_steps)
    if decayed <= 0:
        return 1.0
    cosine = (1 + math.cos(math.pi * decayed / config.decay_steps)) / 2
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine


def gradients(run: Run, micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Leave the global batch's gradient in every parameter's ``.grad``.

    Returns:
        [4], the :func:`loss_sums` of the global batch.
    """
    run.train()
    for chunk in run.language:
        chunk.zero_grad_buffer()

    # DEP: 1. everybody encodes a fair share; 2. the backbone, as if for text; 3. encode again,
    # now backwards.
    with record_function("encode"):
        features = run.encoder.encode(
            [(batch.patches, batch.grids) for batch in micro_batches],
            multimodal.image_error(micro_batches, run.data.tokenizer.media_pad)
            if run.context.first_stage
            else None,
        )
    with record_function("backbone"):
        sums = backbone(run, micro_batches, features)
    with record_function("encode again, backwards"):
        run.encoder.backward()
        run.encoder.reduce_gradients()

    dist.all_reduce(sums)
    labels = (sums[1] + sums[3]).clamp(min=1)  # as megatron-core does: no labels, no gradient
    for parameter in run.tower.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(labels.to(parameter.grad.dtype))
    for chunk in run.language:
        for parameter in chunk.parameters():
            parameter.grad = parameter.main_grad
    return sums


def train_step(
    run: Run, micro_batches: Sequence[MicroBatch], step: int, guard: Guard | None = None
) -> dict[str, Any]:
    """Do update ``step`` of 1..``config.steps`` and return its metrics, the same on every rank.

    Args:
        guard: judges the step before anything is updated; default: one that has seen no other.

    Raises:
        PretrainError: a loss or gradient is not finite, or the loss is a spike, and the run is to
            stop then; nothing was updated.
        RollBack: the same, and the run is to go back to its newest checkpoint.
    """
    guard = guard or Guard(run.config.faults)
    buffers = [
        tensor for tensor in run.named_tensors.values() if not isinstance(tensor, nn.Parameter)
    ]
    # The router's bias moves with the backward pass, before the step can be judged.
    before = [buffer.clone() for buffer in buffers]
    metrics = {"step": step, **mean_losses(gradients(run, micro_batches))}
    norm = gradient_norm(run)
    fault = guard.judge(metrics["loss"], norm.item())
    factor = learning_rate_factor(run.config.optimizer, step, run.config.steps)
    if fault is None:
        moved, clipped = _update(run, norm, factor, step)
    else:
        if fault.action == "stop":
            _stop(run, step, metrics["loss"], fault)
        moved, clipped = _leave_out(run)
        if fault.action == "roll_back":
            raise RollBack(fault.reason)
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
    # The data-parallel wrapper adds what it finds in .grad to its buffer, which .grad now is.
    run.optimizer.zero_grad(set_to_none=True)

    return metrics | {
        "grad_norm": norm.item(),
        "lr": run.config.optimizer.lr * factor,
        **run.step_metrics.gather(micro_batches, clipped, moved),
        "encoder_balance": run.encoder.balance,
        "encoder_least_balance": run.encoder.balance_lower_bound,
        "encoder_oversized": run.encoder.oversized,
        "tokens": run.config.global_batch_size * run.config.data.seq_length,
        "skipped_steps": guard.skipped,
        "empty_steps": guard.empty,
        "skipped_batches": guard.skipped_batches,
    }


def spare_encoder(run: Run) -> None:
    """Text alone leaves the encoder as it is: without a gradient it is not decayed either."""
    if not run.data.has_images:
        for parameter in run.tower.parameters():
            parameter.grad = None


def _update(run: Run, norm: Tensor, factor: float, step: int) -> tuple[Tensor, list[ClipResult]]:
    """Clip the gradient, step the optimizer at ``factor`` of the peak rates, clip the heads."""
    spare_encoder(run)
    scale = (run.config.optimizer.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    apex.scale_([p.grad for _, p in run.parameters() if p.grad is not None], scale)
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    run.step_metrics.before_update(step)
    with record_function("optimizer"):
        run.optimizer.step()
    moved = run.step_metrics.after_update()
    with record_function("QK-Clip"):
        return moved, [clip.step() for clip in run.clips]


def _leave_out(run: Run) -> tuple[Tensor, list[ClipResult]]:
    """Change nothing, and return the same as :func:`_update`."""
    run.optimizer.zero_grad(set_to_none=True)
    return run.step_metrics.after_update(), [clip.step(clip=False) for clip in run.clips]
