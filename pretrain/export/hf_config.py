"""A model's configuration as the ``config.json`` of Kimi-K2.5 or DeepSeek-V3, and back."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

from pretrain.config import LanguageConfig, RopeScalingConfig, VisionConfig
from pretrain.errors import PretrainError
from pretrain.model.geometry import MAX_FRAMES, MERGE

VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"
"""Placeholder of a video in a text, which the processor replaces."""

T = TypeVar("T")

# Keys of DeepSeek-V3 that have one value in all models of this trainer.
_TEXT_CONSTANTS = {
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "rope_interleave": True,
    "attention_bias": False,
}
# Options of other architectures, with the value that turns each off; null and false do so, too.
_TEXT_OPTIONS_OFF = {
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
# Keys that other architectures may lack, and the reason why a model without one is refused.
_REQUIRED = {
    "q_lora_rank": "queries without a low-rank projection are not supported",
    "kv_lora_rank": "only multi-head latent attention is supported",
    "n_routed_experts": "models without experts (all layers dense) are not supported",
    "n_shared_experts": "models without a shared expert are not supported",
}
# Limit of every count in config.json: a larger number is a mistake, and listing the weights of
# such a model would take forever.
_LARGEST = 1 << 27
# Fields of LanguageConfig and keys of DeepSeek-V3 with the same number.
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
# Fields of VisionConfig, transformers' keys, and the published keys, which vLLM and SGLang read.
_VISION = (
    ("num_layers", "num_hidden_layers", "vt_num_hidden_layers"),
    ("hidden_size", "hidden_size", "vt_hidden_size"),
    ("num_heads", "num_attention_heads", "vt_num_attention_heads"),
    ("ffn_hidden_size", "intermediate_size", "vt_intermediate_size"),
    ("patch_size", "patch_size", "patch_size"),
    ("position_grid", "pos_emb_height", "init_pos_emb_height"),
    ("position_grid", "pos_emb_width", "init_pos_emb_width"),
)
_VISION_CONSTANTS = {
    "merge_kernel_size": [MERGE, MERGE],
    "init_pos_emb_time": MAX_FRAMES,
    "pos_emb_type": "divided_fixed",
    "video_attn_type": "spatial_temporal",
    "merge_type": "sd2_tpool",
    "mm_projector_type": "patchmerger",
    "projector_hidden_act": "gelu",
    "projector_ln_eps": 1e-5,
}


def _text_config(
    config: LanguageConfig, vocab_size: int, max_length: int, special: Mapping[str, int]
) -> dict[str, Any]:
    """Keys of a ``DeepseekV3Config``; for the arguments see :func:`to_hf_config`."""
    shared, width = config.shared_expert_ffn_hidden_size, config.expert_ffn_hidden_size
    if shared % width:
        raise PretrainError(
            f"DeepSeek-V3's shared experts are a multiple of its experts, but language."
            f"shared_expert_ffn_hidden_size={shared} is not a multiple of "
            f"expert_ffn_hidden_size={width}: this model cannot be exported"
        )
    if config.num_experts < 2:
        raise PretrainError("DeepSeek-V3 needs at least 2 experts: this model cannot be exported")
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{key: getattr(config, field) for field, key in _TEXT.items()},
        **_TEXT_CONSTANTS,
        "tie_word_embeddings": False,
        "vocab_size": vocab_size,
        "num_key_value_heads": config.num_heads,
        "n_shared_experts": shared // width,
        # The score of a single expert is not normalized.
        "norm_topk_prob": config.experts_per_token > 1,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": max_length,
        "rope_theta": config.rope_base,
        **_position_keys(config),
        "attention_dropout": 0.0,
        "use_cache": True,
        **special,
    }


def _position_keys(config: LanguageConfig) -> dict[str, Any]:
    """``rope_parameters``, which transformers reads, and ``rope_scaling``, which servers read."""
    if config.rope_scaling.factor == 1:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base}}
    scaling = asdict(config.rope_scaling)
    return {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": config.rope_base, **scaling},
        "rope_scaling": {"type": "yarn", "rope_type": "yarn", **scaling},
    }


def transformers_vision_config(config: VisionConfig) -> dict[str, Any]:
    """The keyword arguments of transformers' ``Kimi_K25VisionConfig``."""
    return {
        "patch_size": config.patch_size,
        "pos_emb_height": config.position_grid,
        "pos_emb_width": config.position_grid,
        "pos_emb_time": MAX_FRAMES,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "hidden_act": "gelu_pytorch_tanh",
        "merge_kernel_size": [MERGE, MERGE],
        "rope_parameters": {"rope_type": "axial", "rope_theta": config.rope_base},
    }


