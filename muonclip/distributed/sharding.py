"""The part of a tensor that a rank stores: of a DTensor, or of a plain tensor with a ``Sharding``.

Both the optimizer and QK-Clip read it here.
"""

from __future__ import annotations  # torch may have been built without torch.distributed

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeGuard
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # importing it takes a second, and a run without DTensors does not need it
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


class TensorShard(NamedTuple):
    """A rectangular part of a tensor: ``offsets`` and ``sizes``, a number for each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> TensorShard:
        """The whole of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    def reduced(self, dims: Sequence[int]) -> TensorShard:
        """The part of a tensor that has one element along these dimensions, in place of some."""
        return TensorShard(
            tuple(0 if dim in dims else offset for dim, offset in enumerate(self.offsets)),
            reduced_shape(self.sizes, dims),
        )

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True, eq=False)
class Copies:
    """The ranks of a group in sets: those of a set have copies of the same shard.

    ``of`` returns the same object for the same sets.

    Attributes:
        sets: the ranks of each set, ascending; sets in the order of their first ranks.
        set_of: number of the set that each rank is in.
    """

    sets: tuple[tuple[int, ...], ...]
    set_of: tuple[int, ...]

    @classmethod
    def of(cls, shards: Sequence[TensorShard]) -> Copies:
        """The sets of ranks with these shards; a rank with an empty shard is alone in its set."""
        numbers: dict[TensorShard | int, int] = {}
        sets: list[list[int]] = []
        set_of = []
        for rank, shard in enumerate(shards):
            number = numbers.setdefault(shard if shard.numel else rank, len(sets))
            if number == len(sets):
                sets.append([])
            sets[number].append(rank)
            set_of.append(number)
        key = tuple(set_of)
        found = _copies.get(key)
        if found is None:
            found = _copies[key] = cls(tuple(map(tuple, sets)), key)
        return found


