"""Which part of a parameter each rank holds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_T = TypeVar("_T")


class Block(NamedTuple):
    """A rectangular part of a tensor: ``offsets`` and ``sizes``, a number for each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True, eq=False)
class Sharding:
    """Where the whole of a parameter is, for parameters that are plain tensors.

    DTensors (FSDP2, tensor parallelism) know this of themselves; megatron-core's parameters are
    described by ``muonclip.integrations.megatron_core.shardings``.

    Attributes:
        shape: of the whole parameter.
        group: the ranks that hold it.
        blocks: what each rank of the group holds, in the group's order; equal blocks are copies.

    Raises:
        ValueError: if there is not one block a rank, or the blocks do not cover the parameter.
    """

    shape: tuple[int, ...]
    group: dist.ProcessGroup
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        if len(self.blocks) != dist.get_world_size(self.group):
            raise ValueError(
                f"{len(self.blocks)} blocks for {dist.get_world_size(self.group)} ranks"
            )
        covered = sum(block.numel for block in set(self.blocks))
        if covered != prod(self.shape):
            raise ValueError(
                f"the blocks of a parameter of shape {self.shape} hold {covered} elements, "
                f"not {prod(self.shape)}"
            )

    @classmethod
    def replicated(cls, shape: Sequence[int], group: dist.ProcessGroup) -> "Sharding":
        """Every rank of the group holds a copy of the whole (data parallel)."""
        whole = Block((0,) * len(shape), tuple(shape))
        return cls(tuple(shape), group, (whole,) * dist.get_world_size(group))

    @classmethod
    def gather(
        cls, parts: Sequence[tuple[Sequence[int], Block]], group: dist.ProcessGroup
    ) -> list["Sharding"]:
        """Shardings from the blocks that the ranks hold. A collective call of the group.

        Args:
            parts: for each parameter, the shape of the whole and this rank's block; the same
                parameters in the same order on all ranks.

        Returns:
            One sharding for each parameter.

        Raises:
            ValueError: on every rank, if ranks list different parameters, or the blocks do not
                cover one.
        """
        mine = [(tuple(shape), block) for shape, block in parts]
        everyones: list[list[tuple[tuple[int, ...], Block]]] = [
            [] for _ in range(dist.get_world_size(group))
        ]
        dist.all_gather_object(everyones, mine, group=group)
        for rank, theirs in enumerate(everyones):
            if [shape for shape, _ in theirs] != [shape for shape, _ in everyones[0]]:
                raise ValueError(
                    f"ranks 0 and {rank} of the group update different parameters "
                    f"({_differ(everyones[0], theirs)}): every rank of a group must have "
                    "gradients for the same ones, in the same order"
                )
        return [
            cls(shape, group, tuple(theirs[index][1] for theirs in everyones))
            for index, (shape, _) in enumerate(mine)
        ]

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return dist.get_rank(self.group)

    @property
    def is_local(self) -> bool:
        """Whether every rank holds whole matrices [n, m] and none that another one has too."""
        whole = all(
            block.numel == 0 or block.sizes[-2:] == self.shape[-2:] for block in self.blocks
        )
        held = [block for block in self.blocks if block.numel]
        return (len(self.shape) == 3 and whole and len(set(held)) == len(held)) or (
            len(self.blocks) == 1
        )


def _differ(ours: Sequence[tuple[object, Block]], theirs: Sequence[tuple[object, Block]]) -> str:
    if len(ours) != len(theirs):
        return f"{len(ours)} and {len(theirs)} of them"
    index = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a[0] != b[0])
    return f"number {index} has shapes {ours[index][0]} and {theirs[index][0]}"


def own_block(tensor: DTensor) -> Block:
    """The part of a DTensor on this rank, by its placements."""
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return Block(tuple(offsets), tuple(sizes))


def check_placements(tensor: DTensor) -> None:
    """Raise unless the placements of a DTensor describe the part that this rank holds.

    Raises:
        ValueError: for a DTensor whose value is a sum over ranks that was not formed, or whose
            local tensor has another shape than DTensors have in torch (uneven shards).
    """
    what = f"a DTensor of shape {tuple(tensor.shape)} has placements {tensor.placements}"
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise ValueError(f"{what}: reduce it before the optimizer's step")
    held, expected = tuple(tensor.to_local().shape), own_block(tensor).sizes
    if held != expected:
        raise ValueError(
            f"{what}, which give this rank {expected}, but it holds {held}: Muon cannot put "
            "together matrices from such uneven shards (Megatron-FSDP, RaggedShard); shard with "
            "torch.distributed.fsdp.fully_shard"
        )


def group_of(tensor: DTensor) -> dist.ProcessGroup | None:
    """The group of all ranks of a DTensor's mesh; None on a rank outside the mesh."""
    mesh = tensor.device_mesh
    if mesh.get_coordinate() is None:
        return None
    if mesh.ndim == 1:
        return mesh.get_group()
    return group_of_ranks(mesh.mesh.flatten().tolist(), mesh.get_all_groups())


