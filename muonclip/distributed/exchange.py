"""Transfer of shards to the owners of their matrices, and of results back to all holders.

Results return in two steps, whose buffers have the size of what a rank receives, whatever the
number of ranks and however unevenly matrices are owned. The ranks with copies of the same shard
need the same elements: these are cut into one part for each of them; owners send every rank its
part (``all_to_all_single``), and the ranks gather the parts (``all_gather_into_tensor``). The first
step is one part of the data. The second is the fastest path of NCCL, whose rings carry every
element over a node's network once, and of gloo, which gathers equal parts only. The alternatives: a
gather of what each rank owns is padded to the largest; a broadcast for each owner waits for the
whole ring each time. A shard without copies arrives with the first step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.distributed.groups import group_of_copies, nodes_of
from muonclip.distributed.plan import (
    Bucket,
    Cut,
    WorkUnit,
    nearest,
    segments,
    split_results,
)
from muonclip.distributed.scaled_float16 import decode_, encode, message_size, split_flat
from muonclip.distributed.sharding import Copies, TensorShard

# A rank receives at most this many elements of results at a time, or those of one unit.
RESULT_ELEMENTS = 2**27

_T = TypeVar("_T")


class BucketExchange:
    """Transfer of one bucket's shards to their owners.

    ``send`` (or ``send_zeros``) and ``receive`` are called once each, in this order, on every rank;
    the first returns at once. Results return by ``ResultExchange``. The constructor is a collective
    call of the group.

    Args:
        bucket: the units.
        group: the ranks.
        dtype: of the shards. They are normalized by the norm of their whole matrix, which only the
            owner knows, and need this dtype's range until then.
        device: of the tensors.
        scaled: send float32 shards as scaled float16 (see ``scaled_float16``): the dimensions along
            which elements share a scale, by the index of a unit. None: in ``dtype``.

    Attributes:
        owned: the units that this rank orthogonalizes.
        unsent: the units of which this rank has a copy of a shard that another rank sends.
    """

    def __init__(
        self,
        bucket: Bucket,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
        scaled: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.group, self.dtype, self.device = group, dtype, device
        self.rank, nodes = dist.get_rank(group), nodes_of(group)
        self.owned = [unit for unit, owner in bucket if owner == self.rank]
        # The units between this rank and each other one, in the bucket's order on both sides.
        to_owner: dict[int, list[WorkUnit]] = {}
        from_sender: dict[int, list[WorkUnit]] = {}
        for unit, owner in bucket:
            if unit.is_on(self.rank):
                holders = unit.copies.sets[unit.copies.set_of[self.rank]]
                if nearest(holders, owner, nodes) == self.rank:
                    to_owner.setdefault(owner, []).append(unit)
            if owner == self.rank:
                for _, holders in unit.held:
                    from_sender.setdefault(nearest(holders, owner, nodes), []).append(unit)
        self._outgoing = [unit for _, units in sorted(to_owner.items()) for unit in units]
        self._incoming = [(unit, r) for r, units in sorted(from_sender.items()) for unit in units]
        sent = set(self._outgoing)
        self.unsent = [unit for unit, _ in bucket if unit.is_on(self.rank) and unit not in sent]
        self._owners_have_all = all(unit.is_whole_on(owner) for unit, owner in bucket)
        self._scaled = None if self._owners_have_all else scaled
        ranks = range(dist.get_world_size(group))
        self._sent = [self._elements(to_owner.get(rank, ()), self.rank) for rank in ranks]
        self._to_receive = [self._elements(from_sender.get(rank, ()), rank) for rank in ranks]
        self._received: Tensor | None = None
        self._work: Any = None

    def send(self, shards_of: Callable[[Sequence[WorkUnit]], list[Tensor]]) -> None:
        """Start sending this rank's shards.

        Args:
            shards_of: returns this rank's shard of each of some units.
        """
        if self._scaled is None:
            self._send(_flat(shards_of(self._outgoing), self.dtype, self.device))
        else:
            dims = [self._scaled[unit.index] for unit in self._outgoing]
            self._send(encode(shards_of(self._outgoing), dims, self.device))

    def send_zeros(self) -> None:
        """Send zeros in place of the shards, which need not exist."""
        dtype = self.dtype if self._scaled is None else torch.float16
        self._send(torch.zeros(sum(self._sent), dtype=dtype, device=self.device))

    def _send(self, packed: Tensor) -> None:
        if self._owners_have_all:
            self._received = packed
            return
        self._received = packed.new_empty(sum(self._to_receive))
        self._work = _all_to_all(self._received, packed, self._to_receive, self._sent, self.group)

    def receive(self) -> list[Tensor]:
        """Wait for the units that this rank owns: each whole, in the order of ``owned``."""
        _wait(self._work)
        assert self._received is not None
        received, self._work, self._received = self._received, None, None
        shards = [unit.shard_of(rank) for unit, rank in self._incoming]
        if self._scaled is not None:
            return self._decoded(received, shards, self._scaled)
        parts = received.split_with_sizes([shard.numel for shard in shards])
        pieces: dict[WorkUnit, list[tuple[TensorShard, Tensor]]] = {}
        for (unit, _), shard, part in zip(self._incoming, shards, parts, strict=True):
            pieces.setdefault(unit, []).append((shard, part))
        return [_assemble(unit, pieces.pop(unit)) for unit in self.owned]

    def _decoded(
        self,
        received: Tensor,
        shards: Sequence[TensorShard],
        scaled: Mapping[int, tuple[int, ...]],
    ) -> list[Tensor]:
        """The units of a message of scaled float16: 4 bytes for each of their elements.

        Each shard is decoded into its place. Until then, there are 2 more bytes for what was
        received. In memory, the units follow one another, and need not be copied again for
        Newton-Schulz.
        """
        shapes = [unit.shape for unit in self.owned]
        flat = torch.empty(sum(map(prod, shapes)), dtype=self.dtype, device=self.device)
        whole = dict(zip(self.owned, split_flat(flat, shapes), strict=True))
        targets = [
            whole[unit][shard.slices]
            for (unit, _), shard in zip(self._incoming, shards, strict=True)
        ]
        decode_(received, targets, [scaled[unit.index] for unit, _ in self._incoming])
        return list(whole.values())

    def _elements(self, units: Sequence[WorkUnit], rank: int) -> int:
        """Number of elements in the message of a rank's shards of units."""
        shards = [(unit.index, unit.shard_of(rank)) for unit in units]
        if self._scaled is None:
            return sum(shard.numel for _, shard in shards)
        return sum(message_size(shard.sizes, self._scaled[index]) for index, shard in shards)


