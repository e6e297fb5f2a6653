"""Matrix products as torch computes them: the whole of a product that is known to be symmetric."""

import torch
from torch import Tensor


def dense(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, out: Tensor | None = None
) -> Tensor:
    """The whole product."""
    if c is not None:
        return torch.baddbmm(c, a, b.mT, beta=beta, alpha=alpha, out=out)
    product = torch.bmm(a, b.mT, out=out)
    return product if alpha == 1 else torch.mul(product, alpha, out=out)
