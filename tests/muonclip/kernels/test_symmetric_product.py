"""The symmetric product without a GPU: each backend, the rule that picks it, the operator."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from muonclip.kernels import blocked_product
from muonclip.kernels import symmetric_product as module
from muonclip.kernels.blocked_product import Matrices, new_squares
from muonclip.kernels.dense_product import dense
from muonclip.kernels.support import allows_tf32, has_triton
from muonclip.kernels.symmetric_product import (
    blocked,
    choose_backend,
    symmetric_product,
    unchecked_product,
)
from tests.muonclip.kernels.reference import check_symmetric_product, symmetric_factors

LARGE = 520  # enough rows for the blocked backend, and no multiple of its blocks


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes that pay depend on the threads."""
    monkeypatch.setattr(blocked_product, "cpu_threads", lambda: 1)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    n=st.integers(1, 70),
    k=st.integers(1, 40),
    rows=st.integers(8, 80),
    gram=st.booleans(),
    transposed=st.booleans(),
    with_c=st.booleans(),
    alpha=st.sampled_from([1.0, -2.5]),
    beta=st.sampled_from([1.0, 0.75]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_backends_against_float64(
    batch: int,
    n: int,
    k: int,
    rows: int,
    gram: bool,
    transposed: bool,
    with_c: bool,
    alpha: float,
    beta: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Also sizes that blocks do not divide, and fewer rows than blocks."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (x.to(dtype) for x in symmetric_factors(generator, (batch, n, k), gram, transposed))
    c = torch.randn(batch, n, n, generator=generator, dtype=torch.float64)
    c = (c + c.mT).to(dtype) if with_c else None
    beta = beta if with_c else 0.0
    with mock.patch.object(blocked_product, "block_rows", lambda n, dtype: rows):
        for backend in (dense, blocked):
            result = backend(a, b, c, alpha, beta)
            check_symmetric_product(result, a, b, c, alpha, beta)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    n=st.integers(1, 70) | st.sampled_from([128, 256]),  # whose rows are padded
    rows=st.integers(8, 80),
    with_c=st.booleans(),
    is_blocked=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_products_of_symmetric_matrices(
    batch: int,
    n: int,
    rows: int,
    with_c: bool,
    is_blocked: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Known symmetric factors, whose columns are multiplied in place of their rows."""
    generator = torch.Generator().manual_seed(seed)
    factors = symmetric_factors(generator, (batch, n, n), gram=False, transposed=False)
    backend = "blocked" if is_blocked else "dense"
    with (
        mock.patch.object(blocked_product, "block_rows", lambda n, dtype: rows),
        mock.patch.object(module, "choose_backend", lambda a: backend),
    ):
        a, b, c, out = new_squares(Matrices(torch.empty(batch, n, 1, dtype=dtype)), 4)
        for target, values in zip((a, b, c), (*factors, factors[0]), strict=True):
            target.tensor.copy_((values + values.mT) / 2)
        summand, beta = (c, 0.75) if with_c else (None, 0.0)
        assert unchecked_product(a, b, summand, -2.5, beta, out) is out
    expected = None if summand is None else summand.tensor
    check_symmetric_product(out.tensor, a.tensor, b.tensor, expected, -2.5, beta)


def test_above_the_threshold_blocks_agree_with_the_whole_product() -> None:
    """Through the public name, with several numbers of blocks, and in memory that is given."""
    torch.manual_seed(0)
    for n in (257, LARGE, 1030):
        a, c = torch.randn(1, n, 24), torch.randn(1, n, n)
        c += c.mT.clone()
        assert choose_backend(a) == "blocked"
        result = symmetric_product(a, a, c=c, alpha=0.5, beta=2.0)
        assert torch.allclose(result, dense(a, a, c, 0.5, 2.0), atol=1e-4)
        assert torch.allclose(symmetric_product(a, a), a @ a.mT, atol=1e-4)
        out = torch.full((1, n, n), torch.nan)
        assert symmetric_product(a, a, c=c, alpha=0.5, beta=2.0, out=out) is out
        assert torch.equal(out, result)


@pytest.mark.parametrize("backend", [dense, blocked])
def test_c_is_not_read_with_beta_zero(backend) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    a = torch.randn(2, 9, 5)
    c = torch.full((2, 9, 9), torch.nan)
    assert torch.allclose(backend(a, a, c, 1.0, 0.0), a @ a.mT, atol=1e-5)


@pytest.mark.parametrize("n", [3, LARGE])
def test_arguments_are_not_changed_and_the_result_is_new(n: int) -> None:
    torch.manual_seed(0)
    a, c = torch.randn(1, n, 4), torch.randn(1, n, n)
    a_before, c_before = a.clone(), c.clone()
    symmetric_product(a, a, c=c, beta=1.0).zero_()
    assert torch.equal(a, a_before)
    assert torch.equal(c, c_before)


def backend_of(
    batch: int, n: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> str:
    """On a machine that need not have the device."""
    with FakeTensorMode():
        return choose_backend(torch.empty(batch, n, n, dtype=dtype, device=device))


def test_choice_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend for each shape, dtype and device."""
    for threads, least in (1, 160), (2, 512):
        monkeypatch.setattr(blocked_product, "cpu_threads", lambda threads=threads: threads)
        assert backend_of(1, least - 1, torch.float32, "cpu") == "dense"
        assert backend_of(1, least, torch.float32, "cpu") == "blocked"
        assert backend_of(1, 383, torch.bfloat16, "cpu") == "dense"
    assert backend_of(1, 512, torch.bfloat16, "cpu") == "blocked"
    assert backend_of(0, 512, torch.float32, "cpu") == "dense"
    assert backend_of(1, 512, torch.float32, "meta") == "dense"
    assert backend_of(1, 4096) == "dense"  # no GPU here

    monkeypatch.setattr(module, "has_triton", lambda: True)
    assert backend_of(1, 4096) == "triton"
    assert backend_of(1, 1024) == "dense"  # too few tiles to fill a GPU
    assert backend_of(4, 1024) == "triton"
    assert backend_of(1000, 256) == "dense"  # too few tiles to a matrix to leave out many
    assert backend_of(1, 4096, torch.float64) == "dense"
    assert backend_of(1, 4096, torch.float32) == "dense"
    monkeypatch.setattr(module, "allows_tf32", lambda: True)
    assert backend_of(1, 4096, torch.float32) == "triton"
    assert backend_of(1, 4096, torch.float64) == "dense"


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("n", [8, 4096])
def test_shape_without_data(device: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake and meta tensors: what torch.compile and deferred initialisation work with."""
    monkeypatch.setattr(module, "has_triton", lambda: True)
    with FakeTensorMode():
        a = torch.empty(3, n, 16, dtype=torch.bfloat16, device=device)
        c = torch.empty(3, n, n, dtype=torch.bfloat16, device=device)
        for result in (symmetric_product(a, a), symmetric_product(a, a, c=c, beta=0.5)):
            assert result.shape == (3, n, n)
            assert result.dtype == torch.bfloat16
            assert result.device.type == device
            assert result.is_contiguous()


@pytest.mark.parametrize("n", [16, LARGE])
def test_compiles_without_a_graph_break(n: int) -> None:
    torch.manual_seed(0)

    def polynomial(x: Tensor) -> Tensor:
        gram = symmetric_product(x, x)
        return symmetric_product(gram, gram, c=gram, alpha=2.0, beta=-4.0)

    x = torch.randn(2, n, 8, dtype=torch.float64) / n**0.5
    compiled = torch.compile(polynomial, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), polynomial(x))


def test_hardware_checks_do_not_break_a_graph() -> None:
    def ask(x: Tensor) -> Tensor:
        return x + has_triton() + allows_tf32()

    compiled = torch.compile(ask, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(1)), ask(torch.zeros(1)))


def test_operator_passes_opcheck() -> None:
    """Schema, fake tensors, autograd and AOT dispatch, static and dynamic shapes."""
    torch.manual_seed(0)
    a = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    c = torch.randn(2, 6, 6, dtype=torch.float64, requires_grad=True)
    operator = torch.ops.muonclip.symmetric_product.default
    torch.library.opcheck(operator, (a, a.detach(), c, 0.5, 2.0))
    torch.library.opcheck(operator, (a, a, None, 1.0, 0.0))


def test_gradient_is_that_of_the_whole_product() -> None:
    torch.manual_seed(0)
    a = torch.randn(1, LARGE, 3, dtype=torch.float64, requires_grad=True)
    c = torch.randn(1, LARGE, LARGE, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, LARGE, LARGE, dtype=torch.float64)

    def gradients(result: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((result * weight).sum(), (a, c))

    ours = gradients(symmetric_product(a, a, c=c, alpha=0.5, beta=2.0))
    theirs = gradients(dense(a, a, c, 0.5, 2.0))
    assert all(torch.allclose(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("n", [4, LARGE])
def test_empty(n: int) -> None:
    """No matrices, or no columns."""
    assert symmetric_product(torch.empty(0, n, 3), torch.empty(0, n, 3)).shape == (0, n, n)
    none = torch.empty(2, n, 0)
    assert symmetric_product(none, none).count_nonzero() == 0


A = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("a", "b", "c", "beta", "message"),
    [
        (A[0], A[0], None, 0.0, "a and b must be"),
        (A, A[:1], None, 0.0, "of one shape"),
        (A.int(), A.int(), None, 0.0, "floating-point"),
        (A, A, None, 0.5, "beta is 0.5"),
        (A, A, torch.zeros(2, 3, 4), 1.0, r"= \(2, 3, 3\)"),
        (A, A, torch.zeros(3, 3), 1.0, "c must be"),
        (A, A.double(), None, 0.0, "b must have a's dtype"),
        (A, A, torch.zeros(2, 3, 3, device="meta"), 1.0, "c must have a's dtype and device"),
    ],
)
def test_errors_name_the_argument(
    a: Tensor, b: Tensor, c: Tensor | None, beta: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        symmetric_product(a, b, c=c, beta=beta)
