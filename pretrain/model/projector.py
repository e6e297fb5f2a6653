"""From the vision encoder's features to the language model's embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import VisionConfig
from pretrain.model.geometry import MERGE
from pretrain.model.vision import VisionEncoder


class Projector(nn.Module):
    """LayerNorm of each patch, then an MLP over the 2x2 patches of a feature."""

    def __init__(self, vision_hidden_size: int, language_hidden_size: int) -> None:
        super().__init__()
        merged = MERGE * MERGE * vision_hidden_size
        self.norm = nn.LayerNorm(vision_hidden_size)
        self.fc1 = nn.Linear(merged, merged)
        self.fc2 = nn.Linear(merged, language_hidden_size)

    def forward(self, merged: Tensor) -> Tensor:
        """[N, 4 * vision hidden] to [N, language hidden]."""
        # The width is written out: it cannot be inferred where there are no rows.
        patches = torch.unflatten(merged, -1, (MERGE * MERGE, merged.shape[-1] // MERGE**2))
        projected: Tensor = self.fc2(F.gelu(self.fc1(self.norm(patches).flatten(1))))
        return projected


class VisionTower(nn.Module):
    """All that an image passes through before the language model sees it."""

    def __init__(self, config: VisionConfig, language_hidden_size: int) -> None:
        super().__init__()
        self.encoder = VisionEncoder(config)
        self.projector = Projector(config.hidden_size, language_hidden_size)

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        """Patches [P, 3 * patch * patch] uint8 and grids [n, 3] to features [N, hidden].

        No items give no features, which have a graph all the same: whoever goes backward need not
        know. See :meth:`pretrain.model.vision.VisionEncoder.forward`.
        """
        features: Tensor = self.projector(self.encoder(patches, grids))
        return features
