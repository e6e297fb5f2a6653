"""The names that transformers' models give to the parts of an attention, and their sizes.

The only table of such names: ``attention_layouts`` and ``matrix_layouts`` both read it.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from muonclip.adapters import base_layer, layer_shape

# Separate linear layers for query, key and value.
SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("linear_q", "linear_k", "linear_v"),
    ("project_q", "project_k", "project_v"),
    ("projection_query", "projection_key", "projection_value"),
    ("q_head", "k_head", "v_head"),
    ("to_q", "to_k", "to_v"),
    ("Wq", "Wk", "Wv"),
)
# One layer; rows: all queries, then all keys, then all values.
FUSED = ("qkv_proj", "qkv", "Wqkv", "c_attn", "att_proj", "qkv_linear")
# One layer; rows: per head (or key group) its queries, its key and its value.
FUSED_BY_GROUP = ("query_key_value",)
# Words in the class names of attention without a softmax, whose logits need no limit.
WITHOUT_SOFTMAX = ("Linear", "Lightning", "Delta")
# Norms of the projected queries and keys.
NORMS = (
    ("q_norm", "k_norm"),
    ("q_layernorm", "k_layernorm"),
    ("q_layer_norm", "k_layer_norm"),
    ("query_layernorm", "key_layernorm"),
)
# A norm of both.
NORM_OF_BOTH = "qk_norm"


class MLADims(NamedTuple):
    """Sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Attributes:
        nope: rows of a head's query and key without position.
        rope: rows of a head's rotary query and of the shared rotary key.
        value: rows of a head's value.
        latent: size of the latent of keys and values.
    """

    nope: int
    rope: int
    value: int
    latent: int


def mla_dims(module: nn.Module) -> MLADims | None:
    """The sizes of an MLA module; None for any other module."""
    names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    sizes: list[Any] = [getattr(module, name, None) for name in names]
    return None if None in sizes else MLADims(*sizes)


def num_heads(module: nn.Module) -> int | None:
    """Query heads of an attention module; None if unknown."""
    return number(module, ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads"))


def num_key_heads(module: nn.Module) -> int | None:
    """Key heads of an attention module; None if unknown or equal to the query heads."""
    return number(module, ("num_key_value_heads", "num_kv_heads", "kv_heads"))


def head_dim(module: nn.Module) -> int | None:
    """Rows of a head of an attention module; None if unknown."""
    names = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "d_kv")
    return number(module, (*names, "head_k_dim"))


def number(module: nn.Module, names: Sequence[str]) -> int | None:
    """The first attribute that is an integer; the module comes before its configuration."""
    for source in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(source, name, None)
            if type(value) is int:
                return value
    return None


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer stores its weight as [inputs, outputs], as GPT-2's Conv1D does."""
    return type(base_layer(layer)).__name__ == "Conv1D"


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, or of the linear layer inside PEFT's adapters."""
    rows, columns = layer_shape(base_layer(layer))[-2:]
    return (columns, rows) if is_transposed(layer) else (rows, columns)


def is_excluded(name: str, exclude: str | Sequence[str]) -> bool:
    """Whether a name matches the pattern, or one of the patterns (``fnmatch``)."""
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    return any(fnmatchcase(name, pattern) for pattern in patterns)
