"""Process groups that share tensors, and agreement of all ranks that they connect."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

from muonclip.distributed.sharding import Copies, Sharding, is_dtensor

_T = TypeVar("_T")


def group_of(
    tensor: Tensor,
    process_group: dist.ProcessGroup | None,
    shardings: Mapping[Tensor, Sharding],
) -> dist.ProcessGroup | None:
    """The group of the ranks that share a tensor; None if this rank is not in it, or has it alone.

    Args:
        tensor: a DTensor, whose group is that of its whole mesh, or a plain tensor.
        process_group: the group of plain tensors without a sharding, or None.
        shardings: of plain tensors.
    """
    if not is_dtensor(tensor):
        return shardings[tensor].group if tensor in shardings else process_group
    mesh = tensor.device_mesh
    if mesh.get_coordinate() is None:
        return None
    if mesh.ndim == 1:
        return mesh.get_group()
    along = mesh.get_all_groups()
    for group in along:
        remember(group)
    return group_of_ranks(mesh.mesh.flatten().tolist(), along)


def groups_of(
    tensors: Iterable[Tensor],
    process_group: dist.ProcessGroup | None,
    shardings: Mapping[Tensor, Sharding],
) -> list[dist.ProcessGroup]:
    """The groups in which this rank shares tensors, each group once.

    Args:
        tensors, process_group, shardings: as for ``group_of``; ``process_group`` is always in the
            result.

    Returns:
        Groups in the order of ``order_of``: ranks that share several groups must meet in them in
        the same order.
    """
    groups = [process_group, *(group_of(t, process_group, shardings) for t in tensors)]
    distinct = {id(group): group for group in groups if group is not None}
    return sorted(distinct.values(), key=order_of)


def order_of(group: dist.ProcessGroup) -> tuple[int, list[int], str]:
    """Sort key of groups, the same on every rank: the largest first."""
    ranks = dist.get_process_group_ranks(group)
    return -len(ranks), ranks, group.group_name


class ConnectedRanks:
    """The ranks that groups connect, directly or through other ranks.

    If one of them skips a step, all must, because each shares tensors with another. The
    constructor and each method are collective calls of all of them.

    Args:
        groups: the groups that this rank is in, sorted by ``order_of``; at least one.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup]) -> None:
        self._groups = groups
        self._rounds = 0
        neighbours = {rank for group in groups for rank in dist.get_process_group_ranks(group)}
        # Usually the largest group contains all others, and no rank needs to send its neighbours:
        # together they are as many as the square of the number of ranks.
        has_all = len(neighbours) == len(dist.get_process_group_ranks(groups[0]))
        if all([all(values_of_ranks(has_all, group)) for group in groups]):
            self._rounds = min(1, len(neighbours) - 1)
            return
        known = {dist.get_rank(): neighbours}
        # After n rounds a rank knows the neighbours of all ranks up to n groups away.
        while self._rounds < _diameter(known):
            gathered = [entries for group in groups for entries in values_of_ranks(known, group)]
            known = {rank: ranks for entries in gathered for rank, ranks in entries.items()}
            self._rounds += 1

    def largest(self, flags: Tensor) -> Tensor:
        """The elementwise maximum of all ranks' tensors, in place."""
        for _ in range(self._rounds):
            for group in self._groups:
                dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
        return flags

    def any(self, flag: bool) -> bool:
        """Whether the flag of a rank is set; kept on the host, unlike those of ``largest``."""
        for _ in range(self._rounds):
            for group in self._groups:
                flag = any(values_of_ranks(flag, group))
        return flag

    def first_error(self, error: str | None) -> str | None:
        """The error of the lowest rank that has one, the same for all; None if there is none."""
        errors = {} if error is None else {dist.get_rank(): error}
        for _ in range(self._rounds):
            for group in self._groups:
                for gathered in values_of_ranks(errors, group):
                    errors |= gathered
        return errors[min(errors)] if errors else None


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


