"""Nothing depends on torch's default dtype, which Lightning's bf16-true sets around every step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonclip import (
    COEFFICIENTS,
    MuonClip,
    clip_factors,
    max_logits,
    max_logits_bound,
    orthogonalize,
    param_groups,
    screened_max_logits,
)

DEFAULTS = [torch.bfloat16, torch.float16, torch.float64]


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def train(dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Three steps, one of them with a bad gradient; then saved, loaded and one more."""
    layers = {"wide": (6, 4), "other": (4, 6), "norm": (6,), "experts": (2, 3, 5)}
    model = nn.Module()
    for name, shape in layers.items():
        setattr(model, name, nn.Parameter(random(*shape).to(dtype)))
    optimizer = MuonClip(param_groups(model), lr=0.1, nonfinite="skip", **options)
    for step in range(4):
        for parameter in model.parameters():
            gradient = random(*parameter.shape) * (step + 1)
            parameter.grad = gradient.mul(float("nan") if step == 1 else 1.0).to(dtype)
        optimizer.step()
        if step == 2:
            state = optimizer.state_dict()
            optimizer = MuonClip(param_groups(model), lr=0.1, nonfinite="skip", **options)
            optimizer.load_state_dict(state)
    state = optimizer.state_dict()["state"]
    kept = [v for entry in state.values() for v in entry.values() if isinstance(v, Tensor)]
    return [p.detach() for p in model.parameters()] + kept


@pytest.mark.parametrize("chosen", DEFAULTS)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"weight_decay_mode": "cautious", "momentum_warmup_steps": 3}),
        (torch.bfloat16, {"master_weights": True}),
        (torch.bfloat16, {"stochastic_rounding": True, "ns_dtype": torch.float32}),
    ],
)
def test_training_is_bit_identical(
    chosen: torch.dtype, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    expected = train(dtype, **options)
    with default(chosen):
        actual = train(dtype, **options)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


FUNCTIONS: dict[str, Callable[[], Any]] = {
    **{
        f"orthogonalize, {name}": lambda name=name: orthogonalize(
            random(5, 3), coefficients=name, steps=10
        )
        for name in COEFFICIENTS
    },
    "clip_factors": lambda: clip_factors(random(4).abs() * 200, 100.0, 2),
    "max_logits": lambda: max_logits(random(2, 4, 5, 6), random(2, 2, 7, 6), causal=True),
    "max_logits_bound": lambda: max_logits_bound(random(2, 4, 5, 6), random(2, 2, 7, 6)),
    "screened_max_logits": lambda: screened_max_logits(
        random(2, 4, 5, 6), random(2, 2, 7, 6), 1.0, mask=random(5, 7)
    ),
}


@pytest.mark.parametrize("chosen", DEFAULTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_bit_identical(name: str, chosen: torch.dtype) -> None:
    expected = FUNCTIONS[name]()
    with default(chosen):
        actual = FUNCTIONS[name]()
    pairs = (
        [(actual, expected)] if isinstance(expected, Tensor) else zip(actual, expected, strict=True)
    )
    for one, other in pairs:
        assert one.dtype == other.dtype and torch.equal(one, other)
