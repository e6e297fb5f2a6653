"""Every kernel attends within each item of a pack and nowhere else."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from muonclip import max_logits
from pretrain.model import vision_attention
from pretrain.model.vision_attention import (
    Kernel,
    Pack,
    attend,
    block_mask,
    choose_kernel,
    largest_logits,
)

CPU = torch.device("cpu")
lengths_of_packs = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(sorted)
# Blocks of 128 rows: of one item, incomplete at the end of the pack, and of several items.
SEVERAL_BLOCKS = [[1, 2], [128], [300], [3, 128, 128, 256, 1], [4, 4, 130, 260, 7]]


def make_rows(lengths: list[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = torch.randn(3, sum(lengths), 2, 16, generator=generator, dtype=dtype)
    return list(rows.unbind())


def other_items(lengths: list[int]) -> Tensor:
    """bool [P, P]: True where query and key belong to different items."""
    items = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return items[:, None] != items


def reference(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    logits = torch.einsum("ihd,jhd->hij", query, key) / query.shape[-1] ** 0.5
    weights = logits.masked_fill(other_items(lengths), -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, value)


@settings(deadline=None, max_examples=25)
@given(lengths_of_packs)
def test_sdpa_is_softmax_within_each_item(lengths: list[int]) -> None:
    rows = make_rows(lengths)
    expected = reference(*rows, lengths)
    torch.testing.assert_close(attend(*rows, Pack(lengths, CPU)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("lengths", SEVERAL_BLOCKS)
def test_flex_attention_equals_sdpa(lengths: list[int]) -> None:
    rows = make_rows(lengths)
    pack = Pack(lengths, CPU)
    torch.testing.assert_close(
        attend(*rows, pack, "flex"), attend(*rows, pack), rtol=1e-12, atol=1e-12
    )


@settings(deadline=None, max_examples=25)
@given(
    st.one_of(
        st.sampled_from(SEVERAL_BLOCKS), st.lists(st.integers(1, 400), min_size=1, max_size=9)
    )
)
def test_the_block_mask_equals_the_one_that_torch_computes_from_all_pairs(
    lengths: list[int],
) -> None:
    hidden = other_items(lengths)
    rows = len(hidden)
    expected = create_block_mask(
        lambda _b, _h, q, k: ~hidden[q, k], None, None, rows, rows, device="cpu"
    )
    mask = block_mask(lengths, CPU)
    for kind in ("kv", "full_kv", "q", "full_q"):
        assert listed(mask, kind) == listed(expected, kind), kind


def listed(mask: object, kind: str) -> list[list[int]]:
    counts, tiles = (
        getattr(mask, f"{kind}_num_blocks")[0, 0],
        getattr(mask, f"{kind}_indices")[0, 0],
    )
    return [sorted(row[:n].tolist()) for n, row in zip(counts.tolist(), tiles, strict=True)]


@pytest.mark.parametrize("lengths", [[1], [4, 4, 6], [2, 3, 3, 40]])
def test_varlen_attention_gets_the_boundaries_of_items(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's kernel needs a GPU; a loop with its arguments replaces it here."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10 and newer have it")

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, *boundaries: Tensor | int) -> Tensor:
        cu_seqlens, cu_seqlens_k, longest, longest_k = boundaries
        assert torch.equal(cu_seqlens, cu_seqlens_k) and cu_seqlens.dtype == torch.int32
        assert longest == longest_k == max(cu_seqlens.diff())
        parts = [
            reference(q[i:j], k[i:j], v[i:j], [j - i]) for i, j in pairwise(cu_seqlens.tolist())
        ]
        return torch.cat(parts)

    rows = make_rows(lengths)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    attended = attend(*rows, Pack(lengths, CPU), "varlen")
    torch.testing.assert_close(attended, reference(*rows, lengths), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(lengths_of_packs)
def test_the_largest_logits_are_those_within_items(lengths: list[int]) -> None:
    query, key, _ = make_rows(lengths)
    logits = torch.einsum("ihd,jhd->hij", query, key) / 4
    expected = logits.masked_fill(other_items(lengths), -torch.inf).amax((1, 2))
    pack = Pack(lengths, CPU)
    torch.testing.assert_close(largest_logits(query, key, pack), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision_attention, "_LOGITS_AT_A_TIME", 1)
        patch.setattr(vision_attention, "_LEAST_ROWS", 3)
        torch.testing.assert_close(largest_logits(query, key, pack), expected)
    padded = [
        max_logits(query[rows].transpose(1, 2), key[rows].transpose(1, 2)) for rows in pack.buckets
    ]
    torch.testing.assert_close(torch.stack(padded).amax(0), expected)
    assert sum(rows.numel() for rows in pack.buckets) < 2 * sum(lengths)


def test_a_cpu_uses_sdpa_for_every_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert choose_kernel(torch.empty(3, 2, 16, dtype=dtype)) == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "width", "kernel", "tolerance"),
    [
        (torch.bfloat16, 72, "varlen", 3e-2),
        (torch.bfloat16, 20, "flex", 3e-2),
        (torch.float32, 72, "flex", 1e-4),
        (torch.float32, 4, "sdpa", 1e-4),
        (torch.float64, 72, "sdpa", 1e-12),
    ],
)
def test_kernels_on_a_gpu_equal_the_reference_forward_and_backward(
    dtype: torch.dtype, width: int, kernel: Kernel, tolerance: float
) -> None:
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    for lengths in ([4, 4, 6, 130, 260], [300], [24, 1000, 1001]):
        pack = Pack(lengths, torch.device("cuda"))
        rows = torch.randn(3, sum(lengths), 2, width, device="cuda", dtype=dtype).requires_grad_()
        exact = rows.detach().cpu().double().requires_grad_()
        assert choose_kernel(rows) == kernel
        attended = attend(*rows.unbind(), pack)
        expected = reference(*exact.unbind(), lengths)
        gradient = torch.randn_like(attended)
        attended.backward(gradient)
        expected.backward(gradient.cpu().double())
        torch.testing.assert_close(attended.cpu(), expected, **close)
        torch.testing.assert_close(rows.grad.cpu(), exact.grad, **close)
        query, key, _ = rows.detach()
        exact_query, exact_key, _ = exact.detach()
        expected = largest_logits(exact_query, exact_key, Pack(lengths, CPU))
        torch.testing.assert_close(largest_logits(query, key, pack).cpu(), expected, **close)
