"""The vision tower: encoder and projector, from pixels to the language model's embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import VisionConfig
from pretrain.model.geometry import PATCHES_PER_TOKEN
from pretrain.model.vision import VisionEncoder


class Projector(nn.Module):
    """LayerNorm of each patch, then an MLP over the 2 x 2 patches of a feature (Kimi-VL)."""

    def __init__(self, vision_hidden_size: int, language_hidden_size: int) -> None:
        super().__init__()
        merged = PATCHES_PER_TOKEN * vision_hidden_size
        self.norm = nn.LayerNorm(vision_hidden_size)
        self.fc1 = nn.Linear(merged, merged)
        self.fc2 = nn.Linear(merged, language_hidden_size)

    def forward(self, merged: Tensor) -> Tensor:
        """[N, 4 * vision hidden] to [N, language hidden]."""
        # torch cannot infer the width if N is 0.
        width = merged.shape[-1] // PATCHES_PER_TOKEN
        patches = torch.unflatten(merged, -1, (PATCHES_PER_TOKEN, width))
        projected: Tensor = self.fc2(F.gelu(self.fc1(self.norm(patches).flatten(1))))
        return projected


class VisionTower(nn.Module):
    """Vision encoder and projector."""

    def __init__(self, config: VisionConfig, language_hidden_size: int) -> None:
        super().__init__()
        self.encoder = VisionEncoder(config)
        self.projector = Projector(config.hidden_size, language_hidden_size)

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        """Patches uint8 [P, 3 * patch_size²] and grids int64 [n, 3] to features [N, hidden].

        Without items, the features are empty and still have a graph, so that a backward works. See
        :meth:`pretrain.model.vision.VisionEncoder.forward`.
        """
        features: Tensor = self.projector(self.encoder(patches, grids))
        return features