_groups_by_ranks: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = (
    WeakKeyDictionary()
)


def group_of_ranks(ranks: Sequence[int], along: Sequence[dist.ProcessGroup]) -> dist.ProcessGroup:
    """The group of these ranks, created once. A collective call of these ranks alone.

    Args:
        ranks: global ranks, a grid in any order.
        along: this rank's group along each dimension of the grid.
    """
    world = dist.group.WORLD
    assert world is not None
    if len(ranks) == dist.get_world_size():
        return world
    created = _groups_by_ranks.setdefault(world, {})  # groups end with the world they belong to
    key = tuple(sorted(ranks))
    if key not in created:
        _align_names(along)
        created[key] = _new_group(key)
    return created[key]


def remember(group: dist.ProcessGroup) -> None:
    """Let ``group_of_ranks`` and ``group_of_copies`` use a group, instead of creating another."""
    if dist.group.WORLD is not None:
        created = _groups_by_ranks.setdefault(dist.group.WORLD, {})
        created.setdefault(tuple(dist.get_process_group_ranks(group)), group)


_groups_of_copies: WeakKeyDictionary[dist.ProcessGroup, dict[Copies, dist.ProcessGroup | None]] = (
    WeakKeyDictionary()
)


def group_of_copies(copies: Copies, group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """The group of the ranks that have the same shards as this one, created once.

    A collective call of the group.

    Returns:
        None if no other rank has a copy of this rank's shards.
    """
    if len(copies.sets) == len(copies.set_of):
        return None
    if len(copies.sets) == 1:
        return group
    known = _groups_of_copies.setdefault(group, {})
    if copies not in known:
        world = dist.group.WORLD
        assert world is not None
        created = _groups_by_ranks.setdefault(world, {})
        members = dist.get_process_group_ranks(group)
        own = copies.sets[copies.set_of[dist.get_rank(group)]]
        ranks = tuple(members[number] for number in own)
        # Some of these ranks may know no group of them, or another one than the rest.
        name = created[ranks].group_name if ranks in created else ""
        names = values_of_ranks(name, group)

        def is_missing(numbers: Sequence[int]) -> bool:
            found = {names[number] for number in numbers}
            return len(numbers) > 1 and (len(found) > 1 or "" in found)

        if any(map(is_missing, copies.sets)):
            _align_names([group])
        if is_missing(own):
            created[ranks] = _new_group(ranks)
        known[copies] = created.get(ranks)
    return known[copies]


_nodes: WeakKeyDictionary[dist.ProcessGroup, list[int]] = WeakKeyDictionary()


def nodes_of(group: dist.ProcessGroup) -> list[int]:
    """A number for the node of each rank of a group. A collective call of the group.

    Nodes have ``LOCAL_WORLD_SIZE`` consecutive ranks; where it is not set, all are on one.
    """
    if group not in _nodes:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        # Ranks might disagree about the size.
        _nodes[group] = values_of_ranks(dist.get_rank() // local, group)
    return _nodes[group]


def values_of_ranks(value: _T, group: dist.ProcessGroup) -> list[_T]:
    """The value of each rank of a group. A collective call of the group."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _align_names(along: Sequence[dist.ProcessGroup]) -> None:
    """Let the ranks of groups be in equally many groups.

    torch names a group that only its members create after that number: where it differs, they would
    wait for each other under different names.
    """
    count = len(dist.distributed_c10d._world.pg_names)
    for group in along:
        count = max(values_of_ranks(count, group))
    while len(dist.distributed_c10d._world.pg_names) < count:
        dist.new_group([dist.get_rank()], use_local_synchronization=True)


def _new_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    group = dist.new_group(list(ranks), timeout=_time_limit(world), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _time_limit(group: dist.ProcessGroup) -> timedelta | None:
    """Time limit of a group's collectives; a new group does not inherit it. None: unknown."""
    backend = group._get_backend(group._device_types[0])
    return getattr(getattr(backend, "options", None), "_timeout", None)
