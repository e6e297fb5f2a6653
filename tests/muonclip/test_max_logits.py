"""Max logits compared with the full product, and their upper bound."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from muonclip import max_logits, max_logits_bound
from muonclip.max_logits import screened_max_logits


def reference(query: Tensor, key: Tensor, scale: float, allowed: Tensor | None = None) -> Tensor:
    heads = query.shape[-3]
    key = key.repeat_interleave(heads // key.shape[-3], -3)
    logits = torch.einsum("...hqd,...hkd->...hqk", query.double(), key.double()) * scale
    if allowed is not None:
        logits = logits.where(allowed, -math.inf)
    return logits.reshape(-1, *logits.shape[-3:]).amax((0, 2, 3))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries_per_group=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    block=st.integers(1, 10),
    causal=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_max_logits_are_exact_and_below_their_bound(
    batch: int,
    groups: int,
    queries_per_group: int,
    queries: int,
    keys: int,
    block: int,
    causal: bool,
    seed: int,
) -> None:
    """Any block size, grouping and length; causal as in scaled_dot_product_attention."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, groups * queries_per_group, queries, 4, generator=generator)
    key = torch.randn(batch, groups, keys, 4, generator=generator)
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril() if causal else None
    result = max_logits(query, key, scale=0.7, causal=causal, block_size=block)
    assert torch.allclose(result.double(), reference(query, key, 0.7, allowed), atol=1e-5)
    assert (max_logits_bound(query, key, scale=0.7) >= result - 1e-5).all()


def test_bound_is_reached_by_parallel_vectors() -> None:
    query, key = torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 1, 4)
    query[..., 0], key[..., 0] = 3, 5
    assert max_logits_bound(query, key).tolist() == pytest.approx([7.5, 7.5])  # 15/√4
    assert max_logits(query, key).tolist() == pytest.approx([7.5, 7.5])


def test_masks() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8)
    allowed = torch.rand(2, 1, 5, 6) > 0.5
    expected = reference(query, key, 8**-0.5, allowed)
    assert torch.allclose(max_logits(query, key, mask=allowed, block_size=2).double(), expected)
    additive = torch.zeros(2, 1, 5, 6).masked_fill(~allowed, -math.inf)
    assert torch.allclose(max_logits(query, key, mask=additive, block_size=2).double(), expected)
    padding = torch.tensor([True] * 3 + [False] * 3)
    expected = reference(query, key[..., :3, :], 8**-0.5)
    assert torch.allclose(max_logits(query, key, mask=padding).double(), expected)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 2),
    per_group=st.integers(1, 3),
    length=st.integers(1, 12),
    block=st.integers(1, 13),
    shape=st.sampled_from(["b1qk", "bhqk", "1hqk", "qk", "b11k", "k", "b1q1"]),
    floating=st.booleans(),
    causal=st.booleans(),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_any_mask(
    groups: int,
    per_group: int,
    length: int,
    block: int,
    shape: str,
    floating: bool,
    causal: bool,
    share: float,
    seed: int,
) -> None:
    """Masks of any shape that broadcasts; floating ones also raise logits."""
    torch.manual_seed(seed)
    heads = groups * per_group
    query, key = torch.randn(2, heads, length, 4), torch.randn(2, groups, length, 4)
    sizes = {"b": 2, "h": heads, "q": length, "k": length, "1": 1}
    allowed = torch.rand([sizes[letter] for letter in shape]) < share
    added = torch.randn(allowed.shape) * 3
    mask = added.masked_fill(~allowed, torch.finfo().min) if floating else allowed
    full = (added if floating else torch.zeros(())).where(allowed, -math.inf)
    full = full.expand(2, heads, length, length).double()
    if causal:
        full = full.where(torch.ones(length, length, dtype=torch.bool).tril(), -math.inf)
    products = query.double() @ key.double().repeat_interleave(per_group, 1).mT * 0.5
    expected = (products + full).amax((0, 2, 3))

    result = max_logits(query, key, scale=0.5, mask=mask, causal=causal, block_size=block)
    assert torch.allclose(result.double(), expected, atol=1e-5)
    bound = max_logits_bound(query, key, scale=0.5, mask=mask)
    assert (bound >= result - 1e-5).all()
    threshold = float(bound.median())
    screened = screened_max_logits(query, key, threshold, scale=0.5, mask=mask, causal=causal)
    assert torch.equal(screened.bounds, bound)
    over = bound > threshold
    assert torch.allclose(screened.max_logits[over].double(), expected[over], atol=1e-5)
    assert (screened.max_logits[~over] == -math.inf).all()


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("heads", [None, 4])
def test_block_masks_of_flex_attention(batch: int | None, heads: int | None) -> None:
    """Documents and sliding windows, one per head, with lengths that blocks do not divide."""
    torch.manual_seed(0)
    document = torch.randint(3, (2, 150)).sort().values

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < 20 + 10 * h) & (document[b, q] == document[b, k])

    mask = create_block_mask(allowed, batch, heads, 150, 150, device="cpu", BLOCK_SIZE=16)
    query, key = torch.randn(2, 4, 150, 8), torch.randn(2, 2, 150, 8)
    b, h = (
        torch.arange(n).view(shape)
        for n, shape in ((batch or 1, (-1, 1, 1, 1)), (heads or 1, (-1, 1, 1)))
    )
    q, k = torch.arange(150)[:, None], torch.arange(150)
    expected = reference(query, key, 8**-0.5, allowed(b, h, q, k))
    assert torch.allclose(max_logits(query, key, mask=mask).double(), expected, atol=1e-5)
    screened = screened_max_logits(
        query, key, float(max_logits_bound(query, key)[1]), mask=mask
    ).max_logits
    kept = screened > -math.inf
    assert 0 < kept.sum() < 4
    assert torch.allclose(screened[kept].double(), expected[kept], atol=1e-5)


