"""What a configuration costs, counted before anything is allocated.

``python -m pretrain plan`` shows it: parameters, memory of a rank, FLOPs and messages of a step.
Parameters, optimizer state, FLOPs of matrix products and messages of the backbone are exact for
balanced experts; activations are what autograd keeps, without what a kernel needs for a moment.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain.config import Config, LanguageConfig, VisionConfig
from pretrain.data.sources import image_share
from pretrain.encoder_process.cost import CostModel, analytic_cost
from pretrain.errors import PretrainError
from pretrain.model.geometry import MERGE
from pretrain.plan.flops import FORWARD_AND_BACKWARD, flops_per_token

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT32 = 4


# ---------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Weight:
    """A parameter of the whole model, or one for each expert.

    Attributes:
        name: in the whole model; of experts, with ``{expert}`` in the number's place.
        shape: of the whole.
        part: what it belongs to, for people.
        muon: trained by Muon; else by AdamW.
        cut: tensor parallelism gives each rank a part of it.
        layer: of the language model; None before and after its layers, and in the encoder.
        last: it is with the last layer; else, without a layer, with the first.
        experts: how many there are.
    """

    name: str
    shape: tuple[int, ...]
    part: str
    muon: bool = False
    cut: bool = False
    layer: int | None = None
    last: bool = False
    experts: int = 0

    @property
    def numel(self) -> int:
        """Elements, of all experts together."""
        return math.prod(self.shape) * max(self.experts, 1)

    @property
    def vision(self) -> bool:
        return self.name.startswith("vision.")


def language_weights(config: LanguageConfig, vocab_size: int) -> Iterator[Weight]:
    """Of the language model."""
    hidden, heads = config.hidden_size, config.num_heads
    qk = config.qk_nope_head_dim + config.qk_rope_head_dim
    up = config.qk_nope_head_dim + config.v_head_dim
    yield Weight(
        "language.embedding.word_embeddings.weight", (vocab_size, hidden), "embedding", cut=True
    )
    for layer in range(config.num_layers):
        at = f"language.decoder.layers.{layer}"

        def norm(name: str, size: int, at: str = at, layer: int = layer) -> Weight:
            return Weight(f"{at}.{name}.weight", (size,), "norms", layer=layer)

        def matrix(
            name: str, rows: int, columns: int, part: str, at: str = at, layer: int = layer,
            cut: bool = True, experts: int = 0,
        ) -> Weight:  # fmt: skip
            return Weight(
                f"{at}.{name}.weight", (rows, columns), part, True, cut, layer, experts=experts
            )

        def mlp(name: str, ffn: int, part: str, experts: int = 0) -> Iterator[Weight]:
            yield matrix(f"{name}.linear_fc1", 2 * ffn, hidden, part, experts=experts)
            yield matrix(f"{name}.linear_fc2", hidden, ffn, part, experts=experts)

        yield norm("input_layernorm", hidden)
        attention = "self_attention.linear_"
        kv_down = config.kv_lora_rank + config.qk_rope_head_dim
        yield matrix(f"{attention}proj", hidden, heads * config.v_head_dim, "attention")
        yield matrix(f"{attention}q_down_proj", config.q_lora_rank, hidden, "attention")
        yield matrix(f"{attention}q_up_proj", heads * qk, config.q_lora_rank, "attention")
        # Whole on every tensor-parallel rank: see pretrain.model.language.DuplicatedLinear.
        yield matrix(f"{attention}kv_down_proj", kv_down, hidden, "attention", cut=False)
        yield matrix(f"{attention}kv_up_proj", heads * up, config.kv_lora_rank, "attention")
        yield norm("self_attention.q_layernorm", config.q_lora_rank)
        yield norm("self_attention.kv_layernorm", config.kv_lora_rank)
        yield norm("pre_mlp_layernorm", hidden)
        if layer < config.dense_layers:
            yield from mlp("mlp", config.ffn_hidden_size, "dense MLP")
            continue
        router = f"{at}.mlp.router.weight"
        yield Weight(router, (config.num_experts, hidden), "router", layer=layer)
        yield from mlp(
            "mlp.experts.local_experts.{expert}", config.expert_ffn_hidden_size, "experts",
            config.num_experts,
        )  # fmt: skip
        yield from mlp("mlp.shared_experts", config.shared_expert_ffn_hidden_size, "shared experts")
    yield Weight("language.decoder.final_layernorm.weight", (hidden,), "norms", last=True)
    yield Weight(
        "language.output_layer.weight", (vocab_size, hidden), "output head", cut=True, last=True
    )


def vision_weights(config: VisionConfig, language_hidden_size: int) -> Iterator[Weight]:
    """Of encoder and projector, which every rank has."""
    hidden, ffn, side = config.hidden_size, config.ffn_hidden_size, config.position_grid
    merged = MERGE * MERGE * hidden

    def linear(
        name: str, rows: int, columns: int, part: str, muon: bool = True
    ) -> Iterator[Weight]:
        yield Weight(f"vision.{name}.weight", (rows, columns), part, muon)
        yield Weight(f"vision.{name}.bias", (rows,), part)

    def norm(name: str, part: str) -> Iterator[Weight]:
        yield Weight(f"vision.{name}.weight", (hidden,), part)
        yield Weight(f"vision.{name}.bias", (hidden,), part)

    encoder, projector = "vision encoder", "projector"
    yield Weight("vision.encoder.pos_embed", (side, side, hidden), encoder)
    yield from linear("encoder.patch_embed", hidden, 3 * config.patch_size**2, encoder, False)
    for block in range(config.num_layers):
        at = f"encoder.blocks.{block}"
        yield from norm(f"{at}.norm1", encoder)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield from linear(f"{at}.attention.{name}", hidden, hidden, encoder)
        yield from norm(f"{at}.norm2", encoder)
        yield from linear(f"{at}.fc1", ffn, hidden, encoder)
        yield from linear(f"{at}.fc2", hidden, ffn, encoder)
    yield from norm("encoder.final_norm", encoder)
    yield from norm("projector.norm", projector)
    yield from linear("projector.fc1", merged, merged, projector)
    yield from linear("projector.fc2", language_hidden_size, merged, projector)


def weights(config: Config) -> list[Weight]:
    """Every trained parameter of the model."""
    language = language_weights(config.language, config.data.vocab_size)
    return [*language, *vision_weights(config.vision, config.language.hidden_size)]


def active(config: Config, every: list[Weight]) -> int:
    """Parameters of the language model that a token is multiplied with: of the experts those that
    it is sent to; not the embedding, of which it reads one row."""
    share = config.language.experts_per_token
    return sum(
        math.prod(weight.shape) * (share if weight.experts else 1)
        for weight in every
        if not weight.vision and weight.part != "embedding"
    )


# ---------------------------------------------------------------------- who holds what


@dataclass(frozen=True)
class Layout:
    """How many ranks there are of each kind, and which layers each stage has.

    Attributes:
        world: all ranks.
        data: that hold the same of everything but experts, and see other sequences.
        expert_data: that hold the same experts.
        stages: of each pipeline stage its runs of layers, each a range of the whole model's.
        micro_batches: of a rank in a step.
    """

    world: int
    tensor: int
    expert: int
    expert_tensor: int
    data: int
    expert_data: int
    stages: tuple[tuple[range, ...], ...]
    micro_batches: int

    @property
    def pipeline(self) -> int:
        return len(self.stages)

    def stage_of(self, weight: Weight) -> int | None:
        """The stage that has a parameter; None: all of them."""
        if weight.vision:
            return None
        if weight.layer is None:
            return self.pipeline - 1 if weight.last else 0
        return next(
            stage
            for stage, runs in enumerate(self.stages)
            if any(weight.layer in run for run in runs)
        )

    def held(self, weight: Weight) -> int:
        """Elements of a parameter on a rank that has any of it."""
        if weight.experts:
            return weight.numel // (self.expert * (self.expert_tensor if weight.cut else 1))
        return weight.numel // (self.tensor if weight.cut else 1)


def layout(config: Config, processes: int) -> Layout:
    """The trainer's layout over so many processes.

    Raises:
        PretrainError: the configuration does not fit them; as the trainer says it.
    """
    config.check_world_size(processes)
    parallel = config.parallel
    counts = parallel.layers(config.language.num_layers)
    runs = [range(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]
    return Layout(
        world=processes,
        tensor=parallel.tensor,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        data=parallel.data_size(processes),
        expert_data=parallel.expert_data_size(processes),
        stages=tuple(tuple(runs[stage :: parallel.pipeline]) for stage in range(parallel.pipeline)),
        micro_batches=config.micro_batches(processes),
    )


# ---------------------------------------------------------------------- images


@dataclass(frozen=True)
class Images:
    """The images of a step: as many as ``data.vision_share`` asks for, all of one size."""

    patches_per_image: int
    features: float
    """Tokens of the language model, of the global batch."""

    @property
    def patches(self) -> float:
        return self.features * MERGE**2

    @property
    def count(self) -> float:
        return self.patches / self.patches_per_image

    def forward_flops(self, cost: CostModel) -> float:
        pairs = self.patches * self.patches_per_image
        return (
            cost.per_patch * self.patches + cost.per_feature * self.features + cost.per_pair * pairs
        )


def images(config: Config, patches_per_image: int | None = None) -> Images:
    """Of a step; by default images of 1,024 patches (448 x 448 pixels), or what a quarter of a
    sequence holds."""
    patches = patches_per_image or min(1024, config.data.seq_length // 4 * MERGE**2)
    return Images(patches, image_share(config.data) * tokens_per_step(config))


def tokens_per_step(config: Config) -> int:
    return config.global_batch_size * config.data.seq_length


# ---------------------------------------------------------------------- FLOPs


def forward_flops(config: Config) -> dict[str, float]:
    """Of the language model as it is run, a token of a forward pass, by part; of one layer each,
    but for the output head. Attention meets the whole sequence, masked or not."""
    language, hidden, heads = (
        config.language,
        config.language.hidden_size,
        config.language.num_heads,
    )
    qk = language.qk_nope_head_dim + language.qk_rope_head_dim
    v_dim = language.v_head_dim
    return {
        "down": 2.0
        * hidden
        * (language.q_lora_rank + language.kv_lora_rank + language.qk_rope_head_dim),
        "up": 2.0
        * heads
        * (language.q_lora_rank * qk + language.kv_lora_rank * (language.qk_nope_head_dim + v_dim)),
        "scores": 2.0 * heads * (qk + v_dim) * config.data.seq_length,
        "out": 2.0 * heads * v_dim * hidden,
        "mlp": 6.0 * hidden * language.ffn_hidden_size,
        "router": 2.0 * hidden * language.num_experts,
        "experts": 6.0 * hidden * language.expert_ffn_hidden_size * language.experts_per_token,
        "shared_experts": 6.0 * hidden * language.shared_expert_ffn_hidden_size,
        "head": 2.0 * hidden * config.data.vocab_size,
    }


_ATTENTION = ("down", "up", "scores", "out")
_SPARSE = ("router", "experts", "shared_experts")
# What each module of selective recompute does again.
_RECOMPUTED = {
    "core_attn": ("scores",),
    "mlp": ("mlp",),
    "moe": _SPARSE,
    "shared_experts": ("shared_experts",),
}


def _layer_parts(config: Config, layer: int) -> tuple[str, ...]:
    return (*_ATTENTION, *(("mlp",) if layer < config.language.dense_layers else _SPARSE))


def recomputed_layers(config: Config, run: range) -> range:
    """The layers of a run that are computed again as a whole."""
    recompute = config.recompute
    if recompute.granularity != "full":
        return run[:0]
    return run if recompute.method == "uniform" else run[: recompute.num_layers]


def flops(config: Config, place: Layout, pictures: Images) -> dict[str, float]:
    """Of a step of all ranks, as run; ``model`` as model FLOP utilisation counts them."""
    parts = forward_flops(config)
    again = {
        part
        for module in config.recompute.modules
        for part in _RECOMPUTED[module]
        if config.recompute.granularity == "selective"
    }
    layers = recompute = attention = 0.0
    for runs in place.stages:
        for run in runs:
            whole = recomputed_layers(config, run)
            for layer in run:
                own = _layer_parts(config, layer)
                layers += sum(parts[part] for part in own)
                attention += parts["scores"]
                recompute += sum(parts[p] for p in own if layer in whole or p in again)
    tokens = tokens_per_step(config)
    cost = analytic_cost(config.vision, config.language.hidden_size)
    encoder = pictures.forward_flops(cost)
    embed = 2.0 * 3 * config.vision.patch_size**2 * config.vision.hidden_size * pictures.patches
    found = {
        "language forward": tokens * (layers - attention + parts["head"]),
        "attention forward": tokens * attention,
        "language backward": 2 * tokens * (layers + parts["head"]),
        "language recompute": tokens * recompute,
        "encoder forward": encoder,
        "encoder backward": 2 * encoder - embed,  # pixels have no gradient
        "encoder recompute": encoder if config.encoder_process.enabled else 0.0,
        # Every head's largest logit, for QK-Clip.
        "encoder logits": cost.per_pair / 2 * pictures.patches * pictures.patches_per_image,
    }
    per_token = flops_per_token(config.language, config.data.vocab_size, config.data.seq_length)
    return {
        **found,
        "total": sum(found.values()),
        "model": FORWARD_AND_BACKWARD * (tokens * per_token + encoder),
    }


# ---------------------------------------------------------------------- memory


def layer_activations(config: Config, layer: int, place: Layout) -> dict[str, float]:
    """Bytes that autograd keeps of one layer and micro-batch on a rank, by part.

    With sequence parallelism, what lies between the cut matrices is kept for a part of the
    sequence. Experts are taken to be balanced.
    """
    language, size, tensor = config.language, _ITEMSIZE[config.precision], place.tensor
    heads, batch = language.num_heads / tensor, config.micro_batch_size
    tokens = batch * config.data.seq_length
    local = tokens / tensor
    qk = language.qk_nope_head_dim + language.qk_rope_head_dim
    query, latent, rope = language.q_lora_rank, language.kv_lora_rank, language.qk_rope_head_dim
    # Softmax's result in float32, and rounded.
    weight_size = _FLOAT32 + (size if size < _FLOAT32 else 0)
    found = {
        "norms": local * 2 * _norm(language.hidden_size, size),
        "latents": local * (_norm(query, size) + _norm(latent, size) + rope * size),
        "qkv": tokens * heads * (2 * qk + language.v_head_dim) * size,
        "scores": tokens * heads * config.data.seq_length * weight_size,
        "context": tokens * heads * language.v_head_dim * size,
    }

    def gated(ffn: int) -> float:
        """Gate and up, the gate's SiLU, up again, and their product."""
        return tokens * 5 * ffn / tensor * size

    if layer < language.dense_layers:
        return {**found, "mlp": gated(language.ffn_hidden_size)}
    copies = local * language.experts_per_token * place.expert_tensor
    ffn = language.expert_ffn_hidden_size / place.expert_tensor
    return {
        **found,
        "shared_experts": gated(language.shared_expert_ffn_hidden_size),
        "router": local * language.num_experts * 4 * _FLOAT32,
        # Their tokens, and beside what any MLP has the product times the router's score.
        "experts": copies * ((language.hidden_size + 6 * ffn) * size + _FLOAT32),
    }


