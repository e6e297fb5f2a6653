"""Newton-Schulz orthogonalization: pure functions from tensors to tensors."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Triple: TypeAlias = tuple[float, float, float]
CoefficientName = Literal["quintic"]
Coefficients: TypeAlias = CoefficientName | Sequence[float]
AdjustLR = Literal["match_rms_adamw", "original"]

# One (a, b, c) per step, each step mapping a singular value s to a*s + b*s**3 + c*s**5.
# Where there are more steps than triples, the last one repeats.
COEFFICIENTS: Mapping[CoefficientName, tuple[Triple, ...]] = MappingProxyType(
    {
        # Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024):
        # steepest at zero; five steps take s in [1e-3, 1] to between 0.47 and 1.20.
        "quintic": ((3.4445, -4.7750, 2.0315),),
    }
)

# float16 is left out: a gradient's Frobenius norm overflows it.
NS_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def coefficient_steps(coefficients: Coefficients, steps: int) -> list[Triple]:
    """The (a, b, c) of each Newton-Schulz step.

    Args:
        coefficients: a name in ``COEFFICIENTS``, or one triple of numbers used in every step.
        steps: how many steps; at least 1.

    Raises:
        ValueError: for an unknown name, a sequence that is not three finite numbers, or
            ``steps`` below 1.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(
                f"coefficients must be one of {tuple(COEFFICIENTS)} or three numbers, "
                f"got {coefficients!r}"
            )
        table = COEFFICIENTS[coefficients]
    else:
        if len(coefficients) != 3 or not all(math.isfinite(value) for value in coefficients):
            raise ValueError(f"coefficients must be three finite numbers, got {coefficients!r}")
        a, b, c = coefficients
        table = ((a, b, c),)
    return [table[min(step, len(table) - 1)] for step in range(steps)]


def orthogonalize(
    matrices: Tensor,
    *,
    coefficients: Coefficients = "quintic",
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Replace the singular values of each matrix by values near one, keeping its singular vectors.

    Newton-Schulz iteration on the Frobenius-normalised matrix, in the order of operations of
    ``torch.optim.Muon``, so that results agree to the rounding of ``dtype``. A zero matrix stays
    zero. Source: Muon (Keller Jordan, 2024); Moonlight, arXiv 2502.16982, section 2.1.

    Args:
        matrices: [..., n, m], any floating dtype; each [n, m] slice is a matrix of its own. Not
            changed.
        coefficients: see ``coefficient_steps``.
        steps: number of iterations.
        eps: least Frobenius norm to divide by.
        dtype: of the arithmetic and the result: bfloat16, float32 or float64.

    Returns:
        [..., n, m] in ``dtype``.

    Raises:
        ValueError: if ``matrices`` has fewer than two dimensions or is complex, or an option is
            out of range.
    """
    if matrices.ndim < 2 or not matrices.is_floating_point():
        raise ValueError(
            "matrices must be a real floating-point tensor [..., n, m], "
            f"got {matrices.dtype} of shape {tuple(matrices.shape)}"
        )
    if dtype not in NS_DTYPES:
        raise ValueError(f"dtype must be one of {NS_DTYPES}, got {dtype}")
    schedule = coefficient_steps(coefficients, steps)

    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:  # the Gram matrix below is then the smaller of the two
        x = x.mT
    # The Frobenius norm is at least the spectral norm: singular values start in [0, 1].
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    batch: Tensor = x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
    for a, b, c in schedule:
        gram = batch @ batch.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        batch = torch.baddbmm(batch, polynomial, batch, beta=a)
    return (batch.mT if tall else batch).reshape(matrices.shape)


def update_scale(shape: Sequence[int], mode: AdjustLR = "match_rms_adamw") -> float:
    """The factor on an orthogonalized update of a matrix of this shape.

    Args:
        shape: [..., n, m]; only the last two count, so stacked experts scale as one expert does.
        mode: ``"match_rms_adamw"``, 0.2·√max(n, m): the update's root mean square is then that of
            AdamW's, whose learning rate and weight decay carry over (Moonlight, arXiv 2502.16982,
            section 2.2). ``"original"``, √max(1, n/m) (Keller Jordan, 2024).

    Raises:
        ValueError: if ``mode`` is neither.
    """
    n, m = shape[-2:]
    if mode == "match_rms_adamw":
        return 0.2 * math.sqrt(max(n, m))
    if mode == "original":
        return math.sqrt(max(1, n / m))
    raise ValueError(f"mode must be one of {get_args(AdjustLR)}, got {mode!r}")
