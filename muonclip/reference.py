"""A slow reference in float64 that follows the definitions, for one matrix at a time.

Tests compare the optimizer with it. Only the coefficient tables are shared.
"""

import math

import torch
from torch import Tensor

from muonclip.orthogonalize import Coefficients, coefficient_steps


def orthogonalize(
    matrix: Tensor, *, coefficients: Coefficients = "quintic", steps: int = 5
) -> Tensor:
    """Newton-Schulz as a polynomial of the singular values, by an SVD.

    Args:
        matrix: [n, m].
        coefficients, steps: as for ``muonclip.orthogonalize``.

    Returns:
        float64 [n, m].
    """
    matrix = matrix.double()
    if matrix.any():
        matrix = matrix / matrix.abs().max()  # so that squares are in range
        matrix = matrix / matrix.norm()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    for a, b, c in coefficient_steps(coefficients, steps):
        values = a * values + b * values**3 + c * values**5
    result: Tensor = left @ values.diag() @ right
    return result


def muon_step(
    weight: Tensor,
    gradient: Tensor,
    buffer: Tensor,
    *,
    lr: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    coefficients: Coefficients = "quintic",
    steps: int = 5,
    rms: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """One update of a matrix as the Kimi K2 report writes it (arXiv 2507.20534, algorithm 1).

    Args:
        weight, gradient: [n, m].
        buffer: [n, m], the sum M of the algorithm; initially zero.
        lr, weight_decay, momentum, nesterov, coefficients, steps: as for ``MuonClip``.
        rms: its ``update_rms``.

    Returns:
        The new weight and the new buffer, float64.
    """
    gradient = gradient.double()
    buffer = momentum * buffer.double() + gradient
    update = momentum * buffer + gradient if nesterov else buffer
    direction = orthogonalize(update, coefficients=coefficients, steps=steps)
    scaled = direction * rms * math.sqrt(max(weight.shape))
    weight = weight.double()
    return weight - lr * (scaled + weight_decay * weight), buffer


def normuon_step(update: Tensor, average: Tensor, *, beta2: float = 0.95) -> tuple[Tensor, Tensor]:
    """NorMuon's second moment and normalization (arXiv 2510.05491, algorithm 1, lines 7 to 9).

    Args:
        update: [n, m], orthogonalized.
        average: [n], of the mean squares of its rows; initially zero.
        beta2: its decay rate.

    Returns:
        The update with rows divided by the root of the average, of the Frobenius norm that it had,
        and the new average; float64.
    """
    update, average = update.double(), average.double()
    average = beta2 * average + (1 - beta2) * update.square().mean(dim=1)
    normalized = update / (average.sqrt() + 1e-8).unsqueeze(1)
    if normalized.any():
        normalized = normalized * (update.norm() / normalized.norm())
    return normalized, average


def clip_factor(products: Tensor, bias: Tensor, threshold: float) -> float:
    """The largest factor on a head's scaled products that brings its logits to the threshold.

    Logits are S = q·k · scale + b. An entry with S above the threshold and b below it requires
    (threshold - b) / (S - b); the factor is the least of these and 1. Entries whose bias alone
    reaches the threshold require nothing: no factor on q·k brings them below it.

    Args:
        products: q·k · scale of all entries that enter the softmax, any shape.
        bias: added to the products; the same shape.
        threshold: above 0.
    """
    pairs = zip(products.double().flatten().tolist(), bias.double().flatten().tolist(), strict=True)
    asked: list[float] = [(threshold - b) / p for p, b in pairs if b < threshold < p + b]
    return min([1.0, *asked])
