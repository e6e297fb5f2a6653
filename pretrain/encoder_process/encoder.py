"""The Decoupled Encoder Process, and the plain way that it must equal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.encoder_process.cost import CostModel, analytic_cost, transfer_bytes
from pretrain.encoder_process.exchange import ItemExchange, gather_grids
from pretrain.encoder_process.plan import (
    CapacityError,
    balance,
    balance_lower_bound,
    oversized,
    plan,
)
from pretrain.errors import PretrainError
from pretrain.model.projector import VisionTower
from pretrain.model.vision import check_grids, chunks, num_features, observers_disabled

Spread = Literal["balanced", "round_robin"]
# (patches [P, 3 * patch * patch] uint8, grids [n, 3] int64) of one micro-batch.
Images = tuple[Tensor, Tensor]


def reduce_gradients(tower: VisionTower, group: dist.ProcessGroup | None) -> None:
    """Sum the tower's gradients over the ranks in one collective; no gradient counts as zero."""
    parameters = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            dtype = getattr(parameter, "grad_dtype", parameter.dtype)  # torch < 2.10 has no other
            parameter.grad = torch.zeros_like(parameter, dtype=dtype)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, summed in zip(
        gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(summed.view_as(gradient))


@dataclass
class _Sent:
    """What stage 3 needs of stage 1."""

    exchange: ItemExchange
    features_per_item: list[int]
    patches: Tensor
    grids: Tensor
    features: Tensor


class EncoderProcess:
    """DEP: every rank encodes a fair share of the global batch's images, whoever owns them.

    Source: Kimi K2.5 report, section on the training infrastructure. In a step: :meth:`encode`
    (1. balanced forward that keeps no activations), the backbone's own forward and backward with
    the features as leaves (2.), and :meth:`backward` (3. recompute, backward) followed by
    :meth:`reduce_gradients`. All ranks of the group call all of them, with or without images.

    Args:
        tower: this rank's copy of encoder and projector.
        group: the ranks that share the work; None is all.
        takes_images: whether this rank's part of the backbone takes in the features (the first
            pipeline stage). Others have no images, and get no features.
        tensor_group: ranks that take in the same images (tensor parallel); the first of them sends
            them and the gradients for all. None: every rank has its own.
        spread: ``"balanced"``: by :func:`pretrain.encoder_process.plan.plan`; ``"round_robin"``:
            item after item, a baseline.
        max_patches: patches that go through the encoder at a time, which bounds the memory of its
            activations; a larger item goes alone.
        max_patches_per_rank: patches that a rank is given to encode, at most, which bounds the
            memory of their pixels; an item larger than that has a rank to itself. None: as many as
            balance asks for. The baseline does not heed it.
        cost: what an item costs; None: the FLOPs of its shapes.

    Attributes:
        balance: largest load of a rank over the mean, in the last :meth:`encode`.
        least_balance: what no plan could have been better than, in the same: above 1 where one
            item is more than a fair share.
    """

    def __init__(
        self,
        tower: VisionTower,
        group: dist.ProcessGroup | None,
        *,
        needs_features: bool = True,
        tensor_group: dist.ProcessGroup | None = None,
        spread: Spread = "balanced",
        max_patches: int = 16384,
        max_patches_per_rank: int | None = None,
        cost: CostModel | None = None,
    ) -> None:
        self.tower = tower
        self.group = group
        self.needs_features = needs_features
        self.tensor_group = tensor_group
        self.spread = spread
        self.max_patches = max_patches
        self.max_patches_per_rank = max_patches_per_rank
        self.cost = cost or analytic_cost(tower.encoder.config, tower.projector.fc2.out_features)
        self.owns_images = needs_features and _is_first(tensor_group)
        self.balance = self.balance_lower_bound = 1.0
        self.oversized = 0
        self._sent: _Sent | None = None

    def encode(
        self, micro_batches: Sequence[Images], image_error: str | None = None
    ) -> list[Tensor]:
        """Stage 1.

        Args:
            micro_batches: the images of each of this rank's micro-batches.
            refused: what the caller found wrong with them, if anything.

        Returns:
            Of each micro-batch, [N, language hidden] features of its images in order (none where
            this rank takes no images); views of one leaf that collects their gradients, unless
            gradients are off.

        Raises:
            PretrainError: on every rank, if an image of one of them cannot be encoded (see
                :func:`pretrain.model.vision.check_grids`), or it refused; or if there are more
                patches than ``max_patches_per_rank`` lets all ranks have.
        """
        patches = torch.cat([patches for patches, _ in micro_batches])
        grids = torch.cat([grids for _, grids in micro_batches])
        counts = [int(num_features(grids).sum()) for _, grids in micro_batches]
        if not self.owns_images:
            patches, grids = patches[:0], grids[:0]
        everyones = gather_grids(grids, self.group, image_error or _refusal(grids, len(patches)))
        owners = [rank for rank, theirs in enumerate(everyones) for _ in range(len(theirs))]
        all_grids = torch.cat(everyones)
        patches_per_item = all_grids.prod(1).tolist()
        features_per_item = num_features(all_grids).tolist()
        encoders = self._plan(all_grids, owners, len(everyones))

        exchange = ItemExchange(owners, encoders, self.group)
        received = exchange.to_encoders(patches, patches_per_item)
        received_grids = all_grids[exchange.incoming]
        with torch.no_grad():
            encoded = [
                self.tower(part, part_grids)
                for part, part_grids in self._chunks(received, received_grids)
            ]
        mine = torch.cat([_no_features(self.tower), *encoded])
        features = exchange.to_owners(mine, features_per_item)
        if self.needs_features:
            features = _share(features, sum(counts), self.tensor_group)
        else:
            counts = [0] * len(counts)
        if torch.is_grad_enabled():
            features.requires_grad_()
            self._sent = _Sent(exchange, features_per_item, received, received_grids, features)
        return list(torch.split(features, counts))

    def backward(self) -> None:
        """Stage 3: add the gradients of what this rank encoded to the tower's ``.grad``."""
        if self._sent is None:
            raise RuntimeError("backward() needs an encode() with gradients on before it")
        sent, self._sent = self._sent, None
        gradient = sent.features.grad
        if gradient is None:
            gradient = torch.zeros_like(sent.features)
        if not self.owns_images:  # what it got from the first of its tensor group, that one returns
            gradient = gradient[:0]
        gradient = sent.exchange.to_encoders(gradient, sent.features_per_item)
        self.recompute(sent.patches, sent.grids, gradient)

    def recompute(self, patches: Tensor, grids: Tensor, gradient: Tensor) -> None:
        """Encode items again, and go backwards from their features' gradient, chunk by chunk."""
        # Stage 1 has shown the observers these logits.
        with observers_disabled(self.tower):
            done = 0
            for part, part_grids in self._chunks(patches, grids):
                features = self.tower(part, part_grids)
                features.backward(gradient[done : done + len(features)])
                done += len(features)

    def _plan(self, grids: Tensor, owners: Sequence[int], ranks: int) -> list[int]:
        """Who encodes each item of the global batch."""
        loads = self.cost.loads(grids)
        if self.spread == "round_robin":
            encoders = [item % ranks for item in range(len(loads))]
        else:
            weight = self.tower.projector.fc2.weight
            sent = transfer_bytes(grids, self.tower.encoder.config, len(weight), weight.itemsize)
            capacity = self.max_patches_per_rank
            sizes = None if capacity is None else grids.prod(1).numpy()
            try:
                encoders = plan(
                    loads, ranks, owners=owners, traffic=sent, sizes=sizes, capacity=capacity
                )
            except CapacityError as error:  # all ranks plan the same: all raise it
                owner = owners[error.item]
                item = error.item - owners.index(owner)
                frames, rows, columns = grids[error.item].tolist()
                raise PretrainError(
                    f"encoder_process.max_patches_per_rank={capacity} leaves no room on any of "
                    f"{ranks} ranks for rank {owner}'s image {item} ({frames} x {rows} x {columns} "
                    f"patches) beside the step's {int(grids.prod(1).sum())}: raise it, or lower "
                    "global_batch_size or data.vision_share"
                ) from error
        self.balance = balance(loads, encoders, ranks)
        self.balance_lower_bound = balance_lower_bound(loads, ranks)
        self.oversized = len(oversized(loads, ranks))
        return encoders

    def _chunks(self, patches: Tensor, grids: Tensor) -> Iterator[Images]:
        """The items in runs of at most ``max_patches``."""
        counts = grids.prod(1).tolist()
        first = 0
        for run in chunks(counts, self.max_patches):
            size = sum(counts[run])
            yield patches[first : first + size], grids[run]
            first += size

    def reduce_gradients(self) -> None:
        """Sum the tower's gradients over all ranks."""
        reduce_gradients(self.tower, self.group)


class ColocatedEncoder:
    """DEP off: the ranks that take in images encode them themselves, inside the backbone's graph.

    The reference that :class:`EncoderProcess` must equal, with the same methods and arguments.
    """

    def __init__(
        self,
        tower: VisionTower,
        group: dist.ProcessGroup | None,
        *,
        needs_features: bool = True,
        tensor_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.tower = tower
        self.group = group
        self.needs_features = needs_features
        self.owns_images = needs_features and _is_first(tensor_group)
        self.cost = analytic_cost(tower.encoder.config, tower.projector.fc2.out_features)
        self.balance = self.balance_lower_bound = 1.0
        self.oversized = 0

    def encode(
        self, micro_batches: Sequence[Images], image_error: str | None = None
    ) -> list[Tensor]:
        """Features of each micro-batch, with their graph where gradients are on."""
        patches = sum(len(patches) for patches, _ in micro_batches)
        mine = torch.cat([grids for _, grids in micro_batches])
        image_error = image_error or _refusal(mine, patches)
        if not self.needs_features:
            mine = mine[:0]
        everyones = gather_grids(mine, self.group, image_error)
        loads = [int(self.cost.loads(theirs).sum()) for theirs in everyones]
        self.balance = balance(loads, range(len(loads)), len(loads))
        all_loads = self.cost.loads(torch.cat(everyones))
        self.balance_lower_bound = balance_lower_bound(all_loads, len(everyones))
        self.oversized = len(oversized(all_loads, len(everyones)))
        if not self.needs_features:
            return [_no_features(self.tower) for _ in micro_batches]
        return [self.tower(patches, grids) for patches, grids in micro_batches]

    def backward(self) -> None:
        """Nothing: the backbone's backward went through the tower."""

    def reduce_gradients(self) -> None:
        """Sum the tower's gradients over all ranks, copies of the same work counted once."""
        if not self.owns_images:
            for parameter in self.tower.parameters():
                parameter.grad = None
        reduce_gradients(self.tower, self.group)


def _refusal(grids: Tensor, num_patches: int) -> str | None:
    """Why images cannot be encoded; here an item still has its owner's index."""
    try:
        check_grids(grids, num_patches)
    except ValueError as error:
        return str(error)
    return None


def _is_first(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_rank(group) == 0


def _share(features: Tensor, count: int, group: dist.ProcessGroup | None) -> Tensor:
    """The features [count, h] that the group's first rank has, on all its ranks."""
    if group is None or dist.get_world_size(group) == 1:
        return features
    if not _is_first(group):
        features = features.new_empty(count, features.shape[1])
    dist.broadcast(features, group=group, group_src=0)
    return features


def _no_features(tower: VisionTower) -> Tensor:
    weight = tower.projector.fc2.weight
    return weight.new_empty(0, weight.shape[0])