def _norm(width: int, size: int) -> float:
    """Bytes a token that a norm and who reads it keep: its input and that normalized in float32,
    the root mean square, and the result. (A GPU's fused norm keeps the input as it is.)"""
    return 2 * width * _FLOAT32 + _FLOAT32 + width * size


# What each module of selective recompute does without.
_NOT_KEPT = {
    "core_attn": ("scores",),
    "mlp": ("mlp",),
    "moe": ("router", "experts", "shared_experts"),
    "shared_experts": ("shared_experts",),
}


def run_activations(config: Config, run: range, place: Layout) -> tuple[float, float]:
    """Bytes that a run of layers keeps of a micro-batch, and the most it makes again at a time."""
    recompute, whole = config.recompute, recomputed_layers(config, run)
    tokens = config.micro_batch_size * config.data.seq_length / place.tensor
    unit = recompute.num_layers if recompute.method == "uniform" else 1
    not_kept = {
        part
        for module in recompute.modules
        for part in _NOT_KEPT[module]
        if recompute.granularity == "selective"
    }
    kept = again = 0.0
    for layer in run:
        parts = layer_activations(config, layer, place)
        if layer in whole:  # its input stays, or that of the first of several
            kept += tokens * config.language.hidden_size * _ITEMSIZE[config.precision] / unit
            again = max(again, sum(parts.values()) * unit)
        else:
            dropped = sum(size for part, size in parts.items() if part in not_kept)
            kept += sum(parts.values()) - dropped
            again = max(again, dropped)
    return kept, again


