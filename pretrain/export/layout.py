"""Our weights and settings as published checkpoints of Kimi-K2.5 and DeepSeek-V3 have them.

Their tensor names are those of the files (which transformers renames as it loads, and vLLM and
SGLang read directly): experts one by one, the vision encoder's q, k and v in one, and rotary
channels in pairs of neighbours, as we have them in both models. Nothing is computed: every tensor
of theirs is rows of ours.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from pretrain.config import LanguageConfig, RopeScalingConfig, VisionConfig
from pretrain.errors import PretrainError
from pretrain.model.geometry import MAX_FRAMES, MERGE
from pretrain.model.hf_vision import transformers_config

VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"
"""Placeholder of a video in a text, until a processor replaces it."""

Shapes = dict[str, tuple[int, ...]]
T = TypeVar("T")


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
}
# Options of other architectures, with the value that leaves them out; null and false do so too.
_NEUTRAL_TEXT = {
    "num_nextn_predict_layers": 0,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "layer_types": None,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "index_topk": None,
    "num_zero_experts": None,
    "attn_output_gate": False,
}
# What every model of ours has, and others may lack.
_NEEDED = {
    "q_lora_rank": "queries without a low-rank projection are not supported",
    "kv_lora_rank": "only multi-head latent attention is supported",
    "n_routed_experts": "models without experts (all layers dense) are not supported",
    "n_shared_experts": "models without a shared expert are not supported",
}
# Of what config.json counts; a larger number is a mistake, and would take forever to refuse.
_LARGEST = 1 << 27
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
_FLOATS = ("router_scaling", "norm_eps", "init_std")
_SMALLEST = {"dense_layers": 0, "num_experts": 2}
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
        "tie_word_embeddings": False,
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
    """Settings of positions: under transformers' name, and the one that servers read."""
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
        "video_placeholder": VIDEO_PLACEHOLDER,
        "use_unified_vision_chunk": True,
        "ignore_index": -100,
        "tie_word_embeddings": False,
        **special,
    }


def our_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None, int]:
    """A model's settings from its ``config.json``.

    Returns:
        Fields of LanguageConfig; of VisionConfig, or None for a model of text; the vocabulary's
        size.

    Raises:
        PretrainError: the model is of another architecture; the message names the first key of
            config.json that does not fit, its value and what is supported.
    """
    whole, kind = _Settings(config), config.get("model_type")
    if kind == "kimi_k25":
        text, vision = whole.part("text_config"), whole.part("vision_config")
        if text is None or vision is None:
            raise PretrainError("config.json has no text_config or no vision_config")
    elif kind in ("deepseek_v3", "kimi_k2"):
        text, vision = whole, None
    else:
        raise PretrainError(
            f"config.json has model_type={_shown(kind)}: only kimi_k25 (text and images) and "
            "deepseek_v3 or kimi_k2 (text) can be imported"
        )
    for part in (whole, text):
        if part.values.get("quantization_config"):
            raise PretrainError(
                f"config.json has {part.prefix}quantization_config: quantized weights cannot be "
                "imported; convert the model to bfloat16 first"
            )
    language, vocab_size = _our_language(text)
    if vision is None:
        return language, None, vocab_size
    return language, _our_vision(vision, whole, language["hidden_size"]), vocab_size


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output layer's weight is the embedding's."""
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    return any(part.get("tie_word_embeddings") is True for part in parts)


def _our_language(text: "_Settings") -> tuple[dict[str, Any], int]:
    """Fields of LanguageConfig, and the vocabulary's size."""
    for key, reason in _NEEDED.items():
        if text.values.get(key) in (None, 0):
            raise text.refuse(key, reason)
    text.require(_FIXED_TEXT | _NEUTRAL_TEXT)
    language: dict[str, Any] = {
        ours: text.number(theirs) if ours in _FLOATS else text.count(theirs, _SMALLEST.get(ours, 1))
        for ours, theirs in _TEXT.items()
    }
    layers, dense = language["num_layers"], language["dense_layers"]
    if dense >= layers:
        raise text.refuse(
            "first_k_dense_replace",
            f"of num_hidden_layers={layers} at least one must have experts, not all be dense",
        )
    if language["experts_per_token"] > language["num_experts"]:
        raise text.refuse(
            "num_experts_per_tok", f"there are n_routed_experts={language['num_experts']}"
        )
    if language["qk_rope_head_dim"] % 2:
        raise text.refuse(
            "qk_rope_head_dim", "rotary channels are turned in pairs: it must be even"
        )
    text.require(
        {
            "norm_topk_prob": language["experts_per_token"] > 1,
            "num_key_value_heads": language["num_heads"],
        }
    )
    width = language["expert_ffn_hidden_size"]
    language["shared_expert_ffn_hidden_size"] = text.count("n_shared_experts") * width
    rope = text.part("rope_parameters") or text.part("rope_scaling")
    base = rope if rope and rope.values.get("rope_theta") is not None else text
    language["rope_base"] = base.number("rope_theta", 10000.0)
    scaling = _our_scaling(rope) if rope else RopeScalingConfig()
    text.fits(LanguageConfig, {**language, "rope_scaling": scaling}, _TEXT)
    return {**language, "rope_scaling": asdict(scaling)}, text.count("vocab_size")


