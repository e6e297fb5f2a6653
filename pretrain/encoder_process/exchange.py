"""Exchange of items between the ranks that own them and the ranks that encode them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.errors import PretrainError
from pretrain.model.vision import inverse, select_items


def gather_grids(
    grids: Tensor, group: dist.ProcessGroup | None, image_error: str | None = None
) -> tuple[Tensor, list[int]]:
    """Gather the grids of the global batch on all ranks.

    Args:
        grids: int64 [n, 3] of this rank's items; n may differ between ranks.
        group: default: all ranks.
        image_error: reason why this rank's images cannot be encoded, if any.

    Returns:
        int64 [N, 3] of all items, in the order of ranks, and the rank that owns each item.

    Raises:
        PretrainError: on all ranks, so that none waits for another, if one of them has an error.
    """
    gathered: list[tuple[list[list[int]], str | None]] = [([], None)] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (grids.tolist(), image_error), group=group)
    for rank, (_, error) in enumerate(gathered):
        if error is not None:
            raise PretrainError(f"rank {rank} cannot use its images: {error}")
    owners = [rank for rank, (rows, _) in enumerate(gathered) for _ in rows]
    rows = [row for rows, _ in gathered for row in rows]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3), owners


class ItemExchange:
    """All-to-all exchange of items' rows: patches, features or gradients.

    Args:
        owners: rank that owns each item of the global batch, in ascending order.
        encoders: rank that encodes each item.
        group: default: all ranks.

    Attributes:
        incoming: items that this rank encodes, in ascending order.
    """

    def __init__(
        self, owners: Sequence[int], encoders: Sequence[int], group: dist.ProcessGroup | None
    ) -> None:
        self.group = group
        self._num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self._owners, self._encoders = owners, encoders
        owned = [item for item, owner in enumerate(owners) if owner == rank]
        # All-to-all sends and receives one block of rows per rank. The sort is stable, so that both
        # sides list the items of a pair of ranks in the same order.
        self._order = sorted(range(len(owned)), key=lambda index: encoders[owned[index]])
        self._outgoing = [owned[index] for index in self._order]
        self._owned = owned
        self.incoming = [item for item, encoder in enumerate(encoders) if encoder == rank]

    def to_encoders(self, rows: Tensor, rows_per_item: Sequence[int]) -> Tensor:
        """Send the rows of this rank's items to their encoders.

        Args:
            rows: [R, d], rows of the items that this rank owns, item by item.
            rows_per_item: number of rows of every item of the global batch.

        Returns:
            [R', d], rows of the items in ``incoming``, item by item.
        """
        rows = select_items(rows, [rows_per_item[item] for item in self._owned], self._order)
        return self._all_to_all(
            rows,
            self._rows_per_rank(self._outgoing, self._encoders, rows_per_item),
            self._rows_per_rank(self.incoming, self._owners, rows_per_item),
        )

    def to_owners(self, rows: Tensor, rows_per_item: Sequence[int]) -> Tensor:
        """Send rows [R', d] of the items in ``incoming`` to their owners: the inverse."""
        rows = self._all_to_all(
            rows,
            self._rows_per_rank(self.incoming, self._owners, rows_per_item),
            self._rows_per_rank(self._outgoing, self._encoders, rows_per_item),
        )
        counts = [rows_per_item[item] for item in self._outgoing]
        return select_items(rows, counts, inverse(self._order))

    def _rows_per_rank(
        self, items: Sequence[int], ranks: Sequence[int], rows_per_item: Sequence[int]
    ) -> list[int]:
        counts = [0] * self._num_ranks
        for item in items:
            counts[ranks[item]] += rows_per_item[item]
        return counts

    def _all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=self.group)
        return received