def head_activations(config: Config, place: Layout) -> float:
    """Bytes kept of a micro-batch behind the last layer: the last norm, and the softmax of the
    logits in float32."""
    tokens = config.micro_batch_size * config.data.seq_length
    norm = _norm(config.language.hidden_size, _ITEMSIZE[config.precision])
    return tokens / place.tensor * (norm + config.data.vocab_size * _FLOAT32)


def in_flight(place: Layout, stage: int) -> int:
    """Micro-batches, each of one run of layers, whose activations a stage keeps at its fullest."""
    runs = len(place.stages[stage])
    if runs == 1:
        return min(place.pipeline - stage, place.micro_batches)
    warm_up = 2 * (place.pipeline - stage - 1) + (runs - 1) * place.pipeline
    return min(warm_up + 1, place.micro_batches * runs)


def encoder_activations(config: Config, patches: float) -> float:
    """Bytes that autograd keeps of so many patches in encoder and projector."""
    vision, size = config.vision, _ITEMSIZE[config.precision]
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    layer = (9 * hidden + 2 * ffn) * size + vision.num_heads * _FLOAT32 + 4 * _FLOAT32
    ends = (3 * vision.patch_size**2 + 3 * hidden) * size
    merged = MERGE * MERGE * hidden
    projector = 3 * merged * size / MERGE**2
    return patches * (vision.num_layers * layer + ends + projector)


