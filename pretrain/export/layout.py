"""Our weights and settings as published checkpoints of Kimi-K2.5 and DeepSeek-V3 have them.

Their tensor names are those of the files (which transformers renames as it loads, and vLLM and
SGLang read directly): experts one by one, the vision encoder's q, k and v in one, and rotary
channels in pairs of neighbours, as we have them in both models. Nothing is computed: every tensor
of theirs is rows of ours.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.config import LanguageConfig, RopeScalingConfig, VisionConfig
from pretrain.errors import PretrainError
from pretrain.model.hf_vision import transformers_config
from pretrain.model.vision import MAX_FRAMES, MERGE

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rows:
    """Tensors of ours that hold, row after row, what some tensors of theirs hold.

    Attributes:
        ours, theirs: names and shapes, in the order of rows. Of one side there is one tensor.
    """

    ours: Shapes
    theirs: Shapes

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of theirs, from a mapping that has ours."""
        return _recut(tensors, self.ours, self.theirs)

    def to_ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of ours, from a mapping that has theirs."""
        return _recut(tensors, self.theirs, self.ours)


def _recut(tensors: Mapping[str, Tensor], old: Shapes, new: Shapes) -> dict[str, Tensor]:
    parts = [tensors[name] for name in old]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    cuts = torch.split(whole, [shape[0] for shape in new.values()])
    return {
        name: cut.reshape(shape).contiguous()
        for (name, shape), cut in zip(new.items(), cuts, strict=True)
    }


def language_rows(config: LanguageConfig, vocab_size: int, prefix: str = "") -> Iterator[Rows]:
    """Every weight of the language model.

    Args:
        vocab_size: rows of the embedding and of the output layer.
        prefix: before their names: ``language_model.`` in Kimi-K2.5, nothing in DeepSeek-V3.
    """
    hidden, heads = config.hidden_size, config.num_heads
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim

    def same(ours: str, theirs: str, *shape: int) -> Rows:
        return Rows({f"language.{ours}.weight": shape}, {f"{prefix}{theirs}.weight": shape})

    def mlp(ours: str, theirs: str, width: int) -> Iterator[Rows]:
        gate, up = (f"{prefix}{theirs}.{part}_proj.weight" for part in ("gate", "up"))
        yield Rows(
            {f"language.{ours}.linear_fc1.weight": (2 * width, hidden)},
            {gate: (width, hidden), up: (width, hidden)},
        )
        yield same(f"{ours}.linear_fc2", f"{theirs}.down_proj", hidden, width)

    yield same("embedding.word_embeddings", "model.embed_tokens", vocab_size, hidden)
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        yield same(f"{ours}.input_layernorm", f"{theirs}.input_layernorm", hidden)
        for our_name, their_name, *shape in (
            ("linear_q_down_proj", "q_a_proj", config.q_lora_rank, hidden),
            ("q_layernorm", "q_a_layernorm", config.q_lora_rank),
            ("linear_q_up_proj", "q_b_proj", heads * (nope + rope), config.q_lora_rank),
            ("linear_kv_down_proj", "kv_a_proj_with_mqa", config.kv_lora_rank + rope, hidden),
            ("kv_layernorm", "kv_a_layernorm", config.kv_lora_rank),
            ("linear_kv_up_proj", "kv_b_proj", heads * (nope + value), config.kv_lora_rank),
            ("linear_proj", "o_proj", hidden, heads * value),
        ):
            yield same(
                f"{ours}.self_attention.{our_name}", f"{theirs}.self_attn.{their_name}", *shape
            )
        yield same(f"{ours}.pre_mlp_layernorm", f"{theirs}.post_attention_layernorm", hidden)
        if layer < config.dense_layers:
            yield from mlp(f"{ours}.mlp", f"{theirs}.mlp", config.ffn_hidden_size)
            continue
        experts = config.num_experts
        yield same(f"{ours}.mlp.router", f"{theirs}.mlp.gate", experts, hidden)
        yield Rows(
            {f"language.{ours}.mlp.router.expert_bias": (experts,)},
            {f"{prefix}{theirs}.mlp.gate.e_score_correction_bias": (experts,)},
        )
        for expert in range(experts):
            yield from mlp(
                f"{ours}.mlp.experts.local_experts.{expert}",
                f"{theirs}.mlp.experts.{expert}",
                config.expert_ffn_hidden_size,
            )
        yield from mlp(
            f"{ours}.mlp.shared_experts",
            f"{theirs}.mlp.shared_experts",
            config.shared_expert_ffn_hidden_size,
        )
    yield same("decoder.final_layernorm", "model.norm", hidden)
    yield same("output_layer", "lm_head", vocab_size, hidden)


def vision_rows(config: VisionConfig, language_hidden_size: int) -> Iterator[Rows]:
    """Every weight of the vision encoder and of the projector, for Kimi-K2.5."""
    hidden, width, side = config.hidden_size, config.ffn_hidden_size, config.patch_size
    merged = MERGE * MERGE * hidden

    def affine(ours: str, theirs: str, *shape: int) -> Iterator[Rows]:
        """A layer's weight, and its bias of the same number of rows."""
        for kind, size in (("weight", shape), ("bias", shape[:1])):
            yield Rows({f"vision.{ours}.{kind}": size}, {f"{theirs}.{kind}": size})

    grid = (config.position_grid, config.position_grid, hidden)
    yield Rows(
        {"vision.encoder.pos_embed": grid}, {"vision_tower.patch_embed.pos_emb.weight": grid}
    )
    theirs = "vision_tower.patch_embed.proj"
    yield Rows(
        {"vision.encoder.patch_embed.weight": (hidden, 3 * side * side)},
        {f"{theirs}.weight": (hidden, 3, side, side)},
    )
    yield Rows({"vision.encoder.patch_embed.bias": (hidden,)}, {f"{theirs}.bias": (hidden,)})
    for layer in range(config.num_layers):
        ours, theirs = f"encoder.blocks.{layer}", f"vision_tower.encoder.blocks.{layer}"
        yield from affine(f"{ours}.norm1", f"{theirs}.norm0", hidden)
        for kind, size in (("weight", (hidden, hidden)), ("bias", (hidden,))):
            yield Rows(
                {f"vision.{ours}.attention.{part}_proj.{kind}": size for part in "qkv"},
                {f"{theirs}.wqkv.{kind}": (3 * hidden, *size[1:])},
            )
        yield from affine(f"{ours}.attention.o_proj", f"{theirs}.wo", hidden, hidden)
        yield from affine(f"{ours}.norm2", f"{theirs}.norm1", hidden)
        yield from affine(f"{ours}.fc1", f"{theirs}.mlp.fc0", width, hidden)
        yield from affine(f"{ours}.fc2", f"{theirs}.mlp.fc1", hidden, width)
    yield from affine("encoder.final_norm", "vision_tower.encoder.final_layernorm", hidden)
    yield from affine("projector.norm", "mm_projector.pre_norm", hidden)
    yield from affine("projector.fc1", "mm_projector.proj.0", merged, merged)
    yield from affine("projector.fc2", "mm_projector.proj.2", language_hidden_size, merged)


