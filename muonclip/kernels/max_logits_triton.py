"""The Triton kernel behind ``max_logits_triton``. Importing this module needs Triton."""

# Triton has no type annotations, and a kernel's arguments have no Python types.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, no-untyped-call"
# mypy: disable-error-code="untyped-decorator, no-any-unimported"

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiling(NamedTuple):
    """A program compares ``queries`` rows of q with all keys, ``keys`` at a time."""

    queries: int
    keys: int
    dim: int  # d, padded


def tiling(dim: int, itemsize: int) -> Tiling:
    """Tile sizes for the shared memory (99 KiB) and registers of every GPU since Ampere."""
    padded = max(16, triton.next_power_of_2(dim))
    rows = max(16, 2**15 // (padded * itemsize))
    return Tiling(queries=min(256 // itemsize, rows), keys=min(128 // itemsize, rows), dim=padded)


def max_logits(
    query: Tensor,
    key: Tensor,
    scale: float,
    causal: bool,
    bound: Tensor | None,
    threshold: float | None,
) -> Tensor:
    """See ``muonclip.kernels.max_logits.max_logits_triton``."""
    batch = math.prod(query.shape[:-3])
    query = query.reshape(batch, *query.shape[-3:])
    key = key.reshape(batch, *key.shape[-3:])
    heads, queries, dim = query.shape[1:]
    groups, keys = key.shape[1:3]
    tile = tiling(dim, query.element_size())
    blocks = triton.cdiv(queries, tile.queries)
    # One maximum per program: atomics would not be faster, and would lose NaN.
    partial = query.new_empty(heads, batch, blocks, dtype=torch.float32)
    if bound is not None:
        bound = bound.to(query.device, torch.float32).contiguous()
    with torch.cuda.device_of(query):
        _kernel[(partial.numel(),)](
            query, key, partial, partial if bound is None else bound,
            0.0 if threshold is None else threshold, abs(scale),
            batch, heads // groups, queries, keys, dim,
            *query.stride(), *key.stride(),
            CAUSAL=causal,
            BOUNDED=bound is not None,
            NEGATE=math.copysign(1, scale) < 0,
            QUERIES=tile.queries, KEYS=tile.keys, DIM=tile.dim,
            num_warps=8 if tile.queries >= 64 else 4, num_stages=2,
        )  # fmt: skip
    return partial.amax((1, 2))


# These vary between micro-batches; specialization would compile the kernel again.
@triton.jit(do_not_specialize=["batches", "queries", "keys"])
def _kernel(
    query, key, partial, bound, threshold, scale,
    batches, heads_per_group, queries, keys, dim,
    q_batch, q_head, q_row, q_column, k_batch, k_group, k_row, k_column,
    CAUSAL: tl.constexpr,
    BOUNDED: tl.constexpr,
    NEGATE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The maximum over QUERIES queries and all keys of one head of one sequence."""
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, QUERIES)
    head = program // (batches * blocks)
    batch = (program // blocks % batches).to(tl.int64)
    block = blocks - 1 - program % blocks  # the last blocks of a causal mask take longest
    if BOUNDED:  # noqa: SIM102 (Triton's `and` would load in any case)
        if tl.load(bound + head) <= threshold:
            tl.store(partial + program, -float("inf"))
            return

    rows = block * QUERIES + tl.arange(0, QUERIES)
    columns = tl.arange(0, DIM)
    query += batch * q_batch + head.to(tl.int64) * q_head
    query += rows.to(tl.int64)[:, None] * q_row + columns[None, :] * q_column
    q = tl.load(query, mask=(rows < queries)[:, None] & (columns < dim)[None, :], other=0.0)
    key += batch * k_batch + (head // heads_per_group).to(tl.int64) * k_group

    # Blocks of keys to which every query attends need no mask.
    stop = keys
    whole = keys // KEYS * KEYS
    if CAUSAL:
        stop = tl.minimum(keys, (block + 1) * QUERIES)
        whole = tl.minimum(whole, (block * QUERIES + 1) // KEYS * KEYS)
    largest = tl.full((QUERIES, KEYS), -float("inf"), tl.float32)
    for start in range(0, whole, KEYS):
        products = _products(q, key, start, keys, dim, k_row, k_column, NEGATE, KEYS, DIM, False)
        largest = tl.maximum(largest, products, propagate_nan=tl.PropagateNan.ALL)
    for start in range(whole, stop, KEYS):
        products = _products(q, key, start, keys, dim, k_row, k_column, NEGATE, KEYS, DIM, True)
        position = start + tl.arange(0, KEYS)[None, :]
        seen = position < keys
        if CAUSAL:
            seen = seen & (position <= rows[:, None])
        products = tl.where(seen, products, -float("inf"))
        largest = tl.maximum(largest, products, propagate_nan=tl.PropagateNan.ALL)

    largest = tl.where((rows < queries)[:, None], largest, -float("inf"))
    # Reductions ignore NaN.
    broken = tl.max(tl.max((largest != largest).to(tl.int32), 1), 0) > 0
    top = tl.max(tl.max(largest, 1), 0)
    # A scale of 0 must not be multiplied by the -inf of a query that attends to no key.
    top = tl.where(top == -float("inf"), top, top * scale)
    tl.store(partial + program, tl.where(broken, float("nan"), top))


@triton.jit
def _products(
    q, key, start, keys, dim, k_row, k_column,
    NEGATE: tl.constexpr,
    KEYS: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The products of a block of queries and the keys from ``start`` on.

    Negated for a negative scale, so that the largest logit is the largest product.
    """
    rows = start + tl.arange(0, KEYS)
    columns = tl.arange(0, DIM)
    inside = (columns < dim)[:, None]
    if MASKED:
        inside = inside & (rows < keys)[None, :]
    k = tl.load(
        key + rows.to(tl.int64)[None, :] * k_row + columns[:, None] * k_column,
        mask=inside,
        other=0.0,
    )
    products = tl.dot(q, k, input_precision="ieee")
    return -products if NEGATE else products