def memory(config: Config, place: Layout, pictures: Images) -> list[dict[str, float]]:
    """Bytes on a rank of each pipeline stage, at the fullest moment of a step."""
    size, narrow = _ITEMSIZE[config.precision], config.precision != "float32"
    found = []
    every = weights(config)
    for stage, runs in enumerate(place.stages):
        held = [
            (weight, place.held(weight))
            for weight in every
            if place.stage_of(weight) in (None, stage)
        ]
        total = sum(numel for _, numel in held)
        state = sum(
            numel * _FLOAT32 * ((1 if weight.muon else 2) + (1 if narrow else 0))
            + (0 if weight.muon else _FLOAT32 * _tensors(weight, place))
            for weight, numel in held
            if pictures.features or not weight.vision  # text alone never steps the encoder
        )
        kept, again = zip(*(run_activations(config, run, place) for run in runs), strict=True)
        times = in_flight(place, stage)
        activations = times * sum(kept) / len(kept) + max(again)
        if stage == place.pipeline - 1:
            activations += head_activations(config, place)
        own = pictures.patches / place.data if stage == 0 else 0.0
        if config.encoder_process.enabled:
            # Encoded before the backbone runs, and again after it: never beside its activations.
            spread = pictures.patches / place.world
            at_a_time = min(config.encoder_process.max_patches, spread)
            if pictures.features:  # an image is not divided
                at_a_time = max(at_a_time, pictures.patches_per_image)
            encoder = encoder_activations(config, at_a_time)
            beside = spread * 3 * config.vision.patch_size**2
        else:
            encoder, beside = 0.0, encoder_activations(config, own)
        row = {
            "weights": float(total * size),
            "gradients": float(total * _FLOAT32),
            "optimizer state": float(state),
            "activations": max(activations, encoder),
            "images": beside + own / MERGE**2 * config.language.hidden_size * size * 2,
        }
        found.append({**row, "total": sum(row.values())})
    return found


