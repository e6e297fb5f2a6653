"""Bytes that a rank sends in a step; collectives count as rings send them.

Exact for the backbone with balanced experts; the optimizer's is the average over the ranks. Images
are assumed to be encoded on other ranks than their own.
"""

from collections import Counter

from pretrain.config import Config
from pretrain.model.geometry import PATCHES_PER_TOKEN
from pretrain.model.weights import Weight
from pretrain.plan.itemsize import FLOAT32, ITEMSIZE
from pretrain.plan.optimizer_costs import OptimizerCosts
from pretrain.plan.parameters import trained_weights
from pretrain.plan.ranks import Ranks
from pretrain.plan.workload import Images, recomputed_layers, recomputed_parts


def step_traffic(
    config: Config, ranks: Ranks, images: Images, optimizer: OptimizerCosts | None = None
) -> list[dict[str, float]]:
    """Bytes that a rank of each pipeline stage sends in a step, by purpose.

    Args:
        optimizer: the optimizer's costs, if they have been computed.
    """
    optimizer = optimizer or OptimizerCosts(config, ranks, images)
    weights = trained_weights(config)
    encoder_numel = sum(weight.numel for weight in weights if weight.layer is None)
    stages = []
    for stage in range(ranks.pipeline):
        traffic = _Traffic(config, ranks)
        local = [w for w in weights if w.layer is not None and ranks.has(stage, w)]
        traffic.add_gradients(local)
        traffic.all_reduce("encoder gradients", encoder_numel * FLOAT32, ranks.world)
        traffic.send("optimizer", optimizer.of(stage).sent)
        for number, chunk in enumerate(ranks.stages[stage], 1):
            is_first = stage == 0 and number == 1
            is_last = stage == ranks.pipeline - 1 and number == len(ranks.stages[stage])
            traffic.add_chunk(chunk, is_first=is_first, is_last=is_last)
        traffic.add_images(images, stage)
        stages.append({**traffic.sent, "total": float(traffic.sent.total())})
    return stages


class _Traffic:
    """Bytes that a rank of one pipeline stage sends, by purpose.

    In the methods a ``channel`` is the size of one channel of every token of the rank's step, of
    which tensor-parallel ranks have the same.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.itemsize = ITEMSIZE[config.precision]
        self.sent: Counter[str] = Counter()

    def send(self, purpose: str, size: float) -> None:
        self.sent[purpose] += size  # type: ignore[assignment]

    def all_reduce(self, purpose: str, size: float, ranks: int) -> None:
        self.send(purpose, 2 * size * (ranks - 1) / ranks)

    def gather_or_scatter(self, purpose: str, size: float, ranks: int) -> None:
        """All-gather, reduce-scatter or all-to-all of ``size`` bytes over all ranks together."""
        self.send(purpose, size * (ranks - 1) / ranks)

    def add_gradients(self, weights: list[Weight]) -> None:
        for weight in weights:
            size, is_expert = self.ranks.local_numel(weight) * FLOAT32, weight.expert is not None
            replicas = self.ranks.expert_data if is_expert else self.ranks.replicas
            self.all_reduce("gradients", size, replicas)
            if not weight.split and not is_expert:
                # Each tensor-parallel rank has the gradient of its part of the sequence.
                self.all_reduce("tensor parallel", size, self.ranks.tensor)

    def add_chunk(self, chunk: range, *, is_first: bool, is_last: bool) -> None:
        """All micro-batches through a model chunk, forward and backward."""
        config, language, ranks = self.config, self.config.language, self.ranks
        tokens = ranks.tokens(config) * ranks.micro_batches
        channel = float(tokens * self.itemsize)
        hidden = channel * language.hidden_size
        whole_layers, parts = recomputed_layers(config, chunk), recomputed_parts(config)
        for layer in chunk:
            recomputed = layer in whole_layers
            self._add_tensor_parallel(channel, layer, forwards=2 if recomputed else 1)
            if layer >= language.dense_layers:
                self._add_expert_parallel(channel, 3 if recomputed or "experts" in parts else 2)
        if ranks.pipeline > 1:
            self.send("pipeline", hidden / ranks.tensor * ((not is_first) + (not is_last)))
        if is_first:  # embeddings are summed; their gradients gathered
            self.all_reduce("tensor parallel", hidden, ranks.tensor)
            self.gather_or_scatter("tensor parallel", hidden, ranks.tensor)
        if is_last:  # hidden states to the output head, again for its gradient, and back
            self.gather_or_scatter("tensor parallel", 3 * hidden, ranks.tensor)
            self.all_reduce("tensor parallel", 3 * channel / self.itemsize * FLOAT32, ranks.tensor)

    def _add_tensor_parallel(self, channel: float, layer: int, forwards: int) -> None:
        """Inputs of column-parallel layers are gathered, outputs of row-parallel ones scattered."""
        language = self.config.language
        hidden = language.hidden_size
        if language.attention == "mla":
            projected = language.q_lora_rank or hidden
            # Latent of keys and values, and the rotary key.
            exchanged: float = language.kv_lora_rank + language.qk_rope_head_dim
            parts = self.ranks.tensor * self.ranks.context
        else:
            projected, parts = hidden, self.ranks.context
            exchanged = language.gqa_kv_heads * 2 * language.gqa_head_dim / self.ranks.tensor
        # Of whole sequences, and their gradients.
        size = channel * self.ranks.context * exchanged * (forwards + 1)
        purpose = "tensor parallel" if self.ranks.context == 1 else "context parallel"
        self.gather_or_scatter(purpose, size, parts)
        # Input of the projection to all heads' queries; the output.
        forward: float = projected + hidden
        # Inputs are gathered again for the weights' gradients; the rest mirrors the forward pass.
        backward: float = 2 * projected + hidden
        if layer < language.dense_layers or language.shared_expert_ffn_hidden_size:
            # MLP: dense, or the shared experts.
            forward += 2 * hidden
            backward += 3 * hidden
        if layer >= language.dense_layers and self.ranks.expert_tensor > 1:
            # Tokens and scores to all shards of an expert, and back in the scores' float32.
            wide = FLOAT32 / self.itemsize
            routed = language.experts_per_token * (hidden * (1 + wide) + wide)
            forward += routed
            backward += routed
        size = channel * (forwards * forward + backward)
        self.gather_or_scatter("tensor parallel", size, self.ranks.tensor)

    def _add_expert_parallel(self, channel: float, passes: int) -> None:
        """Tokens and their router scores to the experts and back."""
        language, ranks = self.config.language, self.ranks
        routed = channel / ranks.tensor * language.experts_per_token
        tokens = routed * language.hidden_size * 2 * passes
        self.gather_or_scatter("expert parallel", tokens, ranks.expert)
        scores = routed / self.itemsize * FLOAT32 * passes
        self.gather_or_scatter("expert parallel", scores, ranks.expert)

    def add_images(self, images: Images, stage: int) -> None:
        """Pixels to the ranks that encode them, features back, and the features' gradients."""
        config, ranks = self.config, self.ranks
        if not config.encoder_process.enabled or ranks.world == 1:
            return
        hidden, remote_share = config.language.hidden_size, (ranks.world - 1) / ranks.world
        if stage == 0:
            # The first of the ranks with the same images sends them, and the first rank of each
            # tensor-parallel group the gradients of its features.
            patches = images.patches / ranks.data * remote_share
            features = patches / PATCHES_PER_TOKEN / ranks.context
            pixels = patches * 3 * config.vision.patch_size**2
            self.send("images", pixels + features * hidden * self.itemsize)
        encoded = images.features / ranks.world * remote_share
        self.send("images", encoded * hidden * self.itemsize)
