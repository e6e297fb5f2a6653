"""Tensors of optimizer state that are stored in parts by ranks, as with ``shard_state``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.distributed.sharding import (
    TensorShard,
    local_tensor,
    reduced_shape,
    sum_of_parts,
)

_ATEN = torch.ops.aten


class ScalesMasters(Protocol):
    """The part of ``StateOwners`` that QK-Clip needs."""

    def scale(self, factors: Mapping[Tensor, Tensor]) -> None:
        """Multiply the master copies of parameters by factors; a collective call."""


@dataclass(frozen=True, eq=False)
class StateLayout:
    """The parts of a parameter's state that this rank stores.

    Attributes:
        shape: of the whole parameter.
        group: the ranks that share the parameter.
        parts: of each part, the boxes that it consists of, in the whole parameter's coordinates. A
            part is stored as one flat tensor, box after box.
        owners: the object that assigned the parts.
    """

    shape: tuple[int, ...]
    group: dist.ProcessGroup
    parts: tuple[tuple[TensorShard, ...], ...]
    owners: ScalesMasters

    @property
    def numel(self) -> int:
        """Number of elements that this rank stores."""
        return sum(box.numel for boxes in self.parts for box in boxes)

    def zeros(self, dtype: torch.dtype, device: torch.device) -> ShardedState:
        """A new tensor of state, zero everywhere."""
        sizes = [sum(box.numel for box in boxes) for boxes in self.parts]
        parts = [torch.zeros(size, dtype=dtype, device=device) for size in sizes]
        return ShardedState(self, parts, dtype, device)

    def select(self, whole: Tensor) -> ShardedState:
        """This rank's parts of a whole tensor, copied."""
        parts = [
            torch.cat([whole[box.slices].reshape(-1) for box in boxes]) for boxes in self.parts
        ]
        return ShardedState(self, parts, whole.dtype, whole.device)

    def first_of(self, kept: int) -> StateLayout:
        """The layout of a tensor with a size of one from dimension ``kept`` on.

        Parts must be whole in these dimensions.
        """
        ones = (1,) * (len(self.shape) - kept)
        parts = tuple(
            tuple(TensorShard(box.offsets, (*box.sizes[:kept], *ones)) for box in boxes)
            for boxes in self.parts
        )
        return replace(self, shape=(*self.shape[:kept], *ones), parts=parts)

    def reduced(self, dims: tuple[int, ...]) -> StateLayout:
        """The parts of state that has one element along these dimensions, in place of some."""
        if not dims:
            return self
        if dims not in self._reduced:  # layouts are compared by identity
            parts = tuple(tuple(box.reduced(dims) for box in boxes) for boxes in self.parts)
            shape = reduced_shape(self.shape, dims)
            self._reduced[dims] = StateLayout(shape, self.group, parts, self.owners)
        return self._reduced[dims]

    @cached_property
    def _reduced(self) -> dict[tuple[int, ...], StateLayout]:
        return {}

    def __deepcopy__(self, _memo: dict[int, Any]) -> StateLayout:
        return self  # never changes, and process groups cannot be copied


