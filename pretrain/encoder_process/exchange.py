"""Exchange of items between the ranks that own them and the ranks that encode them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.errors import PretrainError
from pretrain.model.vision import num_features, select_items


class Piece(NamedTuple):
    """Consecutive features of an item that the backbone needs on one rank.

    Attributes:
        item: number of the item in the global batch.
        rank: the rank.
        rows: number of features.
    """

    item: int
    rank: int
    rows: int


def cut(ranks: Tensor, rows_per_item: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Cut items into runs of features that the same rank needs.

    Args:
        ranks: int64 [N], the rank that needs each feature of the items, in order.
        rows_per_item: number of features of each item; their sum is N.

    Returns:
        (rank, number of features) of each run, by item.
    """
    runs = []
    for part in torch.split(ranks, list(rows_per_item)):
        values, counts = torch.unique_consecutive(part, return_counts=True)
        runs.append(list(zip(values.tolist(), counts.tolist(), strict=True)))
    return runs


def gather_grids(
    grids: Tensor,
    group: dist.ProcessGroup | None,
    image_error: str | None = None,
    runs: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> tuple[Tensor, list[int], list[Piece]]:
    """Gather the grids of the global batch on all ranks.

    Args:
        grids: int64 [n, 3] of this rank's items.
        group: None: all ranks.
        image_error: reason why this rank's images cannot be encoded, if any.
        runs: the ranks that need the features of each item; see :func:`cut`. Default: this rank
            needs all of them.

    Returns:
        int64 [N, 3] of all items, in the order of ranks; the rank that owns each item; and all
        features in the order of items, by the rank that needs them.

    Raises:
        PretrainError: on all ranks, so that none waits for another, if one of them has an error.
    """
    if runs is None:
        rank = dist.get_rank(group)
        runs = [[(rank, rows)] for rows in num_features(grids).tolist()]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (grids.tolist(), runs, image_error), group=group)
    for rank, (_, _, error) in enumerate(gathered):
        if error is not None:
            number = global_rank(group, rank)
            raise PretrainError(f"rank {number} cannot use its images: {error}")
    owners = [rank for rank, (rows, _, _) in enumerate(gathered) for _ in rows]
    rows = [row for rows, _, _ in gathered for row in rows]
    all_runs = [run for _, runs, _ in gathered for run in runs]
    pieces = [Piece(item, *run) for item, runs in enumerate(all_runs) for run in runs]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3), owners, pieces


def global_rank(group: dist.ProcessGroup | None, rank: int) -> int:
    """Number among all ranks of a rank of a group; None: all ranks."""
    return rank if group is None else dist.get_global_rank(group, rank)


class ItemExchange:
    """All-to-all exchange of items' rows: patches, features or gradients.

    Args:
        owners: rank that owns each item of the global batch.
        encoders: rank that encodes each item.
        group: None: all ranks.

    Attributes:
        incoming: items that this rank encodes, in ascending order.
    """

    def __init__(
        self, owners: Sequence[int], encoders: Sequence[int], group: dist.ProcessGroup | None
    ) -> None:
        self.group = group
        self._owners, self._encoders = owners, encoders
        rank = dist.get_rank(group)
        self._owned = [item for item, owner in enumerate(owners) if owner == rank]
        # All-to-all sends and receives one block of rows per rank. The sort is stable, so that both
        # sides list the items of a pair of ranks in the same order.
        self._outgoing = sorted(self._owned, key=encoders.__getitem__)
        self.incoming = [item for item, encoder in enumerate(encoders) if encoder == rank]
        self._received = sorted(self.incoming, key=owners.__getitem__)

    def to_encoders(self, rows: Tensor, rows_per_item: Sequence[int]) -> Tensor:
        """Send rows [R, d] of this rank's items to their encoders.

        Args:
            rows_per_item: number of rows of every item of the global batch.

        Returns:
            [R', d], rows of the items in ``incoming``.
        """
        rows = _reorder(rows, rows_per_item, self._owned, self._outgoing)
        rows = self._all_to_all(rows, *self._rows_per_rank(rows_per_item))
        return _reorder(rows, rows_per_item, self._received, self.incoming)

    def to_owners(self, rows: Tensor, rows_per_item: Sequence[int]) -> Tensor:
        """Send rows [R', d] of the items in ``incoming`` to their owners: the inverse."""
        outgoing, incoming = self._rows_per_rank(rows_per_item)
        rows = _reorder(rows, rows_per_item, self.incoming, self._received)
        rows = self._all_to_all(rows, incoming, outgoing)
        return _reorder(rows, rows_per_item, self._outgoing, self._owned)

    def _rows_per_rank(self, rows_per_item: Sequence[int]) -> tuple[list[int], list[int]]:
        """Rows of outgoing items for each encoder, and of incoming items from each owner."""
        num_ranks = dist.get_world_size(self.group)
        outgoing, incoming = [0] * num_ranks, [0] * num_ranks
        for item in self._outgoing:
            outgoing[self._encoders[item]] += rows_per_item[item]
        for item in self.incoming:
            incoming[self._owners[item]] += rows_per_item[item]
        return outgoing, incoming

    def _all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=self.group)
        return received


def _reorder(
    rows: Tensor, rows_per_item: Sequence[int], before: Sequence[int], after: Sequence[int]
) -> Tensor:
    if before == after:
        return rows
    index = {item: number for number, item in enumerate(before)}
    counts = [rows_per_item[item] for item in before]
    return select_items(rows, counts, [index[item] for item in after])
