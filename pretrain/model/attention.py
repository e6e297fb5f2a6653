"""Causal attention within packed documents, with memory linear in the sequence length.

The core attention of ``kernels: torch``. It computes the logits of one block of queries at a time,
keeps the log-sum-exp of every query, and computes the logits again in the backward pass
(FlashAttention-2, arXiv 2307.08691). Every logit is seen in float32, so that the largest of each
head, which QK-Clip needs, costs nothing more.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from muonclip.max_logits import Buffer
from pretrain.config import Config
from pretrain.errors import first_line
from pretrain.model import flex
from pretrain.model.context_parallel import SequenceShare, gather_sequence
from pretrain.model.packed_documents import PackedDocuments

Kernel = Literal["blocks", "flex"]
MaxLogitObserver = Callable[[Tensor], None]

# Logits computed at a time: on a CPU those that fit a core's cache.
_LOGITS_AT_A_TIME = {"cpu": 2**18}
_LOGITS_AT_A_TIME_ELSEWHERE = 2**26
_LOG2_E = 1 / math.log(2)


class CoreAttention(nn.Module):
    """Softmax attention that reports every head's max logit.

    Attributes:
        observer: if set, called in training with the max logits of a micro-batch: the largest input
            of the softmax (scaled, rotated, masked) of every head, detached float32 (float64 for
            float64 input), [heads].
    """

    def __init__(
        self,
        *,
        softmax_scale: float | None = None,
        config: Any,
        pg_collection: Any = None,
        **_spec: Any,
    ) -> None:
        super().__init__()
        self._context_group: Any = None if pg_collection is None else pg_collection.cp
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.observer: MaxLogitObserver | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedDocuments | None = None,
        **_unused: Any,
    ) -> Tensor:
        """Attend causally within documents.

        Args:
            query: [queries, b, heads, d].
            key: [s, b, groups, d]; groups divides heads. If it has fewer tokens than the
                documents, those of this context-parallel rank.
            value: [s, b, groups, v], of the same tokens.
            attention_mask: must be None.
            packed_seq_params: the documents. Default: each sequence is one document, and queries
                are those of its last tokens.

        Returns:
            [queries, b, heads * v].
        """
        assert attention_mask is None, "the documents are described by packed_seq_params"
        documents = packed_seq_params
        if documents is None:
            documents = _one_document(query, key)
        if len(key) < documents.max_seqlen_kv:
            key, value = self._gather(key, value)
        context, max_logits = attend(query, key, value, documents, self.softmax_scale)
        if self.observer is not None and self.training and torch.is_grad_enabled():
            self.observer(max_logits)
        return context

    def _gather(self, key: Tensor, value: Tensor) -> list[Tensor]:
        """Keys and values of the whole sequences, from all context-parallel ranks.

        Of grouped-query attention, after the rotary embedding: (d + v) * groups channels per token
        and layer. Latent attention gathers its latents instead.
        """
        group = self._context_group
        share = SequenceShare(group.rank(), group.size())
        both = gather_sequence(torch.cat([key, value], -1), group, share)
        return list(torch.split(both, [key.shape[-1], value.shape[-1]], -1))


def _one_document(query: Tensor, key: Tensor) -> PackedDocuments:
    length = key.shape[0]
    chunk = (length - query.shape[0], length)
    return PackedDocuments([[length]] * key.shape[1], query.device, [chunk])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: PackedDocuments,
    scale: float,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention within documents, and the largest logit of each head.

    Args:
        query, key, value: as in :meth:`CoreAttention.forward`.
        documents: the documents.
        scale: factor on the products.
        kernel: default: :func:`choose_kernel`.

    Returns:
        [queries, b, heads * v] in the dtype of the values, and float32 (float64 for float64 input)
        [heads] without gradient.
    """
    kernel = kernel or choose_kernel(query, value)
    if kernel == "flex":
        return _attend_flex(query, key, value, documents, scale)
    apply: Callable[..., tuple[Tensor, Tensor]] = _BlockedAttention.apply
    return apply(query, key, value, documents, scale)


def choose_kernel(query: Tensor, value: Tensor) -> Kernel:
    """Kernel of :func:`attend` for queries and values [s, b, heads, width].

    - ``flex``, compiled flex_attention: where :func:`flex_problem` is None, for at least a block of
      queries; with a cache, tokens are generated one by one.
    - ``blocks``, torch's operations on one block of logits at a time: everything else, including
      all CPUs.
    """
    widths = query.shape[-1], value.shape[-1]
    supported = len(query) >= flex.BLOCK and flex_problem(query.device, query.dtype, widths) is None
    return "flex" if supported else "blocks"