def _vision_config(config: VisionConfig, language_hidden_size: int) -> dict[str, Any]:
    """Keys of a ``Kimi_K25VisionConfig``, under transformers' names and the published ones."""
    if config.rope_base != 10000.0:
        raise PretrainError(
            f"vision.rope_base={config.rope_base} cannot be exported, because vLLM and SGLang "
            "always use 10000: export with --text-only, or train with 10000"
        )
    return {
        "model_type": "kimi_k25_vision",
        **transformers_vision_config(config),
        **{key: getattr(config, field) for field, _, key in _VISION},
        **_VISION_CONSTANTS,
        "mm_hidden_size": config.hidden_size,
        "text_hidden_size": language_hidden_size,
    }


def to_hf_config(
    language: LanguageConfig,
    vision: VisionConfig | None,
    vocab_size: int,
    max_length: int,
    special: Mapping[str, int],
    placeholder: int,
) -> dict[str, Any]:
    """Return the contents of ``config.json``.

    Args:
        vision: the vision encoder of Kimi-K2.5; None for DeepSeek-V3.
        max_length: length of the longest sequences that the model was trained on, in tokens.
        special: ``bos_token_id`` and the like.
        placeholder: id of the token whose embeddings are replaced by image features.

    Raises:
        PretrainError: the model has a shape or a setting that the published models cannot have.
    """
    text = _text_config(language, vocab_size, max_length, special)
    if vision is None:
        return text
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": text,
        "vision_config": _vision_config(vision, language.hidden_size),
        "projection_hidden_size": vision.hidden_size,
        "projection_layer_norm_eps": 1e-5,
        "image_token_id": placeholder,
        "media_placeholder_token_id": placeholder,
        # Beyond the vocabulary: only the processor of Kimi-K2.5 writes it.
        "video_token_id": vocab_size,
        "video_placeholder": VIDEO_PLACEHOLDER,
        "use_unified_vision_chunk": True,
        "ignore_index": -100,
        "tie_word_embeddings": False,
        **special,
    }


class HfModel(NamedTuple):
    """A published model, as its ``config.json`` describes it.

    Attributes:
        language: fields of LanguageConfig.
        vision: fields of VisionConfig; None for a text-only model.
        vocab_size: rows of the embedding and of the output head.
        tied: embedding and output head share one weight.
        fp8_block: rows and columns of the blocks of fp8 weights; None without fp8 weights.
        mtp_layers: numbers of the layers for multi-token prediction, after those of the model.
    """

    language: dict[str, Any]
    vision: dict[str, Any] | None
    vocab_size: int
    tied: bool
    fp8_block: tuple[int, int] | None
    mtp_layers: range


def from_hf_config(config: Mapping[str, Any]) -> HfModel:
    """Return a model's configuration, given the contents of its ``config.json``.

    Raises:
        PretrainError: the architecture is not supported; the message names the first key of
            config.json with an unsupported value, the value and what is supported.
    """
    whole, model_type = _Section(config), config.get("model_type")
    if model_type == "kimi_k25":
        text, vision = whole.section("text_config"), whole.section("vision_config")
        if text is None or vision is None:
            raise PretrainError("config.json has no text_config or no vision_config")
    elif model_type in ("deepseek_v3", "kimi_k2"):
        text, vision = whole, None
    else:
        raise PretrainError(
            f"config.json has model_type={_shorten(model_type)}: only kimi_k25 (text and images) "
            "and deepseek_v3 or kimi_k2 (text) can be imported"
        )
    blocks = [_fp8_block(section) for section in (whole, text)]
    language, vocab_size = _language_fields(text)
    layers, mtp = language["num_layers"], text.count("num_nextn_predict_layers", 0, default=0)
    return HfModel(
        language,
        None if vision is None else _vision_fields(vision, whole, language["hidden_size"]),
        vocab_size,
        any(section.values.get("tie_word_embeddings") is True for section in (whole, text)),
        blocks[0] or blocks[1],
        range(layers, layers + mtp),
    )


def _fp8_block(section: "_Section") -> tuple[int, int] | None:
    """Rows and columns of the blocks that ``quantization_config`` describes; None without one."""
    quantization = section.section("quantization_config")
    if quantization is None:
        return None
    supported = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    if "quant_method" not in quantization.values:
        raise quantization.error("quant_method", "only fp8 is supported")
    for key, value in supported.items():
        if quantization.values.get(key, value) != value:
            raise quantization.error(
                key, f"only {value} is supported; convert the model to bfloat16 first"
            )
    block = quantization.values.get("weight_block_size")
    match block:
        case [int(rows), int(columns)] if min(rows, columns) > 0 and True not in block:
            return rows, columns
    raise quantization.error("weight_block_size", "it must be two numbers above 0, as [128, 128]")


