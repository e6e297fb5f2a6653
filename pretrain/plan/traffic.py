"""Bytes that a rank sends in a step; collectives count as rings send them.

Exact for the backbone with balanced experts. The optimizer's traffic assumes that matrices are
distributed evenly, and that of images that no image stays on its rank.
"""

from collections import Counter

from pretrain.config import Config
from pretrain.model.geometry import PATCHES_PER_TOKEN
from pretrain.model.weights import Weight
from pretrain.plan.memory import FLOAT32, ITEMSIZE
from pretrain.plan.parameters import trained_weights
from pretrain.plan.ranks import Ranks
from pretrain.plan.recompute import recomputed_layers, recomputed_parts
from pretrain.plan.workload import Images


class Traffic:
    """Bytes that a rank sends, by purpose."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    def send(self, purpose: str, size: float) -> None:
        self.sent[purpose] += size  # type: ignore[assignment]

    def all_reduce(self, purpose: str, size: float, ranks: int) -> None:
        self.send(purpose, 2 * size * (ranks - 1) / ranks)

    def gather_or_scatter(self, purpose: str, size: float, ranks: int) -> None:
        """All-gather, reduce-scatter or all-to-all of ``size`` bytes over all ranks together."""
        self.send(purpose, size * (ranks - 1) / ranks)


def step_traffic(config: Config, ranks: Ranks, images: Images) -> list[dict[str, float]]:
    """Bytes that a rank of each pipeline stage sends in a step, by purpose."""
    weights = trained_weights(config)
    encoder_numel = sum(weight.numel for weight in weights if weight.layer is None)
    stages = []
    for stage in range(ranks.pipeline):
        traffic = Traffic()
        local = [w for w in weights if w.layer is not None and ranks.has(stage, w)]
        _add_gradients(traffic, ranks, local)
        traffic.all_reduce("encoder gradients", encoder_numel * FLOAT32, ranks.world)
        _add_optimizer(traffic, config, ranks, local)
        for chunk in ranks.stages[stage]:
            _add_chunk(traffic, config, ranks, chunk)
        _add_images(traffic, config, ranks, images, stage)
        stages.append({**traffic.sent, "total": float(sum(traffic.sent.values()))})
    return stages


def _add_gradients(traffic: Traffic, ranks: Ranks, weights: list[Weight]) -> None:
    for weight in weights:
        size = ranks.local_numel(weight) * FLOAT32
        is_expert = weight.expert is not None
        traffic.all_reduce("gradients", size, ranks.expert_data if is_expert else ranks.data)
        if not weight.split and not is_expert:
            # Each tensor-parallel rank has the gradient from its part of the sequence.
            traffic.all_reduce("tensor parallel", size, ranks.tensor)


def _add_optimizer(traffic: Traffic, config: Config, ranks: Ranks, weights: list[Weight]) -> None:
    """Matrices to the ranks that orthogonalize them, and updates back to all ranks with a shard."""
    dtype = config.optimizer.ns_dtype
    itemsize = ITEMSIZE["bfloat16" if dtype == "auto" else dtype]  # auto, on an accelerator
    for weight in weights:
        if weight.optimizer != "muon":
            continue
        shards, replicas = ranks.tensor, ranks.data
        if weight.expert is not None:
            shards, replicas = ranks.expert_tensor, ranks.expert_data
        numel, group = ranks.tensors(weight) * weight.numel, shards * replicas
        if weight.split and shards > 1:
            gathered = numel * (shards - 1) / shards
            returned = numel * replicas - numel / shards
        else:
            gathered, returned = 0.0, numel * (group - 1.0)
        traffic.send("optimizer", (gathered + returned) * itemsize / group)


def _add_chunk(traffic: Traffic, config: Config, ranks: Ranks, chunk: range) -> None:
    """All micro-batches through a model chunk, forward and backward."""
    language, itemsize = config.language, ITEMSIZE[config.precision]
    tokens = config.micro_batch_size * config.data.seq_length
    channel = float(tokens * itemsize * ranks.micro_batches)  # one channel of every token
    hidden = channel * language.hidden_size
    whole_layers, parts = recomputed_layers(config, chunk), recomputed_parts(config)
    for layer in chunk:
        recomputed = layer in whole_layers
        _add_tensor_parallel(traffic, config, ranks, channel, layer, 2 if recomputed else 1)
        if layer >= language.dense_layers:
            passes = 3 if recomputed or "experts" in parts else 2
            _add_expert_parallel(traffic, config, ranks, channel, passes)
    is_first, is_last = chunk.start == 0, chunk.stop == language.num_layers
    if ranks.pipeline > 1:
        traffic.send(
            "pipeline",
            channel / ranks.tensor * language.hidden_size * ((not is_first) + (not is_last)),
        )
    if is_first:  # embeddings are summed; their gradients gathered
        traffic.all_reduce("tensor parallel", hidden, ranks.tensor)
        traffic.gather_or_scatter("tensor parallel", hidden, ranks.tensor)
    if is_last:  # hidden states into the output head, again for its gradient, and back
        traffic.gather_or_scatter(
            "tensor parallel", 3 * channel * language.hidden_size, ranks.tensor
        )
        traffic.all_reduce("tensor parallel", 3 * channel / itemsize * FLOAT32, ranks.tensor)


def _add_tensor_parallel(
    traffic: Traffic, config: Config, ranks: Ranks, channel: float, layer: int, forwards: int
) -> None:
    """Inputs of column-parallel matrices are gathered, outputs of row-parallel ones scattered."""
    language = config.language
    hidden, q_rank, kv_rank = language.hidden_size, language.q_lora_rank, language.kv_lora_rank
    rope = language.qk_rope_head_dim
    # Attention: hidden states, the split latent of q, both latents, the rotary key; the output.
    forward: float = hidden + q_rank + q_rank + kv_rank + rope + hidden
    # Inputs are gathered again for the weights' gradient, the gradient of the split latent as well;
    # the rest mirrors the forward pass.
    backward: float = 2 * hidden + q_rank + 2 * q_rank + 2 * kv_rank + rope + hidden
    # MLP: dense, or the shared experts.
    forward += 2 * hidden
    backward += 3 * hidden
    if layer >= language.dense_layers and ranks.expert_tensor > 1:
        # Tokens and their scores to all shards of an expert; back in the scores' float32.
        wide = FLOAT32 / ITEMSIZE[config.precision]
        routed = language.experts_per_token * (hidden * (1 + wide) + wide)
        forward += routed
        backward += routed
    size = channel * (forwards * forward + backward)
    traffic.gather_or_scatter("tensor parallel", size, ranks.tensor)


def _add_expert_parallel(
    traffic: Traffic, config: Config, ranks: Ranks, channel: float, passes: int
) -> None:
    """Tokens and their router scores to the experts and back, in every forward and backward."""
    routed = channel / ranks.tensor * config.language.experts_per_token
    tokens = routed * config.language.hidden_size * 2 * passes
    traffic.gather_or_scatter("expert parallel", tokens, ranks.expert)
    scores = routed / ITEMSIZE[config.precision] * FLOAT32 * passes
    traffic.gather_or_scatter("expert parallel", scores, ranks.expert)


def _add_images(traffic: Traffic, config: Config, ranks: Ranks, images: Images, stage: int) -> None:
    """Pixels to the ranks that encode them, features back, and the features' gradients there."""
    if not config.encoder_process.enabled or ranks.world == 1:
        return
    feature = config.language.hidden_size
    itemsize = ITEMSIZE[config.precision]
    sent_share = (ranks.world - 1) / ranks.world
    if stage == 0:  # the first rank of a tensor-parallel group sends for the whole group
        patches = images.patches / ranks.data * sent_share
        pixels = patches * 3 * config.vision.patch_size**2
        traffic.send("images", pixels + patches / PATCHES_PER_TOKEN * feature * itemsize)
    encoded = images.features / ranks.world * sent_share
    traffic.send("images", encoded * feature * itemsize)