class ResultExchange:
    """Transfer of results to all ranks that have a shard of their units.

    ``send`` (or ``send_zeros``), ``gather`` and ``receive`` are called once each, in this order, on
    every rank; the first two return at once, though ``gather`` waits for what was sent. The
    constructor is a collective call of the group.

    Args:
        message: the units, with the same ``copies``, in the order of their owners.
        group: the ranks.
        dtype: of the results on their way.
        device: of the tensors.

    Attributes:
        owned: the units whose results this rank has.
    """

    def __init__(
        self,
        message: Bucket,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.group, self.dtype, self.device = group, dtype, device
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.rank = rank
        self.owned = [unit for unit, owner in message if owner == rank]
        self._copies = _copies_of(message)
        self._own = self._copies.set_of[rank]
        self._number = self._copies.sets[self._own].index(rank)
        self._units = [unit for unit, _ in message if unit.is_on(rank)]
        self._cut, received = _received(message, self._own, self._number)
        # A stack's slices may be on some of the ranks only.
        copies_group = group_of_copies(self._copies, group)
        self._copies_group = copies_group if self._cut.total else None
        self._to_receive = [received.get(owner, 0) for owner in range(size)]
        # This rank's results in pieces, and the size and the rank of each in the order of ranks.
        self._pieces = list(_pieces(message, rank)) if self.owned else []
        order = sorted(
            (holder, number, size)
            for number, piece in enumerate(self._pieces)
            for holder, size in piece.sizes.items()
        )
        self._sizes = [size for *_, size in order]
        self._places: list[list[int]] = [[] for _ in self._pieces]
        self._sent = [0] * size
        for place, (holder, number, elements) in enumerate(order):
            self._places[number].append(place)
            self._sent[holder] += elements
        self._received: Tensor | None = None
        self._work: Any = None

    def send(self, results: Mapping[WorkUnit, Tensor]) -> None:
        """Start sending every rank its part of the results.

        Args:
            results: of the units in ``owned``, each whole.
        """
        if len(self._copies.sets) == 1:
            packed = _flat([results[unit] for unit in self.owned], self.dtype, self.device)
        else:
            packed = self._pack(results)
        self._send(packed)

    def send_zeros(self) -> None:
        """Send zeros in place of the results."""
        self._send(torch.zeros(sum(self._sent), dtype=self.dtype, device=self.device))

    def _send(self, packed: Tensor) -> None:
        self._received = packed.new_empty(sum(self._to_receive))
        self._work = _all_to_all(self._received, packed, self._to_receive, self._sent, self.group)

    def _pack(self, results: Mapping[WorkUnit, Tensor]) -> Tensor:
        if all(_has_rows(piece.unit, piece.shard) for piece in self._pieces):  # views
            by_place: dict[int, Tensor] = {}
            for numbers, parts in self._parts(results):
                by_place |= zip(numbers, parts, strict=True)
            ordered = [by_place[place] for place in range(len(by_place))]
            return _flat(ordered, self.dtype, self.device)
        packed = torch.empty(sum(self._sizes), dtype=self.dtype, device=self.device)
        places = packed.split_with_sizes(self._sizes)
        for numbers, pieces in self._parts(results):
            torch._foreach_copy_([places[number] for number in numbers], list(pieces))
        return packed

    def _parts(
        self, results: Mapping[WorkUnit, Tensor]
    ) -> Iterator[tuple[list[int], Sequence[Tensor]]]:
        """The parts of each piece of the results, and their places in the message."""
        whole: dict[WorkUnit, Tensor] = {}
        for piece, numbers in zip(self._pieces, self._places, strict=True):
            if piece.unit not in whole:  # one at a time
                whole = {piece.unit: results[piece.unit].to(self.dtype).contiguous()}
            flat = whole[piece.unit][piece.shard.slices].reshape(-1)
            yield numbers, flat.split_with_sizes(list(piece.sizes.values()))

    def gather(self) -> None:
        """Start gathering the parts of the ranks that have copies of the same shards."""
        if self._copies_group is None:
            return
        _wait(self._work)
        assert self._received is not None
        gathered = self._received.new_empty(self._cut.gathered)
        part = gathered.narrow(0, self._number * self._cut.part, self._cut.part)
        part[: self._received.numel()] = self._received
        self._received = gathered
        self._work = dist.all_gather_into_tensor(
            gathered, part, group=self._copies_group, async_op=True
        )

    def receive(self) -> list[tuple[WorkUnit, Tensor]]:
        """Wait for the results: (unit, this rank's shard) of every unit that it has a shard of."""
        _wait(self._work)
        assert self._received is not None
        shards = [unit.shard_of(self.rank) for unit in self._units]
        received = self._received[: self._cut.total]
        parts = received.split_with_sizes([shard.numel for shard in shards])
        self._work = self._received = None
        return [
            (unit, part.view(shard.sizes))
            for unit, shard, part in zip(self._units, shards, parts, strict=True)
        ]


def result_exchanges(
    bucket: Bucket, group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device
) -> list[ResultExchange]:
    """Exchanges of a bucket's results; see ``split_results``. A collective call of the group."""
    messages = split_results(bucket, RESULT_ELEMENTS)
    return [ResultExchange(message, group, dtype, device) for message in messages]


def arrivals(sent: Iterable[tuple[_T, ResultExchange]]) -> Iterator[tuple[_T, ResultExchange]]:
    """Results to receive, in turn. While one is received, the next is gathered, and a third sent.

    Args:
        sent: exchanges that have sent their results, each with anything. It is asked for the next
            when that may be sent.
    """
    travelling: deque[tuple[_T, ResultExchange]] = deque()
    for entry in sent:
        travelling.append(entry)
        if len(travelling) > 1:
            travelling[-2][1].gather()
        if len(travelling) > 2:
            yield travelling.popleft()
    if travelling:
        travelling[-1][1].gather()
    yield from travelling


def _copies_of(message: Bucket) -> Copies:
    """The sets of ranks with copies, the same for all units of a message."""
    return message[0][0].copies


def _received(message: Bucket, own: int, number: int) -> tuple[Cut, dict[int, int]]:
    """The cut of the results of a set of ranks, and what one of them receives from each owner."""
    places = list(segments(message, own))
    cut = Cut.of(places[-1][2], len(_copies_of(message).sets[own]))
    received: dict[int, int] = {}
    for owner, start, stop in places:
        if part := cut.overlap(number, start, stop):
            received[owner] = received.get(owner, 0) + part
    return cut, received


class _Piece(NamedTuple):
    """A shard of a result, and the elements of it that each of some ranks is sent, in order."""

    unit: WorkUnit
    shard: TensorShard
    sizes: dict[int, int]


def _pieces(message: Bucket, rank: int) -> Iterator[_Piece]:
    """The shards of the results of ``rank``, unit by unit."""
    copies = _copies_of(message)
    # Where the parts of a set begin and end is of no matter if there is one.
    places = {
        number: list(segments(message, number))
        for number, ranks in enumerate(copies.sets)
        if len(ranks) > 1
    }
    cuts = {number: Cut.of(p[-1][2], len(copies.sets[number])) for number, p in places.items()}
    for index, (unit, owner) in enumerate(message):
        if owner != rank:
            continue
        for number, (shard, ranks) in enumerate(zip(unit.shards, copies.sets, strict=True)):
            if shard is None:
                continue
            sizes = [shard.numel]
            if number in places:
                _, start, stop = places[number][index]
                sizes = cuts[number].overlaps(start, stop)
            yield _Piece(
                unit, shard, {r: size for r, size in zip(ranks, sizes, strict=True) if size}
            )


def _assemble(unit: WorkUnit, pieces: Sequence[tuple[TensorShard, Tensor]]) -> Tensor:
    """The whole of a unit; without a copy if its rows follow one another in memory.

    Args:
        pieces: its different shards, flat.
    """
    first = pieces[0][1]
    if all(_has_rows(unit, shard) for shard, _ in pieces):
        ordered = sorted(pieces, key=lambda piece: piece[0].offsets)
        return _flat([part for _, part in ordered], first.dtype, first.device).view(unit.shape)
    whole = first.new_empty(unit.shape)
    for shard, part in pieces:
        whole[shard.slices] = part.view(shard.sizes)
    return whole


def _has_rows(unit: WorkUnit, shard: TensorShard) -> bool:
    """Whether a shard consists of whole rows, which follow one another in memory."""
    return shard.sizes[1:] == unit.shape[1:]


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Tensors in one flat tensor; without a copy if they follow one another in memory."""
    if not tensors:
        return torch.empty(0, dtype=dtype, device=device)
    first, size = tensors[0], 0
    for tensor in tensors:
        if (
            tensor.dtype != dtype
            or not tensor.is_contiguous()
            or tensor.storage_offset() != first.storage_offset() + size
            or tensor.untyped_storage()._cdata != first.untyped_storage()._cdata
        ):
            return torch.cat([tensor.to(dtype).reshape(-1) for tensor in tensors])
        size += tensor.numel()
    return first.as_strided((size,), (1,))


def _all_to_all(
    received: Tensor, packed: Tensor, to_receive: list[int], sent: list[int], group: Any
) -> Any:
    return dist.all_to_all_single(received, packed, to_receive, sent, group=group, async_op=True)


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()
