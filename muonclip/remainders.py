"""Float32 master weights as a bfloat16 weight and a remainder of 16 bits, without loss.

The weight is the master rounded to nearest, and the remainder the difference of their bits, a
signed 16-bit integer. Ties round away from zero: with ties to even, weights with an even last bit
would be the nearest of 65,537 float32 numbers, one more than remainders can tell apart.

A weight that other code writes keeps its remainder, so that the master is within half a unit in the
last place of what was written. Not every remainder is possible for zeros and infinities: with any
other, the master is what was written.
"""

import torch
from torch import Tensor


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of a bfloat16 weight and its int16 remainder, a new tensor."""
    bits = weight.view(torch.int16).to(torch.int32).mul_(2**16)
    master = bits.add_(remainder.to(weight.device)).view(torch.float32)
    # The remainder of another number takes the bits of a zero or an infinity to those of NaN.
    return torch.where(master.isnan(), weight, master)


def split_(master: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Write a float32 master into a bfloat16 weight and an int16 remainder.

    ``join`` restores its bits, except those of NaN: there is only one.
    """
    bits = torch.where(master.isnan(), torch.nan, master).view(torch.int32)
    weight.view(torch.int16).copy_((bits + 2**15) >> 16)
    remainder.copy_((bits & (2**16 - 1)).bitwise_xor_(2**15).sub_(2**15))


def adopt(master: Tensor, weight: Tensor) -> Tensor:
    """A float32 master, replaced by the weight where that is not the nearest bfloat16 number.

    There the weight was written since. Of a tie, both neighbours are nearest.
    """
    bits = weight.view(torch.int16)
    rounded, remainder = torch.empty_like(weight), torch.empty_like(bits)
    split_(master, rounded, remainder)
    is_nearest = rounded.view(torch.int16) == bits
    is_nearest |= master.bfloat16().view(torch.int16) == bits
    return torch.where(is_nearest, master, weight.float())
