"""A parameter's name in the whole model, whichever rank holds it; and its first value."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.model.weights import TensorShard

_LOCAL_EXPERT = re.compile(r"(?<=\.local_experts\.)(\d+)")
_LOCAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)(?=\.)")
# What writes into the residual stream is drawn smaller, so that depth does not add up (GPT-2).
_RESIDUAL_OUTPUTS = (".linear_proj.weight", ".linear_fc2.weight", ".o_proj.weight", ".fc2.weight")


def language_names(chunk: nn.Module, first_expert: int) -> Callable[[str], str]:
    """How names in a run of layers become names in the whole language model.

    Args:
        chunk: a GPTModel, or the part of one that a pipeline stage has.
        first_expert: the index, in the whole model, of this rank's first expert.
    """
    decoder: Any = chunk.get_submodule("decoder")
    numbers = [layer.layer_number - 1 for layer in decoder.layers]

    def rename(name: str) -> str:
        name = _LOCAL_LAYER.sub(lambda match: f"decoder.layers.{numbers[int(match[1])]}", name)
        return _LOCAL_EXPERT.sub(lambda match: str(int(match[1]) + first_expert), name)

    return rename


def kept_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and every buffer that a checkpoint keeps."""
    yield from module.named_parameters()
    kept = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in kept:
            yield name, buffer


@torch.no_grad()
def initialize(
    tensors: Mapping[str, Tensor],
    shards: Mapping[str, TensorShard],
    seed: int,
    std: float,
    num_layers: int,
) -> None:
    """Give every named tensor its first value.

    Each is drawn from a generator of its own, seeded by the run's seed and its name, and is thus
    the same however the model is spread over ranks. Matrices and tables are normal with ``std``
    (over sqrt(2 * num_layers) for what writes into the residual stream), norm gains one,
    biases and buffers zero.
    """
    for name, parameter in tensors.items():
        if parameter.ndim < 2:
            norm_gain = name.endswith("weight")
            parameter.fill_(1.0 if norm_gain else 0.0)
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        scale = std / math.sqrt(2 * num_layers) if name.endswith(_RESIDUAL_OUTPUTS) else std
        shard = shards.get(name)
        shape = parameter.shape if shard is None else shard.whole_shape(parameter.shape)
        value = torch.empty(shape).normal_(0.0, scale, generator=generator)
        parameter.copy_(value if shard is None else shard.local(value))
