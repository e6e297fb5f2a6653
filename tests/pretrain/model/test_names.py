"""A tensor has one name in the whole model, whichever rank and chunk it is on."""

import torch
from torch import nn

from pretrain.model.names import named_tensors


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number = number
        self.local_experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def chunk(*layer_numbers: int) -> nn.Module:
    decoder = nn.Module()
    decoder.layers = nn.ModuleList(Layer(number) for number in layer_numbers)
    return nn.ModuleDict({"decoder": decoder})


def test_layers_and_experts_have_their_numbers_in_the_whole_model() -> None:
    tower = nn.Linear(3, 3)
    chunks = [chunk(2, 3), chunk(6)]
    named = named_tensors(chunks, tower, first_expert=4)
    assert named["language.decoder.layers.1.local_experts.4.weight"] is next(chunks[0].parameters())
    layers = {int(name.split(".")[3]) for name in named if name.startswith("language.")}
    experts = {int(name.split(".")[5]) for name in named if ".local_experts." in name}
    assert (layers, experts) == ({1, 2, 5}, {4, 5})
    assert named["vision.weight"] is tower.weight


def test_buffers_are_listed_if_checkpoints_keep_them() -> None:
    named = named_tensors([chunk(1)], nn.Linear(3, 3))
    assert "language.decoder.layers.0.kept" in named
    assert not any("scratch" in name for name in named)
