"""Initial weights, the same on any number of ranks."""

import hashlib
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from pretrain.config import Config
from pretrain.model.weights import Weight
from pretrain.runtime.machine import cores_per_process

# Layers that write into the residual stream: drawn smaller, as in GPT-2, so that its variance does
# not grow with depth.
_RESIDUAL_OUTPUTS = (".linear_proj.weight", ".linear_fc2.weight", ".o_proj.weight", ".fc2.weight")
# Tensors drawn at a time; a generator uses one core.
_MAX_THREADS = 8


def initialize(
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, Weight],
    config: Config,
    tensor_rank: int,
) -> None:
    """Fill tensors, given by their names in the whole model, with their initial values.

    Matrices and tables are drawn from a normal distribution with standard deviation
    ``language.init_std``, divided by sqrt(2 * ``language.num_layers``) for layers that write into
    the residual stream. Gains of norms are one, biases and buffers zero. Every tensor has a
    generator that is seeded by ``seed`` and its name, and is drawn whole: its values do not depend
    on the ranks that it is split over.

    Args:
        weights: entry of each tensor in the catalogue.
    """
    with ThreadPoolExecutor(min(_MAX_THREADS, cores_per_process())) as pool:
        draw = partial(_draw, weights=weights, config=config, tensor_rank=tensor_rank)
        for _ in pool.map(draw, tensors.keys(), tensors.values()):
            pass


@torch.no_grad()  # of this thread
def _draw(
    name: str,
    tensor: Tensor,
    *,
    weights: Mapping[str, Weight],
    config: Config,
    tensor_rank: int,
) -> None:
    """Fill a tensor as described above."""
    if tensor.ndim < 2:
        tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        return
    digest = hashlib.sha256(f"{config.seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    std = config.language.init_std
    if name.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * config.language.num_layers)
    whole = torch.empty(weights[name].shape).normal_(0.0, std, generator=generator)
    blocks = weights[name].blocks(config.parallel, tensor_rank)
    tensor.copy_(torch.cat([whole[block.slices] for block in blocks]))