@functools.cache
def flex_problem(device: torch.device, dtype: torch.dtype, widths: tuple[int, int]) -> str | None:
    """The reason why the kernel ``flex`` cannot be used; None if it can.

    On a GPU that :func:`flex.flex_problem` supports, it is compiled and run: whether the blocks
    that torch chooses fit in shared memory depends on the GPU, the dtype, the widths and the
    version of torch. Float32 heads of 192 channels do not on an H100 with torch 2.11.

    Args:
        device, dtype: of queries, keys and values.
        widths: channels of a head of the queries and of the values.
    """
    problem = flex.flex_problem(device, dtype, widths)
    if problem is not None:
        return problem
    try:
        _compile_flex(device, dtype, widths)
    except Exception as error:  # of any compiler
        reason = first_line(error)
        return f"it cannot be compiled for heads of {widths[0]} and {widths[1]} channels ({reason})"
    return None


def _compile_flex(device: torch.device, dtype: torch.dtype, widths: tuple[int, int]) -> None:
    """Run both passes on zeros; steps use the compiled kernels again."""
    length, batch, heads = 3 * flex.BLOCK, 2, 4
    with torch.inference_mode(False), torch.enable_grad():
        documents = PackedDocuments([[length]] * batch, device)
        query, key, value = (
            torch.zeros(length, batch, heads, width, dtype=dtype, device=device, requires_grad=True)
            for width in (widths[0], *widths)
        )
        output, _ = _attend_flex(query, key, value, documents, 1.0)
        output.sum().backward()  # type: ignore[no-untyped-call]


def slow_attention(config: Config, device: torch.device) -> str | None:
    """A warning if the language model's attention cannot use flex_attention on a GPU."""
    if device.type != "cuda":
        return None
    language = config.language
    widths = language.query_key_dim, language.value_dim
    problem = flex_problem(device, getattr(torch, config.precision), widths)
    if problem is None:
        return None
    return (
        f"attention cannot use flex_attention: {problem}; it computes blocks of logits with "
        "torch's operations, which is slower"
    )


def _attend_flex(
    query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    output, max_scores = flex.attention_and_max_scores(q, k, v, documents.block_mask, scale)
    return output.permute(2, 0, 1, 3).flatten(2), max_scores.amax((0, 2))


def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments, scale: float
) -> tuple[Tensor, Tensor]:
    """:func:`attend` by the definition, with all logits in memory: the reference in tests."""
    heads_per_group = query.shape[2] // key.shape[2]
    q = query.permute(1, 2, 0, 3)
    k, v = (x.permute(1, 2, 0, 3).repeat_interleave(heads_per_group, 1) for x in (key, value))
    positions, keys = documents.positions[:, None], torch.arange(key.shape[0])
    starts = documents.first_keys[:, documents.positions, None]
    masked = ((keys > positions) | (keys < starts)).unsqueeze(1).to(query.device)
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = (q.to(dtype) @ k.to(dtype).mT * scale).masked_fill(masked, -math.inf)
    context = logits.softmax(-1).to(value.dtype) @ v
    return context.permute(2, 0, 1, 3).flatten(2), logits.detach().amax((0, 2, 3))