def rows(language: LanguageConfig, vision: VisionConfig | None, vocab_size: int) -> Iterator[Rows]:
    """Every weight of a checkpoint: of Kimi-K2.5; of DeepSeek-V3 where ``vision`` is None."""
    yield from language_rows(language, vocab_size, "" if vision is None else "language_model.")
    if vision is not None:
        yield from vision_rows(vision, language.hidden_size)


# What is the same in every model of ours, as DeepSeek-V3's settings call it.
_FIXED_TEXT = {
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "rope_interleave": True,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
# Ours and theirs, where one number is the other.
_TEXT = {
    "num_layers": "num_hidden_layers",
    "dense_layers": "first_k_dense_replace",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_ffn_hidden_size": "moe_intermediate_size",
    "router_scaling": "routed_scaling_factor",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
# Ours, transformers' name, and the published files' name, which vLLM and SGLang read.
_VISION = (
    ("num_layers", "num_hidden_layers", "vt_num_hidden_layers"),
    ("hidden_size", "hidden_size", "vt_hidden_size"),
    ("num_heads", "num_attention_heads", "vt_num_attention_heads"),
    ("ffn_hidden_size", "intermediate_size", "vt_intermediate_size"),
    ("patch_size", "patch_size", "patch_size"),
    ("position_grid", "pos_emb_height", "init_pos_emb_height"),
    ("position_grid", "pos_emb_width", "init_pos_emb_width"),
)
_FIXED_VISION = {
    "merge_kernel_size": [MERGE, MERGE],
    "init_pos_emb_time": MAX_FRAMES,
    "pos_emb_type": "divided_fixed",
    "video_attn_type": "spatial_temporal",
    "merge_type": "sd2_tpool",
    "mm_projector_type": "patchmerger",
    "projector_hidden_act": "gelu",
    "projector_ln_eps": 1e-5,
}


def text_settings(
    config: LanguageConfig, vocab_size: int, max_length: int, special: Mapping[str, int]
) -> dict[str, Any]:
    """The settings of a ``DeepseekV3Config``.

    Args:
        max_length: tokens in the longest sequence that the model has learned from.
        special: ``bos_token_id`` and the like.

    Raises:
        PretrainError: the model has a shape that theirs cannot have.
    """
    shared, width = config.shared_expert_ffn_hidden_size, config.expert_ffn_hidden_size
    if shared % width:
        raise PretrainError(
            f"DeepSeek-V3's shared experts are a multiple of its experts, but language."
            f"shared_expert_ffn_hidden_size={shared} is none of expert_ffn_hidden_size={width}: "
            "this model cannot be exported"
        )
    if config.num_experts < 2:
        raise PretrainError("DeepSeek-V3 needs at least 2 experts: this model cannot be exported")
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{theirs: getattr(config, ours) for ours, theirs in _TEXT.items()},
        **_FIXED_TEXT,
        "vocab_size": vocab_size,
        "num_key_value_heads": config.num_heads,
        "n_shared_experts": shared // width,
        # One expert's score is taken as it is.
        "norm_topk_prob": config.experts_per_token > 1,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": max_length,
        "rope_theta": config.rope_base,
        **_positions(config),
        "attention_dropout": 0.0,
        "use_cache": True,
        **special,
    }


def _positions(config: LanguageConfig) -> dict[str, Any]:
    """What is done to positions: under transformers' name, and the one that servers read."""
    if config.rope_scaling.factor == 1:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base}}
    scaling = asdict(config.rope_scaling)
    return {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": config.rope_base, **scaling},
        "rope_scaling": {"type": "yarn", "rope_type": "yarn", **scaling},
    }


