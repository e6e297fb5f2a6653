"""Memory of a rank at the fullest moment of a step.

Weights, gradients and optimizer state are exact. :mod:`pretrain.plan.activations` describes
activations and temporary tensors, :mod:`pretrain.plan.muon_step` the buffers of the optimizer's
step. Fragmentation of the allocator is not counted.
"""

from pretrain.config import Config
from pretrain.model.geometry import PATCHES_PER_TOKEN
from pretrain.plan.activations import (
    chunk_activations,
    encoder_activations,
    head_activations,
    head_temporaries,
    kept_by_encoder,
)
from pretrain.plan.itemsize import FLOAT32, ITEMSIZE
from pretrain.plan.optimizer_costs import OptimizerCosts
from pretrain.plan.parameters import trained_weights
from pretrain.plan.ranks import Ranks, ranks_of
from pretrain.plan.workload import Images, images_per_step

# Estimates, not measured: CUDA's context with the kernels and workspaces of its libraries, and
# NCCL's buffers of each communicator.
CUDA_BYTES = 2**30
NCCL_BYTES = 2**29


def step_memory(
    config: Config, ranks: Ranks, images: Images, optimizer: OptimizerCosts | None = None
) -> list[dict[str, float]]:
    """Bytes on the fullest rank of each pipeline stage, by purpose.

    The ``total`` does not count activations and temporary tensors if the buffers of the optimizer's
    step are larger, and these otherwise.

    Args:
        optimizer: the optimizer's costs, if they have been computed.
    """
    optimizer = optimizer or OptimizerCosts(config, ranks, images)
    stages = range(ranks.pipeline)
    return [_stage_memory(config, ranks, images, optimizer, stage) for stage in stages]


def fullest_memory(
    config: Config, ranks: Ranks, images: Images, optimizer: OptimizerCosts | None = None
) -> dict[str, float]:
    """The row of :func:`step_memory` with the largest total."""
    optimizer = optimizer or OptimizerCosts(config, ranks, images)
    rows = [
        _stage_memory(config, ranks, images, optimizer, stage)
        for stage in _different_stages(config, ranks)
    ]
    return max(rows, key=lambda row: row["total"])


def memory_without_optimizer(config: Config, ranks: Ranks, images: Images) -> float:
    """Bytes on the fullest rank without the optimizer, whose costs take most time to compute."""
    return max(
        _stage_memory(config, ranks, images, None, stage)["total"]
        for stage in _different_stages(config, ranks)
    )


def _different_stages(config: Config, ranks: Ranks) -> list[int]:
    """The earliest of stages with the same weights, which keeps most activations."""
    dense = config.language.dense_layers
    return sorted({ranks.first_like(stage, dense) for stage in range(ranks.pipeline)})


def free_memory(config: Config, processes: int, stage: int, memory: float) -> float:
    """Bytes that a rank of a pipeline stage does not need of ``memory``, at least 0."""
    ranks, images = ranks_of(config, processes), images_per_step(config)
    optimizer = OptimizerCosts(config, ranks, images)
    return max(0.0, memory - _stage_memory(config, ranks, images, optimizer, stage)["total"])


def _stage_memory(
    config: Config, ranks: Ranks, images: Images, optimizer: OptimizerCosts | None, stage: int
) -> dict[str, float]:
    itemsize = ITEMSIZE[config.precision]
    local = [weight for weight in trained_weights(config) if ranks.has(stage, weight)]
    numel = sum(map(ranks.local_numel, local))
    own_patches = images.patches / ranks.data if stage == 0 else 0.0
    encoding, image_data = _encoder(config, ranks, images, own_patches)
    # With context parallelism, each rank has the features of its part of the sequences.
    features = own_patches / PATCHES_PER_TOKEN / ranks.context * config.language.hidden_size
    # The encoder's gradients are copied to be summed over all ranks during its backward pass.
    encoder = [weight for weight in local if weight.layer is None and images.update(weight)]
    copied = FLOAT32 * sum(weight.numel for weight in encoder) if ranks.world > 1 else 0
    activations, temporary = max(
        _backbone(config, ranks, stage), (encoding, float(copied)), key=sum
    )
    row = {
        "weights": float(numel * itemsize),
        "gradients": float(numel * FLOAT32),
        "optimizer state": optimizer.of(stage).state if optimizer else 0.0,
        "images": image_data + 2 * features * itemsize,  # with their gradients
        "CUDA and NCCL": float(CUDA_BYTES + NCCL_BYTES * ranks.communicators),
    }
    total = sum(row.values())
    buffers = optimizer.of(stage).buffers if optimizer else 0.0
    row |= {"activations": activations, "temporary tensors": temporary, "optimizer step": buffers}
    return {**row, "total": total + max(activations + temporary, buffers)}


def _encoder(
    config: Config, ranks: Ranks, images: Images, own_patches: float
) -> tuple[float, float]:
    """Bytes of the encoder's activations that alternate with the backbone's, and those of image
    data and activations that exist at the same time.

    The encoder process runs before the backbone, and after it on the images whose activations it
    has not kept. Without it, activations are kept until the backbone's backward pass is done.
    """
    patch = 3 * config.vision.patch_size**2  # bytes
    if not config.encoder_process.enabled:
        return 0.0, own_patches * patch + encoder_activations(config, own_patches)
    share = images.patches / ranks.world
    kept, every = kept_by_encoder(config, share), encoder_activations(config, share)
    image_data = (own_patches + share) * patch + kept
    if kept == every:
        return 0.0, image_data
    at_a_time = min(config.encoder_process.max_patches, share)
    if images.features:  # an image is not divided
        at_a_time = max(at_a_time, images.patches_per_image)
    return encoder_activations(config, at_a_time), image_data


def _backbone(config: Config, ranks: Ranks, stage: int) -> tuple[float, float]:
    """Bytes of the language model's activations on a rank of a stage, and of temporary tensors, at
    the fullest moment."""
    chunks = [chunk_activations(config, chunk, ranks) for chunk in ranks.stages[stage]]
    kept = sum(chunk.kept for chunk in chunks) / len(chunks) * _chunks_in_flight(ranks, stage)
    moments = [(kept + chunk.recomputed, chunk.temporary) for chunk in chunks]
    if stage == ranks.pipeline - 1:
        logits = head_activations(config, ranks)
        moments.append((kept + logits, head_temporaries(config, ranks)))
    return max(moments, key=sum)


def _chunks_in_flight(ranks: Ranks, stage: int) -> int:
    """Passes of a micro-batch through a chunk whose activations a stage keeps, at most (1F1B)."""
    chunks = len(ranks.stages[stage])
    if chunks == 1:
        return min(ranks.pipeline - stage, ranks.micro_batches)
    warm_up = 2 * (ranks.pipeline - stage - 1) + (chunks - 1) * ranks.pipeline
    return min(warm_up + 1, ranks.micro_batches * chunks)
