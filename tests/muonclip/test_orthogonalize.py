"""Newton-Schulz compared with an independent singular value decomposition in float64."""

import importlib
from typing import Literal
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.optim._muon import _zeropower_via_newtonschulz

from muonclip import orthogonalize, update_scale
from muonclip.kernels import blocked_product, matrix_polynomial, support
from muonclip.orthogonalize import COEFFICIENTS, CoefficientName, Form, coefficient_steps

module = importlib.import_module("muonclip.orthogonalize")  # the function has its name


@pytest.fixture(params=[True, False], ids=["products in 16 bits", "products in float32"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has fast products in 16 bits, and one that has not."""
    monkeypatch.setattr(support, "_multiplies_fast", lambda dtype: request.param)


def matrix_with(singular_values: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """A float64 n x m matrix with these singular values, and its singular vectors."""
    rank = len(singular_values)
    left = torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(m, rank, dtype=torch.float64)).Q
    return left @ singular_values.diag() @ right.mT, left, right


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 32), (2, 32, 64), (300, 200), (2, 3, 200, 100)], ids=str)
def test_results_are_contiguous(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert orthogonalize(torch.randn(shape), dtype=dtype).is_contiguous()


@pytest.mark.parametrize(("n", "m"), [(24, 24), (16, 40), (40, 16)])
def test_keeps_singular_vectors_and_brings_values_near_one(n: int, m: int) -> None:
    """The quintic takes normalised values in [1e-3, 1] to between 0.47 and 1.20."""
    torch.manual_seed(0)
    values = torch.logspace(-2.3, 0, 16, dtype=torch.float64)
    matrix, left, right = matrix_with(values, n, m)
    result = orthogonalize(matrix, dtype=torch.float64)
    core = left.mT @ result @ right  # diagonal if and only if the vectors are kept
    assert torch.allclose(core, core.diag().diag(), atol=1e-10)
    assert torch.allclose(left @ core @ right.mT, result, atol=1e-10)
    assert core.diag().min() > 0.47
    assert core.diag().max() < 1.21


def test_one_step_is_the_polynomial_of_the_table() -> None:
    torch.manual_seed(0)
    values = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    matrix, left, right = matrix_with(values, 5, 7)
    result = orthogonalize(matrix, steps=1, dtype=torch.float64)
    s = values / values.norm()
    expected = left @ (3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5).diag() @ right.mT
    assert torch.allclose(result, expected, atol=1e-12)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 48), (1, 16)])
def test_agrees_with_torch_to_rounding(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) * 1e-3
    expected = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    result = orthogonalize(matrix, dtype=torch.bfloat16)
    assert result.dtype == torch.bfloat16
    # Each is off by about 1.2 % (Gaussian matrices, bfloat16), independently.
    assert (result.float() - expected.float()).norm() < 0.025 * expected.float().norm()


@settings(max_examples=30, deadline=None)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_batch_equals_one_by_one(batch: list[int], n: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(*batch, n, m, generator=generator, dtype=torch.float64)
    together = orthogonalize(matrices, dtype=torch.float64)
    alone = [orthogonalize(one, dtype=torch.float64) for one in matrices.reshape(-1, n, m)]
    assert together.shape == matrices.shape
    assert torch.allclose(together.reshape(-1, n, m), torch.stack(alone), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 7),
    at_once=st.integers(1, 4),
    rows=st.integers(8, 40),
    n=st.integers(2, 90),
    m=st.integers(2, 90),
    form=st.sampled_from(["direct", "gram"]),
    coefficients=st.sampled_from(["quintic", "cubic", "polar_express"]),
    steps=st.integers(1, 7),
    seed=st.integers(0, 2**16),
)
def test_blocks_and_shared_memory_do_not_change_the_result(
    batch: int,
    at_once: int,
    rows: int,
    n: int,
    m: int,
    form: Literal["direct", "gram"],
    coefficients: CoefficientName,
    steps: int,
    seed: int,
) -> None:
    """Also blocks and parts of a batch that are smaller than the others."""
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(batch, n, m, generator=generator, dtype=torch.float64)
    expected = []
    for matrix in matrices:
        x = matrix / matrix.norm()
        for a, b, c in coefficient_steps(coefficients, steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        expected.append(x)
    with (
        mock.patch.object(blocked_product, "block_rows", lambda n, dtype: rows),
        mock.patch.object(matrix_polynomial, "_CACHE_BYTES", at_once * n * m * 8),
        mock.patch.object(module, "_FEW_ELEMENTS", 0),
    ):
        result = orthogonalize(
            matrices, coefficients=coefficients, steps=steps, dtype=torch.float64, form=form
        )
    assert torch.allclose(result, torch.stack(expected), atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(exponent=st.integers(-6, 10), seed=st.integers(0, 2**16))
def test_scale_free(exponent: int, seed: int) -> None:
    """Loss scaling and momentum's prefactor drop out."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(6, 10, generator=generator, dtype=torch.float64)
    base = orthogonalize(matrix, dtype=torch.float64)
    scaled = orthogonalize(matrix * 10.0**exponent, dtype=torch.float64)
    assert torch.allclose(base, scaled, atol=1e-9)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("shape", [(3, 5, 11), (0, 5, 11), (3, 100, 200), (0, 100, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_transpose_commutes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    result = orthogonalize(matrix.mT, dtype=dtype)
    expected = orthogonalize(matrix, dtype=dtype).mT
    # Entries are about 0.1; in 16 bits, norms summed in another order change them by 1%.
    assert torch.allclose(result, expected, atol=1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_zero_stays_zero_and_input_is_untouched(dtype: torch.dtype) -> None:
    """Also where input and arithmetic share a dtype, and an in-place division would show."""
    torch.manual_seed(0)
    matrices = torch.stack([torch.zeros(4, 6), torch.randn(4, 6)]).to(dtype)
    before = matrices.clone()
    result = orthogonalize(matrices, dtype=dtype)
    assert torch.equal(matrices, before)
    assert result[0].count_nonzero() == 0
    assert result[1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (0, 4), (4, 0), (0, 0), (2, 0, 3, 4), (2, 3, 0)])
@pytest.mark.parametrize("form", ["direct", "gram"])
def test_without_elements(shape: tuple[int, ...], form: Form) -> None:
    result = orthogonalize(torch.zeros(shape), form=form, dtype=torch.float16)
    assert result.shape == shape
    assert result.dtype == torch.float16


@pytest.mark.parametrize(
    ("matrices", "options", "message"),
    [
        (torch.zeros(3), {}, "matrices must be"),
        (torch.zeros(3, 3, dtype=torch.complex64), {}, "matrices must be"),
        (torch.zeros(3, 3), {"steps": 0}, "steps must be"),
        (torch.zeros(3, 3), {"coefficients": "septic"}, "coefficients must be one of"),
        (torch.zeros(3, 3), {"coefficients": (1.0, 2.0)}, "three finite numbers"),
        (torch.zeros(3, 3), {"coefficients": (1.0, 2.0, float("nan"))}, "three finite numbers"),
        (torch.zeros(3, 3), {"eps": 1.0}, "eps must be in"),
        (torch.zeros(3, 3), {"eps": float("nan")}, "eps must be in"),
        (torch.zeros(3, 3), {"dtype": torch.int8}, "dtype must be one of"),
        (torch.zeros(3, 3), {"form": "cubic"}, "form must be one of"),
        (torch.zeros(3, 3), {"form": "gram", "dtype": torch.bfloat16}, "unstable in bfloat16"),
    ],
)
def test_errors_name_the_argument(matrices: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthogonalize(matrices, **options)


def test_coefficients_repeat_the_last_triple() -> None:
    assert coefficient_steps("quintic", 3) == [(3.4445, -4.7750, 2.0315)] * 3
    assert coefficient_steps([1, 2, 3], 2) == [(1, 2, 3)] * 2
    assert coefficient_steps([(1, 2, 3), (4, 5, 6)], 3) == [(1, 2, 3), (4, 5, 6), (4, 5, 6)]


@given(
    triples=st.lists(st.tuples(*[st.floats(-9, 9)] * 3), min_size=1, max_size=9),
    steps=st.integers(1, 9),
)
def test_every_triple_has_an_effect(triples: list[tuple[float, ...]], steps: int) -> None:
    if steps >= len(triples):
        assert coefficient_steps(triples, steps)[: len(triples)] == triples
        return
    with pytest.raises(ValueError, match=f"steps must be at least {len(triples)}"):
        coefficient_steps(triples, steps)


def test_coefficients_of_a_name_that_differ_from_those_of_others() -> None:
    """With fewer steps, ``deepseek_v4`` would be ``quintic``."""
    schedules = {tuple(coefficient_steps(name, 9)) for name in COEFFICIENTS}
    assert len(schedules) == len(COEFFICIENTS)
    with pytest.raises(ValueError, match="steps must be at least 9"):
        coefficient_steps("deepseek_v4", 8)


def test_update_scale() -> None:
    assert update_scale((16, 64)) == pytest.approx(0.2 * 8)
    assert update_scale((8, 16, 64)) == pytest.approx(0.2 * 8)  # experts do not count
    assert update_scale((64, 16), "original") == pytest.approx(2)
    assert update_scale((16, 64), "original") == 1
    assert update_scale((16, 64), "spectral") == pytest.approx(0.5)
    assert update_scale((16, 64), "none") == 1
    assert update_scale((16, 64), rms=0.4) == pytest.approx(0.4 * 8)
    with pytest.raises(ValueError, match="mode must be one of"):
        update_scale((2, 2), "nuclear")  # type: ignore[arg-type]


def test_matched_update_has_adamw_root_mean_square() -> None:
    """Moonlight: scaled so, an update's root mean square is about 0.2 whatever its shape."""
    torch.manual_seed(0)
    for shape in [(32, 256), (256, 32), (128, 128)]:
        update = orthogonalize(torch.randn(shape), dtype=torch.float32) * update_scale(shape)
        assert 0.15 < update.square().mean().sqrt() < 0.25


@pytest.mark.parametrize("shape", [(8, 12), (3, 40, 256), (520, 520)])
def test_shapes_without_data(shape: tuple[int, ...]) -> None:
    """Fake tensors, with which tools estimate memory."""
    with FakeTensorMode():
        result = orthogonalize(torch.empty(shape), dtype=torch.float32)
    assert result.shape == shape
