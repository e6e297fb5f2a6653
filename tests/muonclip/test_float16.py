"""Newton-Schulz in float16: the default for rectangular matrices on GPUs, and its range.

No test here runs on a GPU: the choice is a function of the device, and float16 runs on the CPU.
"""

from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from muonclip import (
    MatrixLayout,
    MuonClip,
    assign_parameters,
    describe_assignment,
    orthogonalize,
    reference,
)
from muonclip.kernels import matrix_polynomial
from muonclip.orthogonalize import default_ns_dtype, prefers_gram

CUDA = torch.device("cuda")
HALF, BRAIN = torch.float16, torch.bfloat16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_low_rank(n: int, m: int, rank: int) -> Tensor:
    return random(n, rank) @ random(rank, m, seed=1)


def relative_error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


# ---------------------------------------------------------------------- the default


@pytest.mark.parametrize(
    ("shapes", "dtype", "expected"),
    [
        ([(512, 512)], torch.float32, BRAIN),
        ([(512, 767)], torch.float32, BRAIN),
        ([(512, 768)], torch.float32, HALF),
        ([(768, 512)], torch.bfloat16, HALF),
        ([(512, 768)], torch.float64, BRAIN),
        ([(64, 128)], torch.float32, BRAIN),  # small: the direct form
        ([(64, 129)], torch.float32, HALF),
        ([(65, 98)], torch.float32, HALF),
        ([(1, 4096)], torch.float32, HALF),
        ([(512, 1024), (128, 1024)], torch.float32, HALF),
        ([(1024, 1024), (128, 1024)], torch.float32, BRAIN),  # not all matrices
    ],
)
def test_the_default_on_a_gpu_follows_the_shapes(
    shapes: list[tuple[int, int]], dtype: torch.dtype, expected: torch.dtype
) -> None:
    single = [(1, n, m) for n, m in shapes]
    assert default_ns_dtype(CUDA, dtype, single) == expected
    assert default_ns_dtype(torch.device("mps"), dtype, single) == BRAIN
    assert default_ns_dtype(torch.device("cpu"), dtype, single) == torch.float32


@pytest.mark.parametrize(
    ("layout", "shape", "expected"),
    [
        (None, (256, 1024), HALF),
        (None, (4, 256, 1024), HALF),
        (MatrixLayout.per_head(1024, 8), (1024, 1024), HALF),  # heads of 128 x 1024
        (MatrixLayout((1024, 256, 256)), (1536, 1024), BRAIN),
        (MatrixLayout((512, 512), transposed=True), (1024, 1024), HALF),
        (MatrixLayout(flatten=True), (64, 64, 3, 3), HALF),
        (MatrixLayout(view=(256, 256)), (256, 4, 64), BRAIN),
    ],
)
def test_parameters_on_a_gpu(
    layout: MatrixLayout | None, shape: tuple[int, ...], expected: torch.dtype
) -> None:
    with FakeTensorMode():
        p = nn.Parameter(torch.empty(shape, device="cuda"))
        p.grad = torch.empty_like(p)
        groups = [{"params": [("p", p)], "algorithm": "muon", "layout": layout}]
        optimizer = MuonClip(groups, nonfinite="skip")
        (param,) = optimizer._muon_params(optimizer._work())
        assert param.ns_dtype == expected
        assert param.update_dtype == (torch.float32 if expected == HALF else BRAIN)
        optimizer.step()
        pinned = MuonClip(groups, ns_dtype=torch.float32, nonfinite="skip")
        (param,) = pinned._muon_params(pinned._work())
        assert param.ns_dtype == torch.float32


def test_the_description_names_both_dtypes() -> None:
    with FakeTensorMode():
        model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(2)))
        for layer, rows in zip(model, (256, 1024), strict=True):
            layer.weight = nn.Parameter(torch.empty(rows, 256, device="cuda"))
        text = describe_assignment(assign_parameters(model))
        assert "Newton-Schulz in bfloat16 and float16" in text
        text = describe_assignment(assign_parameters(model), ns_dtype=torch.float32)
        assert text.endswith("Newton-Schulz in float32")


@pytest.mark.parametrize("shape", [(256, 256), (256, 1024)])
def test_orthogonalize_chooses_as_the_optimizer(shape: tuple[int, int]) -> None:
    expected = HALF if shape[1] > 256 else BRAIN
    with FakeTensorMode():
        matrix = torch.empty(shape, device="cuda")
        assert orthogonalize(matrix).dtype == expected
        in_gram_form = orthogonalize(matrix, form="gram").dtype
        assert in_gram_form == (HALF if expected == HALF else torch.float32)
    assert orthogonalize(random(*shape), form="gram").dtype == torch.float32


