"""One training step: gradients, optimizer, QK-Clip.

The gradients are computed in the three stages of the Decoupled Encoder Process (DEP; Kimi K2.5
report): all ranks encode a balanced share of the images, the backbone trains as if on text, and the
encoder runs backward, after another forward on images whose activations did not fit in memory.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn
from torch.profiler import record_function

from muonclip import ClipResult
from pretrain import objective
from pretrain.build import Run
from pretrain.config import OptimizerConfig
from pretrain.encoder_process.encoder import ImagePlan, Images
from pretrain.errors import PretrainError
from pretrain.model import multimodal
from pretrain.model.flex import to_device
from pretrain.model.multimodal import MicroBatch
from pretrain.parallel import max_over_ranks, raise_on_all_ranks
from pretrain.runtime import apex
from pretrain.runtime.faults import Action, Fault, Guard, RollBack

# Called with a micro-batch and the output of the model's last layer; returns the scalar to
# differentiate.
LossFunction = Callable[[MicroBatch, Tensor], Tensor]


def train_step(
    run: Run,
    micro_batches: Sequence[MicroBatch],
    step: int,
    guard: Guard | None = None,
    plan: ImagePlan | None = None,
) -> dict[str, Any]:
    """Perform update ``step`` of 1..``config.steps``.

    Args:
        micro_batches: this rank's share of the global batch.
        guard: decides, before anything is updated, whether the step is faulty. Default: a guard
            without a history.
        plan: the result of :func:`plan_images`. Default: plan now.

    Returns:
        The metrics of the step, the same on every rank.

    Raises:
        PretrainError: a loss or gradient is not finite, or the loss is a spike, and the
            configuration says to stop. Nothing was updated.
        RollBack: the same, and the configuration says to return to the newest checkpoint.
    """
    guard = guard or Guard(run.config.faults)
    buffers = [x for x in run.named_tensors.values() if not isinstance(x, nn.Parameter)]
    # The backward pass updates the routers' biases, before the guard can judge the step.
    saved = [buffer.clone() for buffer in buffers]

    sums = forward_backward(run, micro_batches, plan)
    losses = objective.mean_losses(sums)
    norm = gradient_norm(run)
    factor = learning_rate_factor(run.config.optimizer, step, run.config.steps)
    fault = guard.judge(losses["loss"], norm.item())
    if fault is None:
        moved, clipped = _update(run, norm, factor, step)
    else:
        if fault.action == "stop":
            _stop(run, step, losses["loss"], fault)
        moved, clipped = _skip_update(run)
        if fault.action == "roll_back":
            raise RollBack(fault.reason)
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)
    # The data-parallel wrapper adds a .grad to its gradient buffer, of which .grad is now a view.
    run.optimizer.zero_grad(set_to_none=True)

    return {
        "step": step,
        **losses,
        **by_source("source_losses", sums),
        "grad_norm": norm.item(),
        "lr": run.config.optimizer.lr * factor,
        **run.step_metrics.gather(micro_batches, clipped, moved, run.encoder),
        "tokens": run.config.global_batch_size * run.config.data.seq_length,
        "skipped_steps": guard.skipped,
        "empty_steps": guard.empty,
        "skipped_batches": guard.skipped_batches,
    }


def by_source(name: str, sums: Tensor) -> dict[str, list[float | None]]:
    """A metric of the mean loss of each source; none with the built-in data.

    Args:
        sums: the :func:`pretrain.objective.loss_sums` of all ranks.
    """
    losses = objective.source_losses(sums)
    return {name: losses} if losses else {}


def forward_backward(
    run: Run, micro_batches: Sequence[MicroBatch], plan: ImagePlan | None = None
) -> Tensor:
    """Compute the gradient of the objective over the global batch, into every ``.grad``.

    Args:
        plan: the result of :func:`plan_images`. Default: plan now.

    Returns:
        The :func:`pretrain.objective.loss_sums` of the global batch.
    """
    run.train()
    for chunk in run.language:
        chunk.zero_grad_buffer()

    with record_function("encode"):
        features = encode_images(run, micro_batches, plan)
    if run.load_balancing is not None:
        # All gradients are divided by the total weight: that of a mean over sequences is not.
        total = _total_weight(run, micro_batches)
        run.load_balancing.start_step(total / run.config.global_batch_size)
    with record_function("backbone"):
        sums = run_backbone(run, micro_batches, features)
    with record_function("encoder backward"):
        run.encoder.backward()
        run.encoder.reduce_gradients()

    dist.all_reduce(sums)
    total = objective.total_weight(sums)
    for parameter in run.tower.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(total.to(parameter.grad.dtype))
    for chunk in run.language:
        chunk.scale_gradients(1 / total)
        for parameter in chunk.parameters():
            parameter.grad = parameter.main_grad
    return sums


def _total_weight(run: Run, micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Sum of the weights of all labels of the global batch, a float64 scalar."""
    local = [batch.weights.sum(dtype=torch.float64) for batch in micro_batches]
    total = torch.stack(local).sum().to(run.context.device)
    dist.all_reduce(total)
    return total * run.context.data_size / run.context.world_size  # other ranks have copies


