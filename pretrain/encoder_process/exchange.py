"""Moving items between the ranks that own them and the ranks that encode them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.errors import PretrainError


def gather_grids(
    grids: Tensor, group: dist.ProcessGroup | None, image_error: str | None = None
) -> list[Tensor]:
    """Every rank's int64 grids [n, 3], whatever n is there.

    Args:
        grids: this rank's.
        group: the ranks; None is all.
        refused: what is wrong with this rank's images, if anything is.

    Raises:
        PretrainError: on every rank, if one of them refused: nobody is left waiting for it.
    """
    told: list[tuple[list[list[int]], str | None]] = [([], None)] * dist.get_world_size(group)
    dist.all_gather_object(told, (grids.tolist(), image_error), group=group)
    for rank, (_, why) in enumerate(told):
        if why is not None:
            raise PretrainError(f"rank {rank} cannot use its images: {why}")
    return [torch.tensor(rows, dtype=torch.int64).view(-1, 3) for rows, _ in told]


class ItemExchange:
    """The ways of all items to their encoders and back.

    Args:
        owners: for every item of the global batch, in the order of ranks, the rank that holds it.
        encoders: the rank that encodes it.
        group: the ranks; None is all.
    """

    def __init__(
        self, owners: Sequence[int], encoders: Sequence[int], group: dist.ProcessGroup | None
    ) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        rank = dist.get_rank(group)
        mine = [item for item, owner in enumerate(owners) if owner == rank]
        # Sorted by the other side: what goes to one rank is together. The sort is stable, so that
        # both sides list a pair's items in the same order.
        self.outgoing = sorted(mine, key=lambda item: encoders[item])
        incoming = [item for item, encoder in enumerate(encoders) if encoder == rank]
        self.incoming = sorted(incoming, key=lambda item: owners[item])
        self._first = mine[0] if mine else 0
        self._owners, self._encoders = owners, encoders

    def to_encoders(self, rows: Tensor, rows_per_item: Sequence[int]) -> Tensor:
        """Send this rank's own items away and take in those that it encodes.

        Args:
            rows: [R, d], the rows of this rank's items in their own order.
            rows_per_item: rows of every item of the global batch.

        Returns:
            [R', d], the rows of the items in ``incoming``, in that order.
        """
        own = sorted(self.outgoing)
        parts = dict(zip(own, torch.split(rows, [rows_per_item[i] for i in own]), strict=True))
        packed = torch.cat([rows[:0], *(parts[item] for item in self.outgoing)])
        return self._all_to_all(
            packed,
            self._counts(self.outgoing, self._encoders, rows_per_item),
            self._counts(self.incoming, self._owners, rows_per_item),
        )

    def to_owners(self, rows: Tensor, rows_per_item: Sequence[int]) -> Tensor:
        """The way back: rows of ``incoming`` items to their owners, who get them in own order."""
        packed = self._all_to_all(
            rows,
            self._counts(self.incoming, self._owners, rows_per_item),
            self._counts(self.outgoing, self._encoders, rows_per_item),
        )
        parts = torch.split(packed, [rows_per_item[item] for item in self.outgoing])
        by_item = dict(zip(self.outgoing, parts, strict=True))
        return torch.cat([packed[:0], *(by_item[item] for item in sorted(self.outgoing))])

    def _counts(
        self, items: Sequence[int], ranks: Sequence[int], rows_per_item: Sequence[int]
    ) -> list[int]:
        counts = [0] * self.size
        for item in items:
            counts[ranks[item]] += rows_per_item[item]
        return counts

    def _all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=self.group)
        return received
