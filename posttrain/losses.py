"""The loss of a language model on rows of different lengths."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

Row = tuple[Tensor, Tensor]
"""Tokens, int64 [s], and the weight of each as a label, float32 [s]."""


def weighted_loss(model: Any, rows: Sequence[Row]) -> Tensor:
    """Sum of the cross-entropies of labels by weight, in nats; each row is read alone."""
    tokens = pad_sequence([tokens for tokens, _ in rows], batch_first=True)
    weights = pad_sequence([weights for _, weights in rows], batch_first=True)
    lengths = torch.tensor([len(tokens) for tokens, _ in rows])
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    device = model.device
    logits = model(
        input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False
    ).logits
    labels = tokens[:, 1:].to(device)
    losses = cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none")
    return (losses * weights[:, 1:].to(device)).sum()