def vision_settings(config: VisionConfig, language_hidden_size: int) -> dict[str, Any]:
    """The settings of a ``Kimi_K25VisionConfig``, under transformers' names and the published."""
    if config.rope_base != 10000.0:
        raise PretrainError(
            f"vision.rope_base={config.rope_base} is 10000 in vLLM and SGLang, which cannot be "
            "told another: export with --text-only, or train with 10000"
        )
    return {
        "model_type": "kimi_k25_vision",
        **transformers_config(config),
        **{theirs: getattr(config, ours) for ours, _, theirs in _VISION},
        **_FIXED_VISION,
        "mm_hidden_size": config.hidden_size,
        "text_hidden_size": language_hidden_size,
    }


def settings(
    language: LanguageConfig,
    vision: VisionConfig | None,
    vocab_size: int,
    max_length: int,
    special: Mapping[str, int],
    placeholder: int,
) -> dict[str, Any]:
    """``config.json`` of Kimi-K2.5; of DeepSeek-V3 where ``vision`` is None.

    Args:
        placeholder: id of the token in whose places image features stand.
    """
    text = text_settings(language, vocab_size, max_length, special)
    if vision is None:
        return text
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": text,
        "vision_config": vision_settings(vision, language.hidden_size),
        "projection_hidden_size": vision.hidden_size,
        "projection_layer_norm_eps": 1e-5,
        "image_token_id": placeholder,
        "media_placeholder_token_id": placeholder,
        # No token of the vocabulary: their processor alone writes it.
        "video_token_id": vocab_size,
        "video_placeholder": "<|kimi_k25_video_placeholder|>",
        "use_unified_vision_chunk": True,
        "ignore_index": -100,
        "tie_word_embeddings": False,
        **special,
    }


