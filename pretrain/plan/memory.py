"""Memory of a rank at the fullest moment of a step.

Weights, gradients and optimizer state are exact. Activations are the tensors that autograd keeps,
for experts with balanced loads; temporary buffers of kernels are not counted.
"""

from pretrain.config import Config
from pretrain.model.geometry import PATCHES_PER_TOKEN
from pretrain.model.weights import Weight
from pretrain.plan.itemsize import FLOAT32, ITEMSIZE
from pretrain.plan.parameters import trained_weights
from pretrain.plan.ranks import Ranks
from pretrain.plan.workload import Images, recomputed_layers, recomputed_parts


def step_memory(config: Config, ranks: Ranks, images: Images) -> list[dict[str, float]]:
    """Bytes on a rank of each pipeline stage, by purpose."""
    itemsize = ITEMSIZE[config.precision]
    weights = trained_weights(config)
    stages = []
    for stage in range(ranks.pipeline):
        local = [weight for weight in weights if ranks.has(stage, weight)]
        numel = sum(map(ranks.local_numel, local))
        # Without images the encoder is never updated.
        updated = [weight for weight in local if images.features or weight.layer is not None]
        own_patches = images.patches / ranks.data if stage == 0 else 0.0
        encoder, image_data = _encoder(config, ranks, images, own_patches)
        features = own_patches / PATCHES_PER_TOKEN * config.language.hidden_size * itemsize
        row = {
            "weights": float(numel * itemsize),
            "gradients": float(numel * FLOAT32),
            "optimizer state": float(sum(_state(config, ranks, weight) for weight in updated)),
            "activations": max(_stage_activations(config, ranks, stage), encoder),
            "images": image_data + 2 * features,  # with their gradients
        }
        stages.append({**row, "total": sum(row.values())})
    return stages


def _state(config: Config, ranks: Ranks, weight: Weight) -> int:
    """Bytes of optimizer state: Muon's momentum, or AdamW's two moments and step count; for 16-bit
    weights a float32 master as well."""
    is_muon = weight.optimizer == "muon"
    copies = (1 if is_muon else 2) + (0 if config.precision == "float32" else 1)
    counts = 0 if is_muon else ranks.tensors(weight)
    return FLOAT32 * (copies * ranks.local_numel(weight) + counts)


def _encoder(
    config: Config, ranks: Ranks, images: Images, own_patches: float
) -> tuple[float, float]:
    """Bytes of the encoder's activations that alternate with the backbone's, and those of image
    data and activations that exist at the same time.

    The encoder process runs before the backbone, and again after it. Without it, each rank encodes
    its own images and keeps the activations until the backbone's backward pass is done.
    """
    if not config.encoder_process.enabled:
        return 0.0, encoder_activations(config, own_patches)
    share = images.patches / ranks.world
    at_a_time = min(config.encoder_process.max_patches, share)
    if images.features:  # an image is not divided
        at_a_time = max(at_a_time, images.patches_per_image)
    return encoder_activations(config, at_a_time), share * 3 * config.vision.patch_size**2


def _stage_activations(config: Config, ranks: Ranks, stage: int) -> float:
    """Bytes of activations of the language model on a rank of a stage, at most."""
    chunks = [chunk_activations(config, chunk, ranks) for chunk in ranks.stages[stage]]
    kept = sum(kept for kept, _ in chunks) / len(chunks)
    activations = _chunks_in_flight(ranks, stage) * kept + max(again for _, again in chunks)
    if stage == ranks.pipeline - 1:
        activations += head_activations(config, ranks)
    return activations


def _chunks_in_flight(ranks: Ranks, stage: int) -> int:
    """Passes of a micro-batch through a chunk whose activations a stage keeps, at most (1F1B)."""
    chunks = len(ranks.stages[stage])
    if chunks == 1:
        return min(ranks.pipeline - stage, ranks.micro_batches)
    warm_up = 2 * (ranks.pipeline - stage - 1) + (chunks - 1) * ranks.pipeline
    return min(warm_up + 1, ranks.micro_batches * chunks)


