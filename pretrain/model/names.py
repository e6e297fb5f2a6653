"""A parameter's name in the whole model, whichever rank holds it; and its first value."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

_LOCAL_EXPERT = re.compile(r"(?<=\.local_experts\.)(\d+)")
# What writes into the residual stream is drawn smaller, so that depth does not add up (GPT-2).
_RESIDUAL_OUTPUTS = (".linear_proj.weight", ".linear_fc2.weight", ".o_proj.weight", ".fc2.weight")


def global_names(model: nn.Module, first_expert: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for every parameter and every buffer that a checkpoint keeps.

    Args:
        model: this rank's part of the model.
        first_expert: the index, in the whole model, of this rank's first expert.
    """

    def rename(name: str) -> str:
        return _LOCAL_EXPERT.sub(lambda match: str(int(match[1]) + first_expert), name)

    for name, parameter in model.named_parameters():
        yield rename(name), parameter
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in kept:
            yield rename(name), buffer


@torch.no_grad()
def initialize(tensors: Mapping[str, Tensor], seed: int, std: float, num_layers: int) -> None:
    """Give every tensor of :func:`global_names` its first value.

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
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, scale, generator=generator))
