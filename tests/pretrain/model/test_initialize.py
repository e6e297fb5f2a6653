"""Initial weights depend on the seed and their names, not on ranks."""

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from pretrain.config import Config, ParallelConfig
from pretrain.model.initialize import initialize
from pretrain.model.weights import Split, Weight


def initialize_whole(tensors: Mapping[str, Tensor], seed: int = 1) -> None:
    weights = {n: Weight(n, tuple(t.shape), "", None, {}) for n, t in tensors.items()}
    initialize(tensors, weights, Config(seed=seed), tensor_rank=0)


def test_values_do_not_depend_on_the_other_tensors_of_a_rank() -> None:
    whole = {name: torch.empty(4, 3) for name in ("a", "b", "c")}
    apart = {name: torch.empty(4, 3) for name in ("c", "b")}
    for tensors in (whole, apart):
        initialize_whole(tensors)
    assert all(torch.equal(whole[name], tensor) for name, tensor in apart.items())
    assert not torch.equal(whole["a"], whole["b"])


@pytest.mark.parametrize(("dim", "stacked"), [(0, 1), (1, 1), (0, 2)])
def test_shards_have_the_values_of_the_whole_tensor(dim: int, stacked: int) -> None:
    whole = {"w": torch.empty(8, 12)}
    initialize_whole(whole)
    weights = {"w": Weight("w", (8, 12), "", None, {}, Split(dim, stacked))}
    config = Config(seed=1, parallel=ParallelConfig(tensor=2))
    parts = []
    for rank in (0, 1):
        part = {"w": torch.empty(4, 12) if dim == 0 else torch.empty(8, 6)}
        initialize(part, weights, config, rank)
        parts.append(part["w"])
    if stacked == 2:  # each rank has rows of gate, then rows of up
        parts = [torch.cat([p[:2] for p in parts]), torch.cat([p[2:] for p in parts])]
    assert torch.equal(torch.cat(parts, dim), whole["w"])


def test_values_depend_on_the_kind_of_tensor_and_the_seed() -> None:
    tensors = {"a.weight": torch.empty(200, 300), "b.o_proj.weight": torch.empty(200, 300)}
    tensors |= {"norm.weight": torch.empty(7), "a.bias": torch.empty(7), "kept": torch.ones(3)}
    language = dataclasses.replace(Config().language, init_std=0.02, num_layers=8)
    weights = {n: Weight(n, tuple(t.shape), "", None, {}) for n, t in tensors.items()}
    initialize(tensors, weights, Config(seed=1, language=language), tensor_rank=0)
    assert abs(tensors["a.weight"].std().item() / 0.02 - 1) < 0.02
    assert abs(tensors["b.o_proj.weight"].std().item() / (0.02 / 4) - 1) < 0.02
    assert tensors["norm.weight"].tolist() == [1] * 7
    assert tensors["a.bias"].tolist() == [0] * 7
    assert tensors["kept"].tolist() == [0] * 3
    first = tensors["a.weight"].clone()
    initialize_whole(tensors, seed=2)
    assert not torch.equal(first, tensors["a.weight"])
