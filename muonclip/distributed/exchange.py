"""Transfer of shards to the owners of their matrices, and of updates back to all holders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.distributed.plan import Bucket, WorkUnit


class BucketExchange:
    """Transfer of one bucket's units to their owners and back, over one process group.

    ``send``, ``receive``, ``send_back`` and ``receive_back`` are called once each, in this order,
    on every rank; the two that send return at once.

    Args:
        bucket: the units.
        group: the ranks.
        send_dtype: of the shards on their way to the owner. They are normalized by the norm of
            their whole matrix, which only the owner knows, and need this dtype's range until then.
        return_dtype: of the results on their way back, the dtype of Newton-Schulz.
        device: of the tensors.

    Attributes:
        owned: the units that this rank orthogonalizes.
        unsent: the units of which this rank has a copy of a shard that another rank sends.
    """

    def __init__(
        self,
        bucket: Bucket,
        group: dist.ProcessGroup,
        send_dtype: torch.dtype,
        return_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.group, self.device = group, device
        self.send_dtype, self.return_dtype = send_dtype, return_dtype
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.owned = [unit for unit, owner in bucket if owner == self.rank]
        # The units between this rank and each other one, in the bucket's order on both sides.
        self._to_owner: list[list[WorkUnit]] = [[] for _ in range(self.size)]
        self._from_sender: list[list[WorkUnit]] = [[] for _ in range(self.size)]
        self._to_holder: list[list[WorkUnit]] = [[] for _ in range(self.size)]
        self._from_owner: list[list[WorkUnit]] = [[] for _ in range(self.size)]
        self._owners_have_all = True  # every owner has the whole of its units already
        self._ranks_have_all = True  # and so does every other rank
        for unit, owner in bucket:
            for sender, holders in unit.routes(owner):
                self._owners_have_all &= sender == owner
                self._ranks_have_all &= len(holders) == self.size
                if sender == self.rank:
                    self._to_owner[owner].append(unit)
                if owner == self.rank:
                    self._from_sender[sender].append(unit)
                    for holder in holders:
                        self._to_holder[holder].append(unit)
                if self.rank in holders:
                    self._from_owner[owner].append(unit)
        self._owned_sizes = [0] * self.size
        for unit, owner in bucket:
            self._owned_sizes[owner] += sum(s.numel for s in set(unit.shards) if s is not None)
        sent = {unit for units in self._to_owner for unit in units}
        self.unsent = [
            unit for unit, _ in bucket if unit.shards[self.rank] is not None and unit not in sent
        ]
        self._received: Tensor | None = None
        self._work: Any = None

    def send(self, shards_of: Callable[[Sequence[WorkUnit]], list[Tensor]]) -> None:
        """Start sending this rank's shards.

        Args:
            shards_of: returns this rank's shard of each of some units.
        """
        outgoing = [unit for units in self._to_owner for unit in units]
        packed = self._pack(shards_of(outgoing), self.send_dtype)
        if self._owners_have_all:
            self._received = packed
            return
        self._start_all_to_all(
            packed,
            [_elements(units, self.rank) for units in self._to_owner],
            [_elements(units, rank) for rank, units in enumerate(self._from_sender)],
        )

    def receive(self) -> list[Tensor]:
        """Wait for the units that this rank owns: each whole, in the order of ``owned``."""
        whole: dict[WorkUnit, Tensor] = {}
        for unit, rank, received in self._unpack(self._from_sender, lambda sender: sender):
            shard = unit.shard_of(rank)
            if shard.sizes == unit.shape:
                whole[unit] = received.view(unit.shape)
                continue
            if unit not in whole:
                whole[unit] = torch.empty(unit.shape, dtype=received.dtype, device=self.device)
            whole[unit][shard.slices] = received.view(shard.sizes)
        return [whole[unit] for unit in self.owned]

    def send_back(self, results: Sequence[Tensor]) -> None:
        """Start sending the results of the units in ``owned`` to all ranks that have a shard."""
        by_unit = dict(zip(self.owned, results, strict=True))
        if self._ranks_have_all:
            # The same number of elements from each rank, as gloo and NCCL's fast path require.
            longest = max(self._owned_sizes)
            packed = self._pack(list(by_unit.values()), self.return_dtype, longest)
            self._received = packed.new_empty(self.size * longest)
            self._work = dist.all_gather_into_tensor(
                self._received, packed, group=self.group, async_op=True
            )
            return
        shards = [
            by_unit[unit][unit.shard_of(rank).slices]
            for rank, units in enumerate(self._to_holder)
            for unit in units
        ]
        self._start_all_to_all(
            self._pack(shards, self.return_dtype),
            [_elements(units, rank) for rank, units in enumerate(self._to_holder)],
            [_elements(units, self.rank) for units in self._from_owner],
        )

    def receive_back(self) -> list[tuple[WorkUnit, Tensor]]:
        """Wait for the results: (unit, this rank's shard) of every unit that it has a shard of."""
        stride = max(self._owned_sizes) if self._ranks_have_all else None
        received = self._unpack(self._from_owner, lambda _owner: self.rank, stride)
        return [(unit, flat.view(unit.shard_of(rank).sizes)) for unit, rank, flat in received]

    def _pack(
        self, tensors: Sequence[Tensor], dtype: torch.dtype, length: int | None = None
    ) -> Tensor:
        """Tensors in one flat tensor, filled up with zeros to ``length``."""
        flat = [tensor.to(dtype).reshape(-1) for tensor in tensors]
        if length is not None:
            rest = length - sum(tensor.numel() for tensor in flat)
            flat.append(torch.zeros(rest, dtype=dtype, device=self.device))
        return torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=self.device)

    def _unpack(
        self,
        units_by_rank: Sequence[Sequence[WorkUnit]],
        shard_rank: Callable[[int], int],
        stride: int | None = None,
    ) -> list[tuple[WorkUnit, int, Tensor]]:
        """Wait for what was sent.

        Args:
            units_by_rank: units that each rank sends.
            shard_rank: given a sender, the rank whose shards it sends.
            stride: distance between two senders' elements; default: there are no gaps.

        Returns:
            (unit, rank of the shard, the shard as a flat tensor) each.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        assert self._received is not None
        unpacked = []
        position = 0
        for sender, units in enumerate(units_by_rank):
            if stride is not None:
                position = sender * stride
            rank = shard_rank(sender)
            for unit in units:
                end = position + unit.shard_of(rank).numel
                unpacked.append((unit, rank, self._received[position:end]))
                position = end
        self._received = None
        return unpacked

    def _start_all_to_all(self, packed: Tensor, sent: list[int], received: list[int]) -> None:
        self._received = packed.new_empty(sum(received))
        self._work = dist.all_to_all_single(
            self._received, packed, received, sent, group=self.group, async_op=True
        )


def _elements(units: Sequence[WorkUnit], rank: int) -> int:
    """Number of elements in a rank's shards of units."""
    return sum(unit.shard_of(rank).numel for unit in units)
