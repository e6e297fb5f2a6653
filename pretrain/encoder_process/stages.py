"""The Decoupled Encoder Process, and the plain way that it must equal."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.encoder_process.exchange import Exchange, gather_grids
from pretrain.encoder_process.plan import balance, plan
from pretrain.model.projector import VisionTower
from pretrain.model.vision import check_grids, num_features, unobserved

# (patches [P, 3 * patch * patch] uint8, grids [n, 3] int64) of one micro-batch.
Images = tuple[Tensor, Tensor]


def reduce_gradients(tower: VisionTower, group: dist.ProcessGroup | None) -> None:
    """Sum the tower's gradients over the ranks in one collective; no gradient counts as zero."""
    parameters = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
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

    exchange: Exchange
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

    Attributes:
        balance: largest load (patches) of a rank over the mean, in the last :meth:`encode`.
    """

    def __init__(
        self,
        tower: VisionTower,
        group: dist.ProcessGroup | None,
        *,
        takes_images: bool = True,
        tensor_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.tower = tower
        self.group = group
        self.takes_images = takes_images
        self.tensor_group = tensor_group
        self.owns_images = takes_images and _is_first(tensor_group)
        self.balance = 1.0
        self._sent: _Sent | None = None

    def encode(self, micro_batches: Sequence[Images]) -> list[Tensor]:
        """Stage 1.

        Args:
            micro_batches: the images of each of this rank's micro-batches.

        Returns:
            Of each micro-batch, [N, language hidden] features of its images in order (none where
            this rank takes no images); views of one leaf that collects their gradients, unless
            gradients are off.

        Raises:
            ValueError: an image of this rank cannot be encoded; see
                :func:`pretrain.model.vision.check_grids`.
        """
        patches = torch.cat([patches for patches, _ in micro_batches])
        grids = torch.cat([grids for _, grids in micro_batches])
        counts = [int(num_features(grids).sum()) for _, grids in micro_batches]
        if not self.owns_images:
            patches, grids = patches[:0], grids[:0]
        # Here an item still has its owner's index; whoever encodes it knows another.
        check_grids(grids, patches.shape[0])
        everyones = gather_grids(grids, self.group)
        owners = [rank for rank, theirs in enumerate(everyones) for _ in range(len(theirs))]
        all_grids = torch.cat(everyones)
        patches_per_item = all_grids.prod(1).tolist()
        features_per_item = num_features(all_grids).tolist()
        encoders = plan(patches_per_item, len(everyones))
        self.balance = balance(patches_per_item, encoders, len(everyones))

        exchange = Exchange(owners, encoders, self.group)
        received = exchange.to_encoders(patches, patches_per_item)
        received_grids = all_grids[exchange.incoming]
        with torch.no_grad():
            encoded = self.tower(received, received_grids)
        features = exchange.to_owners(encoded, features_per_item)
        if self.takes_images:
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
        # Stage 1 has shown the observers these logits.
        with unobserved(self.tower):
            features = self.tower(sent.patches, sent.grids)
        features.backward(gradient)

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
        takes_images: bool = True,
        tensor_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.tower = tower
        self.group = group
        self.takes_images = takes_images
        self.owns_images = takes_images and _is_first(tensor_group)
        self.balance = 1.0

    def encode(self, micro_batches: Sequence[Images]) -> list[Tensor]:
        """Features of each micro-batch, with their graph where gradients are on."""
        mine = torch.cat([grids for _, grids in micro_batches])
        if not self.takes_images:
            mine = mine[:0]
        loads = [int(theirs.prod(1).sum()) for theirs in gather_grids(mine, self.group)]
        self.balance = balance(loads, range(len(loads)), len(loads))
        if not self.takes_images:
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