def test_block_masks_without_a_function() -> None:
    """Blocks that are not listed are skipped, even if the mask function allows them."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4)
    counts = torch.ones(1, 1, 2, dtype=torch.int32)
    indices = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=4)
    allowed = torch.tensor([[False, True], [True, False]])
    allowed = allowed.repeat_interleave(4, 0).repeat_interleave(4, 1)
    expected = reference(query, key, 0.5, allowed)
    assert torch.allclose(max_logits(query, key, mask=mask).double(), expected, atol=1e-5)


def test_full_blocks_ignore_the_mask_function() -> None:
    """flex_attention's kernels evaluate the mask function in partial blocks only."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4)
    one, first = torch.ones(1, 1, 2, dtype=torch.int32), torch.tensor([[[[0, 1], [0, 1]]]]).int()
    mask = BlockMask.from_kv_blocks(
        one, first, one, first.flip(-1), BLOCK_SIZE=4, mask_mod=lambda b, h, q, k: q % 4 == k % 4
    )
    allowed = torch.ones(8, 8, dtype=torch.bool)
    allowed[:, :4] = torch.eye(4, dtype=torch.bool).repeat(2, 1)
    expected = reference(query, key, 0.5, allowed)
    assert torch.allclose(max_logits(query, key, mask=mask).double(), expected, atol=1e-5)


def test_screening_uses_the_keys_of_each_heads_group() -> None:
    """GQA with two heads above the threshold."""
    query, key = torch.zeros(1, 4, 1, 2), torch.zeros(1, 2, 1, 2)
    query[0, :, 0, 0] = torch.tensor([1.0, 9.0, 1.0, 9.0])
    key[0, :, 0, 0] = torch.tensor([2.0, 3.0])
    screened = screened_max_logits(query, key, 10.0, scale=1.0)
    assert screened.bounds.tolist() == [2, 18, 3, 27]
    assert screened.max_logits.tolist() == [-math.inf, 18, -math.inf, 27]


def test_a_head_without_logits_gives_minus_infinity() -> None:
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    result = max_logits(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), mask=nothing)
    assert result.tolist() == [-math.inf] * 2


