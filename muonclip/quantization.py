"""Int8 momentum: codes of 8 bits and a float32 scale for each row.

The scale of a row is its largest magnitude over 127, so that codes are in [-127, 127]. It is
rounded up to 17 significant bits, and at least the smallest normal number, 2**-126: code times
scale is then exact in float32, so that a decoded row is encoded to the same bits, and a checkpoint
that stores decoded values loses nothing.
"""

import torch
from torch import Tensor

_LARGEST = 127
_DROPPED_BITS = 2**7 - 1  # of the 24 significant bits of a scale


def quantize_(codes: Tensor, scale: Tensor, values: Tensor) -> None:
    """Encode values, and write them over the codes and scales.

    Args:
        codes: int8.
        scale: float32; of the shape of ``codes``, with size one in dimensions that a row spans.
        values: of the shape of ``codes``, float32 or float64. A row with NaN, or a number out of
            float32's range, is decoded to NaN.
    """
    if not codes.numel():
        return
    row_dims = [dim for dim, size in enumerate(scale.shape) if size == 1]
    largest = torch.linalg.vector_norm(values, float("inf"), row_dims, keepdim=True)
    # Infinity in place of NaN, some of which have bits that rounding would take to zero.
    bits = largest.float().div_(_LARGEST).nan_to_num_(torch.inf, torch.inf).view(torch.int32)
    bits = (bits + _DROPPED_BITS).bitwise_and_(~_DROPPED_BITS)
    rounded = bits.view(torch.float32).clamp_(min=torch.finfo(torch.float32).tiny)
    scale.copy_(rounded)
    codes.copy_((values / rounded).round_())


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode values.

    Args:
        codes, scale: as ``quantize_`` wrote them.
        dtype: of the result: float32 or float64.
    """
    return codes.to(dtype).mul_(scale)