def chunk_activations(config: Config, chunk: range, ranks: Ranks) -> tuple[float, float]:
    """Bytes that a model chunk keeps of a micro-batch, and the most that it recomputes at once."""
    recompute, whole_layers = config.recompute, recomputed_layers(config, chunk)
    tokens = config.micro_batch_size * config.data.seq_length / ranks.tensor
    layers_at_once = recompute.num_layers if recompute.method == "uniform" else 1
    inputs = tokens * config.language.hidden_size * ITEMSIZE[config.precision] / layers_at_once
    recomputed_in_all = recomputed_parts(config)
    kept = recomputed = 0.0
    for layer in chunk:
        parts = layer_activations(config, layer, ranks)
        if layer in whole_layers:
            kept += inputs
            recomputed = max(recomputed, sum(parts.values()) * layers_at_once)
        else:
            dropped = sum(size for part, size in parts.items() if part in recomputed_in_all)
            kept += sum(parts.values()) - dropped
            recomputed = max(recomputed, dropped)
    return kept, recomputed


def layer_activations(config: Config, layer: int, ranks: Ranks) -> dict[str, float]:
    """Bytes that autograd keeps of one layer and micro-batch on a rank, by part.

    With sequence parallelism, tensors between the split matrices are kept for the rank's part of
    the sequence.
    """
    language, itemsize, tensor = config.language, ITEMSIZE[config.precision], ranks.tensor
    heads = language.num_heads / tensor
    tokens = config.micro_batch_size * config.data.seq_length
    local_tokens = tokens / tensor
    qk, value = language.query_key_dim, language.value_dim
    latents = sum(_norm(rank, itemsize) for rank in language.latent_ranks)
    shared_key = language.qk_rope_head_dim if language.attention == "mla" else 0
    attention = {
        "norms": local_tokens * 2 * _norm(language.hidden_size, itemsize),
        "latents": local_tokens * (latents + shared_key * itemsize),
        "qkv": tokens * heads * (2 * qk + value) * itemsize,
        "scores": tokens * heads * FLOAT32,  # the log-sum-exp of every query
        "context": tokens * heads * value * itemsize,
    }

    def gated_mlp(width: int) -> float:
        """Gate and up, the gate's SiLU, up again, and their product."""
        return tokens * 5 * width / tensor * itemsize

    if layer < language.dense_layers:
        return {**attention, "dense MLP": gated_mlp(language.ffn_hidden_size)}
    routed_tokens = local_tokens * language.experts_per_token * ranks.expert_tensor
    width = language.expert_ffn_hidden_size / ranks.expert_tensor
    return {
        **attention,
        "shared experts": gated_mlp(language.shared_expert_ffn_hidden_size),
        "router": local_tokens * language.num_experts * 4 * FLOAT32,
        # The tokens, an MLP's five tensors, the product times the router's score, and the score.
        "experts": routed_tokens * ((language.hidden_size + 6 * width) * itemsize + FLOAT32),
    }


def head_activations(config: Config, ranks: Ranks) -> float:
    """Bytes kept of a micro-batch after the last layer: the final norm, and the softmax of the
    logits in float32."""
    tokens = config.micro_batch_size * config.data.seq_length
    norm = _norm(config.language.hidden_size, ITEMSIZE[config.precision])
    return (
        tokens
        / ranks.tensor
        * (norm + config.language.vocab_rows(config.data.vocab_size) * FLOAT32)
    )


def encoder_activations(config: Config, patches: float) -> float:
    """Bytes that autograd keeps of this many patches in encoder and projector."""
    vision, itemsize = config.vision, ITEMSIZE[config.precision]
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    layer = float((9 * hidden + 2 * ffn) * itemsize + (vision.num_heads + 4) * FLOAT32)
    ends = (3 * vision.patch_size**2 + 3 * hidden) * itemsize
    projector = 3 * hidden * itemsize  # of a feature, whose width is that of its patches together
    return patches * (vision.num_layers * layer + ends + projector)


def _norm(width: int, itemsize: int) -> float:
    """Bytes per token of a norm and its consumer: the input and the normalized input in float32,
    the root mean square, and the result. (A GPU's fused norm keeps the input as it is.)"""
    return 2 * width * FLOAT32 + FLOAT32 + width * itemsize
