"""A weight has one name and one first value, on whichever rank it lives."""

import torch
from torch import nn

from pretrain.model.names import global_names, initialize


class Experts(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.local_experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(count))
        self.norm = nn.LayerNorm(3)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def model(experts: int) -> nn.Module:
    return nn.ModuleDict({"mlp": Experts(experts)})


def test_experts_are_numbered_through_the_ranks() -> None:
    names = dict(global_names(model(2), first_expert=4))
    assert "mlp.local_experts.5.weight" in names
    assert "mlp.local_experts.0.weight" not in names
    assert "mlp.kept" in names
    assert "mlp.scratch" not in names


def test_two_ranks_draw_what_one_would() -> None:
    whole = dict(global_names(model(4), 0))
    parts = dict(global_names(model(2), 0)) | dict(global_names(model(2), 2))
    for tensors in (whole, parts):
        initialize(tensors, seed=1, std=0.02, num_layers=2)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_values_are_of_their_kind_and_the_seed() -> None:
    tensors = {"a.weight": torch.empty(200, 300), "b.o_proj.weight": torch.empty(200, 300)}
    tensors |= {"norm.weight": torch.empty(7), "a.bias": torch.empty(7), "kept": torch.ones(3)}
    initialize(tensors, seed=1, std=0.02, num_layers=8)
    assert abs(tensors["a.weight"].std().item() / 0.02 - 1) < 0.02
    assert abs(tensors["b.o_proj.weight"].std().item() / (0.02 / 4) - 1) < 0.02
    assert tensors["norm.weight"].tolist() == [1] * 7
    assert tensors["a.bias"].tolist() == [0] * 7
    assert tensors["kept"].tolist() == [0] * 3
    first = tensors["a.weight"].clone()
    initialize(tensors, seed=2, std=0.02, num_layers=8)
    assert not torch.equal(first, tensors["a.weight"])