def _language_fields(text: "_Section") -> tuple[dict[str, Any], int]:
    """Fields of LanguageConfig, and the vocabulary size."""
    for key, reason in _REQUIRED.items():
        if text.values.get(key) in (None, 0):
            raise text.error(key, reason)
    text.require(_TEXT_CONSTANTS | _TEXT_OPTIONS_OFF)
    language: dict[str, Any] = {
        field: text.number(key) if field in _FLOATS else text.count(key, _SMALLEST.get(field, 1))
        for field, key in _TEXT.items()
    }
    text.require(
        {
            "norm_topk_prob": language["experts_per_token"] > 1,
            "num_key_value_heads": language["num_heads"],
        }
    )
    width = language["expert_ffn_hidden_size"]
    language["shared_expert_ffn_hidden_size"] = text.count("n_shared_experts") * width
    rope = text.section("rope_parameters") or text.section("rope_scaling")
    base = rope if rope and rope.values.get("rope_theta") is not None else text
    language["rope_base"] = base.number("rope_theta", 10000.0)
    scaling = _rope_scaling(rope) if rope else RopeScalingConfig()
    text.build(LanguageConfig, {**language, "rope_scaling": scaling}, _TEXT)
    return {**language, "rope_scaling": asdict(scaling)}, text.count("vocab_size")


def _vision_fields(
    vision: "_Section", whole: "_Section", language_hidden_size: int
) -> dict[str, Any]:
    """Fields of VisionConfig."""
    fields: dict[str, Any] = {}
    for field, *keys in _VISION:
        for key in [key for key in keys if key in vision.values] or keys[:1]:
            value = vision.count(key)
            if fields.setdefault(field, value) != value:
                raise vision.error(key, f"another key says {fields[field]}, and grids are square")
    rope = vision.section("rope_parameters")
    fields["rope_base"] = rope.number("rope_theta", 10000.0) if rope else 10000.0
    vision.build(VisionConfig, fields, {field: key for field, key, _ in _VISION})
    vision.require(
        _VISION_CONSTANTS
        | {"mm_hidden_size": fields["hidden_size"], "text_hidden_size": language_hidden_size}
        | {"pos_emb_time": MAX_FRAMES, "hidden_act": "gelu_pytorch_tanh"}
    )
    whole.require(
        {"projection_hidden_size": fields["hidden_size"], "projection_layer_norm_eps": 1e-5}
    )
    return fields


def _rope_scaling(rope: "_Section") -> RopeScalingConfig:
    """The scaling of positions; missing keys have transformers' defaults."""
    key = "rope_type" if "rope_type" in rope.values else "type"
    rope_type = rope.values.get(key, "default")
    if rope_type == "default":
        return RopeScalingConfig()
    if rope_type != "yarn":
        raise rope.error(key, "positions can be scaled by yarn, or not at all (default)")
    rope.require({"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0})
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    original = rope.count("original_max_position_embeddings")
    numbers = {"factor": rope.number("factor", low=1.0)}
    numbers |= {key: rope.number(key, value, low=0.0) for key, value in defaults.items()}
    return rope.build(
        RopeScalingConfig, {**numbers, "original_max_position_embeddings": original}, {}
    )


@dataclass(frozen=True)
class _Section:
    """A JSON object in config.json.

    Attributes:
        prefix: prefix of its keys in messages, such as ``text_config.``
    """

    values: Mapping[str, Any]
    prefix: str = ""

    def error(self, key: str, reason: str) -> PretrainError:
        """Return an error that names the key, its value and what is supported."""
        value = self.values.get(key)
        return PretrainError(f"config.json has {self.prefix}{key}={_shorten(value)}: {reason}")

    def build(self, cls: type[T], fields: Mapping[str, Any], keys: Mapping[str, str]) -> T:
        """Return a section of our configuration.

        Args:
            keys: keys of config.json by the fields' names, where they differ.

        Raises:
            PretrainError: a value is not allowed; the message has the keys of config.json.
        """
        try:
            return cls(**fields)
        except ValueError as error:
            names = re.compile(rf"\b({'|'.join(keys) or '(?!)'})\b")
            reason = names.sub(lambda match: keys[match[0]], str(error))
            raise PretrainError(f"in config.json, {self.prefix}{reason}") from error

    def section(self, key: str) -> "_Section | None":
        """Return an object within this one; None if it is missing, null or empty."""
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "it must be an object")
        return _Section(value, f"{self.prefix}{key}.")

    def count(self, key: str, smallest: int = 1, default: int | None = None) -> int:
        """Return a whole number from ``smallest`` to 2**27."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not smallest <= value <= _LARGEST:
            raise self.error(key, f"it must be a whole number from {smallest} to {_LARGEST}")
        return value

    def number(self, key: str, default: float | None = None, low: float | None = None) -> float:
        """Return a finite number: above 0, or at least ``low`` if that is given."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30:
            number = float(value)
            if number > 0 if low is None else number >= low:
                return number
        at_least = "above 0" if low is None else f"of at least {low:g}"
        raise self.error(key, f"it must be a finite number {at_least}")

    def require(self, expected: Mapping[str, Any]) -> None:
        """Raise for a key that is present with another value than the only supported one."""
        for key, value in expected.items():
            given = self.values.get(key, value)
            if given != value and not (key in _TEXT_OPTIONS_OFF and not given):
                raise self.error(key, f"this trainer's models have {_shorten(value)}")


def _shorten(value: Any) -> str:
    """The value as JSON on one line of at most 80 characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