def _tensors(weight: Weight, place: Layout) -> int:
    """How many tensors a rank has of a parameter."""
    return weight.experts // place.expert if weight.experts else 1


# ---------------------------------------------------------------------- messages


@dataclass
class Messages:
    """Bytes that a rank sends in a step, by purpose; collectives as rings send them."""

    sent: Counter[str] = field(default_factory=Counter)

    def all_reduce(self, purpose: str, size: float, ranks: int) -> None:
        self.sent[purpose] += 2 * size * (ranks - 1) / ranks  # type: ignore[assignment]

    def gather_or_scatter(self, purpose: str, size: float, ranks: int) -> None:
        """All-gather, reduce-scatter or all-to-all of ``size`` bytes, all parts together."""
        self.sent[purpose] += size * (ranks - 1) / ranks  # type: ignore[assignment]


def messages(config: Config, place: Layout, pictures: Images) -> list[dict[str, float]]:
    """Bytes that a rank of each pipeline stage sends in a step, by purpose."""
    every = weights(config)
    size = _ITEMSIZE[config.precision]
    language, tensor = config.language, place.tensor
    tokens = config.micro_batch_size * config.data.seq_length
    found = []
    for stage, runs in enumerate(place.stages):
        out = Messages()
        held = [weight for weight in every if place.stage_of(weight) == stage]
        for weight in held:
            copies = place.expert_data if weight.experts else place.data
            out.all_reduce("gradients", place.held(weight) * _FLOAT32, copies)
            if not weight.cut and not weight.experts:
                # Each tensor-parallel rank saw a part of the sequence.
                out.all_reduce("tensor parallel", place.held(weight) * _FLOAT32, tensor)
        tower = sum(weight.numel for weight in every if weight.vision)
        out.all_reduce("encoder gradients", tower * _FLOAT32, place.world)
        _exchange(out, config, place, held)

        row = float(tokens * size * place.micro_batches)  # of one channel of every token
        for run in runs:
            whole = recomputed_layers(config, run)
            for layer in run:
                # Forward, and again where it is recomputed; backward apart.
                _tensor_parallel(out, config, place, row, layer, 2 if layer in whole else 1)
                if layer >= language.dense_layers:
                    again = layer in whole or (
                        config.recompute.granularity == "selective"
                        and "moe" in config.recompute.modules
                    )
                    _expert_parallel(out, config, place, row, 3 if again else 2)
            first, last = run.start == 0, run.stop == language.num_layers
            if place.pipeline > 1:
                hand = row / tensor * language.hidden_size
                out.sent["pipeline"] += hand * ((not first) + (not last))  # type: ignore[assignment]
            if first:  # embeddings are summed; their gradients gathered
                out.all_reduce("tensor parallel", row * language.hidden_size, tensor)
                out.gather_or_scatter("tensor parallel", row * language.hidden_size, tensor)
            if last:  # into the output head, again for its gradient, and back
                out.gather_or_scatter("tensor parallel", 3 * row * language.hidden_size, tensor)
                out.all_reduce("tensor parallel", 3 * row / size * _FLOAT32, tensor)
        _images(out, config, place, pictures, stage)
        found.append({**dict(out.sent), "total": float(sum(out.sent.values()))})
    return found