def encode_images(
    run: Run, micro_batches: Sequence[MicroBatch], plan: ImagePlan | None = None
) -> list[Tensor]:
    """Features [N, h] of each micro-batch's images, for the placeholder tokens of this rank.

    Args:
        plan: the result of :func:`plan_images`. Default: plan now.

    Raises:
        PretrainError: on every rank, if images do not match their placeholders on one of them, or
            cannot be encoded.
    """
    failure: PretrainError | None = None
    if plan is None:
        try:
            plan = plan_images(run, micro_batches)
        except PretrainError as error:  # of all ranks that share their images
            failure = error
    if run.encoder.num_groups > 1 and max_over_ranks(failure is not None) == [1]:
        raise_on_all_ranks(failure)
    if failure is not None:
        raise failure
    images, _, ranks = _images(run, micro_batches)
    return run.encoder.encode(images, feature_ranks=ranks, plan=plan)


def plan_images(
    run: Run, micro_batches: Sequence[MicroBatch], error: str | None = None, *, ahead: bool = False
) -> ImagePlan:
    """Assign the images of a step to ranks.

    Args:
        error: the reason why this rank has no micro-batches, if any.
        ahead: the step may be a later one than that of other ranks; see
            :meth:`EncoderProcess.plan`.

    Raises:
        PretrainError: see :func:`encode_images`; on the ranks that share their images.
    """
    images, image_error, ranks = _images(run, micro_batches)
    return run.encoder.plan(images, error or image_error, ranks, ahead=ahead)


def _images(
    run: Run, micro_batches: Sequence[MicroBatch]
) -> tuple[list[Images], str | None, list[Tensor] | None]:
    """Images of each micro-batch, the reason why they cannot be used, and the context-parallel
    ranks that need their features."""
    images = [(batch.patches, batch.grids) for batch in micro_batches]
    if not run.context.first_stage:
        return images, None, None
    placeholder = run.data.tokenizer.media_pad
    error = multimodal.image_error(micro_batches, placeholder)
    ranks = None
    if run.context.context_size > 1 and micro_batches:
        ranks = [multimodal.feature_ranks(batch, placeholder) for batch in micro_batches]
    return images, error, ranks


def run_backbone(
    run: Run,
    micro_batches: Sequence[MicroBatch],
    features: Sequence[Tensor],
    *,
    forward_only: bool = False,
) -> Tensor:
    """Forward and backward of the language model, over the features of the images.

    The gradients are sums over the global batch, still to be divided by its total weight.

    Returns:
        The :func:`pretrain.objective.loss_sums` of this rank's tokens. Zeros on all but one of the
        ranks that share them: the first tensor-parallel rank of the last pipeline stage.
    """
    num_sources = len(run.config.data.sources)
    sums = objective.no_losses(run.context.device, num_sources)

    def weighted_loss(batch: MicroBatch, losses: Tensor) -> Tensor:
        weights = to_device(batch.share.take(batch.weights, 1), losses.device)
        if run.context.tensor_rank == 0:
            categories = batch.share.take(batch.categories, 1)
            sources = None
            if num_sources:
                sources = to_device(batch.share.take(batch.sources, 1), losses.device)
            sums.add_(objective.loss_sums(losses, weights, categories, sources, num_sources))
        return objective.weighted_loss(losses, weights)

    run_schedule(run, micro_batches, features, weighted_loss, forward_only=forward_only)
    return sums


def run_schedule(
    run: Run,
    micro_batches: Sequence[MicroBatch],
    features: Sequence[Tensor],
    loss_function: LossFunction,
    *,
    forward_only: bool,
    logits: bool = False,
) -> None:
    """Pass micro-batches through the language model by megatron-core's pipeline schedule.

    Args:
        features: the image features of each micro-batch.
        loss_function: called for each micro-batch, on the last pipeline stage.
        forward_only: skip the backward pass.
        logits: the output is logits instead of losses; see :func:`multimodal.forward`.
    """
    placeholder = run.data.tokenizer.media_pad
    # megatron-core divides gradients by a count of labels, an integer. 0 leaves this to
    # forward_backward(): weights need not be integers.
    no_labels = torch.zeros((), dtype=torch.int, device=run.context.device)

    def loss_of(batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        return loss_function(batch, output), no_labels, {}

    def forward_step(
        batches: Iterator[tuple[MicroBatch, Tensor]], model: nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Any]]]]:
        batch, batch_features = next(batches)
        output = multimodal.forward(model, batch, batch_features, placeholder, logits=logits)
        return output, partial(loss_of, batch)

    # All micro-batches pass through each of this rank's model chunks.
    iterators = [iter(zip(micro_batches, features, strict=True)) for _ in run.language]
    rows, length = micro_batches[0].tokens.shape
    if multimodal.is_packed(run.language[0].config):
        rows, length = 1, rows * length
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=run.language,
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )


