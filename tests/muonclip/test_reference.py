"""The optimizer compared with the slow reference, which computes singular values in float64."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonclip import COEFFICIENTS, MuonClip, orthogonalize, reference
from muonclip.orthogonalize import coefficient_steps

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
KINDS = ("random", "low rank", "rank one", "ill-conditioned", "orthogonal", "zero")


def matrix_of(kind: str, n: int, m: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank = min(n, m)
    if kind == "zero":
        return torch.zeros(n, m, dtype=torch.float64)
    if kind == "random":
        return normal(n, m)
    if kind in ("low rank", "rank one"):
        rank = 1 if kind == "rank one" else max(1, rank // 4)
        return normal(n, rank) @ normal(rank, m)
    left, right = torch.linalg.qr(normal(n, rank)).Q, torch.linalg.qr(normal(m, rank)).Q
    lowest = -8.0 if kind == "ill-conditioned" else 0.0
    values = torch.logspace(lowest, 0, rank, dtype=torch.float64)
    return left @ values.diag() @ right.mT


def steps_of(name: str) -> int:
    return 10 if name == "deepseek_v4" else 5


def steepest_slope(name: str, steps: int) -> float:
    """The largest |dp/ds| of the composed polynomial where singular values may be."""
    s = torch.linspace(0, 1.004, 20001, dtype=torch.float64)
    slope = torch.ones_like(s)
    for a, b, c in coefficient_steps(name, steps):  # type: ignore[arg-type]
        slope = slope * (a + 3 * b * s**2 + 5 * c * s**4)
        s = a * s + b * s**3 + c * s**5
    return slope.abs().max().item()


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(COEFFICIENTS)),
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    form=st.sampled_from(["auto", "direct", "gram"]),
    dtype=st.sampled_from(sorted(UNIT, key=str)),
    exponent=st.sampled_from([-38, -30, -6, 0, 6, 30, 37]),
    seed=st.integers(0, 2**16),
)
def test_newton_schulz_is_exact_to_rounding(
    name: str,
    kind: str,
    n: int,
    m: int,
    form: str,
    dtype: torch.dtype,
    exponent: int,
    seed: int,
) -> None:
    """Every coefficient set, form and precision, on every kind of matrix and of any size.

    No arithmetic in ``dtype`` does better than the exact result for an input that is rounded to
    it, which the polynomial magnifies by up to its steepest slope: this, and a rounding at each
    step, is all the error there is.
    """
    assume((form, dtype) != ("gram", torch.bfloat16))  # refused
    _check_rounding(matrix_of(kind, n, m, seed) * 10.0**exponent, name, form, dtype)


@pytest.mark.parametrize("name", sorted(COEFFICIENTS))
@pytest.mark.parametrize("dtype", sorted(UNIT, key=str), ids=str)
@pytest.mark.parametrize("shape", [(16, 16), (32, 64), (64, 128), (128, 64), (65, 128)], ids=str)
def test_every_polynomial_is_exact_on_both_sides_of_the_size_limits(
    name: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Among them are cubic ones, without a product that all others have."""
    _check_rounding(matrix_of("random", *shape, seed=0), name, "auto", dtype)


def _check_rounding(matrix: Tensor, name: str, form: str, dtype: torch.dtype) -> None:
    steps = steps_of(name)
    result = orthogonalize(
        matrix.float() if dtype != torch.float64 else matrix,
        coefficients=name,  # type: ignore[arg-type]
        steps=steps,
        dtype=dtype,
        form=form,  # type: ignore[arg-type]
    )
    exact = reference.orthogonalize(
        matrix.float(),
        coefficients=name,  # type: ignore[arg-type]
        steps=steps,
    )
    size = math.sqrt(
        min(matrix.shape)
    )  # of the result, whose singular values are at most about 1.3
    error = UNIT[dtype] * (2 * steepest_slope(name, steps) + 8 * steps * size)
    if form != "direct":  # see test_forms_are_about_as_exact
        error *= 20
    assert (result.double() - exact).norm() <= min(error, 4 * size)


@pytest.mark.parametrize("name", sorted(COEFFICIENTS))
@pytest.mark.parametrize("shape", [(48, 48), (24, 96), (96, 24), (12, 48)])
def test_forms_are_about_as_exact(name: str, shape: tuple[int, int]) -> None:
    """In float32 the Gram form is within bfloat16's rounding (2^-8) of the direct form.

    The Gram matrix is recomputed before its rounding can grow, as it would for a low rank.
    """
    steps = steps_of(name)
    for kind in KINDS[:4]:
        matrix = matrix_of(kind, *shape, seed=0).float()
        direct, gram = (
            orthogonalize(matrix, coefficients=name, steps=steps, form=form)  # type: ignore[arg-type]
            for form in ("direct", "gram")
        )
        exact = reference.orthogonalize(matrix, coefficients=name, steps=steps)  # type: ignore[arg-type]
        error = (direct - exact).norm()
        assert (gram - exact).norm() < 2 * error + 2**-8 * exact.norm(), kind


@pytest.mark.parametrize("name", sorted(COEFFICIENTS))
def test_no_set_leaves_its_range_above_one(name: str) -> None:
    """Rounding lifts the largest singular value over one: CANS as published then diverges."""
    for margin in (1.0, 1.002, 1.004):
        value = margin
        for a, b, c in coefficient_steps(name, steps_of(name)):  # type: ignore[arg-type]
            value = a * value + b * value**3 + c * value**5
        assert 0.1 < value < 1.3


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    nesterov=st.booleans(),
    momentum=st.sampled_from([0.0, 0.5, 0.95]),
    name=st.sampled_from(sorted(COEFFICIENTS)),
    seed=st.integers(0, 2**16),
)
def test_steps_match_the_papers(
    n: int, m: int, nesterov: bool, momentum: float, name: str, seed: int
) -> None:
    """Five steps from the algorithm's own sum M, where the optimizer keeps an average."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, m, generator=generator, dtype=torch.float64)
    parameter = nn.Parameter(start.clone())
    optimizer = MuonClip(
        [{"params": [parameter], "algorithm": "muon"}],  # a single row too
        lr=0.1,
        momentum=momentum,
        nesterov=nesterov,
        ns_coefficients=name,  # type: ignore[arg-type]
        ns_steps=steps_of(name),
        ns_dtype=torch.float64,
    )
    weight, buffer = start, torch.zeros_like(start)
    for _ in range(5):
        gradient = torch.randn(n, m, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.clone()
        optimizer.step()
        weight, buffer = reference.muon_step(
            weight,
            gradient,
            buffer,
            lr=0.1,
            momentum=momentum,
            nesterov=nesterov,
            coefficients=name,  # type: ignore[arg-type]
            steps=steps_of(name),
        )
    assert torch.allclose(parameter, weight, atol=1e-8, rtol=1e-8)
