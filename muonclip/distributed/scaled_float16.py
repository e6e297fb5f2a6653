"""Messages in float16 of tensors that have the range of float32.

Elements that share a scale, those of a matrix row on one rank, are multiplied by a power of two
that brings the largest to [2^14, 2^15), and rounded. The exponent is one more element of the
message. Entries down to 2^-28 of the largest have float16's relative error, 2^-11; smaller ones,
which Newton-Schulz in float16 would lose anyway, lose bits gradually. Infinities and NaN stay what
they are. As in bfloat16, entries within 2^-12 of float32's largest round to infinity.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from muonclip.distributed.sharding import reduced_shape

# Values are multiplied by 2^(_LARGEST - exponent). Exponents are integers from 0 to 240, which
# float16 represents, so that factors and their reciprocals are normal numbers of float32. Zeros
# have exponent 0, and a message of zeros is one of zero tensors. Numbers below 2^-112 have it too:
# their scaled values still have all bits of float16, or all that denormal numbers have.
_LARGEST = 126
# The exponent bits of a float32 number, minus the exponent.
_BIAS = 127 + 14 - _LARGEST


def message_size(shape: Sequence[int], dims: tuple[int, ...]) -> int:
    """Number of elements of the message of a tensor.

    Args:
        shape: of the tensor.
        dims: dimensions along which its elements share a scale.
    """
    return prod(shape) + prod(reduced_shape(shape, dims))


def encode(
    tensors: Sequence[Tensor], dims: Sequence[tuple[int, ...]], device: torch.device
) -> Tensor:
    """The message of some tensors: for each its scaled values, then its exponents.

    Args:
        tensors: in float32.
        dims: for each, as for ``message_size``.
        device: of the tensors, of which there may be none.

    Returns:
        Flat, in float16.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors]
    sizes = map(message_size, shapes, dims)
    message = torch.empty(sum(sizes), dtype=torch.float16, device=device)
    if not tensors:
        return message
    largest = [
        torch.linalg.vector_norm(tensor, torch.inf, dim=shared, keepdim=True)
        for tensor, shared in zip(tensors, dims, strict=True)
    ]
    bits = torch.cat([x.reshape(-1) for x in largest]).view(torch.int32)
    exponents = (bits >> 23).sub_(_BIAS).clamp_(min=0)
    factors = _power_of_two(_LARGEST - exponents)
    values, scales = _values_and_scales(message, shapes, dims)
    of_scales = [scale.shape for scale in scales]
    for tensor, factor, part in zip(tensors, split_flat(factors, of_scales), values, strict=True):
        torch.mul(tensor, factor, out=part)
    torch._foreach_copy_(scales, split_flat(exponents, of_scales))
    return message


def decode_(message: Tensor, targets: Sequence[Tensor], dims: Sequence[tuple[int, ...]]) -> None:
    """Write the tensors of a message into ``targets``.

    Args:
        message: as ``encode`` returns it.
        targets: in float32; any views.
        dims: for each, as for ``message_size``.
    """
    if not targets:
        return
    values, scales = _values_and_scales(message, [target.shape for target in targets], dims)
    exponents = torch.cat([scale.view(-1) for scale in scales]).to(torch.int32)
    factors = split_flat(_power_of_two(exponents - _LARGEST), [scale.shape for scale in scales])
    for part, factor, target in zip(values, factors, targets, strict=True):
        torch.mul(part, factor, out=target)


def _values_and_scales(
    message: Tensor, shapes: Sequence[Sequence[int]], dims: Sequence[tuple[int, ...]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The parts of a message of tensors of these shapes."""
    pairs = zip(shapes, map(reduced_shape, shapes, dims), strict=True)
    parts = split_flat(message, [shape for pair in pairs for shape in pair])
    return parts[::2], parts[1::2]


def split_flat(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """A flat tensor in parts of these shapes."""
    parts = flat.split_with_sizes([prod(shape) for shape in shapes])
    return [part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]


def _power_of_two(exponents: Tensor) -> Tensor:
    """2^x in float32, of int32 exponents of normal numbers."""
    return ((exponents + 127) << 23).view(torch.float32)