_copies: WeakValueDictionary[tuple[int, ...], Copies] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Sharding:
    """Shards of a parameter whose local tensors are plain tensors.

    DTensors (FSDP2, tensor parallelism) describe themselves; for megatron-core's parameters see
    ``muonclip.integrations.megatron_core.shardings``.

    Attributes:
        shape: of the whole parameter.
        group: the ranks that share it.
        shards: the shard of each rank, in the group's order; equal shards are copies.

    Raises:
        ValueError: unless there is one shard for each rank and the shards cover the parameter.
    """

    shape: tuple[int, ...]
    group: dist.ProcessGroup
    shards: tuple[TensorShard, ...]

    def __post_init__(self) -> None:
        if len(self.shards) != dist.get_world_size(self.group):
            raise ValueError(
                f"{len(self.shards)} shards for {dist.get_world_size(self.group)} ranks: give one "
                "for each rank of the group, in its order"
            )
        covered = sum(shard.numel for shard in self.distinct)
        if covered != prod(self.shape):
            raise ValueError(
                f"the shards of a parameter of shape {self.shape} have {covered} elements, "
                f"not {prod(self.shape)}: each element must be in one of them, or in equal ones"
            )

    @classmethod
    def gather(
        cls, local: Sequence[tuple[Sequence[int], TensorShard]], group: dist.ProcessGroup
    ) -> list[Sharding]:
        """Shardings of parameters, given the shards of this rank. A collective call of the group.

        Args:
            local: for each parameter, the shape of the whole and this rank's shard; the same
                parameters in the same order on all ranks.

        Returns:
            One sharding for each parameter.

        Raises:
            ValueError: on every rank, if ranks list different parameters, or the shards do not
                cover one.
        """
        local = [(tuple(shape), shard) for shape, shard in local]
        # Parameters that are cut in the same way are described once: in a large model there are
        # few kinds of them, whatever the number of layers.
        kinds = list(dict.fromkeys(local))
        number = {kind: index for index, kind in enumerate(kinds)}
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (kinds, [number[entry] for entry in local]), group=group)
        first_kinds, first_numbers = gathered[0]
        for rank, (remote_kinds, numbers) in enumerate(gathered):
            if difference := _difference(first_kinds, first_numbers, remote_kinds, numbers):
                raise ValueError(
                    f"ranks 0 and {rank} of the group update different parameters ({difference}): "
                    "every rank of a group must have gradients for the same ones, in the same order"
                )
        columns = list(zip(*(numbers for _, numbers in gathered), strict=True))
        made = {
            column: cls(
                first_kinds[column[0]][0],
                group,
                tuple(kinds[index][1] for (kinds, _), index in zip(gathered, column, strict=True)),
            )
            for column in dict.fromkeys(columns)
        }
        return [made[column] for column in columns]

    def reduced(self, dims: tuple[int, ...]) -> Sharding:
        """The sharding of a tensor that has one element along these dimensions, in place of some.

        Ranks whose shards differ along these dimensions only have copies of it.
        """
        if not dims:
            return self
        if dims not in self._reduced:  # one object for the many parameters that are cut like this
            shards = tuple(shard.reduced(dims) for shard in self.shards)
            self._reduced[dims] = Sharding(reduced_shape(self.shape, dims), self.group, shards)
        return self._reduced[dims]

    @cached_property
    def _reduced(self) -> dict[tuple[int, ...], Sharding]:
        return {}

    @cached_property
    def copies(self) -> Copies:
        """The ranks with equal shards."""
        return Copies.of(self.shards)

    @cached_property
    def distinct(self) -> tuple[TensorShard, ...]:
        """The shard of each set of ``copies``."""
        return tuple(self.shards[ranks[0]] for ranks in self.copies.sets)

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return dist.get_rank(self.group)

    @property
    def local(self) -> TensorShard:
        """The shard of this process."""
        return self.shards[self.rank]

    def gather_whole(self, local: Tensor) -> Tensor:
        """The whole of a tensor that is sharded like the parameter. A collective call of the group.

        Args:
            local: this process's shard.
        """
        whole = torch.zeros(self.shape, dtype=local.dtype, device=local.device)
        if self.shards.index(self.local) == self.rank:  # the first of several copies
            whole[self.local.slices] = local
        sum_of_parts(whole, self.group)
        return whole

    @property
    def has_whole_matrices(self) -> bool:
        """Whether every rank has whole matrices [n, m] of a stack, and none that another has."""
        return (
            len(self.shape) == 3
            and all(s.sizes[-2:] == self.shape[-2:] for s in self.distinct if s.numel)
            and len(self.copies.sets) == len(self.shards)
        )


def reduced_shape(shape: Sequence[int], dims: Sequence[int]) -> tuple[int, ...]:
    """A shape with one element along these dimensions."""
    return tuple(1 if dim in dims else size for dim, size in enumerate(shape))


_Kinds: TypeAlias = Sequence[tuple[tuple[int, ...], TensorShard]]  # shapes and shards


def _difference(
    kinds: _Kinds, numbers: Sequence[int], other_kinds: _Kinds, other_numbers: Sequence[int]
) -> str:
    """The first difference between two ranks' lists of parameters; empty if there is none.

    Args:
        kinds, numbers: the distinct entries of a list, and those of all its parameters.
        other_kinds, other_numbers: of the other rank.
    """
    if len(numbers) != len(other_numbers):
        return f"{len(numbers)} and {len(other_numbers)} of them"
    for index, (first, other) in enumerate(zip(numbers, other_numbers, strict=True)):
        shape, other_shape = kinds[first][0], other_kinds[other][0]
        if shape != other_shape:
            return f"number {index} has shapes {shape} and {other_shape}"
    return ""


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "device_mesh")


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its storage; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def placements_like(param: DTensor, dims: Sequence[int]) -> tuple[Placement, ...]:
    """Placements of a tensor that is placed as a parameter is, but has one element along ``dims``.

    Copies of it are on all ranks whose parts of the parameter differ along these dimensions only.
    """
    if not dims:
        return tuple(param.placements)
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if getattr(p, "dim", -1) in dims else p for p in param.placements)


