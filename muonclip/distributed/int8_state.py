"""Int8 momentum as a tensor of optimizer state: a tensor, a DTensor or a ``ShardedState``."""

from collections.abc import Iterator

import torch
from torch import Tensor

from muonclip.distributed.sharded_state import ShardedState
from muonclip.distributed.sharding import local_tensor
from muonclip.matrix_layouts import MatrixLayout
from muonclip.quantization import dequantize, quantize_


def new_scale(codes: Tensor, layout: MatrixLayout) -> Tensor:
    """Scales of zero for a tensor of codes, which decode to zeros.

    A row is a range of the last dimension of what this rank stores of the parameter: a shard
    of columns has separate scales, so that no rank needs those of another. Of a convolution kernel
    that ``layout`` flattens, it is all dimensions but the first.

    Args:
        codes: a tensor, a DTensor, or a ``ShardedState`` of whole rows.

    Returns:
        For a ``ShardedState`` another one, otherwise a plain tensor on the device of ``codes``.
    """
    kept = 1 if layout.flatten else codes.ndim - 1
    if isinstance(codes, ShardedState):
        return codes.state_layout.first_of(kept).zeros(torch.float32, codes.device)
    local = local_tensor(codes)
    shape = (*local.shape[:kept], *(1 for _ in local.shape[kept:]))
    return torch.zeros(shape, dtype=torch.float32, device=local.device)


def encode_(codes: Tensor, scale: Tensor, values: Tensor) -> None:
    """Encode a tensor of state, placed on ranks as ``codes`` is."""
    for ours, scales, given in zip(*map(_pieces, (codes, scale, values)), strict=True):
        quantize_(ours, scales, given.to(torch.promote_types(given.dtype, torch.float32)))


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values of a tensor of state, placed on ranks as ``codes`` is."""
    values = torch.empty_like(codes, dtype=torch.float32)
    for target, ours, scales in zip(*map(_pieces, (values, codes, scale)), strict=True):
        target.copy_(dequantize(ours, scales))
    return values


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The parts of a tensor of state on this rank, in the tensor's dimensions."""
    if isinstance(tensor, ShardedState):
        yield from (values for _, values in tensor.pieces())
    else:
        yield local_tensor(tensor)
