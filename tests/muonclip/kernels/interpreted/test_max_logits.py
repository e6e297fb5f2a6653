"""The max-logit kernel against float64, heads passed over, and its operator."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from muonclip import max_logits_bound
from muonclip.kernels.max_logits import max_logits_triton

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def reference(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    heads = query.shape[-3]
    key = key.repeat_interleave(heads // key.shape[-3], -3)
    logits = query.double() @ key.double().mT * scale
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(later, -math.inf)
    return logits.reshape(-1, *logits.shape[-3:]).amax((0, 2, 3))


def agrees(result: Tensor, query: Tensor, key: Tensor, scale: float, causal: bool) -> bool:
    """To float32's rounding of sums of d products."""
    expected = reference(query, key, scale, causal)
    largest = float(max_logits_bound(query.double(), key.double(), scale=scale).max())
    tolerance = (query.size(-1) + 4) * torch.finfo(torch.float32).eps * largest
    assert result.dtype == torch.float32
    return torch.allclose(result.double(), expected, rtol=0, atol=tolerance)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    queries_per_group=st.integers(1, 2),
    queries=st.integers(1, 150),
    keys=st.integers(1, 150),
    dim=st.integers(1, 40),
    causal=st.booleans(),
    scale=st.sampled_from([0.25, -0.5, 0.0]),
    heads_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_against_float64(
    batch: int,
    groups: int,
    queries_per_group: int,
    queries: int,
    keys: int,
    dim: int,
    causal: bool,
    scale: float,
    heads_last: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Any lengths, both layouts of heads in memory; a negative scale turns maxima into minima."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, length: int) -> Tensor:
        if heads_last:
            x = torch.randn(batch, length, heads, dim, generator=generator).transpose(1, 2)
        else:
            x = torch.randn(batch, heads, length, dim, generator=generator)
        # All logits on one side of zero in some draws: padding must not count as zero.
        return (x + seed % 3).to(DEVICE, dtype)

    query, key = draw(groups * queries_per_group, queries), draw(groups, keys)
    result = max_logits_triton(query, key, scale=scale, causal=causal)
    assert agrees(result, query, key, scale, causal)


@pytest.mark.parametrize("dim", [64, 192, 300, 512])
def test_head_sizes_and_their_tilings(dim: int) -> None:
    """Sizes of real models (192 in MLA), up to the largest; blocks shrink as they grow."""
    torch.manual_seed(0)
    query = torch.randn(1, 2, 150, dim, device=DEVICE)
    key = torch.randn(1, 1, 70, dim, device=DEVICE)
    result = max_logits_triton(query, key, scale=dim**-0.5, causal=True)
    assert agrees(result, query, key, dim**-0.5, True)


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    query, key = (torch.randn(*lead, 2, 5, 8, device=DEVICE) for _ in range(2))
    result = max_logits_triton(query, key, scale=1.0, causal=False)
    assert agrees(result, query, key, 1.0, False)


def test_heads_under_the_bound_are_passed_over_unread() -> None:
    torch.manual_seed(0)
    query, key = (torch.randn(2, 4, 9, 8, device=DEVICE) for _ in range(2))
    expected = max_logits_triton(query, key, scale=1.0, causal=True)
    bound = torch.tensor([10.0, 9.0, math.nan, 11.0], device=DEVICE)
    # NaN would show, if it were read. A bound that is NaN proves nothing.
    query[:, 0] = key[:, 1] = math.nan
    result = max_logits_triton(
        query, key, scale=1.0, causal=True, bound=bound.double(), threshold=10.0
    )
    assert result.tolist() == [-math.inf, -math.inf, *expected[2:].tolist()]


def test_not_a_number_is_not_lost() -> None:
    """As in max_logits: only where it is attended to, and only for its head."""
    torch.manual_seed(0)
    query, key = (torch.randn(1, 2, 4, 8, device=DEVICE) for _ in range(2))
    key[0, 1, 3, 0] = math.nan
    assert max_logits_triton(query, key, scale=1.0, causal=False).isnan().tolist() == [False, True]
    result = max_logits_triton(query[..., :3, :], key, scale=1.0, causal=True)
    assert result.isfinite().all()


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 3), (1, 0, 3), (1, 3, 0)])
def test_empty_batches_and_sequences(batch: int, queries: int, keys: int) -> None:
    query = torch.zeros(batch, 2, queries, 4, device=DEVICE)
    key = torch.zeros(batch, 1, keys, 4, device=DEVICE)
    bound = torch.ones(2, device=DEVICE)
    for options in ({}, {"bound": bound, "threshold": 0.0}):
        result = max_logits_triton(query, key, scale=0.0, causal=False, **options)
        assert result.tolist() == [-math.inf] * 2


def test_no_gradient() -> None:
    query = torch.randn(1, 1, 3, 4, device=DEVICE, requires_grad=True)
    assert not max_logits_triton(query, query, scale=1.0, causal=False).requires_grad


def test_compiles_without_a_graph_break() -> None:
    torch.manual_seed(0)
    query, key = (torch.randn(1, 2, 5, 8, device=DEVICE) for _ in range(2))

    def observed(query: Tensor, key: Tensor) -> Tensor:
        bound = max_logits_bound(query, key)
        return 2 * max_logits_triton(query, key, scale=0.5, causal=True, bound=bound, threshold=1.0)

    compiled = torch.compile(observed, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(query, key), observed(query, key))


def test_operator_passes_opcheck() -> None:
    query, key = (torch.randn(1, 2, 5, 8, device=DEVICE) for _ in range(2))
    operator = torch.ops.muonclip.max_logits.default
    torch.library.opcheck(operator, (query, key, 0.5, True, None, None))
    torch.library.opcheck(operator, (query, key, 0.5, False, torch.ones(2, device=DEVICE), 2.0))


def test_shape_without_data() -> None:
    with FakeTensorMode():
        query = torch.empty(2, 4, 5, 8, device="cuda", dtype=torch.bfloat16)
        result = max_logits_triton(query, query, scale=1.0, causal=False)
        assert (result.shape, result.dtype, result.device.type) == ((4,), torch.float32, "cuda")
