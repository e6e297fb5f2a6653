"""A model's configuration as a published ``config.json``, and back.

The model is Kimi-K2.5, or a language model alone (:mod:`pretrain.export.text_config`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pretrain.config import LanguageConfig, VisionConfig
from pretrain.errors import PretrainError
from pretrain.export.section import Section
from pretrain.export.text_config import (
    ARCHITECTURES,
    DEEPSEEK_V3,
    Architecture,
    architecture_of,
    from_text_config,
    to_text_config,
    unknown_keys,
)
from pretrain.model.geometry import MAX_FRAMES, MERGE

VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"
"""Placeholder of a video in a text, which the processor replaces."""

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
        vision: the vision encoder of Kimi-K2.5; None for a language model alone.
        vocab_size: rows of the embedding.
        max_length: length of the longest sequences that the model was trained on, in tokens.
        special: ``bos_token_id`` and the like.
        placeholder: id of the token whose embeddings are replaced by image features.

    Raises:
        PretrainError: the model has a shape or a setting that the published models cannot have.
    """
    text = to_text_config(language, vocab_size, max_length, special)
    if vision is None:
        return text
    architecture = architecture_of(language)
    if architecture is not DEEPSEEK_V3:
        raise PretrainError(
            f"the language model of Kimi-K2.5 is {DEEPSEEK_V3.name}, and this one is "
            f"{architecture.name}: export it with --text-only"
        )
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
        "tie_word_embeddings": language.tie_embeddings,
        **special,
    }


class HfModel(NamedTuple):
    """A published model, as its ``config.json`` describes it.

    Attributes:
        language: fields of LanguageConfig, without the vocabulary.
        vision: fields of VisionConfig; None for a text-only model.
        vocab_size: rows of the embedding and of the output head.
        fp8_block: rows and columns of the blocks of fp8 weights; None without fp8 weights.
        mtp_layers: numbers of the layers for multi-token prediction, after those of the model.
        unknown_keys: keys of the language model that were ignored, because nothing is known of
            them.
    """

    language: dict[str, Any]
    vision: dict[str, Any] | None
    vocab_size: int
    fp8_block: tuple[int, int] | None
    mtp_layers: range
    unknown_keys: list[str]


def from_hf_config(config: Mapping[str, Any]) -> HfModel:
    """Return a model's configuration, given the contents of its ``config.json``.

    Raises:
        PretrainError: the architecture is not supported; the message names the first key of
            config.json with an unsupported value, the value and what is supported.
    """
    whole = Section(config)
    text, vision = whole, None
    if config.get("model_type") == "kimi_k25":
        language, vision = whole.section("text_config"), whole.section("vision_config")
        if language is None or vision is None:
            raise PretrainError("config.json has no text_config or no vision_config")
        text = language
    architecture = _architecture(text, DEEPSEEK_V3 if vision else None)
    blocks = [_fp8_block(section) for section in (whole, text)]
    settings = from_text_config(text, architecture)
    settings["tie_embeddings"] |= whole.values.get("tie_word_embeddings") is True
    layers, mtp = settings["num_layers"], text.count("num_nextn_predict_layers", 0, default=0)
    return HfModel(
        settings,
        None if vision is None else _vision_fields(vision, whole, settings["hidden_size"]),
        text.count("vocab_size"),
        blocks[0] or blocks[1],
        range(layers, layers + mtp),
        [f"{text.prefix}{key}" for key in unknown_keys(text, architecture)],
    )


def _architecture(text: Section, only: Architecture | None) -> Architecture:
    """The architecture of a language model.

    Args:
        only: the supported one; None: any that the model_type names.
    """
    model_type = text.values.get("model_type", only.model_type if only else None)
    architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if architecture is None or only not in (None, architecture):
        supported = [name for name, item in ARCHITECTURES.items() if only in (None, item)]
        images = "" if only else "kimi_k25 (text and images) or "
        raise text.error(
            "model_type", f"only {images}{', '.join(supported)} (text) can be imported"
        )
    return architecture


def _fp8_block(section: "Section") -> tuple[int, int] | None:
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


def _vision_fields(
    vision: "Section", whole: "Section", language_hidden_size: int
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