def place_like(param: Tensor, whole: Tensor, dims: Sequence[int] = ()) -> Tensor:
    """A whole tensor as a DTensor that is placed as a parameter is.

    Args:
        param: a DTensor.
        whole: has the parameter's shape, but one element along ``dims``.
        dims: see ``placements_like``.
    """
    from torch.distributed.tensor import DTensor

    assert is_dtensor(param)
    return DTensor.from_local(
        whole[local_shard(param).reduced(dims).slices].clone(),  # a view would keep the whole
        param.device_mesh,
        placements_like(param, dims),
        shape=whole.shape,
        stride=whole.stride(),
    )


def local_gradient(param: Tensor) -> Tensor:
    """This rank's part of a parameter's gradient, placed as the parameter is."""
    gradient = param.grad
    assert gradient is not None
    if is_dtensor(param) and is_dtensor(gradient):
        if gradient.placements != param.placements:
            gradient = gradient.redistribute(param.device_mesh, param.placements)
        return gradient.to_local()
    if is_dtensor(param) or is_dtensor(gradient):
        raise TypeError("a parameter and its gradient must both be DTensors, or both be tensors")
    return gradient


def local_shard(tensor: Tensor) -> TensorShard:
    """The shard of a tensor on this rank, by its placements; a plain tensor is whole.

    Raises:
        ValueError: as ``local_indices``, or if the indices have gaps.
    """
    if not is_dtensor(tensor):
        return TensorShard.whole(tensor.shape)
    indices = [local_indices(tensor, dim) for dim in range(tensor.ndim)]
    if any(len(i) and i[-1] - i[0] >= len(i) for i in indices):
        raise ValueError(
            f"{_description(tensor)}, which give this rank parts with gaps, from which matrices "
            "cannot be put together: shard it in another way, or give it to AdamW "
            "(adamw=[PATTERN] of for_model and param_groups)"
        )
    return TensorShard(
        tuple(int(i[0]) if len(i) else 0 for i in indices), tuple(len(i) for i in indices)
    )


def local_indices(tensor: DTensor, dim: int, first_axis: int = 0) -> Tensor:
    """The indices along a dimension of a DTensor that are on this rank, ascending.

    Args:
        tensor: the tensor.
        dim: the dimension.
        first_axis: of its mesh: as if the tensor were gathered over the axes before it, as FSDP2
            does for the forward pass over its own, which come first.

    Raises:
        ValueError: if the tensor is a sum over ranks, or its local part has another size than its
            placements give it.
    """
    mesh = tensor.device_mesh
    indices = torch.arange(tensor.size(dim), device="cpu")
    if mesh.get_coordinate() is None:  # this rank has no part of it
        return indices[:0]
    for axis, placement in list(enumerate(tensor.placements))[first_axis:]:
        if placement.is_partial():
            raise ValueError(f"{_description(tensor)}: reduce it first")
        if getattr(placement, "dim", dim) % tensor.ndim != dim or placement.is_replicate():
            continue
        # FSDP2 on top of tensor parallelism splits each of that many parts (_StridedShard).
        parts = indices.chunk(getattr(placement, "split_factor", 1))
        rank, size = mesh.get_local_rank(axis), mesh.size(axis)
        indices = torch.cat([_chunk(part, size, rank) for part in parts])
    local_shape = tuple(tensor.to_local().shape)
    if first_axis == 0 and local_shape[dim : dim + 1] != (len(indices),):
        raise ValueError(
            f"{_description(tensor)}, which give this rank {len(indices)} entries of dimension "
            f"{dim}, but its local tensor has shape {local_shape}: matrices cannot be put together "
            "from such uneven shards (Megatron-FSDP, RaggedShard); shard with "
            "torch.distributed.fsdp.fully_shard"
        )
    return indices


def _chunk(indices: Tensor, count: int, number: int) -> Tensor:
    chunks = indices.chunk(count)
    return chunks[number] if number < len(chunks) else indices[:0]


def _description(tensor: DTensor) -> str:
    return f"a DTensor of shape {tuple(tensor.shape)} has placements {tensor.placements}"


def sum_of_parts(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """The tensor whose parts ranks have, in place: each element is zero on all of them but one.

    Sums bytes, because a sum of numbers loses the sign of zeros.
    """
    dist.all_reduce(tensor.view(-1).view(torch.uint8), group=group)