def our_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None, int]:
    """What ``config.json`` says of a model, in our words.

    Returns:
        Fields of LanguageConfig; of VisionConfig, or None for a model of text; the vocabulary's
        size.

    Raises:
        PretrainError: the model is of another architecture; the first setting that does not fit
            is named.
    """
    kind = config.get("model_type")
    if kind == "kimi_k25":
        text, vision = config.get("text_config"), config.get("vision_config")
        if not isinstance(text, dict) or not isinstance(vision, dict):
            raise PretrainError("config.json has no text_config and vision_config of its own")
    elif kind in ("deepseek_v3", "kimi_k2"):
        text, vision = config, None
    else:
        raise PretrainError(
            f"config.json is of model_type {kind!r}: only kimi_k25 (text and images) and "
            "deepseek_v3 or kimi_k2 (text) can be imported"
        )
    for part in (config, text):
        if part.get("quantization_config"):
            raise PretrainError(
                "the checkpoint is quantized (quantization_config in config.json): convert it to "
                "bfloat16 first"
            )
    _require(text, _FIXED_TEXT)
    language = {ours: _number(text, theirs) for ours, theirs in _TEXT.items()}
    rope: dict[str, Any] = text.get("rope_parameters") or text.get("rope_scaling") or {}
    language["rope_base"] = float(rope.get("rope_theta") or text.get("rope_theta", 10000.0))
    language["rope_scaling"] = _our_scaling(rope)
    language["router_scaling"] = float(language["router_scaling"])
    width = language["expert_ffn_hidden_size"]
    language["shared_expert_ffn_hidden_size"] = _number(text, "n_shared_experts") * width
    _require(text, {"norm_topk_prob": language["experts_per_token"] > 1})
    _require(text, {"num_key_value_heads": language["num_heads"]})
    vocab_size = _number(text, "vocab_size")
    if vision is None:
        return language, None, vocab_size

    found: dict[str, Any] = {}
    for ours, *names in _VISION:
        name = next((name for name in reversed(names) if name in vision), names[0])
        value = _number(vision, name)
        if found.setdefault(ours, value) != value:
            raise PretrainError(f"{name}={value} in config.json, where the height is {found[ours]}")
    _require(vision, _FIXED_VISION)
    _require(vision, {"mm_hidden_size": found["hidden_size"], "pos_emb_time": MAX_FRAMES})
    theta: Any = (vision.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    return language, {**found, "rope_base": float(theta)}, vocab_size


def _our_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of RopeScalingConfig.

    What is left out means what it does to transformers: 32, 1, and m(1) on queries and keys.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return asdict(RopeScalingConfig())
    if kind != "yarn":
        raise PretrainError(
            f"config.json scales positions by {kind!r}: this trainer has the default rotary "
            "embedding and yarn"
        )
    _require(rope, {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0})
    left_out = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    given = {name: value for name, value in rope.items() if value is not None}
    original = int(_number(given, "original_max_position_embeddings"))
    numbers = {name: float(_number({**left_out, **given}, name)) for name in ("factor", *left_out)}
    try:
        scaling = RopeScalingConfig(original_max_position_embeddings=original, **numbers)
    except ValueError as error:
        raise PretrainError(f"the positions' scaling in config.json: {error}") from error
    return asdict(scaling)


def _number(settings: Mapping[str, Any], name: str) -> Any:
    value = settings.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise PretrainError(f"{name} in config.json must be a number, not {value!r}")
    return value


def _require(settings: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        given = settings.get(name, value)
        if (list(given) if isinstance(given, tuple) else given) != value:
            raise PretrainError(
                f"{name}={given!r} in config.json: this trainer's models have {value!r}"
            )