def groups_of(
    tensors: Iterable[Tensor],
    process_group: dist.ProcessGroup | None,
    shardings: "Mapping[Tensor, Sharding]",
) -> list[dist.ProcessGroup]:
    """The groups in which this rank holds parts or copies of tensors, each group once.

    Args:
        tensors: DTensors and plain tensors.
        process_group: the group of plain tensors without a sharding, or None; always in the result.
        shardings: of plain tensors.

    Returns:
        Groups in the order of ``order_of``: ranks that share several groups must meet in them in
        the same order.
    """
    found = {} if process_group is None else {id(process_group): process_group}
    for tensor in tensors:
        group = None
        if isinstance(tensor, DTensor):
            group = group_of(tensor)
        elif tensor in shardings:
            group = shardings[tensor].group
        if group is not None:
            found[id(group)] = group
    return sorted(found.values(), key=order_of)


def order_of(group: dist.ProcessGroup) -> tuple[int, list[int], str]:
    """Sort key of groups, the same on every rank: the largest first."""
    ranks = dist.get_process_group_ranks(group)
    return -len(ranks), ranks, group.group_name


class ConnectedRanks:
    """The ranks that groups connect, directly or through other ranks.

    If one of them leaves out a step, all must: each shares tensors with another one. Making it, and
    each method, is a collective call of all of them.

    Args:
        groups: the groups that this rank is in, sorted by ``order_of``; at least one.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup]) -> None:
        self._groups = groups
        self._rounds = 0
        neighbours = {rank for group in groups for rank in dist.get_process_group_ranks(group)}
        known = {dist.get_rank(): neighbours}
        # After n rounds a rank knows the neighbours of all ranks up to n groups away.
        while self._rounds < _diameter(known):
            gathered = [theirs for group in groups for theirs in _gather(known, group)]
            known = {rank: found for theirs in gathered for rank, found in theirs.items()}
            self._rounds += 1

    def largest(self, flags: Tensor) -> Tensor:
        """The elementwise maximum of all ranks' tensors."""
        for _ in range(self._rounds):
            for group in self._groups:
                dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
        return flags

    def first_error(self, error: str | None) -> str | None:
        """The error of one rank, the same for all; None if no rank has one."""
        errors = {} if error is None else {dist.get_rank(): error}
        for _ in range(self._rounds):
            for group in self._groups:
                for theirs in _gather(errors, group):
                    errors |= theirs
        return errors[min(errors)] if errors else None


def _gather(value: dict[int, _T], group: dist.ProcessGroup) -> list[dict[int, _T]]:
    everyones: list[dict[int, _T]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyones, value, group=group)
    return everyones


def _diameter(neighbours: Mapping[int, set[int]]) -> float:
    """The largest distance between two ranks; infinite if a rank's neighbours are not known."""
    if not set().union(*neighbours.values()) <= neighbours.keys():
        return math.inf
    largest = 0
    for rank in neighbours:
        reached, distance = {rank}, 0
        while reached != neighbours.keys():
            reached = set().union(*(neighbours[other] for other in reached))
            distance += 1
        largest = max(largest, distance)
    return largest


_made: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = (
    WeakKeyDictionary()
)


def group_of_ranks(ranks: Sequence[int], along: Sequence[dist.ProcessGroup]) -> dist.ProcessGroup:
    """The group of these ranks, made once. A collective call of these ranks alone.

    Args:
        ranks: global ranks, a grid in any order.
        along: this rank's group along each dimension of the grid.
    """
    world = dist.group.WORLD
    assert world is not None
    if len(ranks) == dist.get_world_size():
        return world
    made = _made.setdefault(world, {})  # groups end with the world they belong to
    key = tuple(sorted(ranks))
    if key not in made:
        # torch names a group that only its members make after the number of groups that a rank is
        # in: where that differs, they would wait for each other under different names.
        count = len(dist.distributed_c10d._world.pg_names)
        for group in along:
            counts = _gather({dist.get_rank(): count}, group)
            count = max(max(theirs.values()) for theirs in counts)
        while len(dist.distributed_c10d._world.pg_names) < count:
            dist.new_group([dist.get_rank()], use_local_synchronization=True)
        found = dist.new_group(list(key), use_local_synchronization=True)
        assert isinstance(found, dist.ProcessGroup)
        made[key] = found
    return made[key]


def local_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a gradient or state, placed as the parameter is."""
    if isinstance(parameter, DTensor) and isinstance(tensor, DTensor):
        if tensor.placements != parameter.placements:
            tensor = tensor.redistribute(parameter.device_mesh, parameter.placements)
        return tensor.to_local()
    if isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        raise TypeError("a parameter and its gradient must both be DTensors, or both be tensors")
    return tensor
