"""The catalogue of weights lists exactly the tensors of the models that are built."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor, nn

from muonclip import MatrixLayout
from muonclip.distributed import TensorShard
from pretrain.build import build
from pretrain.config import LanguageConfig
from pretrain.model.weights import language_weights, vision_weights
from pretrain.startup import set_up
from tests.distributed import training
from tests.distributed.launch import launch

VOCAB_SIZE = 408
# Different sizes, so that no dimension passes for another one.
SHAPE = (
    *(f"data.vocab_size={VOCAB_SIZE}", "language.num_layers=4", "language.dense_layers=2"),
    *("language.hidden_size=64", "language.ffn_hidden_size=120", "language.num_heads=4"),
    *("language.q_lora_rank=24", "language.kv_lora_rank=32", "language.qk_nope_head_dim=16"),
    *("language.v_head_dim=12", "language.num_experts=6", "language.expert_ffn_hidden_size=40"),
    *("language.shared_expert_ffn_hidden_size=56", "vision.num_layers=2"),
    *("vision.ffn_hidden_size=36", "vision.position_grid=5"),
)


class Properties(NamedTuple):
    """Properties of a rank's tensor; ``blocks``: those of the whole tensor that it consists of."""

    blocks: tuple[TensorShard, ...]
    optimizer: str | None
    layout: MatrixLayout | None
    of_expert: bool
    of_vision: bool


class Rank(NamedTuple):
    """A rank's tensors by name, its layers and its tensor-parallel rank."""

    tensors: dict[str, Properties]
    layers: list[int]
    tensor_rank: int


def build_and_describe(folder: str, *overrides: str) -> Rank:
    settings = training.tiny(folder, *overrides)
    context, data = set_up(settings)
    assert data.tokenizer.vocab_size == VOCAB_SIZE
    run = build(settings, context, data)
    algorithms = {
        parameter: group["algorithm"]
        for group in run.optimizer.param_groups
        for parameter in group["params"]
    }
    layouts = {p: group["layout"] for group in run.optimizer.param_groups for p in group["params"]}
    blocks = {p: split for chunk in run.language for p, split in megatron_blocks(chunk)}
    experts = {
        parameter
        for chunk in run.language
        for module in chunk.modules()
        if isinstance(module, SequentialMLP)
        for parameter in module.parameters()
    }
    vision = set(run.tower.parameters())
    tensors = {
        name: Properties(
            blocks.get(tensor, (TensorShard.whole(tensor.shape),)),
            algorithms.get(tensor),
            layouts.get(tensor),
            tensor in experts,
            tensor in vision,
        )
        for name, tensor in run.named_tensors.items()
    }
    assert run.weights.keys() == tensors.keys()
    layers = [layer.layer_number - 1 for chunk in run.language for layer in decoder_layers(chunk)]
    if run.language[0].get_submodule("module").pre_process:
        layers.append(-1)
    if run.language[-1].get_submodule("module").post_process:
        layers.append(settings.language.num_layers)
    return Rank(tensors, layers, context.tensor_rank)


def decoder_layers(chunk: nn.Module) -> Any:
    return chunk.get_submodule("module.decoder.layers")


def megatron_blocks(chunk: nn.Module) -> Iterator[tuple[Tensor, tuple[TensorShard, ...]]]:
    """Weights that megatron-core's layers split, and this rank's blocks of each."""
    for name, module in chunk.named_modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            dim = 0
        elif isinstance(module, RowParallelLinear):
            dim = 1
        else:
            continue
        group = module.tp_group
        if group.size() > 1 and module.weight is not None:  # None: tied to the embedding
            stacked = 2 if name.endswith("linear_fc1") else 1
            sizes = list(module.weight.shape)
            sizes[dim] //= stacked
            starts = [(n * group.size() + group.rank()) * sizes[dim] for n in range(stacked)]
            offsets = [(start, 0) if dim == 0 else (0, start) for start in starts]
            yield module.weight, tuple(TensorShard(o, tuple(sizes)) for o in offsets)


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ("language.dense_layers=0",)),
        (2, ("parallel.tensor=2",)),
        (2, ("parallel.tensor=2", "parallel.expert=2", "precision=bfloat16")),
        (2, ("parallel.pipeline=2", "parallel.interleave=2")),
        (2, ("parallel.pipeline=2", "parallel.interleave=2", "parallel.layout=[0,3,1,0]")),
        (4, ("parallel.tensor=2", "parallel.expert=2", "parallel.pipeline=2")),
        *((2, ("parallel.tensor=2", *shape)) for shape in training.SHAPES.values()),
    ],
)
def test_the_catalogue_lists_the_tensors_of_the_model(
    folder: Path, world_size: int, overrides: tuple[str, ...]
) -> None:
    """Names, shapes, splits, optimizers, fused matrices, layers, experts and copies are exact."""
    settings = training.tiny(str(folder), *SHAPE, *overrides)
    weights = {
        weight.name: weight
        for weight in (
            *language_weights(settings.language, settings.language.vocab_rows(VOCAB_SIZE)),
            *vision_weights(settings.vision, settings.language.hidden_size),
        )
    }
    ranks: list[Rank] = launch(build_and_describe, world_size, str(folder), *SHAPE, *overrides)
    copies = Counter((name, t.blocks) for rank in ranks for name, t in rank.tensors.items())
    neuron_copies = Counter(
        (name, tuple(weights[name].of_neurons.blocks(settings.parallel, rank.tensor_rank)))
        for rank in ranks
        for name in rank.tensors
    )
    for (name, _), count in neuron_copies.items():
        assert weights[name].of_neurons.copies(settings.parallel, world_size) == count, name
    sizes: Counter[str] = Counter()
    for name, blocks in copies:
        sizes[name] += sum(block.numel for block in blocks)
    assert sizes == {name: weight.numel for name, weight in weights.items()}
    for rank in ranks:
        for name, tensor in rank.tensors.items():
            weight = weights[name]
            blocks = tuple(weight.blocks(settings.parallel, rank.tensor_rank))
            assert blocks == tensor.blocks, name
            assert weight.copies(settings.parallel, world_size) == copies[name, blocks], name
            assert weight.optimizer == tensor.optimizer, name
            assert weight.layout(settings.parallel) == tensor.layout, name
            assert (weight.expert is not None) == tensor.of_expert, name
            assert (weight.layer is None) == tensor.of_vision, name
            assert weight.layer is None or weight.layer in rank.layers, name


def test_experts_can_be_selected() -> None:
    language = LanguageConfig()
    every = list(language_weights(language, VOCAB_SIZE))
    selected = list(language_weights(language, VOCAB_SIZE, experts=[5]))
    assert selected == [weight for weight in every if weight.expert in (None, 5)]