def _our_vision(vision: "_Settings", whole: "_Settings", language_size: int) -> dict[str, Any]:
    """Fields of VisionConfig."""
    found: dict[str, Any] = {}
    for ours, *names in _VISION:
        for name in [name for name in names if name in vision.values] or names[:1]:
            value = vision.count(name)
            if found.setdefault(ours, value) != value:
                raise vision.refuse(name, f"another key says {found[ours]}, and grids are square")
    heads = found["num_heads"]
    if found["hidden_size"] % (4 * heads):
        raise vision.refuse(
            "hidden_size", f"it must be num_attention_heads={heads} times a multiple of 4"
        )
    vision.require(
        _FIXED_VISION
        | {"mm_hidden_size": found["hidden_size"], "text_hidden_size": language_size}
        | {"pos_emb_time": MAX_FRAMES, "hidden_act": "gelu_pytorch_tanh"}
    )
    whole.require(
        {"projection_hidden_size": found["hidden_size"], "projection_layer_norm_eps": 1e-5}
    )
    rope = vision.part("rope_parameters")
    found["rope_base"] = rope.number("rope_theta", 10000.0) if rope else 10000.0
    vision.fits(VisionConfig, found, {ours: theirs for ours, theirs, _ in _VISION})
    return found


def _our_scaling(rope: "_Settings") -> RopeScalingConfig:
    """The positions' scaling.

    A key that is left out has transformers' default: 32, 1, and m(1) on queries and keys.
    """
    name = "rope_type" if "rope_type" in rope.values else "type"
    kind = rope.values.get(name, "default")
    if kind == "default":
        return RopeScalingConfig()
    if kind != "yarn":
        raise rope.refuse(name, "positions can be scaled by yarn, or not at all (default)")
    rope.require({"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0})
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    original = rope.count("original_max_position_embeddings")
    numbers = {"factor": rope.number("factor", low=1.0)}
    numbers |= {key: rope.number(key, value, low=0.0) for key, value in defaults.items()}
    return rope.fits(
        RopeScalingConfig, {**numbers, "original_max_position_embeddings": original}, {}
    )


@dataclass(frozen=True)
class _Settings:
    """An object of config.json.

    Attributes:
        prefix: before its keys in messages, such as ``text_config.``
    """

    values: Mapping[str, Any]
    prefix: str = ""

    def refuse(self, key: str, reason: str) -> PretrainError:
        """An error that names the key, its value and what is supported."""
        value = self.values.get(key)
        return PretrainError(f"config.json has {self.prefix}{key}={_shown(value)}: {reason}")

    def fits(self, kind: type[T], fields: Mapping[str, Any], names: Mapping[str, str]) -> T:
        """The section of the configuration with some fields.

        Args:
            names: ours and those of config.json, where they differ.

        Raises:
            PretrainError: a value is not allowed; in terms of config.json.
        """
        try:
            return kind(**fields)
        except ValueError as error:
            ours = re.compile(rf"\b({'|'.join(names) or '(?!)'})\b")
            reason = ours.sub(lambda found: names[found[0]], str(error))
            raise PretrainError(f"in config.json, {self.prefix}{reason}") from error

    def part(self, key: str) -> "_Settings | None":
        """An object within; None where it is left out, null or empty."""
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.refuse(key, "it must be an object")
        return _Settings(value, f"{self.prefix}{key}.")

    def count(self, key: str, smallest: int = 1) -> int:
        """A whole number of a sensible size."""
        value = self.values.get(key)
        if type(value) is not int or not smallest <= value <= _LARGEST:
            raise self.refuse(key, f"it must be a whole number from {smallest} to {_LARGEST}")
        return value

    def number(self, key: str, default: float | None = None, low: float | None = None) -> float:
        """A finite number: above 0, or at least ``low``."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30:
            number = float(value)
            if number > 0 if low is None else number >= low:
                return number
        at_least = "above 0" if low is None else f"of at least {low:g}"
        raise self.refuse(key, f"it must be a finite number {at_least}")

    def require(self, expected: Mapping[str, Any]) -> None:
        """Refuse what differs from the only value that is supported; keys may be left out."""
        for key, value in expected.items():
            given = self.values.get(key, value)
            if given != value and not (key in _NEUTRAL_TEXT and not given):
                raise self.refuse(key, f"this trainer's models have {_shown(value)}")


def _shown(value: Any) -> str:
    """As config.json has it, in a line and not too long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