def _tensor_parallel(
    out: Messages, config: Config, place: Layout, row: float, layer: int, forwards: int
) -> None:
    """Of a layer: what goes into a cut matrix is gathered, what comes out is scattered."""
    language = config.language
    hidden, ql, kvl = language.hidden_size, language.q_lora_rank, language.kv_lora_rank
    dense = layer < language.dense_layers
    # Attention: hidden states, the cut latent of the queries, both latents, the rotary key; out.
    forward: float = hidden + ql + ql + kvl + language.qk_rope_head_dim + hidden
    # Inputs are gathered again for the weights' gradient; the rest is each forward's mirror, and
    # the cut latent's gradient is gathered.
    backward: float = 2 * hidden + ql + 2 * ql + 2 * kvl + language.qk_rope_head_dim + hidden
    # MLP, dense or shared.
    forward += 2 * hidden
    backward += 3 * hidden
    if not dense and place.expert_tensor > 1:
        # Tokens, and their scores, to all parts of an expert; back in the scores' float32.
        wide = _FLOAT32 / _ITEMSIZE[config.precision]
        copies = language.experts_per_token * (hidden * (1 + wide) + wide)
        forward += copies
        backward += copies
    out.gather_or_scatter("tensor parallel", row * (forwards * forward + backward), place.tensor)


