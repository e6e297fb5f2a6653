"""Encoding of the images of a step: on all ranks (DEP), or on the ranks that own them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config import EncoderProcessConfig
from pretrain.encoder_process.cost import (
    CostModel,
    activation_bytes,
    analytic_cost,
    transfer_bytes,
)
from pretrain.encoder_process.exchange import ItemExchange, cut, gather_grids, global_rank
from pretrain.encoder_process.gradient_reduction import GradientReduction
from pretrain.encoder_process.plan import (
    CapacityError,
    balance,
    balance_lower_bound,
    oversized,
    plan,
)
from pretrain.errors import PretrainError
from pretrain.model.flex import to_device
from pretrain.model.projector import VisionTower
from pretrain.model.vision import check_grids, num_features, observers_disabled, split_items

# (patches [P, 3 * patch_size²] uint8, grids [n, 3] int64) of one micro-batch.
Images = tuple[Tensor, Tensor]

# Default memory for activations that are kept during the backbone's passes, in bytes.
ACTIVATION_MEMORY = 2**30


@dataclass(frozen=True)
class ImagePlan:
    """Assignment of the images of a step to the ranks of a group.

    Attributes:
        grids: int64 [N, 3] of all images of the group, in the order of its ranks.
        items: exchange of images between the ranks that own and encode them.
        pieces: exchange of features with the ranks that need them.
        features_per_piece: number of features of each piece.
        counts: features of each of this rank's micro-batches that this rank needs.
        balance: largest load of a rank over the mean load.
        balance_lower_bound: lower bound of ``balance`` for these images.
        oversized: number of items above the mean load.
        mean_load: the mean load of a rank.
    """

    grids: Tensor
    items: ItemExchange
    pieces: ItemExchange
    features_per_piece: list[int]
    counts: list[int]
    balance: float
    balance_lower_bound: float
    oversized: int
    mean_load: float


class _Encoder:
    """Arguments and statistics of both encoders. All ranks of the group call all methods.

    Args:
        tower: this rank's replica of encoder and projector.
        group: ranks that share their images. None: all ranks.
        config: settings of :class:`EncoderProcess`.
        planning_group: the ranks of ``group`` in the same order, over gloo: for plans that are made
            in another thread. None: there are no such plans.
        num_groups: number of groups like ``group``, which together train the tower.
        needs_features: this rank's part of the backbone reads the features (the first pipeline
            stage). Other ranks have no images and receive no features.
        tensor_group: tensor-parallel ranks, which need the features of the same images; the first
            of them receives the features. None: every rank has its own images.
        context_group: context-parallel ranks, which have the same images, and need the features of
            their parts of the sequences; the first of them owns the images. None: every rank has
            its own images.
        cost: cost model of an item. Default: FLOPs.
        activation_memory: bytes for activations that :class:`EncoderProcess` keeps, if the settings
            do not limit them. Default: 1 GiB.

    Attributes:
        balance, balance_lower_bound, oversized, mean_load: those of the last :meth:`encode`'s plan.
    """

    def __init__(
        self,
        tower: VisionTower,
        group: dist.ProcessGroup | None,
        config: EncoderProcessConfig | None = None,
        *,
        planning_group: dist.ProcessGroup | None = None,
        num_groups: int = 1,
        needs_features: bool = True,
        tensor_group: dist.ProcessGroup | None = None,
        context_group: dist.ProcessGroup | None = None,
        cost: CostModel | None = None,
        activation_memory: float = ACTIVATION_MEMORY,
    ) -> None:
        self.tower = tower
        self.group = group
        self.planning_group, self.num_groups = planning_group, num_groups
        self._num_ranks = dist.get_world_size(group)
        self.config = config or EncoderProcessConfig()
        self.needs_features = needs_features
        self.tensor_group, self.context_group = tensor_group, context_group
        self.owns_images = needs_features and _is_first(tensor_group) and _is_first(context_group)
        self.cost = cost or analytic_cost(tower.encoder.config, tower.projector.fc2.out_features)
        if self.config.activation_memory_gib is not None:
            activation_memory = self.config.activation_memory_gib * 2**30
        self.activation_memory = activation_memory if self.config.recompute else math.inf
        self.balance = self.balance_lower_bound = 1.0
        self.oversized, self.mean_load = 0, 0.0
        self._stage1: _Stage1 | None = None
        reducing = self.group if num_groups == 1 else dist.group.WORLD
        self._reduction = GradientReduction(tower, reducing)

    def reduce_gradients(self) -> None:
        """Sum the tower's gradients over the ranks of all groups; no gradient counts as zero."""
        self._reduction.finish()

    def plan(
        self,
        micro_batches: Sequence[Images],
        image_error: str | None = None,
        feature_ranks: Sequence[Tensor] | None = None,
        *,
        ahead: bool = False,
    ) -> ImagePlan:
        """Assign the images of a step to ranks. It depends on their sizes only.

        Args:
            micro_batches, image_error, feature_ranks: see :meth:`EncoderProcess.encode`.
            ahead: communicate over ``planning_group``, as another rank may be in an earlier step.

        Raises:
            PretrainError: see :meth:`EncoderProcess.encode`.
        """
        no_grids = torch.empty(0, 3, dtype=torch.int64)
        grids = torch.cat([no_grids, *(grids for _, grids in micro_batches)])
        num_patches = sum(len(patches) for patches, _ in micro_batches)
        if not self._reads_images:
            grids, num_patches = grids[:0], 0
        image_error = image_error or _image_error(grids, num_patches)
        runs = None if image_error else self._runs(grids, feature_ranks)
        group = self.planning_group if ahead else self.group
        all_grids, owners, pieces = gather_grids(grids, group, image_error, runs)
        encoders = self._assign(all_grids, owners)
        loads = self.cost.loads(all_grids)
        counts = [0] * len(micro_batches)
        if self.needs_features:
            counts = [int(num_features(grids).sum()) for _, grids in micro_batches]
            if feature_ranks is not None:
                rank = dist.get_rank(self.context_group)
                counts = [int((ranks == rank).sum()) for ranks in feature_ranks]
        return ImagePlan(
            all_grids,
            ItemExchange(owners, encoders, self.group),
            ItemExchange(
                [piece.rank for piece in pieces],
                [encoders[piece.item] for piece in pieces],
                self.group,
            ),
            [piece.rows for piece in pieces],
            counts,
            balance(loads, encoders, self._num_ranks),
            balance_lower_bound(loads, self._num_ranks),
            len(oversized(loads, self._num_ranks)),
            int(loads.sum()) / self._num_ranks,
        )

    def _record_balance(self, plan: ImagePlan) -> None:
        self.balance, self.oversized = plan.balance, plan.oversized
        self.balance_lower_bound, self.mean_load = plan.balance_lower_bound, plan.mean_load

    @property
    def _reads_images(self) -> bool:
        """Whether this rank's images are planned: it alone has them, or it encodes them itself."""
        raise NotImplementedError

    def _assign(self, grids: Tensor, owners: Sequence[int]) -> list[int]:
        """The rank that encodes each item."""
        raise NotImplementedError

    def _runs(
        self, grids: Tensor, feature_ranks: Sequence[Tensor] | None
    ) -> list[list[tuple[int, int]]] | None:
        """The ranks that need the features of this rank's items; None: this rank needs them."""
        return None


