"""Vision encoder and projector under the names of transformers' Kimi-K2.5, and back.

Pure functions of weights; transformers itself is not needed. Its published checkpoints fuse q, k
and v, and pair the channels that a rotary embedding turns as neighbours, as we do; its model
(``Kimi_K25Model``) keeps them apart and pairs each channel of a head's first half with the one as
far into the second. The names here are the model's.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.config import VisionConfig
from pretrain.model.geometry import MAX_FRAMES, MERGE

# Ours (of a VisionTower) and theirs; {} is the number of a layer.
_NAMES = {
    "encoder.patch_embed": "vision_tower.patch_embed.proj",
    "encoder.pos_embed": "vision_tower.patch_embed.pos_emb.position_embeddings",
    "encoder.blocks.{}.norm1": "vision_tower.layers.{}.norm1",
    "encoder.blocks.{}.attention.q_proj": "vision_tower.layers.{}.attn.q_proj",
    "encoder.blocks.{}.attention.k_proj": "vision_tower.layers.{}.attn.k_proj",
    "encoder.blocks.{}.attention.v_proj": "vision_tower.layers.{}.attn.v_proj",
    "encoder.blocks.{}.attention.o_proj": "vision_tower.layers.{}.attn.proj",
    "encoder.blocks.{}.norm2": "vision_tower.layers.{}.norm2",
    "encoder.blocks.{}.fc1": "vision_tower.layers.{}.mlp.fc1",
    "encoder.blocks.{}.fc2": "vision_tower.layers.{}.mlp.fc2",
    "encoder.final_norm": "vision_tower.final_layernorm",
    "projector.norm": "mm_projector.pre_norm",
    "projector.fc1": "mm_projector.in_proj",
    "projector.fc2": "mm_projector.out_proj",
}
_THEIRS = {theirs: ours for ours, theirs in _NAMES.items()}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def to_transformers(weights: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """The weights of a ``VisionTower`` as those of transformers' ``Kimi_K25Model``.

    Args:
        weights: a ``VisionTower``'s ``state_dict()``.
        num_heads: of its encoder.

    Returns:
        ``vision_tower.…`` and ``mm_projector.…``; views of the weights where they are the same.

    Raises:
        ValueError: a name is none of a ``VisionTower``'s.
    """
    result = {}
    for name, tensor in weights.items():
        renamed = _rename(name, _NAMES)
        if _turns(name):
            tensor = _regroup(tensor, num_heads, (-1, 2))
        elif name == "encoder.patch_embed.weight":
            side = math.isqrt(tensor.shape[1] // 3)
            tensor = tensor.view(-1, 3, side, side)
        result[renamed] = tensor
    return result


def from_transformers(weights: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """The inverse of :func:`to_transformers`.

    Raises:
        ValueError: a name is none of the vision model's or the projector's.
    """
    result = {}
    for name, tensor in weights.items():
        renamed = _rename(name, _THEIRS)
        if _turns(name):
            tensor = _regroup(tensor, num_heads, (2, -1))
        elif renamed == "encoder.patch_embed.weight":
            tensor = tensor.flatten(1)
        result[renamed] = tensor
    return result


def transformers_config(config: VisionConfig) -> dict[str, Any]:
    """The keyword arguments of ``Kimi_K25VisionConfig`` for an encoder of ours."""
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


def _rename(name: str, names: Mapping[str, str]) -> str:
    kind = next((kind for kind in (".weight", ".bias") if name.endswith(kind)), "")
    module = name.removesuffix(kind)
    renamed = names.get(_NUMBER.sub("{}", module))
    if renamed is None:
        raise ValueError(f"{name!r} is no weight of a vision encoder or projector: leave it out")
    return renamed.format(*_NUMBER.findall(module)) + kind


def _turns(name: str) -> bool:
    return ".q_proj." in name or ".k_proj." in name


def _regroup(rows: Tensor, num_heads: int, pairs: tuple[int, int]) -> Tensor:
    """Each head's rows [a * b] from order (a, b) to (b, a)."""
    return torch.unflatten(rows, 0, (num_heads, *pairs)).transpose(1, 2).flatten(0, 2)