def _expert_parallel(out: Messages, config: Config, place: Layout, row: float, passes: int) -> None:
    """Tokens to their experts and back, in every forward and backward."""
    copies = row / place.tensor * config.language.experts_per_token
    out.gather_or_scatter(
        "expert parallel", copies * config.language.hidden_size * 2 * passes, place.expert
    )
    # With each token goes the router's score.
    scores = copies / _ITEMSIZE[config.precision] * _FLOAT32
    out.gather_or_scatter("expert parallel", scores * passes, place.expert)


def _exchange(out: Messages, config: Config, place: Layout, held: list[Weight]) -> None:
    """Matrices to the ranks that orthogonalize them, and updates back to all who hold a part."""
    auto = "bfloat16"  # on an accelerator
    size = _ITEMSIZE[auto if config.optimizer.ns_dtype == "auto" else config.optimizer.ns_dtype]
    for weight in held:
        if not weight.muon:
            continue
        parts, copies = place.tensor, place.data
        numel = weight.numel
        if weight.experts:
            parts, copies = place.expert_tensor, place.expert_data
            numel //= place.expert
        ranks = parts * copies
        if weight.cut and parts > 1:
            gathered = numel * (parts - 1) / parts
            returned = numel * copies - numel / parts
        else:
            gathered, returned = 0.0, numel * (ranks - 1.0)
        out.sent["optimizer"] += (gathered + returned) * size / ranks  # type: ignore[assignment]


def _images(out: Messages, config: Config, place: Layout, pictures: Images, stage: int) -> None:
    """Pixels to who encodes them, features back, their gradients there: at most, as if no image
    stayed where it is."""
    if not config.encoder_process.enabled or place.world == 1:
        return
    size, hidden = _ITEMSIZE[config.precision], config.language.hidden_size
    away = (place.world - 1) / place.world
    if stage == 0:  # of a tensor-parallel group the first rank, which sends for all
        own = pictures.patches / place.data * away
        pixels, gradients = own * 3 * config.vision.patch_size**2, own / MERGE**2 * hidden * size
        out.sent["images"] += pixels + gradients  # type: ignore[assignment]
    encoded = pictures.features / place.world * away
    out.sent["images"] += encoded * hidden * size  # type: ignore[assignment]


# ---------------------------------------------------------------------- all of it


