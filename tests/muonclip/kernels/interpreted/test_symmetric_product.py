"""The triangular kernel against float64, for tilings small enough that shapes cut through them."""

import os

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from muonclip.kernels import symmetric_product_triton as module
from muonclip.kernels.symmetric_product_triton import (
    TILINGS,
    Tiling,
    _triangle_row,
    symmetric_product_triton,
)
from tests.muonclip.kernels.reference import check_symmetric_product, symmetric_factors

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SMALL = Tiling(16, 16, 16, num_warps=4, num_stages=2)
OBLONG = Tiling(32, 16, 32, num_warps=4, num_stages=2)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    gram=st.booleans(),
    transposed=st.booleans(),
    with_c=st.booleans(),
    alpha=st.sampled_from([1.0, -2.5]),
    beta=st.sampled_from([1.0, 0.75]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    tiling=st.sampled_from([SMALL, OBLONG, TILINGS[0]]),
    seed=st.integers(0, 2**16),
)
def test_against_float64(
    batch: int,
    n: int,
    k: int,
    gram: bool,
    transposed: bool,
    with_c: bool,
    alpha: float,
    beta: float,
    dtype: torch.dtype,
    tiling: Tiling,
    seed: int,
) -> None:
    """And symmetric to the bit, also where the product of the rounded factors is not quite."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        x.to(DEVICE, dtype) for x in symmetric_factors(generator, (batch, n, k), gram, transposed)
    )
    c = torch.randn(batch, n, n, generator=generator, dtype=torch.float64)
    c = (c + c.mT).to(DEVICE, dtype) if with_c else None
    beta = beta if with_c else 0.0
    result = symmetric_product_triton(a, b, c, alpha, beta, tiling)
    check_symmetric_product(result, a, b, c, alpha, beta)
    assert torch.equal(result, result.mT)


@pytest.mark.parametrize("tiling", TILINGS)
def test_every_tiling(tiling: Tiling) -> None:
    torch.manual_seed(0)
    a = torch.randn(1, 300, 70, device=DEVICE)
    c = torch.randn(1, 300, 300, device=DEVICE)
    c += c.mT.clone()
    result = symmetric_product_triton(a, a, c, 0.5, -2.0, tiling)
    check_symmetric_product(result, a, a, c, 0.5, -2.0)


@pytest.mark.parametrize("tile_rows", [9, 17])
def test_every_tile_is_computed(tile_rows: int) -> None:
    """Tiles are counted through in groups of eight rows: one and a bit, two and a bit."""
    torch.manual_seed(0)
    a = torch.randn(1, 16 * tile_rows, 1, device=DEVICE)
    result = symmetric_product_triton(a, a, None, 1.0, 0.0, SMALL)
    assert torch.equal(result, a @ a.mT)


@triton.jit
def _rows_of(index, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, SIZE)
    tl.store(out + offsets, _triangle_row(tl.load(index + offsets)))


def test_row_of_a_tile_however_far_down() -> None:
    """A root in float32 misses the row just before and just after a row begins."""
    rows = torch.randint(0, 2**15, (256,), generator=torch.Generator().manual_seed(0))
    starts = rows * (rows + 1) // 2
    index = torch.cat([starts, starts + rows]).to(DEVICE, torch.int32)  # first and last of a row
    out = torch.empty_like(index)
    _rows_of[(1,)](index, out, SIZE=512)
    assert torch.equal(out.cpu(), torch.cat([rows, rows]).int())


def test_any_strides() -> None:
    """Factors and c cut out of larger tensors, none of their dimensions contiguous."""
    torch.manual_seed(0)
    a = torch.randn(4, 60, 50, device=DEVICE)[::2, ::3, ::2]
    c = torch.randn(40, 4, 40, device=DEVICE).transpose(0, 1)[::2, ::2, ::2]
    c = c + c.mT
    c = c.transpose(0, 2).contiguous().transpose(0, 2)
    for x in (a, c):
        assert 1 not in x.stride()[1:]
    result = symmetric_product_triton(a, a, c, 2.0, 0.5, SMALL)
    check_symmetric_product(result, a, a, c, 2.0, 0.5)


def test_beta_zero_and_no_columns() -> None:
    """c is not read with beta 0; without columns nothing but c is left."""
    torch.manual_seed(0)
    a, c = torch.randn(1, 20, 3, device=DEVICE), torch.ones(1, 20, 20, device=DEVICE)
    result = symmetric_product_triton(a, a, torch.full_like(c, torch.nan), 1.0, 0.0, SMALL)
    check_symmetric_product(result, a, a, None, 1.0, 0.0)
    assert torch.equal(symmetric_product_triton(a[..., :0], a[..., :0], c, 1.0, 3.0, SMALL), 3 * c)


@pytest.mark.parametrize("fastest", [TILINGS[2], None])
def test_tuning_remembers_the_fastest(
    monkeypatch: pytest.MonkeyPatch, fastest: Tiling | None
) -> None:
    """One timing per shape; the whole product is a choice, and a tiling that does not fit the GPU
    is passed over."""
    times = {choice: 2.0 for choice in module._CHOICES} | {TILINGS[0]: 3.0, fastest: 1.0}
    timed = [*module._CHOICES, *module._CHOICES]

    def do_bench(launch, **options: object) -> float:  # type: ignore[no-untyped-def]
        launch()
        choice = timed.pop(0)
        if choice == TILINGS[1]:
            raise triton.OutOfResources(200_000, 100_000, "shared memory")
        return times[choice]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(module, "_tuned", {})
    a = torch.randn(1, 10, 4, device=DEVICE)
    for _ in range(2):
        check_symmetric_product(
            symmetric_product_triton(a, a, None, 1.0, 0.0), a, a, None, 1.0, 0.0
        )
    assert list(module._tuned.values()) == [fastest]
    gram = a @ a.mT
    for _ in range(2):  # another kernel: timed again
        check_symmetric_product(
            symmetric_product_triton(a, a, gram, 1.0, 1.0), a, a, gram, 1.0, 1.0
        )
    assert list(module._tuned.values()) == [fastest] * 2


def test_no_timing_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing waits for the device, which would end the capture."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(module, "_tuned", {})
    a = torch.randn(1, 10, 4, device=DEVICE)
    result = symmetric_product_triton(a, a, None, 1.0, 0.0)
    check_symmetric_product(result, a, a, None, 1.0, 0.0)
    assert not module._tuned
