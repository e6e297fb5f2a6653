"""Moving blocks to the owners of their matrices, and updates back to all who hold a part."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.distributed.plan import Bucket, Unit


class Exchange:
    """The way of one bucket's units to their owners and back, over one process group.

    ``send``, ``receive``, ``send_back`` and ``receive_back`` are called once each, in this order,
    on every rank; the two that send return at once.

    Args:
        bucket: the units.
        group: the ranks.
        dtype_there: of the blocks on their way to the owner. They are normalized by the norm of
            their whole matrix, which only the owner knows, and need this dtype's range until then.
        dtype: of the results on their way back: that of Newton-Schulz.
        device: of the tensors.

    Attributes:
        mine: the units that this rank owns.
        unsent: those of which it holds a copy that another rank sends.
    """

    def __init__(
        self,
        bucket: Bucket,
        group: dist.ProcessGroup,
        dtype_there: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.group, self.dtype, self.device = group, dtype, device
        self.dtype_there = dtype_there
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.mine = [
            unit
            for unit, owner in zip(bucket.units, bucket.owners, strict=True)
            if owner == self.rank
        ]
        # What passes between this rank and each other one, in the bucket's order on both sides.
        self._to_owner: list[list[Unit]] = [[] for _ in range(self.size)]
        self._from_sender: list[list[Unit]] = [[] for _ in range(self.size)]
        self._to_holder: list[list[Unit]] = [[] for _ in range(self.size)]
        self._from_owner: list[list[Unit]] = [[] for _ in range(self.size)]
        self._all_at_home = True  # every owner holds the whole of its units already
        self._all_to_all_hold = True  # and so does every other rank
        for unit, owner in zip(bucket.units, bucket.owners, strict=True):
            for route in unit.routes(owner):
                self._all_at_home &= route.sender == owner
                self._all_to_all_hold &= len(route.holders) == self.size
                if route.sender == self.rank:
                    self._to_owner[owner].append(unit)
                if owner == self.rank:
                    self._from_sender[route.sender].append(unit)
                    for holder in route.holders:
                        self._to_holder[holder].append(unit)
                if self.rank in route.holders:
                    self._from_owner[owner].append(unit)
        self._owned_sizes = [0] * self.size
        for unit, owner in zip(bucket.units, bucket.owners, strict=True):
            self._owned_sizes[owner] += sum(b.numel for b in set(unit.blocks) if b is not None)
        self.unsent = [
            unit
            for unit in bucket.units
            if unit.blocks[self.rank] is not None
            and not any(unit in units for units in self._to_owner)
        ]
        self._received: Tensor | None = None
        self._work: Any = None

    def send(self, block_of: Callable[[Sequence[Unit]], list[Tensor]]) -> None:
        """Send this rank's blocks on their way.

        Args:
            block_of: gives this rank's block of each of some units.
        """
        outgoing = [unit for units in self._to_owner for unit in units]
        packed = self._pack(block_of(outgoing), self.dtype_there)
        if self._all_at_home:
            self._received = packed
            return
        self._start_all_to_all(
            packed,
            [self._elements(units, self.rank) for units in self._to_owner],
            [self._elements(units, rank) for rank, units in enumerate(self._from_sender)],
        )

    def receive(self) -> list[Tensor]:
        """Wait for the units that this rank owns: each whole, in the order of ``mine``."""
        parts = self._unpack(self._from_sender, lambda sender: sender)
        whole: dict[Unit, Tensor] = {}
        for unit, rank, part in parts:
            block = unit.blocks[rank]
            assert block is not None
            if block.sizes == unit.shape:
                whole[unit] = part.view(unit.shape)
                continue
            if unit not in whole:
                whole[unit] = torch.empty(unit.shape, dtype=part.dtype, device=self.device)
            whole[unit][block.slices] = part.view(block.sizes)
        return [whole[unit] for unit in self.mine]

    def send_back(self, results: Sequence[Tensor]) -> None:
        """Send what became of the units of ``mine`` to all that hold a part of them."""
        by_unit = dict(zip(self.mine, results, strict=True))
        if self._all_to_all_hold:
            # As many elements from everybody: gloo and the fast path of NCCL ask for it.
            longest = max(self._owned_sizes)
            packed = self._pack([by_unit[unit] for unit in self.mine], self.dtype, longest)
            self._received = torch.empty(self.size * longest, dtype=self.dtype, device=self.device)
            self._work = dist.all_gather_into_tensor(
                self._received, packed, group=self.group, async_op=True
            )
            return
        blocks = []
        for rank, units in enumerate(self._to_holder):
            for unit in units:
                block = unit.blocks[rank]
                assert block is not None
                blocks.append(by_unit[unit][block.slices])
        self._start_all_to_all(
            self._pack(blocks, self.dtype),
            [self._elements(units, rank) for rank, units in enumerate(self._to_holder)],
            [self._elements(units, self.rank) for units in self._from_owner],
        )

    def receive_back(self) -> list[tuple[Unit, Tensor]]:
        """Wait for the results: every unit that this rank holds a block of, and that block."""
        stride = max(self._owned_sizes) if self._all_to_all_hold else None
        parts = self._unpack(self._from_owner, lambda _owner: self.rank, stride)
        results = []
        for unit, rank, part in parts:
            block = unit.blocks[rank]
            assert block is not None
            results.append((unit, part.view(block.sizes)))
        return results

    def _pack(
        self, tensors: Sequence[Tensor], dtype: torch.dtype, length: int | None = None
    ) -> Tensor:
        flat = [tensor.to(dtype).reshape(-1) for tensor in tensors]
        if length is not None:
            rest = length - sum(tensor.numel() for tensor in flat)
            flat.append(torch.zeros(rest, dtype=dtype, device=self.device))
        return torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=self.device)

    def _unpack(
        self,
        units_of: Sequence[Sequence[Unit]],
        block_rank: Callable[[int], int],
        stride: int | None = None,
    ) -> list[tuple[Unit, int, Tensor]]:
        """Units, whose block came, and the block itself, flat."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        assert self._received is not None
        parts = []
        position = 0
        for other, units in enumerate(units_of):
            if stride is not None:
                position = other * stride
            for unit in units:
                rank = block_rank(other)
                block = unit.blocks[rank]
                assert block is not None
                parts.append((unit, rank, self._received[position : position + block.numel]))
                position += block.numel
        self._received = None
        return parts

    def _elements(self, units: Sequence[Unit], rank: int) -> int:
        return sum(block.numel for unit in units if (block := unit.blocks[rank]) is not None)

    def _start_all_to_all(self, packed: Tensor, sent: list[int], received: list[int]) -> None:
        self._received = torch.empty(sum(received), dtype=packed.dtype, device=self.device)
        self._work = dist.all_to_all_single(
            self._received, packed, received, sent, group=self.group, async_op=True
        )