def test_no_gradient_and_no_rounding_in_low_precision() -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    key = torch.randn(1, 2, 5, 64, dtype=torch.bfloat16)
    result = max_logits(query, key)
    assert not result.requires_grad
    assert result.dtype == torch.float32
    assert torch.allclose(result.double(), reference(query, key, 0.125), rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 2),
    groups=st.integers(0, 2),
    queries=st.integers(0, 2),
    keys=st.integers(0, 2),
    lead=st.booleans(),
    masked=st.sampled_from(["nothing", "boolean", "floating", "bias"]),
    causal=st.booleans(),
    exact=st.booleans(),
)
def test_empty_batches_and_sequences(
    batch: int,
    groups: int,
    queries: int,
    keys: int,
    lead: bool,
    masked: str,
    causal: bool,
    exact: bool,
) -> None:
    """A batch without images, a sequence without tokens, a rank without heads."""
    heads = 2 * groups
    sizes = (3, batch) if lead else (batch,)
    query, key = torch.ones(*sizes, heads, queries, 4), torch.ones(*sizes, groups, keys, 4)
    options: dict[str, Tensor] = {}
    if masked == "boolean":
        options["mask"] = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    elif masked != "nothing":
        name = "mask" if masked == "floating" else "bias"
        options[name] = torch.ones(batch, heads, queries, keys)
    added = 1.0 if masked in ("floating", "bias") else 0.0
    empty = 0 in (batch, queries, keys)
    expected = torch.full((heads,), -math.inf if empty else 2.0 + added)
    assert torch.equal(max_logits(query, key, causal=causal, **options), expected)
    assert torch.equal(max_logits_bound(query, key, **options), expected)
    screened = screened_max_logits(query, key, 1.0 + added, exact=exact, causal=causal, **options)
    assert torch.equal(screened.max_logits, expected)
    assert torch.equal(screened.bounds, expected)
    assert (screened.unbiased_max_logits == -math.inf).all() == (empty or groups == 0)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 2),
    length=st.integers(1, 12),
    block=st.integers(1, 13),
    kind=st.sampled_from(["boolean", "floating", "BlockMask", "none"]),
    shape=st.sampled_from(["bhqk", "hqk", "qk", "k", "h11"]),
    causal=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_bias_together_with_any_mask(
    groups: int, length: int, block: int, kind: str, shape: str, causal: bool, seed: int
) -> None:
    """A position bias is added, and masked entries stay masked."""
    torch.manual_seed(seed)
    heads = 2 * groups
    query, key = torch.randn(2, heads, length, 4), torch.randn(2, groups, length, 4)
    sizes = {"b": 2, "h": heads, "q": length, "k": length, "1": 1}
    bias = 5 * torch.randn([sizes[letter] for letter in shape])
    window = torch.arange(length)[:, None] - torch.arange(length)
    allowed = window.abs() < 1 + seed % 4
    mask: Tensor | BlockMask | None = allowed
    if kind == "floating":
        mask = torch.zeros(length, length).masked_fill(~allowed, torch.finfo().min)
    elif kind == "BlockMask":
        mask = create_block_mask(
            lambda b, h, q, k: (q - k).abs() < 1 + seed % 4,
            None, None, length, length, device="cpu", BLOCK_SIZE=4,
        )  # fmt: skip
    elif kind == "none":
        mask, allowed = None, torch.ones_like(allowed)
    if causal:
        allowed = allowed & (window >= 0)
    products = query.double() @ key.double().repeat_interleave(2, 1).mT * 0.5
    logits = (products + bias.double()).where(allowed, -math.inf)
    expected = logits.amax((0, 2, 3))
    result = max_logits(
        query, key, scale=0.5, mask=mask, bias=bias, causal=causal, block_size=block
    )
    assert torch.allclose(result.double(), expected, atol=1e-5)
    assert (max_logits_bound(query, key, scale=0.5, mask=mask, bias=bias) >= result - 1e-5).all()
    threshold = 4.0
    screened = screened_max_logits(
        query, key, threshold, scale=0.5, mask=mask, bias=bias, causal=causal, exact=True
    )
    full = bias.double().expand(products.shape)
    counted = allowed & (full < threshold)
    weighted = (products / (1 - full / threshold)).where(counted, -math.inf).amax((0, 2, 3))
    unbiased = screened.unbiased_max_logits.double()
    assert torch.allclose(unbiased.clamp(min=0), weighted.clamp(min=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_minimum_of_a_dtype_masks_even_with_a_bias(dtype: torch.dtype) -> None:
    """A masked entry with a bias, or from a mask made in another dtype, is not a logit."""
    query = torch.zeros(1, 1, 1, 4)
    least = torch.finfo(dtype).min
    for mask in (
        torch.tensor([0.0, least], dtype=dtype),
        torch.tensor([0.0, least], dtype=dtype) + torch.tensor([0.0, 200.0], dtype=dtype),
        torch.full((1, 2), least, dtype=dtype),
        torch.full((1, 2), least, dtype=dtype).to(torch.promote_types(dtype, torch.bfloat16)),
    ):
        expected = 0.0 if mask.ndim == 1 else -math.inf
        if mask.ndim > 1 and mask.dtype != dtype and dtype == torch.float16:
            continue  # -65504 is an ordinary number in float32
        key = torch.zeros(1, 1, 2, 4)
        assert max_logits(query, key, mask=mask).tolist() == [expected]
        assert max_logits_bound(query, key, mask=mask).tolist() == [expected]


def test_nan_in_a_masked_position_is_ignored() -> None:
    """Padding may contain any value."""
    query, key = torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4)
    key[..., 2, :] = math.nan
    allowed = torch.tensor([True, True, False])
    floating = torch.tensor([0.0, 1.0, -math.inf])
    assert max_logits(query, key, mask=allowed).tolist() == [2.0]
    screened = screened_max_logits(query, key, 10.0, mask=floating)
    assert screened.max_logits.tolist() == [3.0]
    assert screened.unbiased_max_logits.tolist() == pytest.approx([2 / 0.9])


class Multiplied(TorchDispatchMode):
    """Records the precision allowed in each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.precisions: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.overloadpacket is torch.ops.aten.bmm:
            self.precisions.append(torch.backends.mkldnn.matmul.fp32_precision)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_products_do_not_depend_on_the_matmul_precision(allowed: str) -> None:
    """TF32 and bfloat16 in float32 products would change which heads are clipped."""
    query = torch.randn(1, 2, 70, 64, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        with Multiplied() as multiplied:
            result = max_logits(query, query)
        assert multiplied.precisions and set(multiplied.precisions) <= {"ieee", "none"}
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.allclose(result.double(), reference(query, query, 0.125), rtol=1e-5)


def test_a_precision_that_is_inherited_stays_so() -> None:
    """A later change of ``torch.backends.fp32_precision`` must still have an effect."""
    query, matmul = torch.randn(1, 1, 4, 8), torch.backends.mkldnn.matmul
    before = torch.backends.fp32_precision, matmul.fp32_precision
    try:
        torch.backends.fp32_precision, matmul.fp32_precision = "tf32", "none"
        max_logits(query, query)
        assert matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
        matmul.fp32_precision = "bf16"
        max_logits(query, query)
        assert matmul.fp32_precision == "bf16"
    finally:
        torch.backends.fp32_precision, matmul.fp32_precision = before


def test_products_that_overflow_float16_are_computed() -> None:
    query = torch.full((1, 1, 1, 64), 200.0, dtype=torch.float16)
    assert max_logits(query, query, scale=1.0).tolist() == [64 * 200.0**2]


def test_autocast_does_not_round_products() -> None:
    """In a mixed-precision forward pass products would be bfloat16."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 70, 64), torch.randn(1, 2, 70, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = max_logits(query, key), max_logits_bound(query, key)
    assert torch.equal(inside[0], max_logits(query, key))
    assert torch.equal(inside[1], max_logits_bound(query, key))


@pytest.mark.parametrize(
    ("query", "key", "message"),
    [
        ((3, 5, 4), (2, 5, 4), "3 query heads cannot be shared by 2"),
        ((2, 5, 4), (2, 5, 3), "agree in d"),
        ((2, 2, 5, 4), (1, 2, 5, 4), "leading dimensions"),
        ((5, 4), (5, 4), "same number of dimensions"),
    ],
)
def test_errors(query: tuple[int, ...], key: tuple[int, ...], message: str) -> None:
    for function in (max_logits, max_logits_bound):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(query), torch.zeros(key))
    for mask, message in (
        (torch.ones(3, 5, dtype=torch.bool), r"mask \(3, 5\) must broadcast to the logits"),
        (torch.ones(5, 5, dtype=torch.int64), "boolean or floating, got torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            max_logits(torch.zeros(2, 5, 4), torch.zeros(2, 5, 4), mask=mask)
    for bias, message in (
        (torch.ones(3, 5), r"bias \(3, 5\) must broadcast to the logits"),
        (torch.ones(5, 5, dtype=torch.bool), "bias must be floating, got torch.bool"),
    ):
        with pytest.raises(ValueError, match=message):
            max_logits(torch.zeros(2, 5, 4), torch.zeros(2, 5, 4), bias=bias)
    sequences = [torch.ones(3, 2, 4), torch.ones(5, 2, 4)]
    nested = torch.nested.nested_tensor(sequences, layout=torch.jagged).transpose(1, 2)
    for function in (max_logits, max_logits_bound):
        with pytest.raises(ValueError, match=r"must not be nested tensors: pass query\.to_padded"):
            function(nested, nested)
        padded = nested.to_padded_tensor(0.0)
        assert torch.equal(function(padded, padded), torch.tensor([2.0, 2.0]))
    with pytest.raises(ValueError, match="block_size"):
        max_logits(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), block_size=0)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_on_a_gpu(causal: bool, masked: bool) -> None:
    """By the Triton kernel without a mask, otherwise by reading which heads are above τ."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 300, 64), torch.randn(2, 2, 300, 64)
    query[:, 1] *= 5
    allowed = (torch.rand(2, 1, 300, 300) > 0.5) if masked else torch.ones(1, 1, 1, 300).bool()
    expected = reference(
        query, key, 0.125, allowed & (torch.ones(300, 300).tril().bool() if causal else True)
    )
    mask = allowed.cuda() if masked else None
    query, key = query.cuda(), key.cuda()
    result = max_logits(query, key, mask=mask, causal=causal)
    assert torch.allclose(result.cpu().double(), expected, rtol=1e-3)
    threshold = float(max_logits_bound(query, key)[[0, 2, 3]].max())
    screened = screened_max_logits(query, key, threshold, mask=mask, causal=causal).max_logits
    assert torch.allclose(screened[1].cpu().double(), expected[1], rtol=1e-3)
    assert (screened[[0, 2, 3]] == -math.inf).all()
