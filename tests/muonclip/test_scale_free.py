"""Muon's updates do not depend on the scale of the gradient, over the whole range of its dtype."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from muonclip import MuonClip, orthogonalize, reference

UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# The slope of five quintic steps at zero, which magnifies rounding of the input (3.4445^5 = 485),
# times the roundings of a step.
MAGNIFIED = 1000


def entries(shape: tuple[int, ...], exponent: float, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 2.0**exponent
    largest = torch.finfo(dtype).max / 4
    return values.clamp(-largest, largest).to(dtype)


def relative_error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


def range_of(dtype: torch.dtype) -> tuple[int, int]:
    """Exponents of two: from a few bits above the smallest denormal number to near the largest."""
    lowest = {torch.float64: -1060, torch.float32: -140, torch.bfloat16: -127, torch.float16: -20}
    highest = {torch.float64: 1018, torch.float32: 122, torch.bfloat16: 122, torch.float16: 10}
    return lowest[dtype], highest[dtype]


@settings(max_examples=100, deadline=None)
@given(
    position=st.floats(0, 1),
    other=st.floats(0, 1),
    dtype=st.sampled_from(sorted(UNIT, key=str)),
    ns_dtype=st.sampled_from(sorted(UNIT, key=str)),
    form=st.sampled_from(["direct", "gram"]),
    eps=st.sampled_from([0.0, 1e-15, 1e-7]),
    seed=st.integers(0, 2**16),
)
@example(
    position=0.0, other=1.0, dtype=torch.float32, ns_dtype=torch.float32, form="direct", eps=1e-7,
    seed=0,
)  # fmt: skip
def test_a_stack_of_tiny_and_huge_matrices(
    position: float,
    other: float,
    dtype: torch.dtype,
    ns_dtype: torch.dtype,
    form: str,
    eps: float,
    seed: int,
) -> None:
    low, high = range_of(dtype)
    stack = torch.stack(
        [
            entries((6, 16), low + (high - low) * position, dtype, seed),
            torch.zeros(6, 16, dtype=dtype),
            entries((6, 16), low + (high - low) * other, dtype, seed + 1),
        ]
    )
    form = "direct" if ns_dtype == torch.bfloat16 else form
    result = orthogonalize(stack, dtype=ns_dtype, form=form, eps=eps)  # type: ignore[arg-type]
    assert result[1].count_nonzero() == 0
    for index in (0, 2):
        exact = reference.orthogonalize(stack[index])
        assert relative_error(result[index], exact) < min(MAGNIFIED * UNIT[ns_dtype], 0.1)


@settings(max_examples=40, deadline=None)
@given(
    position=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
    ns_dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
    nesterov=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_first_update_of_a_gradient_of_any_scale(
    position: float, dtype: torch.dtype, ns_dtype: torch.dtype, nesterov: bool, seed: int
) -> None:
    """With momentum, whose first value is a tenth of the gradient."""
    low, high = range_of(dtype)
    # Five more bits, which the average loses at the lower end of a range.
    low += 0 if dtype == torch.float16 else 5
    tiny, huge = nn.Parameter(torch.zeros(6, 16)), nn.Parameter(torch.zeros(6, 16))
    params = [nn.Parameter(p.to(dtype)) for p in (tiny, huge)]
    for p, place in zip(params, (position, 1 - position), strict=True):
        p.grad = entries((6, 16), low + (high - low) * place, dtype, seed)
    MuonClip(
        params, lr=1.0, weight_decay=0.0, adjust_lr="none", ns_dtype=ns_dtype, nesterov=nesterov
    ).step()
    for p in params:
        assert p.grad is not None
        exact = reference.orthogonalize(p.grad)
        spacing = max(UNIT[ns_dtype], UNIT[dtype], 2.0**-13)
        assert relative_error(-p.detach(), exact) < min(MAGNIFIED * spacing, 0.1)


@pytest.mark.parametrize("exponent", [-126, -100, 0, 100, 120])
@pytest.mark.parametrize("ns_dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_bfloat16_parameters(ns_dtype: torch.dtype, exponent: int) -> None:
    """Their momentum is bfloat16 too, which has float32's range except for its denormals."""
    (p,) = params = [nn.Parameter(torch.zeros(6, 16, dtype=torch.bfloat16))]
    p.grad = entries((6, 16), exponent, torch.bfloat16, 0)
    MuonClip(params, lr=1.0, weight_decay=0.0, adjust_lr="none", ns_dtype=ns_dtype).step()
    # At 2^-126 a tenth of an entry has four bits left.
    assert relative_error(-p.detach(), reference.orthogonalize(p.grad)) < 0.1


def test_clipping_the_global_norm_does_not_change_an_update() -> None:
    """Emerging-Optimizers#229: a huge gradient elsewhere stopped healthy layers from training."""
    moved = []
    for clip in (False, True):
        healthy, huge = (nn.Parameter(torch.zeros(8, 16)) for _ in range(2))
        healthy.grad = entries((8, 16), 0, torch.float32, 0)
        huge.grad = entries((8, 16), 40, torch.float32, 1)
        if clip:
            nn.utils.clip_grad_norm_([healthy, huge], 1.0)
        MuonClip([healthy, huge], lr=1.0, weight_decay=0.0).step()
        moved.append(healthy.detach().clone())
    assert torch.allclose(*moved, atol=1e-4)


def test_zero_momentum_gives_a_zero_update() -> None:
    params = [nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))]
    params[0].grad, params[1].grad = torch.zeros(4, 6), torch.randn(4, 6)
    MuonClip(params, weight_decay=0.0, eps=0.0).step()
    assert torch.equal(params[0], torch.ones(4, 6))
    assert params[1].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum_dtype": torch.float16}, "cannot represent gradients below 6e-8 or above 65504"),
        ({"eps": 1.0}, "eps must be below 1"),
    ],
)
def test_options_that_limit_the_scale_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonClip([nn.Parameter(torch.ones(2, 2))], **options)


def test_no_float64_on_devices_without_it() -> None:
    """MPS has no float64: the accelerator branch runs on fake tensors with float64 disabled."""

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, (list, tuple)) else [result]:
                assert not (isinstance(value, Tensor) and value.dtype == torch.float64), func
            return result

    with FakeTensorMode():
        shapes = ((4, 6), (3, 4, 6), (6,))
        params = [nn.Parameter(torch.empty(s, device="cuda")) for s in shapes]
        optimizer = MuonClip(params, nonfinite="skip")
        for p in params:
            p.grad = torch.empty_like(p)
        with NoFloat64():
            optimizer.step()
            with pytest.raises(AssertionError):  # the test can fail
                torch.empty(1, device="cuda", dtype=torch.float64)