@dataclass
class _Stage1:
    """Results of stage 1 that stage 3 needs.

    Attributes:
        kept: the output of the tower for each chunk, with its graph; None: recompute it.
    """

    plan: ImagePlan
    patches: Tensor
    grids: Tensor
    features: Tensor
    kept: list[Tensor | None]


class EncoderProcess(_Encoder):
    """DEP: every rank encodes an equal share of the global batch's images.

    Source: Kimi K2.5 report, Decoupled Encoder Process. The stages of a step:

    1. :meth:`encode`: balanced forward, chunk by chunk. Activations are kept as long as they fit
       into ``activation_memory``.
    2. The backbone's forward and backward, with the features as leaves.
    3. :meth:`backward`: chunk by chunk, recomputation, if activations were not kept, and backward;
       then :meth:`reduce_gradients`. Chunks and gradients are the same in either case.

    Attributes:
        activation_memory: bytes; infinite without ``config.recompute``.
        recomputed: share of the patches of this rank that the last :meth:`backward` encoded again.
    """

    recomputed = 0.0

    def encode(
        self,
        micro_batches: Sequence[Images],
        image_error: str | None = None,
        feature_ranks: Sequence[Tensor] | None = None,
        plan: ImagePlan | None = None,
    ) -> list[Tensor]:
        """Stage 1.

        Args:
            micro_batches: images of each of this rank's micro-batches.
            image_error: reason why the caller rejects these images, if any.
            feature_ranks: for each micro-batch, int64 [N] on the CPU, the context-parallel rank
                that needs each feature of its images. None: every rank needs all of them.
            plan: the result of :meth:`plan` with these arguments. None: plan now.

        Returns:
            For each micro-batch, features [N, language hidden] of its images in order, of which N
            are needed by this rank. They are views of one leaf, which collects their gradients if
            gradients are enabled.

        Raises:
            PretrainError: on every rank, if an image of one of them cannot be encoded (see
                :func:`pretrain.model.vision.check_grids`) or is rejected, or if
                ``max_patches_per_rank`` is too small.
        """
        plan = plan or self.plan(micro_batches, image_error, feature_ranks)
        self._record_balance(plan)
        patches = torch.cat([patches for patches, _ in micro_batches])
        if not self.owns_images:
            patches = patches[:0]
        received = plan.items.to_encoders(patches, plan.grids.prod(1).tolist())
        received_grids = plan.grids[plan.items.incoming]
        encoded, kept = self._encode_chunks(received, received_grids)
        features = torch.cat([_no_features(self.tower), *encoded])
        features = plan.pieces.to_owners(features, plan.features_per_piece)
        if self.needs_features:
            features = _broadcast(features, sum(plan.counts), self.tensor_group)
        if torch.is_grad_enabled():
            features.requires_grad_()
            self._stage1 = _Stage1(plan, received, received_grids, features, kept)
        return list(torch.split(features, plan.counts))

    @property
    def _reads_images(self) -> bool:
        return self.owns_images

    def _runs(
        self, grids: Tensor, feature_ranks: Sequence[Tensor] | None
    ) -> list[list[tuple[int, int]]] | None:
        if feature_ranks is None or not self.owns_images:
            return None
        world = self.group or dist.group.WORLD
        assert world is not None and self.context_group is not None
        members = dist.get_process_group_ranks(self.context_group)
        ranks = torch.tensor([dist.get_group_rank(world, member) for member in members])
        return cut(ranks[torch.cat(list(feature_ranks))], num_features(grids).tolist())

    def backward(self) -> None:
        """Stage 3: add the gradients of the items that this rank encoded to the tower's ``.grad``.

        Raises:
            RuntimeError: there was no :meth:`encode` with gradients enabled.
        """
        if self._stage1 is None:
            raise RuntimeError("backward() needs an encode() with gradients enabled before it")
        stage1, self._stage1 = self._stage1, None
        gradient = stage1.features.grad
        if gradient is None:
            gradient = torch.zeros_like(stage1.features)
        if not _is_first(self.tensor_group):  # the first rank sends it for all
            gradient = gradient[:0]
        gradient = stage1.plan.pieces.to_encoders(gradient, stage1.plan.features_per_piece)
        self._backpropagate(stage1, gradient)

    def _encode_chunks(
        self, patches: Tensor, grids: Tensor
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Features of each chunk, and the same with their graph if it is kept for stage 3."""
        free = self.activation_memory if torch.is_grad_enabled() else 0.0
        weight = self.tower.projector.fc2.weight
        per_patch = activation_bytes(self.tower.encoder.config, weight.itemsize)
        encoded, kept = [], []
        for chunk in self._chunks(patches, grids):
            size = per_patch * len(chunk[0])
            with torch.set_grad_enabled(size <= free):
                features = self.tower(*chunk)
            is_kept = size <= free
            free -= size if is_kept else 0
            encoded.append(features.detach())
            kept.append(features if is_kept else None)
        return encoded, kept

    def _backpropagate(self, stage1: _Stage1, gradient: Tensor) -> None:
        """Backpropagate the gradient of the features, chunk by chunk, and release the chunk."""
        first = recomputed = 0
        chunks = list(self._chunks(stage1.patches, stage1.grids))
        for number, chunk in enumerate(chunks):
            features, stage1.kept[number] = stage1.kept[number], None
            if features is None:
                recomputed += len(chunk[0])
                # The observers have seen these logits in stage 1.
                with observers_disabled(self.tower):
                    features = self.tower(*chunk)
            if number == len(chunks) - 1:
                self._reduction.start()
            torch.autograd.backward(features, gradient[first : first + len(features)])
            first += len(features)
        self.recomputed = recomputed / max(len(stage1.patches), 1)

    def _assign(self, grids: Tensor, owners: Sequence[int]) -> list[int]:
        num_ranks, capacity = self._num_ranks, self.config.max_patches_per_rank
        if self.config.spread == "round_robin":
            return [item % num_ranks for item in range(len(grids))]
        weight = self.tower.projector.fc2.weight
        traffic = transfer_bytes(grids, self.tower.encoder.config, len(weight), weight.itemsize)
        sizes = None if capacity is None else grids.prod(1).numpy()
        loads = self.cost.loads(grids)
        try:
            return plan(
                loads, num_ranks, owners=owners, traffic=traffic, sizes=sizes, capacity=capacity
            )
        except CapacityError as error:  # all ranks plan the same: all raise it
            owner = owners[error.item]
            image = error.item - owners.index(owner)
            rank = global_rank(self.group, owner)
            shape = " x ".join(map(str, grids[error.item].tolist()))
            raise PretrainError(
                f"encoder_process.max_patches_per_rank={capacity} is too small for the step's "
                f"{int(grids.prod(1).sum())} patches on {num_ranks} ranks: no room is left for "
                f"rank {rank}'s image {image} of {shape} patches; raise it, or lower "
                "global_batch_size or data.vision_share"
            ) from error

    def _chunks(self, patches: Tensor, grids: Tensor) -> Iterator[Images]:
        """Consecutive items of at most ``config.max_patches`` patches."""
        counts = grids.prod(1).tolist()
        first = 0
        for items in split_items(counts, self.config.max_patches):
            size = sum(counts[items])
            yield patches[first : first + size], grids[items]
            first += size


class ColocatedEncoder(_Encoder):
    """DEP switched off: each rank encodes the images that it needs, within the backbone's graph.

    The reference for :class:`EncoderProcess`, with the same methods. All tensor- and
    context-parallel ranks encode the same images.
    """

    def encode(
        self,
        micro_batches: Sequence[Images],
        image_error: str | None = None,
        feature_ranks: Sequence[Tensor] | None = None,
        plan: ImagePlan | None = None,
    ) -> list[Tensor]:
        """Features that this rank needs of each micro-batch, with their graph if gradients are
        enabled. Arguments are those of :meth:`EncoderProcess.encode`."""
        self._record_balance(plan or self.plan(micro_batches, image_error, feature_ranks))
        if not self.needs_features:
            return [_no_features(self.tower) for _ in micro_batches]
        features = [self.tower(patches, grids) for patches, grids in micro_batches]
        if feature_ranks is None:
            return features
        rank = dist.get_rank(self.context_group)
        pairs = zip(features, feature_ranks, strict=True)
        return [
            values[to_device((ranks == rank).nonzero().squeeze(1), values.device)]
            for values, ranks in pairs
        ]

    @property
    def _reads_images(self) -> bool:
        return self.needs_features

    def _assign(self, grids: Tensor, owners: Sequence[int]) -> list[int]:
        return list(owners)

    def backward(self) -> None:
        """Do nothing: the backbone's backward has reached the tower."""

    def reduce_gradients(self) -> None:
        """Sum the tower's gradients over all ranks; one rank of a tensor group counts."""
        if not (self.needs_features and _is_first(self.tensor_group)):
            for parameter in self.tower.parameters():
                parameter.grad = None
        super().reduce_gradients()


def _image_error(grids: Tensor, num_patches: int) -> str | None:
    """Reason why this rank's items cannot be encoded, with their local indices."""
    try:
        check_grids(grids, num_patches)
    except ValueError as error:
        return str(error)
    return None


def _is_first(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_rank(group) == 0


def _broadcast(features: Tensor, count: int, group: dist.ProcessGroup | None) -> Tensor:
    """Features [count, hidden] of the group's first rank, on all of its ranks."""
    if group is None or dist.get_world_size(group) == 1:
        return features
    if not _is_first(group):
        features = features.new_empty(count, features.shape[1])
    dist.broadcast(features, group=group, group_src=0)
    return features


def _no_features(tower: VisionTower) -> Tensor:
    weight = tower.projector.fc2.weight
    return weight.new_empty(0, weight.shape[0])