def plan(
    config: Config, processes: int | None = None, patches_per_image: int | None = None
) -> dict[str, Any]:
    """Everything, as plain values; bytes and FLOPs.

    Args:
        processes: to spread it over; None: as few as its parallel sizes allow.
        patches_per_image: of every image; None: see :func:`images`.

    Raises:
        PretrainError: the configuration does not fit the processes, or a number is not above 0.
    """
    for name, value in (("processes", processes), ("image-patches", patches_per_image)):
        if value is not None and value <= 0:
            raise PretrainError(f"{name} must be > 0, not {value}")
    place = layout(config, config.parallel.min_world_size if processes is None else processes)
    pictures = images(config, patches_per_image)
    every = weights(config)
    parts: Counter[str] = Counter()
    for weight in every:
        parts[weight.part] += weight.numel
    tower = sum(weight.numel for weight in every if weight.vision)
    step = flops(config, place, pictures)
    return {
        "layout": {
            "processes": place.world,
            "tensor": place.tensor,
            "pipeline": place.pipeline,
            "expert": place.expert,
            "data": place.data,
            "expert_data": place.expert_data,
            "micro_batches": place.micro_batches,
            "layers_of_stages": [sum(map(len, runs)) for runs in place.stages],
        },
        "parameters": {
            "total": sum(parts.values()),
            "language": sum(parts.values()) - tower,
            "vision": tower,
            "active": active(config, every),
            "muon": sum(weight.numel for weight in every if weight.muon),
            "by_part": dict(parts),
        },
        "memory": memory(config, place, pictures),
        "tokens": tokens_per_step(config),
        "images": {
            "count": pictures.count,
            "patches_per_image": pictures.patches_per_image,
            "features": pictures.features,
        },
        "flops": step,
        "messages": messages(config, place, pictures),
    }


def table(found: Mapping[str, Any], memory_gib: float | None = None) -> str:
    """:func:`plan`'s answer for people.

    Args:
        memory_gib: of a device, to say whether a rank fits.

    Raises:
        PretrainError: that is not above 0.
    """
    if memory_gib is not None and memory_gib <= 0:
        raise PretrainError(f"memory must be > 0 GiB, not {memory_gib:g}")
    where, parameters = found["layout"], found["parameters"]
    lines = [
        f"{where['processes']} processes: {where['data']} data-parallel x {where['tensor']} tensor "
        f"x {where['pipeline']} pipeline; experts over {where['expert']}; "
        f"{where['micro_batches']} micro-batches a step; layers of the stages: "
        + ", ".join(map(str, where["layers_of_stages"])),
        "",
        f"{'parameters':<24}{parameters['total']:>22,}   {_short(parameters['total'])}",
        f"{'  language model':<24}{parameters['language']:>22,}   {_short(parameters['language'])}",
        f"{'  active per token':<24}{parameters['active']:>22,}   {_short(parameters['active'])}"
        "   (of the language model, without the embedding's table)",
        f"{'  vision':<24}{parameters['vision']:>22,}   {_short(parameters['vision'])}",
        f"{'  by Muon':<24}{parameters['muon']:>22,}   {_short(parameters['muon'])}",
    ]
    lines += [f"    {part:<20}{numel:>22,}" for part, numel in parameters["by_part"].items()]

    stages = found["memory"]
    fullest = max(range(len(stages)), key=lambda stage: stages[stage]["total"])
    lines += ["", f"memory of a rank, GiB{_of_stage(stages, fullest)}"]
    lines += [f"  {name:<22}{size / 2**30:>12,.3f}" for name, size in stages[fullest].items()]
    if memory_gib is not None:
        used = stages[fullest]["total"] / 2**30
        fits = "fits" if used <= memory_gib else "DOES NOT FIT"
        lines.append(f"  {fits} in {memory_gib:g} GiB: {used / memory_gib:.0%}")

    step, tokens = found["flops"], found["tokens"]
    pictures = found["images"]
    lines += [
        "",
        f"a step: {tokens:,} tokens, {pictures['features']:,.0f} of them of "
        f"{pictures['count']:,.0f} images of {pictures['patches_per_image']} patches",
        f"{'FLOPs':<24}{'a step':>12}{'a token':>12}",
    ]
    lines += [f"  {name:<22}{n:>12.3e}{n / tokens:>12.3e}" for name, n in step.items()]

    sent = found["messages"]
    busiest = max(range(len(sent)), key=lambda stage: sent[stage]["total"])
    lines += ["", f"sent by a rank in a step, GiB{_of_stage(sent, busiest)}"]
    lines += [f"  {name:<22}{size / 2**30:>12,.3f}" for name, size in sent[busiest].items() if size]
    return "\n".join(lines)


def _of_stage(stages: list[Any], stage: int) -> str:
    return f" (of stage {stage + 1} of {len(stages)}, which has most)" if len(stages) > 1 else ""


def _short(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:,.0f}"
