"""A parameter's name in the whole model, whichever rank holds it; and its first value."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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


class Cut(NamedTuple):
    """How tensor parallelism cuts a parameter: along ``dim``, this rank's part of ``size``.

    With ``gated``, the rows are those of gate and of up, and each rank has a part of either.
    """

    dim: int
    rank: int
    size: int
    gated: bool

    def part(self, whole: Tensor) -> Tensor:
        """What this rank holds of a whole parameter."""
        halves = whole.chunk(2, self.dim) if self.gated else [whole]
        return torch.cat([half.chunk(self.size, self.dim)[self.rank] for half in halves], self.dim)

    def whole(self, shape: Sequence[int]) -> list[int]:
        """The whole parameter's shape, from the part's."""
        full = list(shape)
        full[self.dim] *= self.size
        return full

    def pieces(self, part: Tensor) -> list[tuple[list[int], Tensor]]:
        """Where in the whole parameter this rank's part lies: (offsets there, view of the part).

        One block, or with ``gated`` one of gate and one of up.
        """
        views = part.chunk(2, self.dim) if self.gated else (part,)
        found = []
        for number, view in enumerate(views):
            offsets = [0] * part.ndim
            offsets[self.dim] = (number * self.size + self.rank) * view.shape[self.dim]
            found.append((offsets, view))
        return found


@torch.no_grad()
def initialize(
    tensors: Mapping[str, Tensor],
    cuts: Mapping[str, Cut],
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
        cut = cuts.get(name)
        shape = parameter.shape if cut is None else cut.whole(parameter.shape)
        value = torch.empty(shape).normal_(0.0, scale, generator=generator)
        parameter.copy_(value if cut is None else cut.part(value))