class ShardedState(Tensor):
    """A tensor of optimizer state in the shape of its whole parameter, stored in parts by ranks.

    ``torch.distributed.checkpoint`` saves and loads it at any number of ranks. Apart from copies
    and moves, computing with it raises an error: compute with ``parts``, or with ``full_tensor()``.
    It cannot be pickled, because a file would contain this rank's parts alone.

    Attributes:
        state_layout: the parts that this rank has.
        parts: a flat tensor for each part; none on a rank that stores nothing.
    """

    state_layout: StateLayout
    parts: list[Tensor]

    @staticmethod
    def __new__(
        cls, layout: StateLayout, parts: Sequence[Tensor], dtype: torch.dtype, device: torch.device
    ) -> ShardedState:
        tensor: ShardedState = Tensor._make_wrapper_subclass(
            cls, layout.shape, dtype=dtype, device=device
        )
        tensor.state_layout, tensor.parts = layout, list(parts)
        return tensor

    def pieces(self) -> Iterator[tuple[TensorShard, Tensor]]:
        """(position in the whole tensor, this rank's values there) pairs, which do not overlap.

        The values are views, of the position's sizes: they may be written. Together the pieces of
        all ranks of ``state_layout.group`` cover the tensor.
        """
        for boxes, part in zip(self.state_layout.parts, self.parts, strict=True):
            sizes = [box.numel for box in boxes]
            for box, values in zip(boxes, part.split_with_sizes(sizes), strict=True):
                yield box, values.view(box.sizes)

    def full_tensor(self) -> Tensor:
        """The whole tensor. A collective call of the ranks that share the parameter."""
        full = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for box, values in self.pieces():
            full[box.slices] = values
        sum_of_parts(full, self.state_layout.group)
        return full

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"ShardedState(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"{self.state_layout.numel} elements on this rank)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedState:
        if id(self) not in memo:
            memo[id(self)] = self.clone()
        copied: ShardedState = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "with shard_state=True, state_dict() has this rank's parts of the state alone and "
            "cannot be pickled: save optimizer.full_state_dict(), also in place of "
            "get_optimizer_state_dict with full_state_dict=True, or use "
            "torch.distributed.checkpoint.save or async_save"
        )

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        state = args[0]
        if func is _ATEN.copy_.default:
            source = args[1]
            if (
                isinstance(state, cls)
                and isinstance(source, cls)
                and state.state_layout is source.state_layout
            ):
                for part, other in zip(state.parts, source.parts, strict=True):
                    part.copy_(other)
                return state
        elif func is _ATEN.new_empty.default and tuple(args[1]) == tuple(state.shape):
            # torch.distributed.checkpoint.async_save copies a tensor so, and then its attributes.
            return torch.empty_like(state, **kwargs)
        elif func in _COPIES:
            parts = [func(part, *args[1:], **kwargs) for part in state.parts]
            dtype = kwargs.get("dtype") or state.dtype
            device = torch.device(kwargs.get("device") or state.device)
            return cls(state.state_layout, parts, dtype, device)
        raise RuntimeError(
            f"{func} cannot compute with a tensor of which this rank stores some parts alone: use "
            "full_tensor(), a collective call, or the values of pieces()"
        )

    # ------------------------------------------------------ torch.distributed.checkpoint

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.size(),
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [
            ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
            for box, _ in self.pieces()
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        for box, values in self.pieces():
            if torch.Size(box.offsets) == index.offset:
                return values
        raise ValueError(f"{index.fqn}: this rank has no part at {index.offset}")


_COPIES = {
    _ATEN.detach.default,
    _ATEN.clone.default,
    _ATEN._to_copy.default,
    _ATEN.empty_like.default,
    _ATEN.zeros_like.default,
}


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[TensorShard]:
    """The boxes that a range of a tensor's elements consists of, in order.

    Args:
        shape: of the tensor, of which elements are counted in row-major order.
        start, stop: of the range; not empty.

    Returns:
        At most 2 * len(shape) - 1 boxes, each a range of consecutive elements.
    """
    shape = tuple(shape)
    if not shape:
        return [TensorShard((), ())]
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        return _in_row(shape, last, start - last * row, stop - last * row)
    boxes = []
    if start < first * row:
        boxes += _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        rest = (0,) * (len(shape) - 1)
        boxes.append(TensorShard((first, *rest), (last - first, *shape[1:])))
    if last * row < stop:
        boxes += _in_row(shape, last, 0, stop - last * row)
    return boxes


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[TensorShard]:
    return [
        TensorShard((row, *box.offsets), (1, *box.sizes))
        for box in flat_boxes(shape[1:], start, stop)
    ]


def flat_range(tensor: Tensor, start: int, stop: int) -> Tensor:
    """A range of a tensor's elements in row-major order: a view of a contiguous tensor."""
    return tensor.reshape(-1)[start:stop]


def write_flat(tensor: Tensor, start: int, values: Tensor) -> None:
    """Write a range of a tensor's elements in row-major order."""
    stop = start + values.numel()
    if tensor.is_contiguous():
        tensor.view(-1)[start:stop] = values
    else:
        flat = tensor.reshape(-1)  # a copy
        flat[start:stop] = values
        tensor.copy_(flat.view(tensor.shape))


def local_values(tensor: Tensor) -> list[Tensor]:
    """This rank's values of a tensor of state: of its parts, or of its local tensor."""
    return tensor.parts if isinstance(tensor, ShardedState) else [local_tensor(tensor)]
