"""The weight rows of each attention head's query and key: MHA, GQA, MLA; fused or separate."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from muonclip.adapters import (
    Effective,
    RowTensor,
    active_adapters,
    active_module,
    base_layer,
    effective,
    layer_shape,
    of_tensors,
    weight_and_bias,
)
from muonclip.update import is_fake

# A layer with a weight and a bias, a weight, a (weight, bias) pair, or a function that returns one.
WeightAndBias: TypeAlias = tuple[Tensor, Tensor | None]
Projection: TypeAlias = (
    nn.Module | Tensor | WeightAndBias | Callable[[], nn.Module | Tensor | WeightAndBias]
)


class NormalizedAttentionError(ValueError):
    """Queries and keys are normalized after their projection, so that QK-Clip has no effect.

    The norm undoes any scaling of the projection, and bounds the logits.

    Attributes:
        bound: of the absolute logits, with the present gains; NaN if it is not known.
    """

    def __init__(self, message: str, bound: float = math.nan) -> None:
        super().__init__(message)
        self.bound = bound


@dataclass(frozen=True, eq=False)
class HeadRows:
    """The rows of a weight (and of its bias) that produce each head's vector.

    A copy (``copy.deepcopy``, pickle) reads the weights of the copied model. If ``projection`` is a
    plain function, which cannot be redirected, using the copy raises an error.

    Attributes:
        projection: a layer with ``weight`` and ``bias``; a weight; a (weight, bias) pair; or a
            function that returns one of these. Layers and functions are read at every step, because
            FSDP2 and PEFT replace parameters.
        rows: int64 [heads, r], unique indices along dimension ``dim`` of the weight.
        dim: 0 for a weight [rows, columns], as in ``nn.Linear``, and for a norm's gain [rows]; 1
            for a weight stored as [columns, rows].
        bias_rows: int64 [heads, r], indices along the bias. Default: ``rows``.
        num_rows: number of rows of the weight; of a quantized layer, of its outputs.
        num_bias_rows: number of rows of the bias; ``num_rows`` without a bias.

    Raises:
        ValueError: if the shapes disagree, or a row is out of range or repeated.
    """

    projection: Projection
    rows: Tensor
    dim: int = 0
    bias_rows: Tensor | None = None
    num_rows: int = field(init=False)
    num_bias_rows: int = field(init=False)

    def __post_init__(self) -> None:
        shape, bias = _shape(self.projection), self.bias
        if not 0 <= self.dim < len(shape):
            raise ValueError(f"dim must be one of the weight's {len(shape)}, got {self.dim}")
        num_rows = shape[self.dim]
        _check_rows("rows", self.rows, num_rows)
        if self.bias_rows is not None:
            if bias is None:
                raise ValueError("bias_rows is given, but the projection has no bias")
            _check_rows("bias_rows", self.bias_rows, bias.size(0))
            if self.bias_rows.size(0) != self.rows.size(0):
                raise ValueError(
                    f"bias_rows has {self.bias_rows.size(0)} heads, rows has {self.rows.size(0)}"
                )
        elif bias is not None and (bias.ndim == 0 or bias.size(0) != num_rows):
            raise ValueError(
                f"bias must be [{num_rows}], one entry per row of the weight, "
                f"got {tuple(bias.shape)}"
            )
        object.__setattr__(self, "num_rows", num_rows)
        object.__setattr__(self, "num_bias_rows", num_rows if bias is None else bias.size(0))

    @property
    def weight(self) -> Tensor:
        """The present weight."""
        return _weight_and_bias(self.projection)[0]

    @property
    def bias(self) -> Tensor | None:
        """The present bias."""
        return _weight_and_bias(self.projection)[1]

    def effective(self) -> Effective:
        """The tensors that presently determine these rows, including PEFT's adapters."""
        with torch.enable_grad():  # distinguishes computed weights from parameters
            projection = _read(self.projection)
        if isinstance(projection, nn.Module):
            return effective(projection)
        return of_tensors(*_weight_and_bias(projection))

    def active_adapters(self) -> tuple[str, ...]:
        """The names of PEFT's adapters that presently determine these rows."""
        projection = _read(self.projection)
        return active_adapters(projection) if isinstance(projection, nn.Module) else ()

    def rows_in(self, tensor: RowTensor) -> tuple[int, Tensor, int]:
        """The dimension of a tensor's rows, the rows of each head, and the number of all rows."""
        if tensor.is_bias:
            return 0, self.rows if self.bias_rows is None else self.bias_rows, self.num_bias_rows
        return self.dim if tensor.dim is None else tensor.dim, self.rows, self.num_rows

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if _is_plain_function(self.projection):
            state["projection"] = _refuse_copy
        return state


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """The query and key rows of one attention layer, for QK-Clip.

    Query head h attends with key group h // (heads // groups). Logits must be linear in the rows.
    If queries or keys are normalized after their projection, use the rows of the norm's gain
    instead, if each head has a separate gain.

    Attributes:
        query: rows of each query head; in MLA, of its part without position (nope).
        key: rows of each key group; in MLA, of each head's part without position.
        query_rope: MLA only: rows of each query head's rotary part. Its key is shared by all heads
            and therefore never scaled.

    Raises:
        ValueError: if groups do not divide heads, or ``query_rope`` and ``query`` have different
            numbers of heads.
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
        """Query heads in these weights (under tensor parallelism, the local ones)."""
        return self.query.rows.size(0)

    @property
    def num_kv_groups(self) -> int:
        """Key heads in these weights."""
        return self.key.rows.size(0)

    def active_adapters(self) -> tuple[tuple[str, ...], ...]:
        """The names of PEFT's adapters that presently determine queries and keys."""
        parts = (self.query, self.key, self.query_rope)
        return tuple(part.active_adapters() for part in parts if part is not None)

    @classmethod
    def separate(
        cls,
        query: Projection,
        key: Projection,
        *,
        num_heads: int,
        num_kv_groups: int | None = None,
        dim: int = 0,
    ) -> "AttentionLayout":
        """MHA or GQA with separate projections for query and key, heads in order.

        For norms after the projections with one gain per head, pass the norms instead.

        Args:
            query: weight [num_heads * d, hidden], or gain [num_heads * d].
            key: weight [num_kv_groups * d, hidden], or gain [num_kv_groups * d].
            num_heads: query heads.
            num_kv_groups: key heads; default: ``num_heads`` (MHA).
            dim: 1 for weights stored as [hidden, rows].

        Raises:
            ValueError: if the weights cannot be split so, or the head sizes differ.
        """
        groups = num_heads if num_kv_groups is None else num_kv_groups
        query_rows = _all_rows("query", query, num_heads, dim)
        key_rows = _all_rows("key", key, groups, dim)
        if query_rows.size(1) != key_rows.size(1):
            raise ValueError(
                f"query has {query_rows.size(1)} rows per head and key {key_rows.size(1)}: "
                "check num_heads and num_kv_groups"
            )
        return cls(HeadRows(query, query_rows, dim), HeadRows(key, key_rows, dim))

    @classmethod
    def fused(
        cls,
        qkv: Projection,
        *,
        num_heads: int,
        num_kv_groups: int | None = None,
        dim: int = 0,
    ) -> "AttentionLayout":
        """MHA or GQA with one projection; rows: all queries, then all keys, then all values.

        Args:
            qkv: weight [(num_heads + 2 * num_kv_groups) * d, hidden].
            num_heads: query heads.
            num_kv_groups: key heads; default: ``num_heads`` (MHA).
            dim: 1 for a weight stored as [hidden, rows].

        Raises:
            ValueError: if the weight cannot be split so.
        """
        groups = num_heads if num_kv_groups is None else num_kv_groups
        rows = _all_rows("qkv", qkv, num_heads + 2 * groups, dim)
        return cls(
            HeadRows(qkv, rows[:num_heads], dim),
            HeadRows(qkv, rows[num_heads : num_heads + groups], dim),
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
        """MHA or GQA with one projection; rows: per key group its queries, key and value.

        This is Megatron's order.

        Args:
            qkv: weight [(num_heads + 2 * num_kv_groups) * d, hidden]; with ``output_gate``
                [(2 * num_heads + 2 * num_kv_groups) * d, hidden].
            num_heads: query heads.
            num_kv_groups: key heads; default: ``num_heads`` (MHA).
            output_gate: each group has one gate per query, between its queries and its key.

        Raises:
            ValueError: if the weight cannot be split so.
        """
        groups = num_heads if num_kv_groups is None else num_kv_groups
        if groups < 1 or num_heads % groups:
            raise ValueError(f"{num_heads} query heads cannot be shared by {groups} key groups")
        queries = num_heads // groups
        per_group = queries * (2 if output_gate else 1) + 2
        rows = _all_rows("qkv", qkv, groups * per_group).view(groups, per_group, -1)
        return cls(
            HeadRows(qkv, rows[:, :queries].flatten(0, 1)),
            HeadRows(qkv, rows[:, -2].contiguous()),
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
            query: the last query projection, weight [num_heads * (nope_dim + rope_dim), any]; rows:
                per head the part without position, then the rotary part.
            kv_up: projection from the latent, weight [num_heads * (nope_dim + v_dim), latent];
                rows: per head its key, then its value.
            num_heads: heads.
            nope_dim: size of a head's query and key without position.
            rope_dim: size of a head's rotary query.
            v_dim: size of a head's value.

        Raises:
            ValueError: if the weights have other numbers of rows.
        """
        for name, projection, per_head, terms in (
            ("query", query, nope_dim + rope_dim, "nope_dim + rope_dim"),
            ("kv_up", kv_up, nope_dim + v_dim, "nope_dim + v_dim"),
        ):
            rows = _shape(projection)[0]
            if rows != num_heads * per_head:
                raise ValueError(
                    f"{name} has {rows} rows, but num_heads * ({terms}) is {num_heads * per_head}"
                )
        query_rows = _all_rows("query", query, num_heads)
        return cls(
            HeadRows(query, query_rows[:, :nope_dim]),
            HeadRows(kv_up, _all_rows("kv_up", kv_up, num_heads)[:, :nope_dim]),
            HeadRows(query, query_rows[:, nope_dim:]),
        )


def _read(projection: Projection) -> nn.Module | Tensor | WeightAndBias:
    if isinstance(projection, (nn.Module, Tensor, tuple)):
        return projection
    return projection()


def _weight_and_bias(projection: Projection) -> WeightAndBias:
    projection = _read(projection)
    if isinstance(projection, Tensor):
        return projection, None
    if isinstance(projection, tuple):
        return projection
    return weight_and_bias(active_module(projection))


def _shape(projection: Projection) -> tuple[int, ...]:
    """The shape of the weight, also of a quantized layer."""
    projection = _read(projection)
    if isinstance(projection, nn.Module):
        return layer_shape(base_layer(projection))
    return tuple(_weight_and_bias(projection)[0].shape)


def _is_plain_function(projection: Projection) -> bool:
    """Whether a copy of the function would read the weights of the original model."""
    if isinstance(projection, partial):
        # Its arguments are copied; pickle must find the function itself by name.
        return "<" in getattr(projection.func, "__qualname__", "")
    return isinstance(projection, FunctionType) and projection is not _refuse_copy


def _refuse_copy() -> WeightAndBias:
    raise ValueError(
        "this layout was copied together with a model, but its projection is a function that still "
        "reads the weights of the original model: make a new layout (and QKClip) for the copy, or "
        "give layouts a module instead of a function"
    )


def _all_rows(name: str, projection: Projection, heads: int, dim: int = 0) -> Tensor:
    """The indices of all rows of a weight, [heads, rows per head]."""
    shape = _shape(projection)
    if not 0 <= dim < len(shape):
        raise ValueError(f"dim must be one of the {len(shape)} of {name}, got {dim}")
    rows = shape[dim]
    if heads < 1 or rows == 0 or rows % heads:
        raise ValueError(f"{name} has {rows} rows, which cannot be split into {heads} heads")
    return torch.arange(rows, device="cpu").view(heads, -1)


def _check_rows(name: str, rows: Tensor, size: int) -> None:
    if rows.ndim != 2 or rows.dtype != torch.int64 or rows.numel() == 0:
        raise ValueError(
            f"{name} must be int64 [heads, rows per head] and not empty, "
            f"got {rows.dtype} {tuple(rows.shape)}"
        )
    if is_fake(rows):
        raise ValueError(f"{name} has no values under FakeTensorMode: leave QK-Clip out there")
    if rows.min() < 0 or rows.max() >= size:
        raise ValueError(f"{name} must lie in 0..{size - 1}, the weight's rows")
    if rows.flatten().bincount().max() > 1:
        raise ValueError(f"{name} must not repeat: a row belongs to one head")