def gradient_norm(run: Run) -> Tensor:
    """Norm of the gradient of the whole model, across ranks and their shards; float64 scalar."""
    squares = torch.zeros((), dtype=torch.float64, device=run.context.device)
    by_copies: dict[int, list[Tensor]] = defaultdict(list)
    for name, parameter in run.parameters():
        if parameter.grad is not None:
            by_copies[run.copies[name]].append(parameter.grad)
    for copies, grads in by_copies.items():
        squares += apex.total_norm(grads).double().square() / copies
    dist.all_reduce(squares)
    return squares.sqrt()


def learning_rate_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Factor on the peak learning rates for update ``step`` of 1..``steps``.

    The schedule is warmup-stable-decay: linear from 0 over ``warmup_steps``, then 1, then a cosine
    to ``final_lr_fraction`` over the last ``decay_steps`` (Kimi K2 report, section 2.5).
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    decayed = step - (steps - config.decay_steps)
    if decayed <= 0:
        return 1.0
    cosine = (1 + math.cos(math.pi * decayed / config.decay_steps)) / 2
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine


def drop_encoder_gradients(run: Run) -> None:
    """Drop the encoder's gradients in a run without images: it is then not decayed either."""
    if not run.data.has_images:
        for parameter in run.tower.parameters():
            parameter.grad = None


def _update(run: Run, norm: Tensor, factor: float, step: int) -> tuple[Tensor, list[ClipResult]]:
    """Clip the gradient, step the optimizer at ``factor`` of the peak rates, apply QK-Clip."""
    drop_encoder_gradients(run)
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


def _skip_update(run: Run) -> tuple[Tensor, list[ClipResult]]:
    """Leave all parameters unchanged; returns the same as :func:`_update`."""
    run.optimizer.zero_grad(set_to_none=True)
    return run.step_metrics.after_update(), [clip.step(clip=False) for clip in run.clips]


def _stop(run: Run, step: int, loss: float | None, fault: Fault) -> None:
    """Report why the run stops; name the weights or gradients that are not finite.

    Raises:
        PretrainError: always; the same on every rank.
    """
    skipped = f", after {fault.skipped} steps skipped in a row" if fault.skipped else ""
    advice = (
        f"nothing was updated{skipped}. Lower optimizer.lr, or look at the data of this step, and "
        "start again: the run continues from its newest checkpoint if it has one"
    )
    if fault.kind == "spike":
        raise PretrainError(f"{fault.reason}, at step {step}; {advice}")
    gradients = {name: p.grad for name, p in run.parameters() if p.grad is not None}
    if weights := _not_finite(run.named_tensors):
        cause = f"weight {_first_of(weights)}"
    elif names := _not_finite(gradients):
        cause = f"gradient of {_first_of(names)}"
    else:
        cause = "norm of the gradient" if math.isfinite(loss or 0.0) else "loss"
    raise PretrainError(f"the {cause} is not finite at step {step} (loss {loss}); {advice}")


def check_weights(run: Run, step: int, action: Action) -> None:
    """Check that the weights are finite after step ``step``, before they are saved.

    The guard sees a step before its update; later steps notice weights that are not finite by
    their loss, but a checkpoint of such weights must not replace those of finite ones. All ranks
    call this together. It waits for the device.

    Args:
        action: reaction to weights that are not finite. To skip the step is too late: the run
            stops.

    Raises:
        PretrainError: some weight is not finite; the same on every rank.
        RollBack: the same, if ``action`` is ``roll_back``.
    """
    tensors = [
        x.detach() for x in run.named_tensors.values() if x.is_floating_point() and x.numel()
    ]
    # The largest absolute value: unlike the 2-norm, it does not overflow for finite weights.
    largest = nn.utils.get_total_norm(tensors, math.inf)
    if max_over_ranks(not largest.isfinite()) == [0]:
        return
    reason = f"the weight {_first_of(_not_finite(run.named_tensors))} is not finite"
    if action == "roll_back":
        raise RollBack(reason)
    raise PretrainError(
        f"{reason} after step {step}, which is not saved: lower optimizer.lr, and start again; the "
        "run continues from its newest checkpoint if it has one"
    )


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with an entry that is not finite, of all ranks."""
    local = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, local)
    return sorted({name for names in gathered for name in names})


def _first_of(names: Sequence[str]) -> str:
    return f"{names[0]} (and {len(names) - 1} others)" if len(names) > 1 else names[0]
