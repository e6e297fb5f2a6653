"""Blocked attention equals the dense form: outputs, gradients and max logits, for any documents."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    create_mask,
    flex_attention,
)

from benchmarks.attention import peak_memory
from pretrain.config import Config, LanguageConfig
from pretrain.model import attention, flex
from pretrain.model.attention import (
    CoreAttention,
    attend,
    attend_dense,
    choose_kernel,
    slow_attention,
)
from pretrain.model.packed_documents import PackedDocuments

CPU = torch.device("cpu")


@st.composite
def packed(draw: Any, most: int = 200, least: int = 1) -> list[list[int]]:
    """Document lengths of one to three sequences of equal length."""
    length = draw(st.integers(least, most))
    batch = draw(st.integers(1, 3))
    sequences = []
    for _ in range(batch):
        kind = draw(st.sampled_from(["one", "ones", "some", "some"]))
        if kind == "one":
            sequences.append([length])
        elif kind == "ones":
            sequences.append([1] * length)
        else:
            cuts = draw(st.sets(st.integers(1, length - 1), max_size=12)) if length > 1 else set()
            ends = [*sorted(cuts), length]
            sequences.append([end - start for start, end in zip([0, *ends], ends, strict=False)])
    return sequences


def inputs(
    queries: int, keys: int, batch: int, heads: int, groups: int, d: int, v: int, dtype: torch.dtype
) -> list[Tensor]:
    return [
        torch.randn(*shape, dtype=dtype, requires_grad=True)
        for shape in (
            (queries, batch, heads, d),
            (keys, batch, groups, d),
            (keys, batch, groups, v),
        )
    ]


def assert_equals_dense(tensors: list[Tensor], documents: PackedDocuments, scale: float) -> None:
    outcomes = []
    gradient = None
    for function in (attend, attend_dense):
        output, max_logits = function(*tensors, documents, scale)
        assert not max_logits.requires_grad
        gradient = torch.randn_like(output) if gradient is None else gradient
        outcomes.append((output, max_logits, *torch.autograd.grad(output, tensors, gradient)))
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    lengths=packed(),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    widths=st.sampled_from([(6, 4), (4, 4), (3, 8)]),
    at_a_time=st.sampled_from([1, 2**12, 2**18]),
    seed=st.integers(0, 2**16),
)
def test_blocks_equal_the_dense_form(
    lengths: list[list[int]],
    heads: tuple[int, int],
    widths: tuple[int, int],
    at_a_time: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    length = sum(lengths[0])
    tensors = inputs(length, length, len(lengths), *heads, *widths, torch.float64)
    before = dict(attention._LOGITS_AT_A_TIME)
    attention._LOGITS_AT_A_TIME["cpu"] = at_a_time
    try:
        assert_equals_dense(tensors, PackedDocuments(lengths, CPU), 0.7)
    finally:
        attention._LOGITS_AT_A_TIME.update(before)


@settings(max_examples=60, deadline=None)
@given(lengths=packed(), data=st.data(), seed=st.integers(0, 2**16))
def test_queries_of_some_chunks_attend_to_the_keys_of_all(
    lengths: list[list[int]], data: Any, seed: int
) -> None:
    """As in context parallelism, where a rank has two chunks of each sequence."""
    torch.manual_seed(seed)
    length = sum(lengths[0])
    documents = PackedDocuments(lengths, CPU, random_chunks(length, data))
    tensors = inputs(len(documents.positions), length, len(lengths), 4, 2, 6, 4, torch.float64)
    assert_equals_dense(tensors, documents, 0.3)


def random_chunks(length: int, data: Any) -> list[tuple[int, int]]:
    points = sorted(data.draw(st.lists(st.integers(0, length), min_size=4, max_size=4)))
    return [(a, b) for a, b in (points[:2], points[2:]) if a < b] or [(0, length)]


@settings(max_examples=25, deadline=None)
@given(lengths=packed(500), data=st.data())
def test_the_block_mask_equals_the_one_that_torch_computes_from_all_pairs(
    lengths: list[list[int]], data: Any
) -> None:
    length = sum(lengths[0])
    documents = PackedDocuments(lengths, CPU, random_chunks(length, data))
    positions = documents.positions
    first = documents.first_keys[:, positions, None]
    seen = (torch.arange(length) <= positions[:, None]) & (torch.arange(length) >= first)
    expected = create_block_mask(
        lambda b, _h, q, k: seen[b, q, k], len(lengths), None, len(positions), length, device="cpu"
    )
    mask = documents.block_mask
    assert mask.shape == expected.shape
    for b in range(len(lengths)):
        listed, reference = ([_blocks(m, kind, b) for kind in KINDS] for m in (mask, expected))
        # Between two chunks, a block of queries may list blocks of keys without any pair.
        for some, exact in zip(listed[0], reference[0], strict=True):
            assert some >= exact
        # torch does not list the incomplete last block of queries as full, either.
        assert listed[1] == reference[1]
        if len(documents.chunks) == 1:
            assert listed == reference


KINDS = ("kv", "full_kv")


def _blocks(mask: BlockMask, kind: str, sequence: int) -> list[set[int]]:
    """Blocks of keys that are listed for each block of queries."""
    counts = getattr(mask, f"{kind}_num_blocks")[sequence, 0].tolist()
    indices = getattr(mask, f"{kind}_indices")[sequence, 0]
    return [set(row[:n].tolist()) for n, row in zip(counts, indices, strict=True)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lengths=packed(300), data=st.data(), groups=st.sampled_from([1, 2, 4]))
def test_flex_attention_equals_the_dense_form(
    lengths: list[list[int]], data: Any, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU without compilation, which has neither gradients nor max scores."""

    def eager(
        query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        output = flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
        batch, heads, queries, _ = query.shape
        seen = create_mask(mask.mask_mod, batch, 1, queries, key.shape[2], device="cpu")
        logits = query @ key.repeat_interleave(heads // key.shape[1], 1).mT * scale
        return output, logits.masked_fill(~seen, -math.inf).amax(-1)

    monkeypatch.setattr(flex, "attention_and_max_scores", eager)
    length = sum(lengths[0])
    documents = PackedDocuments(lengths, CPU, random_chunks(length, data))
    shape = len(documents.positions), length, len(lengths), 4, groups, 6, 4, torch.float64
    tensors = [x.detach() for x in inputs(*shape)]
    for found, expected in zip(
        attend(*tensors, documents, 0.7, "flex"),
        attend_dense(*tensors, documents, 0.7),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_memory_is_linear_in_the_length() -> None:
    short, long = (peak_memory("blocks", length, CPU) for length in (4096, 8192))
    assert 2**20 < short < long < 2.2 * short
    assert long < peak_memory("dense", 2048, CPU)


def test_masks_are_linear_in_the_length() -> None:
    """Also of sequences with long documents that begin at almost the same position."""

    def elements(length: int) -> int:
        documents = PackedDocuments([[100, length - 100], [101, length - 101]], CPU)
        limits = {b.limit.data_ptr(): b.limit for b in documents.blocks(torch.float32)}
        return sum(limit.numel() for limit in limits.values())

    assert elements(8192) <= 2 * elements(4096)


def test_a_cpu_computes_blocks() -> None:
    query = torch.zeros(300, 1, 1, 64)
    assert choose_kernel(query, query) == "blocks"
    assert flex.flex_problem(CPU, torch.float32, (64, 64)) == "it needs an NVIDIA GPU"
    assert slow_attention(Config(), CPU) is None


def out_of_shared_memory(*_arguments: object) -> None:
    raise RuntimeError("out of resource\nReducing block sizes may help")


@pytest.mark.parametrize(
    ("capability", "settings", "problem"),
    [
        ((8, 0), {}, None),
        ((7, 5), {}, "it needs compute capability 8.0 or later, not 7.5"),
        ((8, 0), {"v_head_dim": 8}, "it needs heads of at least 16 channels, not 8"),
        ((8, 6), {"v_head_dim": 48}, "cannot be compiled for heads of 48 and 48 channels (out of"),
    ],
)
def test_a_gpu_without_flex_attention_is_a_warning_at_start(
    capability: tuple[int, int],
    settings: dict[str, int],
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(flex, "flex_problem", flex.flex_problem.__wrapped__)
    monkeypatch.setattr(attention, "flex_problem", attention.flex_problem.__wrapped__)
    compiled = out_of_shared_memory if capability == (8, 6) else lambda *_arguments: None
    monkeypatch.setattr(attention, "_compile_flex", compiled)
    config = Config(language=LanguageConfig(**settings))
    warning = slow_attention(config, torch.device("cuda"))
    assert (warning is None) if problem is None else (problem in str(warning))


def test_tokens_attend_to_earlier_tokens_of_their_document() -> None:
    documents = PackedDocuments.of(torch.tensor([[0, 0, 1, 1], [5, 5, 5, 2]]), CPU)
    assert documents.lengths == [[2, 2], [3, 1]]
    query = key = torch.zeros(4, 2, 1, 4)
    value = torch.eye(4)[:, None, None].expand(4, 2, 1, 4)
    for function in (attend, attend_dense):
        output, _ = function(query, key, value, documents, 1.0)
        sees = (output > 0).int()
        assert sees[:, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
        assert sees[:, 1].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@settings(max_examples=25, deadline=None)
@given(target=st.floats(95.0, 110.0), lengths=packed(20), seed=st.integers(0, 2**16))
@example(target=96.0, lengths=[[1]], seed=1456)  # terms that cancel
def test_max_logits_are_those_of_queries_and_keys_not_of_rounded_products(
    dtype: torch.dtype, target: float, lengths: list[list[int]], seed: int
) -> None:
    """In bfloat16, whose values near 100 are 0.5 apart, a max logit of 100.2 would be 100."""
    torch.manual_seed(seed)
    tensors = inputs(sum(lengths[0]), sum(lengths[0]), len(lengths), 4, 4, 24, 8, torch.float32)
    documents = PackedDocuments(lengths, CPU)
    query, key, value = (x.detach() for x in tensors)
    _, largest = attend_dense(query, key, value, documents, 1 / math.sqrt(24))
    # Heads from far below the threshold of 100 to near it. Where all logits are small, only so far
    # as queries stay in the range of float16.
    aims = torch.tensor([target, target - 5, target / 2, 1.0])
    query = (query * (aims / largest.clamp(min=0.01))[:, None]).to(dtype).requires_grad_()
    key, value = key.to(dtype), value.to(dtype)
    attention = CoreAttention(config=SimpleNamespace(kv_channels=24)).train()
    observed: list[Tensor] = []
    attention.observer = observed.append
    output = attention(query, key, value, packed_seq_params=documents)
    (max_logits,) = observed
    assert max_logits.dtype == torch.float32 and not max_logits.requires_grad
    assert output.dtype == dtype
    wide = [x.detach().double() for x in (query, key, value)]
    _, expected = attend_dense(*wide, documents, 1 / math.sqrt(24))
    # Rounding of sums in float32, whose terms may cancel; of logits near 100 in bfloat16 it is 0.5.
    _, terms = attend_dense(*(x.abs() for x in wide), documents, 1 / math.sqrt(24))
    assert ((max_logits.double() - expected).abs() <= 24 * 2**-23 * terms).all()


def test_max_logits_are_observed_once_and_in_training_only() -> None:
    """Recomputation runs the forward twice, first without gradients."""
    query, key, value = inputs(5, 5, 1, 2, 2, 4, 4, torch.float32)
    attention = CoreAttention(config=SimpleNamespace(kv_channels=4))
    observed: list[Tensor] = []
    attention.observer = observed.append
    with torch.no_grad():
        attention(query, key, value)
    attention.eval()(query, key, value)
    assert not observed
    attention.train()(query, key, value)
    assert len(observed) == 1