@settings(max_examples=60)
@given(
    count=st.integers(1, 5),
    n=st.integers(1, 160),
    m=st.integers(1, 160),
    dtype=st.sampled_from([HALF, BRAIN, torch.float32]),
)
def test_one_predicate_decides_on_dtype_and_form(
    count: int, n: int, m: int, dtype: torch.dtype
) -> None:
    used = []

    def record(x: Tensor, *_: Any, **__: Any) -> Tensor:
        used.append(x)
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("muonclip.orthogonalize"), "_gram_form", record)
        orthogonalize(random(count, n, m), dtype=dtype)
        assert bool(used) == (dtype != BRAIN and prefers_gram(n, m, count, on_cpu=True))
        used.clear()
        with FakeTensorMode():  # which cannot copy a tall matrix
            orthogonalize(torch.empty(count, min(n, m), max(n, m), device="cuda"), dtype=dtype)
        assert bool(used) == (dtype != BRAIN and prefers_gram(n, m, count))
    assert prefers_gram(n, m) == (default_ns_dtype(CUDA, torch.float32, [(1, n, m)]) == HALF)
    assert prefers_gram(n, m) == prefers_gram(m, n)


# ---------------------------------------------------------------------- accuracy


# Of random matrices, largest at aspect ratio 1.5, and of those of low rank (benchmarks/README.md,
# "Coefficients and precision", has 2e-3 and 3e-2 for 256 x 1024).
RANDOM, LOW_RANK = 1e-2, 6e-2


@pytest.mark.parametrize(
    ("n", "m"),
    [
        *((side, int(side * aspect)) for side in (24, 96, 256) for aspect in (1.5, 2, 4, 8)),
        *((768, 512), (512, 2048)),
    ],
)
def test_errors_of_the_default_coefficients(n: int, m: int) -> None:
    matrix = random(n, m)
    exact = reference.orthogonalize(matrix)
    half, brain = (
        relative_error(orthogonalize(matrix, dtype=dtype), exact) for dtype in (HALF, BRAIN)
    )
    assert half < RANDOM
    assert half < brain


@pytest.mark.parametrize("shape", [(128, 192), (128, 512), (512, 128), (96, 768)])
def test_errors_on_matrices_of_low_rank_are_several_times_those_of_bfloat16(
    shape: tuple[int, int],
) -> None:
    matrix = of_low_rank(*shape, rank=min(shape) // 8)
    exact = reference.orthogonalize(matrix)
    half, brain = (
        relative_error(orthogonalize(matrix, dtype=dtype), exact) for dtype in (HALF, BRAIN)
    )
    assert half < LOW_RANK
    assert 4 * half < brain


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("shape", [(48, 200), (100, 200)], ids=str)
def test_the_gram_form_is_as_exact_where_results_are_allocated(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], coefficients: Any, dtype: torch.dtype
) -> None:
    """On a GPU and with torch.compile: results are symmetric there, too, up to rounding."""
    matrix = random(*shape)
    exact = reference.orthogonalize(matrix, coefficients=coefficients)
    errors = []
    for is_eager_on_cpu in (True, False):
        monkeypatch.setattr(
            matrix_polynomial, "_is_eager_on_cpu", lambda x, result=is_eager_on_cpu: result
        )
        result = orthogonalize(matrix, dtype=dtype, form="gram", coefficients=coefficients)
        errors.append(relative_error(result, exact))
    assert errors[1] < 1.2 * errors[0]


# ---------------------------------------------------------------------- range of updates


def change(shape: tuple[int, ...], **options: Any) -> Tensor:
    """The change of a parameter in a step of learning rate 1."""
    p = nn.Parameter(torch.zeros(shape))
    p.grad = random(*shape)
    groups = [{"params": [p], "algorithm": "muon"}]
    MuonClip(groups, lr=1.0, weight_decay=0.0, ns_dtype=HALF, **options).step()
    return p.detach()


@pytest.mark.parametrize("variant", ["muon", "normuon"])
@pytest.mark.parametrize("update_rms", [1e-30, 1e-6, 0.2, 1e3, 1e6, 1e30])
def test_an_update_rms_of_any_size_is_exact(update_rms: float, variant: str) -> None:
    """Times the root of a side, 1e3 would leave the range of float16, and 1e-6 lose most bits."""
    usual = change((96, 256), update_rms=0.2, variant=variant).double() / 0.2
    found = change((96, 256), update_rms=update_rms, variant=variant).double() / update_rms
    assert found.isfinite().all()
    assert relative_error(found, usual) < 2.0**-10


def test_parameters_of_one_group_may_differ_in_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "muonclip.optimizer.default_ns_dtype",
        lambda _, dtype, shapes: default_ns_dtype(CUDA, dtype, shapes),
    )
    shapes = [(96, 96), (96, 256), (2, 72, 144), (16, 24)]
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in params:
        p.grad = random(*p.shape)
    optimizer = MuonClip(params, lr=1.0, weight_decay=0.0, update_rms=1e6)
    dtypes = [param.ns_dtype for param in optimizer._muon_params(optimizer._work())]
    assert dtypes == [BRAIN, HALF, HALF, BRAIN]
    optimizer.step()
    for p, dtype in zip(params, dtypes, strict=True):
        assert p.grad is not None
        gradients = p.grad.view(-1, *p.shape[-2:])
        exact = torch.stack([reference.orthogonalize(gradient) for gradient in gradients])
        exact = exact.view(p.shape) * -1e6 * max(p.shape[-2:]) ** 0.5
        assert relative_error(p.detach(), exact) < (RANDOM if dtype == HALF else 0.03)
