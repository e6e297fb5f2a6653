"""A language model's configuration as the ``config.json`` of a published architecture, and back."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.config import LanguageConfig, RopeScalingConfig
from pretrain.errors import PretrainError
from pretrain.export.section import Section


@dataclass(frozen=True)
class Architecture:
    """A language model of transformers, which servers know by the same name.

    Attributes:
        name: name of the class, as ``architectures`` in config.json lists it.
        model_type: name in config.json.
        keys: keys of config.json that are settings of LanguageConfig, by setting.
        settings: settings of LanguageConfig that all its models have.
        constants: keys of config.json that have one value in all models of this trainer.
    """

    name: str
    model_type: str
    keys: Mapping[str, str]
    settings: Mapping[str, Any]
    constants: Mapping[str, Any]


_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
_MLA_KEYS = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
_GQA_KEYS = {"num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
# The keys of experts are read for models with layers of experts only.
_EXPERT_KEYS = {
    "experts_per_token": "num_experts_per_tok",
    "expert_ffn_hidden_size": "moe_intermediate_size",
}
_DEEPSEEK_KEYS = {
    **_EXPERT_KEYS,
    "dense_layers": "first_k_dense_replace",
    "num_experts": "n_routed_experts",
    "router_scaling": "routed_scaling_factor",
}
_CONSTANTS = {"hidden_act": "silu", "attention_bias": False}

DEEPSEEK_V3 = Architecture(
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    _KEYS
    | _MLA_KEYS
    | _DEEPSEEK_KEYS
    | {"expert_groups": "n_group", "expert_groups_per_token": "topk_group"},
    {"attention": "mla", "router_score": "sigmoid"},
    _CONSTANTS
    | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    | {"moe_layer_freq": 1, "rope_interleave": True},
)
_DEEPSEEK_V2 = Architecture(
    "DeepseekV2ForCausalLM",
    "deepseek_v2",
    _KEYS | _MLA_KEYS | _DEEPSEEK_KEYS,
    {"attention": "mla", "router_score": "softmax", "expert_groups": 1},
    _CONSTANTS | {"scoring_func": "softmax", "topk_method": "greedy", "moe_layer_freq": 1},
)
_QWEN3_MOE = Architecture(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    _KEYS | _GQA_KEYS | _EXPERT_KEYS | {"num_experts": "num_experts"},
    {"attention": "gqa", "qk_norm": True, "router_score": "softmax", "expert_groups": 1}
    | {"shared_expert_ffn_hidden_size": 0, "router_scaling": 1.0},
    _CONSTANTS | {"decoder_sparse_step": 1},
)
_QWEN3 = Architecture(
    "Qwen3ForCausalLM",
    "qwen3",
    _KEYS | _GQA_KEYS,
    {"attention": "gqa", "qk_norm": True},
    _CONSTANTS,
)
_LLAMA = Architecture(
    "LlamaForCausalLM",
    "llama",
    _KEYS | _GQA_KEYS,
    {"attention": "gqa", "qk_norm": False},
    _CONSTANTS,
)
ARCHITECTURES = {
    **{item.model_type: item for item in (DEEPSEEK_V3, _DEEPSEEK_V2, _QWEN3_MOE, _QWEN3, _LLAMA)},
    # Kimi K2 names DeepSeek-V3's architecture after itself.
    "kimi_k2": DEEPSEEK_V3,
}
"""Architectures by ``model_type``."""

# Options of other architectures, with the value that turns each off; null and false do so, too.
_OPTIONS_OFF = {
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
    "partial_rotary_factor": 1.0,
}
# Keys that are read elsewhere, and those that leave the logits alone: losses, dropout, defaults of
# generation, and dtypes.
_OTHER_KEYS = (
    "max_position_embeddings", "mlp_only_layers", "n_group", "n_shared_experts",
    "norm_topk_prob", "num_key_value_heads", "num_local_experts", "num_nextn_predict_layers",
    "quantization_config", "rope_parameters", "rope_scaling", "rope_theta",
    "tie_word_embeddings", "topk_group", "vocab_size", "architectures", "auto_map",
    "bos_token_id", "dtype", "eos_token_id", "model_type", "pad_token_id", "torch_dtype",
    "transformers_version", "use_cache", "_name_or_path", "_attn_implementation_autoset",
    "attention_dropout", "aux_loss_alpha", "ep_size", "head_dim", "max_window_layers",
    "output_router_logits", "pretraining_tp", "qk_head_dim", "return_dict",
    "router_aux_loss_coef", "seq_aux", "unk_token_id", "id2label", "label2id", "length_penalty",
    "max_length", "num_beam_groups", "num_beams", "num_return_sequences", "repetition_penalty",
    "temperature", "top_k", "top_p", "typical_p",
)  # fmt: skip
_ATTENTION = ("attention", "qk_norm")
_EXPERTS = {
    *_EXPERT_KEYS,
    *("num_experts", "router_scaling", "expert_groups", "expert_groups_per_token"),
}
_FLOATS = ("router_scaling", "norm_eps", "init_std")
_SMALLEST = {"dense_layers": 0, "num_experts": 2}
_OPTIONAL = ("q_lora_rank", "num_kv_heads", "head_dim")


def to_text_config(
    config: LanguageConfig, vocab_size: int, max_length: int, special: Mapping[str, int]
) -> dict[str, Any]:
    """Return the keys of a language model's config.json.

    Args:
        vocab_size: rows of the embedding.
        max_length: length of the longest sequences that the model was trained on, in tokens.
        special: ``bos_token_id`` and the like.

    Raises:
        PretrainError: no published architecture has these settings.
    """
    architecture = architecture_of(config)
    keys = architecture.keys
    values = {key: getattr(config, setting) for setting, key in keys.items()}
    if config.attention == "mla":
        values["num_key_value_heads"] = config.num_heads
    else:
        values[keys["num_kv_heads"]] = config.gqa_kv_heads
        values[keys["head_dim"]] = config.gqa_head_dim
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        **values,
        **architecture.constants,
        **(_expert_values(config, architecture) if "num_experts" in keys else {}),
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_length,
        "rope_theta": config.rope_base,
        **_position_keys(config),
        "attention_dropout": 0.0,
        "use_cache": True,
        **special,
    }


def architecture_of(config: LanguageConfig) -> Architecture:
    """Return the published architecture of a model.

    Raises:
        PretrainError: there is none; the message names a setting that none has.
    """
    experts = config.moe_layers > 0
    if config.attention == "mla":
        softmax = experts and config.router_score == "softmax"
        architecture = _DEEPSEEK_V2 if softmax else DEEPSEEK_V3
    elif experts:
        architecture = _QWEN3_MOE
    else:
        architecture = _QWEN3 if config.qk_norm else _LLAMA
    settings = dict(architecture.settings)
    if architecture is _DEEPSEEK_V2 and config.experts_per_token > 1:
        settings["normalize_expert_weights"] = False
    for setting, value in settings.items():
        if getattr(config, setting) != value:
            raise PretrainError(
                f"language.{setting}={getattr(config, setting)} cannot be exported: the closest "
                f"architecture, {architecture.name}, has {value}"
            )
    return architecture


def _expert_values(config: LanguageConfig, architecture: Architecture) -> dict[str, Any]:
    """Keys that are functions of several settings."""
    # The score of a single expert is not normalized.
    normalized = config.normalize_expert_weights and config.experts_per_token > 1
    if architecture is _QWEN3_MOE:
        return {
            "mlp_only_layers": list(range(config.dense_layers)),
            "norm_topk_prob": normalized,
        }
    shared, width = config.shared_expert_ffn_hidden_size, config.expert_ffn_hidden_size
    if shared % width:
        raise PretrainError(
            f"DeepSeek's shared experts are a multiple of its experts, but language."
            f"shared_expert_ffn_hidden_size={shared} is not a multiple of "
            f"expert_ffn_hidden_size={width}: this model cannot be exported"
        )
    if config.num_experts < 2 * config.expert_groups:
        raise PretrainError(
            "DeepSeek needs at least 2 experts in each group: this model cannot be exported"
        )
    return {
        "n_group": config.expert_groups,
        "topk_group": config.expert_groups_per_token,
        "n_shared_experts": shared // width,
        "norm_topk_prob": normalized,
        "num_nextn_predict_layers": 0,
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


def from_text_config(text: Section, architecture: Architecture) -> dict[str, Any]:
    """Return settings of LanguageConfig, given the config.json of a language model.

    Raises:
        PretrainError: a value is not supported; the message names its key.
    """
    text.require(architecture.constants)
    _require_off(text)
    latent = architecture.settings["attention"] == "mla"
    settings = {
        **{name: architecture.settings[name] for name in architecture.settings.keys() & _ATTENTION},
        **_read(text, _KEYS),
        **_read(text, _MLA_KEYS if latent else _GQA_KEYS),
        **_positions(text, scaled=latent),
        "tie_embeddings": text.values.get("tie_word_embeddings") is True,
    }
    settings |= _experts(text, architecture, settings["num_layers"])
    if latent and text.values.get("num_key_value_heads") is not None:
        text.require({"num_key_value_heads": settings["num_heads"]})
    if architecture is _QWEN3:
        text.count("head_dim")  # required, because transformers' default is a constant
    text.build(LanguageConfig, settings, architecture.keys)
    return settings | {"rope_scaling": asdict(settings["rope_scaling"])}


def unknown_keys(text: Section, architecture: Architecture) -> list[str]:
    """Return the keys of a config.json that this module does not know, and that may be in use."""
    known = {*architecture.keys.values(), *architecture.constants, *_OPTIONS_OFF, *_OTHER_KEYS}
    return sorted(key for key, value in text.values.items() if value and key not in known)


def _require_off(text: Section) -> None:
    """Refuse options of other architectures."""
    for key, value in _OPTIONS_OFF.items():
        given = text.values.get(key)
        if key == "sliding_window" and text.values.get("use_sliding_window") is False:
            continue
        full = isinstance(given, list) and given == ["full_attention"] * len(given)
        if given and given != value and not (key == "layer_types" and full):
            raise text.unsupported(key, value)


def _read(text: Section, keys: Mapping[str, str]) -> dict[str, Any]:
    """Numbers, by setting."""
    settings: dict[str, Any] = {}
    for setting, key in keys.items():
        if setting in _OPTIONAL and text.values.get(key) is None:
            settings[setting] = None
        elif setting in _FLOATS:
            settings[setting] = text.number(key)
        else:
            settings[setting] = text.count(key, _SMALLEST.get(setting, 1))
    return settings


def _experts(text: Section, architecture: Architecture, num_layers: int) -> dict[str, Any]:
    """Settings of layers of experts."""
    dense = _dense_layers(text, architecture, num_layers)
    if dense >= num_layers:
        return {"dense_layers": num_layers}
    keys = {name: key for name, key in architecture.keys.items() if name in _EXPERTS}
    if "num_experts" not in text.values and "num_local_experts" in text.values:
        keys["num_experts"] = "num_local_experts"  # transformers' name for Qwen3-MoE
    settings = {**architecture.settings, **_read(text, keys), "dense_layers": dense}
    several = settings["experts_per_token"] > 1
    normalized = text.flag("norm_topk_prob", architecture is DEEPSEEK_V3)
    supported = {DEEPSEEK_V3.name: [several], _DEEPSEEK_V2.name: [False]}
    if normalized not in supported.get(architecture.name, [False, several]):
        raise text.unsupported("norm_topk_prob", not normalized)
    # The score of a single expert is not normalized, whatever the setting.
    settings["normalize_expert_weights"] = normalized or not several
    if architecture is not _QWEN3_MOE:
        shared = text.count("n_shared_experts", 0, default=0)
        width = settings["expert_ffn_hidden_size"]
        settings["shared_expert_ffn_hidden_size"] = shared * width
    return settings


def _dense_layers(text: Section, architecture: Architecture, num_layers: int) -> int:
    """Number of first layers without experts."""
    if "num_experts" not in architecture.keys:
        return num_layers
    if architecture is not _QWEN3_MOE:
        if text.values.get("n_routed_experts") is None:
            return num_layers
        return text.count("first_k_dense_replace", 0)
    layers = text.values.get("mlp_only_layers") or []
    if layers != list(range(len(layers))):
        raise text.error("mlp_only_layers", "layers without experts must be the first ones")
    return len(layers)


def _positions(text: Section, *, scaled: bool) -> dict[str, Any]:
    """Settings of the rotary embedding; missing keys have transformers' defaults.

    Args:
        scaled: the attention supports positions that are scaled by YaRN.
    """
    keys = ("rope_parameters", "rope_scaling")
    sections = [section for key in keys if (section := text.section(key)) is not None]
    base = next((rope for rope in sections if rope.values.get("rope_theta") is not None), text)
    scalings = [_scaling(rope, scaled=scaled) for rope in sections]
    if any(scaling != scalings[0] for scaling in scalings):
        raise text.error("rope_scaling", "it contradicts rope_parameters")
    return {
        "rope_base": base.number("rope_theta", 10000.0),
        "rope_scaling": scalings[0] if scalings else RopeScalingConfig(),
    }


def _scaling(rope: Section, *, scaled: bool) -> RopeScalingConfig:
    key = "rope_type" if "rope_type" in rope.values else "type"
    rope_type = rope.values.get(key, "default")
    rope.require({"partial_rotary_factor": 1.0})
    if rope_type == "default":
        return RopeScalingConfig()
    if rope_type != "yarn" or not scaled:
        latent = "positions can be scaled by yarn, or not at all (default)"
        reason = latent if scaled else "only default is supported with grouped-query attention"
        raise rope.error(key, reason)
    rope.require({"attention_factor": None, "truncate": True})
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    original = rope.count("original_max_position_embeddings")
    numbers = {"factor": rope.number("factor", low=1.0)}
    numbers |= {key: rope.number(key, value, low=0.0) for key, value in defaults.items()}
    if numbers["factor"] == 1:  # not scaled, whatever the others are
        return RopeScalingConfig()
    scaling = {**numbers, "original_max_position_embeddings": original}
    return rope.build(RopeScalingConfig, scaling, {})
