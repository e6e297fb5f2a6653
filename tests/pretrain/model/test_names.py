"""A weight has one name and one first value, on whichever rank it lives."""

import pytest
import torch
from torch import Tensor, nn

from pretrain.model.names import initialize, kept_tensors, language_names
from pretrain.model.weights import TensorShard


class Layer(nn.Module):
    def __init__(self, number: int, experts: int) -> None:
        super().__init__()
        self.layer_number = number
        self.local_experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(experts))
        self.norm = nn.LayerNorm(3)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def stage(first_layer: int, layers: int, experts: int, first_expert: int) -> dict[str, Tensor]:
    """What a pipeline stage holds, by names in the whole model."""
    decoder = nn.Module()
    decoder.layers = nn.ModuleList(Layer(first_layer + i + 1, experts) for i in range(layers))
    chunk = nn.ModuleDict({"decoder": decoder})
    rename = language_names(chunk, first_expert)
    return {rename(name): tensor for name, tensor in kept_tensors(chunk)}


def test_layers_and_experts_are_numbered_through_the_ranks() -> None:
    names = stage(first_layer=2, layers=1, experts=2, first_expert=4)
    assert "decoder.layers.2.local_experts.5.weight" in names
    assert not any(".layers.0." in name or ".local_experts.0." in name for name in names)
    assert "decoder.layers.2.kept" in names
    assert "decoder.layers.2.scratch" not in names


def test_ranks_draw_what_one_would() -> None:
    whole = stage(0, 2, 4, 0)
    parts = {
        name: tensor
        for layer in (0, 1)
        for expert in (0, 2)
        for name, tensor in stage(layer, 1, 2, expert).items()
    }
    for tensors in (whole, parts):
        initialize(tensors, {}, seed=1, std=0.02, num_layers=2)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(("dim", "stacked"), [(0, 1), (1, 1), (0, 2)])
def test_what_tensor_parallelism_cuts_is_drawn_whole(dim: int, stacked: int) -> None:
    whole = {"w": torch.empty(8, 12)}
    initialize(whole, {}, seed=1, std=0.02, num_layers=2)
    parts = []
    for rank in (0, 1):
        part = {"w": torch.empty(4, 12) if dim == 0 else torch.empty(8, 6)}
        initialize(part, {"w": TensorShard(dim, rank, 2, stacked)}, seed=1, std=0.02, num_layers=2)
        parts.append(part["w"])
    if stacked == 2:  # each rank has rows of gate, then rows of up
        parts = [torch.cat([p[:2] for p in parts]), torch.cat([p[2:] for p in parts])]
    assert torch.equal(torch.cat(parts, dim), whole["w"])


def test_values_are_of_their_kind_and_the_seed() -> None:
    tensors = {"a.weight": torch.empty(200, 300), "b.o_proj.weight": torch.empty(200, 300)}
    tensors |= {"norm.weight": torch.empty(7), "a.bias": torch.empty(7), "kept": torch.ones(3)}
    initialize(tensors, {}, seed=1, std=0.02, num_layers=8)
    assert abs(tensors["a.weight"].std().item() / 0.02 - 1) < 0.02
    assert abs(tensors["b.o_proj.weight"].std().item() / (0.02 / 4) - 1) < 0.02
    assert tensors["norm.weight"].tolist() == [1] * 7
    assert tensors["a.bias"].tolist() == [0] * 7
    assert tensors["kept"].tolist() == [0] * 3
    first = tensors["a.weight"].clone()
    initialize(tensors, {}, seed=2, std=0.02, num_layers=8)
    assert not torch.equal(first, tensors["a.weight"])
