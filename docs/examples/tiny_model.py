"""Model and data of the examples: small enough for a laptop, without downloads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Model(nn.Module):
    """A causal transformer of torch layers that returns the loss of next-token prediction."""

    def __init__(self, vocabulary: int = 64, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        mask = nn.Transformer.generate_square_subsequent_mask(inputs.size(1), device=tokens.device)
        logits = self.head(self.body(self.embed(inputs), mask=mask, is_causal=True))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def batch(step: int, rank: int = 0, size: int = 1) -> Tensor:
    """This rank's rows of a batch of 8 sequences, which count up from random starts."""
    starts = torch.randint(64, (8, 1), generator=torch.Generator().manual_seed(step))
    return ((starts + torch.arange(17)) % 64).chunk(size)[rank]
