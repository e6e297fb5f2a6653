"""Which part of a parameter each rank holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


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
        """Put together what every rank says it holds. A collective call of the group.

        Args:
            parts: for each parameter, the shape of the whole and this rank's block; the same
                parameters in the same order on all ranks.

        Returns:
            One sharding for each parameter.

        Raises:
            ValueError: on every rank, if ranks list different parameters.
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
    """What this rank holds of a DTensor.

    Raises:
        ValueError: for a DTensor whose value is a sum over ranks that was not formed.
    """
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise ValueError(
            f"a DTensor of shape {tuple(tensor.shape)} has placements {tensor.placements}: "
            "reduce it before the optimizer's step"
        )
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return Block(tuple(offsets), tuple(sizes))


_groups_of_meshes: dict[tuple[int, ...], dist.ProcessGroup] = {}


def group_of(tensor: DTensor) -> dist.ProcessGroup:
    """The group of all ranks of a DTensor's mesh; made once for a mesh of several dimensions."""
    mesh = tensor.device_mesh
    if mesh.ndim == 1:
        return mesh.get_group()
    ranks = tuple(mesh.mesh.flatten().tolist())
    if len(ranks) == dist.get_world_size():
        group = dist.group.WORLD
        assert group is not None
        return group
    if ranks not in _groups_of_meshes:
        made = dist.new_group(list(ranks), use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        _groups_of_meshes[ranks] = made
    return _groups_of_meshes[ranks]


def local_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a gradient or state, placed as the parameter is."""
    if isinstance(parameter, DTensor) and isinstance(tensor, DTensor):
        if tensor.placements != parameter.placements:
            tensor = tensor.redistribute(parameter.device_mesh, parameter.placements)
        return tensor.to_local()
    if isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        raise TypeError("a parameter and its gradient must both be DTensors, or both be tensors")
    return tensor
