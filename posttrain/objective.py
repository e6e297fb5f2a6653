r"""The objective of Kimi K2.5's reinforcement learning (arXiv 2602.02276, section 4.4.2, eq. 1).

For K responses :math:`y_j` to a prompt, drawn from the policy :math:`\pi_{old}`, maximize

.. math::
    \frac 1 N \sum_j \sum_i \mathrm{Clip}(\rho_{ji}, \alpha, \beta) \, (r_j - \bar r)
    - \tau \, (\log \rho_{ji})^2, \qquad \rho_{ji} = \frac{\pi_\theta}{\pi_{old}},

over the N tokens of all responses of a batch. ``Clip`` is a mask of the gradient: a token whose
ratio is outside [alpha, beta] gives no policy gradient, whatever the sign of its advantage.
Advantages are not divided by their standard deviation, and there is no reference model. The values
of alpha, beta and τ are not published.
"""

import torch
from torch import Tensor


def advantages(rewards: Tensor) -> Tensor:
    """Rewards minus the mean of their group.

    Args:
        rewards: [prompts, K].

    Returns:
        [prompts, K].
    """
    return rewards - rewards.mean(1, keepdim=True)


def token_objective(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    *,
    ratio_low: float,
    ratio_high: float,
    log_ratio_penalty: float,
) -> Tensor:
    """The terms of the objective, one for each token; its maximization needs their gradient.

    Args:
        logprobs: [responses, tokens], log-probabilities of the tokens under the trained policy.
        rollout_logprobs: [responses, tokens], under the policy that generated them; constant.
        advantages: [responses].
        ratio_low, ratio_high: alpha and beta, with 0 < alpha < 1 < beta.
        log_ratio_penalty: τ ≥ 0.

    Returns:
        [responses, tokens].

    Raises:
        ValueError: alpha, beta or τ is out of range.
    """
    if not 0 < ratio_low < 1 < ratio_high:
        raise ValueError(f"needs 0 < ratio_low < 1 < ratio_high, not {ratio_low}, {ratio_high}")
    if not log_ratio_penalty >= 0:
        raise ValueError(f"log_ratio_penalty must be >= 0, not {log_ratio_penalty}")
    log_ratio = logprobs - rollout_logprobs
    constant = log_ratio.detach().exp()
    in_range = (constant >= ratio_low) & (constant <= ratio_high)
    # Masked before the exponential: the derivative of an infinite ratio, times zero, would be NaN.
    ratio = torch.where(in_range, log_ratio, 0.0).exp()
    clipped = torch.where(in_range, ratio, constant.clamp(ratio_low, ratio_high))
    policy = clipped * advantages[:, None]
    return policy - log_ratio_penalty * log_ratio.square()


def mean_over_tokens(terms: Tensor, mask: Tensor, tokens: Tensor | None = None) -> Tensor:
    """The mean of the terms of all tokens of a batch, which weights long responses more.

    Args:
        terms: [responses, tokens].
        mask: [responses, tokens], 1 for tokens of the policy, 0 for padding and observations.
        tokens: N, of the whole batch, where these responses are a part of it; default: those in
            ``mask``.

    Returns:
        A scalar; 0 without any token.
    """
    kept = terms.masked_fill(mask == 0, 0.0)
    return kept.sum() / (mask.sum() if tokens is None else tokens).clamp(min=1)


def share_out_of_range(
    logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, ratio_low: float, ratio_high: float
) -> Tensor:
    """Share of the tokens that give no policy gradient, a scalar."""
    ratio = (logprobs - rollout_logprobs).detach().exp()
    outside = ((ratio < ratio_low) | (ratio > ratio_high)).to(logprobs.dtype)
    return mean_over_tokens(outside, mask)
