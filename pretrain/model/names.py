"""Names of tensors in the whole model, whichever ranks and chunks they are on."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

# Parameters of Transformer Engine's modules: norms within the linear layer after them, experts in
# one module, and two projections in one layer.
_OTHER_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"linear_(q|kv)_up_proj\.layer_norm_weight$", r"\1_layernorm.weight"),
        (r"self_attention\.linear_qkv(_down_proj)?\.layer_norm_weight$", "input_layernorm.weight"),
        (r"mlp\.linear_fc1\.layer_norm_weight$", "pre_mlp_layernorm.weight"),
        (r"experts\.(linear_fc\d)\.weight(\d+)$", r"experts.local_experts.\2.\1.weight"),
        (r"linear_qkv_down_proj\.(q|kv)_weight$", r"linear_\1_down_proj.weight"),
    )
]
_LOCAL_EXPERT = re.compile(r"(?<=\.local_experts\.)(\d+)")
_LOCAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)(?=\.)")


def named_tensors(
    chunks: Sequence[nn.Module], tower: nn.Module, first_expert: int = 0
) -> dict[str, Tensor]:
    """Return this rank's parameters and kept buffers by their names in the whole model.

    Args:
        chunks: model chunks of the language model (GPTModel).
        tower: vision encoder and projector (VisionTower).
        first_expert: number in the whole model of this rank's first expert.
    """
    named = {f"vision.{name}": tensor for name, tensor in _kept_tensors(tower)}
    for chunk in chunks:
        for name, tensor in _kept_tensors(chunk):
            named[f"language.{_name_in_whole_model(name, chunk, first_expert)}"] = tensor
    return named


def _kept_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every parameter and every buffer that a checkpoint keeps."""
    yield from module.named_parameters()
    kept = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in kept:
            yield name, buffer


def _name_in_whole_model(name: str, chunk: nn.Module, first_expert: int) -> str:
    """Name of a tensor, with the numbers of layer and expert in the whole model.

    It is the same for all kernels.
    """
    for pattern, other in _OTHER_NAMES:
        name = pattern.sub(other, name)
    layers: Any = chunk.get_submodule("decoder.layers")
    name = _LOCAL_LAYER.sub(
        lambda match: f"decoder.layers.{layers[int(match[1])].layer_number - 1}", name
    )
    return _LOCAL_EXPERT.sub(lambda match: str(int(match[1]) + first_expert), name)
