"""Tests an attention layout by running its module with scaled rows.

A layout is guessed from a module's structure. The trial scales the rows as QK-Clip would and checks
that exactly the logits follow, so that a wrong guess raises an error and never changes a model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from muonclip.attention_layouts import AttentionLayout
from muonclip.distributed.sharding import is_dtensor
from muonclip.qk_clip import row_factors
from muonclip.row_scaling import ScalingPlan


class AttentionInputs(Exception):
    """Aborts a forward pass and carries out the arguments of the attention function."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, bias: Any) -> None:
        super().__init__()
        self.query, self.key, self.value, self.mask, self.bias = query, key, value, mask, bias


@torch.no_grad()
def check_layout(
    name: str, layout: AttentionLayout, module: nn.Module, run: Callable[[], AttentionInputs]
) -> bool:
    """Check that the logits follow when the rows of a layout are scaled.

    The module runs twice with the same random numbers, and training continues with those that it
    would have drawn without the trial.

    Args:
        name: the layer, for messages.
        layout: the layout to test.
        module: the attention module.
        run: runs the module's forward pass up to its attention function.

    Returns:
        Whether the trial is over. It must be repeated if the layer is not trained yet, or the batch
        is empty or has logits that are not finite.

    Raises:
        ValueError: if the logits do not follow, or something else changes.
    """
    try:
        plan = ScalingPlan({name: layout})
    except ValueError:
        # The weights of this pass need not be those of the step, which raises the error for its:
        # another adapter may be active, or ``functional_call`` may pass computed weights.
        return False
    if name in plan.skipped:
        return False
    # Powers of four: their square roots are powers of two, so scaling is free of rounding errors.
    exponents = torch.arange(layout.num_heads, device="cpu").remainder(5)
    gamma = torch.ones(layout.num_heads, dtype=torch.float32, device="cpu").ldexp(-2 * exponents)
    scaled = _scaled_parameters(module, plan, gamma)
    if scaled is None:
        return True
    device = plan.tensors[0].tensor.device
    with _forked_random_state(device):  # LoRA may have dropout
        before = run()
    if before.query.size(1) != layout.num_heads:
        return False  # ``observe_attention`` raises the error
    if before.query.numel() == 0 or before.key.numel() == 0:
        return False
    with _forked_random_state(device), _replaced(scaled):
        after = run()
    expected = _some_logits(before) * gamma.to(before.query.device)[:, None, None]
    actual = _some_logits(after)
    if not (expected.isfinite().all() and actual.isfinite().all()):
        return False  # an overflow says nothing about the layout
    error = (actual - expected).abs().amax((-2, -1))
    follows = (error <= 0.01 * expected.abs().amax((-2, -1))).all()
    if not follows or not _is_close(before.value, after.value):
        raise ValueError(
            f"layer {name!r}: when the rows of its layout are scaled, its logits do not follow, or "
            "its values change: either queries or keys are normalized or changed between "
            "projection and attention, or the rows are not those of the heads. Declare its "
            "AttentionLayout, or leave it out (exclude; qk_clip_exclude of for_model)"
        )
    if not (_unchanged(before.mask, after.mask) and _unchanged(before.bias, after.bias)):
        raise ValueError(
            f"layer {name!r}: when the rows of its layout are scaled, the bias that is added to "
            "its logits changes too, as with relative positions that are multiplied by queries: "
            "no factor of QK-Clip is exact there. Leave it out (exclude; qk_clip_exclude of "
            "for_model)"
        )
    return True


def _scaled_parameters(
    module: nn.Module, plan: ScalingPlan, gamma: Tensor
) -> list[tuple[nn.Module, str, nn.Parameter]] | None:
    """Scaled copies of a plan's parameters: owner, attribute and new value.

    None if a parameter is sharded, or is not in the module.
    """
    owners = {
        id(parameter): (owner, name)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
    }
    factors = row_factors(gamma, plan)
    scaled = []
    for x in plan.tensors:
        if id(x.tensor) not in owners or is_dtensor(x.tensor):
            return None
        value = x.tensor * x.local_factors(factors).to(x.tensor.dtype)
        scaled.append((*owners[id(x.tensor)], nn.Parameter(value, requires_grad=False)))
    return scaled


def _forked_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Restores the random number generators of the CPU and of a GPU at the end."""
    if device.type not in ("cuda", "xpu"):  # the generators of others have another interface
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


@contextmanager
def _replaced(parameters: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> Iterator[None]:
    """Temporarily replace parameters of modules.

    Within ``torch.func.functional_call`` they may be plain tensors, which ``setattr`` refuses.
    """
    originals = [owner._parameters[name] for owner, name, _ in parameters]
    try:
        for owner, name, parameter in parameters:
            owner._parameters[name] = parameter
        yield
    finally:
        for (owner, name, _), original in zip(parameters, originals, strict=True):
            owner._parameters[name] = original


def _unchanged(before: Any, after: Any) -> bool:
    """Whether a mask or bias stayed the same; only floating tensors can change."""
    if not isinstance(before, Tensor) or not before.is_floating_point():
        return True
    return _is_close(before, after)


def _is_close(before: Tensor, after: Tensor) -> bool:
    return torch.allclose(before, after, rtol=0.01, equal_nan=True)


def _some_logits(inputs: AttentionInputs, tokens: int = 16) -> Tensor:
    """Products of the first queries and keys of the first sequence, [heads, queries, keys]."""
    query, key = (x[0, :, :tokens].float() for x in (inputs.query, inputs.key))
    logits: Tensor = query @ key.repeat_interleave(query.size(0) // key.size(0), 0).mT
    return logits
