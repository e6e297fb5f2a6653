"""The projector is a LayerNorm of each patch and an MLP over 2 x 2 patches."""

import torch
import torch.nn.functional as F

from pretrain.model.projector import Projector


def test_layernorm_of_patches_and_mlp_of_four_patches() -> None:
    torch.manual_seed(0)
    projector = Projector(6, 5).double()
    patches = torch.randn(3, 4, 6, dtype=torch.float64)
    normed = (patches - patches.mean(-1, keepdim=True)) / (
        patches.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    hidden = F.gelu(normed.flatten(1) @ projector.fc1.weight.T + projector.fc1.bias)
    expected = hidden @ projector.fc2.weight.T + projector.fc2.bias
    torch.testing.assert_close(projector(patches.flatten(1)), expected)