class _BlockedAttention(torch.autograd.Function):
    """:func:`attend` block by block, on any device and in any floating dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: PackedDocuments,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = _grouped(query, key.shape[2]), _heads_first(key), _heads_first(value)
        batch, groups, per_group, queries, _ = q.shape
        context = value.new_empty(queries, batch, groups, per_group, v.shape[-1])
        output = context.permute(1, 2, 3, 0, 4)
        log_sums = q.new_empty(*q.shape[:-1], 1)
        max_logits = q.new_full((batch, groups, per_group), -math.inf)
        buffer = Buffer(q.dtype, q.device)
        for part in _parts(documents, q):
            logits = _logits(buffer, q, k, part, scale)
            largest = logits.amax(-1, keepdim=True)
            pairs = part.sequences, part.groups
            max_logits[pairs] = torch.maximum(max_logits[pairs], largest.amax((-2, -1)))
            weights = logits.sub_(largest).exp2_()
            sums = weights.sum(-1, keepdim=True)
            rows = (*pairs, slice(None), part.queries)
            weighted = torch.bmm(_flat(weights), v[*pairs, part.keys].flatten(0, 1))
            output[rows] = weighted.view(*sums.shape[:-1], -1).div_(sums)
            log_sums[rows] = largest.add_(sums.log2_())
        context = context.flatten(2)
        ctx.save_for_backward(query, key, value, context, log_sums)
        ctx.documents, ctx.scale = documents, scale
        max_logits = max_logits.flatten(1).amax(0) / _LOG2_E
        ctx.mark_non_differentiable(max_logits)
        return context, max_logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, context, log_sums = ctx.saved_tensors
        q, k, v = _grouped(query, key.shape[2]), _heads_first(key), _heads_first(value)
        g, o = (_grouped(x.view(*query.shape[:3], -1), key.shape[2]) for x in (grad, context))
        deltas = (o * g).sum(-1, keepdim=True)
        # Contiguous keys and values: their products add to ranges of rows.
        dq, dk, dv = torch.empty_like(q), k.new_zeros(k.shape), v.new_zeros(v.shape)
        buffer, second_buffer = Buffer(q.dtype, q.device), Buffer(q.dtype, q.device)
        for part in _parts(ctx.documents, q):
            pairs = part.sequences, part.groups
            rows, keys = (*pairs, slice(None), part.queries), (*pairs, part.keys)
            weights = _logits(buffer, q, k, part, ctx.scale).sub_(log_sums[rows]).exp2_()
            g_rows, q_rows = _flat(g[rows]), _flat(q[rows])
            dv[keys].flatten(0, 1).baddbmm_(_flat(weights).mT, g_rows)
            d_logits = second_buffer.view(*weights.shape)
            torch.bmm(g_rows, v[keys].flatten(0, 1).mT, out=_flat(d_logits))
            d_logits.sub_(deltas[rows]).mul_(weights)
            dq[rows] = torch.bmm(_flat(d_logits), k[keys].flatten(0, 1)).view_as(dq[rows])
            dk[keys].flatten(0, 1).baddbmm_(_flat(d_logits).mT, q_rows, alpha=ctx.scale)
        dq *= ctx.scale
        return (
            *(
                gradient.permute(2, 0, 1, 3).to(x.dtype).contiguous()
                for gradient, x in ((dq.flatten(1, 2), query), (dk, key), (dv, value))
            ),
            None,
            None,
        )


class _Part(NamedTuple):
    """Sequences and key groups of a block whose logits are computed at a time."""

    sequences: slice
    groups: slice
    queries: slice
    keys: slice
    limit: Tensor


def _parts(documents: PackedDocuments, q: Tensor) -> Iterator[_Part]:
    """Parts of all blocks: several whole sequences, or several groups of one sequence."""
    _, groups, per_group, _, _ = q.shape
    at_a_time = _LOGITS_AT_A_TIME.get(q.device.type, _LOGITS_AT_A_TIME_ELSEWHERE)
    for sequences, queries, keys, limit in documents.blocks(q.dtype):
        pair = per_group * (queries.stop - queries.start) * (keys.stop - keys.start)
        count = max(1, at_a_time // pair)
        step, group_step = max(1, count // groups), min(count, groups)
        for start in range(sequences.start, sequences.stop, step):
            stop = min(start + step, sequences.stop)
            part_limit = limit
            if len(limit) > 1:
                part_limit = limit[start - sequences.start : stop - sequences.start]
            for group in range(0, groups, group_step):
                group_range = slice(group, min(group + group_step, groups))
                yield _Part(slice(start, stop), group_range, queries, keys, part_limit)


def _logits(buffer: Buffer, q: Tensor, k: Tensor, part: _Part, scale: float) -> Tensor:
    """Masked logits [sequences, groups, heads per group, queries, keys] in the buffer.

    Multiplied by log2(e): on a CPU, exp is 3 times as slow as exp2, and up to 100 times where the
    result is tiny.
    """
    rows = q[part.sequences, part.groups, :, part.queries]
    keys = k[part.sequences, part.groups, part.keys]
    logits = buffer.view(*rows.shape[:-1], keys.shape[-2])
    flat = _flat(logits)
    torch.baddbmm(flat, _flat(rows), keys.flatten(0, 1).mT, beta=0, alpha=scale * _LOG2_E, out=flat)
    limited = logits[..., -part.limit.shape[-1] :]
    torch.minimum(limited, part.limit, out=limited)
    return logits


def _flat(x: Tensor) -> Tensor:
    """[sequences, groups, heads per group, rows, n] as a batch of one matrix for each group."""
    return x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])


def _heads_first(x: Tensor) -> Tensor:
    """[s, b, heads, d] to [b, heads, s, d], at least float32; a view if that is its dtype."""
    return x.permute(1, 2, 0, 3).to(torch.promote_types(x.dtype, torch.float32))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[s, b, heads, d] to [b, groups, heads per group, s, d], at least float32."""
    return torch.unflatten(_heads_first(x), 1, (groups, -1))
