"""Where each attention head's query and key rows live: MHA, GQA, MLA; fused or separate."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

# A linear layer (its bias then counts too), a weight, or a weight and its bias.
Projection: TypeAlias = nn.Module | Tensor | tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class HeadRows:
    """The rows of a weight (and of its bias) that make each head's vector.

    Attributes:
        weight: [rows, columns], as in ``nn.Linear``.
        rows: int64 [heads, r], indices into the weight's rows; every row at most once.
        bias: [rows], or None.

    Raises:
        ValueError: if the shapes disagree, or a row is out of range or listed twice.
    """

    weight: Tensor
    rows: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(f"weight must be [rows, columns], got {tuple(self.weight.shape)}")
        if self.rows.ndim != 2 or self.rows.dtype != torch.int64 or self.rows.numel() == 0:
            raise ValueError(
                "rows must be int64 [heads, rows per head] and not empty, "
                f"got {self.rows.dtype} {tuple(self.rows.shape)}"
            )
        if self.rows.min() < 0 or self.rows.max() >= self.weight.size(0):
            raise ValueError(f"rows must lie in 0..{self.weight.size(0) - 1}, the weight's rows")
        if self.rows.flatten().bincount().max() > 1:
            raise ValueError("rows must not repeat: a row belongs to one head")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"bias must be [{self.weight.size(0)}] as the weight has rows, "
                f"got {tuple(self.bias.shape)}"
            )


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """One attention layer, as QK-Clip sees it.

    Query head h attends with key group h // (heads // groups). Logits must be linear in the rows:
    an attention that normalises queries or keys after the projection has no layout, since scaling
    the rows changes nothing there.

    Attributes:
        query: rows of each query head; in MLA, of its part without position.
        key: rows of each key group; in MLA, of each head's part without position.
        query_rope: MLA only: rows of each query head's rotary part, whose key is shared by all
            heads and therefore never scaled.

    Raises:
        ValueError: if groups do not divide heads, or ``query_rope`` has other heads than ``query``.
    """

    query: HeadRows
    key: HeadRows
    query_rope: HeadRows | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_groups:
            raise ValueError(
                f"{self.num_heads} query heads cannot be shared by {self.num_kv_groups} key groups"
            )
        if self.query_rope is not None and self.query_rope.rows.size(0) != self.num_heads:
            raise ValueError(
                f"query_rope has {self.query_rope.rows.size(0)} heads, query has {self.num_heads}"
            )

    @property
    def num_heads(self) -> int:
        """Query heads in these weights (the local ones, under tensor parallelism)."""
        return self.query.rows.size(0)

    @property
    def num_kv_groups(self) -> int:
        """Key heads in these weights."""
        return self.key.rows.size(0)

    @classmethod
    def separate(
        cls,
        query: Projection,
        key: Projection,
        *,
        num_heads: int,
        num_kv_groups: int | None = None,
    ) -> "AttentionLayout":
        """MHA or GQA with one projection each, rows head after head.

        Args:
            query: weight [num_heads * d, hidden].
            key: weight [num_kv_groups * d, hidden].
            num_heads: query heads.
            num_kv_groups: key heads; default: ``num_heads`` (MHA).

        Raises:
            ValueError: if the weights do not divide so, or give two head sizes.
        """
        groups = num_heads if num_kv_groups is None else num_kv_groups
        query_weight, query_bias = _weight_and_bias(query)
        key_weight, key_bias = _weight_and_bias(key)
        query_dim = _head_dim("query", query_weight, num_heads)
        key_dim = _head_dim("key", key_weight, groups)
        if query_dim != key_dim:
            raise ValueError(
                f"query has {query_dim} rows per head and key {key_dim}: "
                "check num_heads and num_kv_groups"
            )
        return cls(
            HeadRows(query_weight, _all_rows(query_weight, num_heads), query_bias),
            HeadRows(key_weight, _all_rows(key_weight, groups), key_bias),
        )

    @classmethod
    def fused(
        cls, qkv: Projection, *, num_heads: int, num_kv_groups: int | None = None
    ) -> "AttentionLayout":
        """MHA or GQA with one projection whose rows are all queries, all keys, all values.

        Args:
            qkv: weight [(num_heads + 2 * num_kv_groups) * d, hidden].
            num_heads: query heads.
            num_kv_groups: key heads; default: ``num_heads`` (MHA).

        Raises:
            ValueError: if the weight does not divide so.
        """
        groups = num_heads if num_kv_groups is None else num_kv_groups
        weight, bias = _weight_and_bias(qkv)
        _head_dim("qkv", weight, num_heads + 2 * groups)
        rows = _all_rows(weight, num_heads + 2 * groups)
        return cls(
            HeadRows(weight, rows[:num_heads], bias),
            HeadRows(weight, rows[num_heads : num_heads + groups], bias),
        )

    @classmethod
    def fused_by_group(
        cls,
        qkv: Projection,
        *,
        num_heads: int,
        num_kv_groups: int | None = None,
        output_gate: bool = False,
    ) -> "AttentionLayout":
        """MHA or GQA with one projection, Megatron's order: per key group its queries, key, value.

        Args:
            qkv: weight [(num_heads + 2 * num_kv_groups) * d, hidden]; with ``output_gate``
                [(2 * num_heads + 2 * num_kv_groups) * d, hidden].
            num_heads: query heads.
            num_kv_groups: key heads; default: ``num_heads`` (MHA).
            output_gate: each group has a gate per query, between its queries and its key.

        Raises:
            ValueError: if the weight does not divide so.
        """
        groups = num_heads if num_kv_groups is None else num_kv_groups
        if groups < 1 or num_heads % groups:
            raise ValueError(f"{num_heads} query heads cannot be shared by {groups} key groups")
        weight, bias = _weight_and_bias(qkv)
        queries = num_heads // groups
        per_group = queries * (2 if output_gate else 1) + 2
        dim = _head_dim("qkv", weight, groups * per_group)
        rows = _all_rows(weight, groups * per_group).view(groups, per_group, dim)
        return cls(
            HeadRows(weight, rows[:, :queries].reshape(num_heads, dim), bias),
            HeadRows(weight, rows[:, -2].contiguous(), bias),
        )

    @classmethod
    def mla(
        cls,
        query: Projection,
        kv_up: Projection,
        *,
        num_heads: int,
        nope_dim: int,
        rope_dim: int,
        v_dim: int,
    ) -> "AttentionLayout":
        """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

        Args:
            query: the last query projection, weight [num_heads * (nope_dim + rope_dim), any]:
                per head, the part without position, then the rotary part.
            kv_up: projection from the latent, weight [num_heads * (nope_dim + v_dim), latent]: per
                head, key, then value.
            num_heads: heads.
            nope_dim: size of a head's query and key without position.
            rope_dim: size of a head's rotary query.
            v_dim: size of a head's value.

        Raises:
            ValueError: if the weights do not have these rows.
        """
        query_weight, query_bias = _weight_and_bias(query)
        kv_weight, kv_bias = _weight_and_bias(kv_up)
        for name, weight, dim, parts in (
            ("query", query_weight, nope_dim + rope_dim, "nope_dim + rope_dim"),
            ("kv_up", kv_weight, nope_dim + v_dim, "nope_dim + v_dim"),
        ):
            if weight.size(0) != num_heads * dim:
                raise ValueError(
                    f"{name} has {weight.size(0)} rows, "
                    f"but num_heads * ({parts}) is {num_heads * dim}"
                )
        query_rows = _all_rows(query_weight, num_heads)
        return cls(
            HeadRows(query_weight, query_rows[:, :nope_dim], query_bias),
            HeadRows(kv_weight, _all_rows(kv_weight, num_heads)[:, :nope_dim], kv_bias),
            HeadRows(query_weight, query_rows[:, nope_dim:], query_bias),
        )


def _weight_and_bias(projection: Projection) -> tuple[Tensor, Tensor | None]:
    if isinstance(projection, Tensor):
        return projection, None
    if isinstance(projection, tuple):
        return projection
    weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"{type(projection).__name__} has no weight: give a linear layer, a weight, "
            "or (weight, bias)"
        )
    # Megatron's layers without a bias hold an empty tensor or None.
    return weight, bias if isinstance(bias, Tensor) and bias.numel() else None


def _head_dim(name: str, weight: Tensor, heads: int) -> int:
    """Rows per head."""
    if heads < 1 or weight.size(0) % heads:
        raise ValueError(f"{name} has {weight.size(0)} rows, which {heads} heads cannot share")
    return weight.size(0) // heads


def _all_rows(weight: Tensor, heads: int) -> Tensor:
    """All row numbers of a weight, [heads, rows per head]."""
    return torch.arange(weight.size(0), device=weight.device).view(heads, -1)
