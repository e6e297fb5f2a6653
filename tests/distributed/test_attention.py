"""The trainer's attention computes what the dense form computes, in every layout: losses, gradients
and max logits, for documents of any lengths."""

import dataclasses
import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import batches, step
from pretrain.build import build
from pretrain.checkpoint.run import local_shard
from pretrain.checkpoint.storage import LocalShard
from pretrain.model import attention
from pretrain.model.multimodal import MicroBatch
from pretrain.startup import set_up
from tests.distributed import training
from tests.distributed.launch import launch
from tests.distributed.test_context_parallel import YARN
from tests.distributed.test_training import EXACT_FOUR, _merged

# Mean lengths of documents; 0: every sequence is one document.
MEAN_LENGTHS = (0, 1, 4, 40)
VARIANTS: list[tuple[str, ...]] = [
    (),
    (*YARN, "recompute.granularity=full"),
    (*YARN, "recompute.granularity=selective"),
]
LAYOUTS = [
    (1, ()),
    (2, ("tensor=2",)),
    (2, ("pipeline=2",)),
    (2, ("expert=2",)),
    (2, ("context=2",)),
    (2, ("context=2", "expert=2")),
    (4, ("context=2", "tensor=2")),
]
# The loss sums, this rank's gradients, and its max logits by layer and first head.
Outcome = tuple[Tensor, dict[str, LocalShard], dict[tuple[int, int], Tensor]]


def with_documents(batch: MicroBatch, mean: int) -> MicroBatch:
    """Documents of random lengths that depend on a sequence's tokens only, not on the layout."""
    rows = []
    for tokens in batch.tokens:
        generator, starts = random.Random(int(tokens.sum())), torch.zeros_like(tokens)
        if mean:
            lengths = [generator.randint(1, 2 * mean - 1) for _ in tokens]
            starts[[end for end in accumulate(lengths) if end < len(tokens)]] = 1
        rows.append(starts.cumsum(0))
    return dataclasses.replace(batch, documents=torch.stack(rows).int())


def outcomes_of_each(folder: str, dense: bool, *overrides: str) -> list[Outcome]:
    """The outcomes of a step with each of VARIANTS and MEAN_LENGTHS."""
    if dense:
        attention.attend = attention.attend_dense  # type: ignore[assignment]
    context, data = set_up(training.tiny(folder, *overrides))
    outcomes = []
    for variant in VARIANTS:
        settings = training.tiny(folder, *overrides, *variant)
        run = build(settings, context, data)
        micro_batches = batches.for_step(settings, context, data, 1)
        for mean in MEAN_LENGTHS:
            max_logits: dict[tuple[int, int], Tensor] = {}
            observe(run.language, context.tensor_rank, max_logits)
            sums = step.forward_backward(run, [with_documents(b, mean) for b in micro_batches])
            gradients = {
                name: local_shard(run, name, p.grad.clone())
                for name, p in run.parameters()
                if p.grad is not None
            }
            outcomes.append((sums, gradients, max_logits))
            run.optimizer.zero_grad(set_to_none=True)
    return outcomes


def observe(
    chunks: Sequence[Any], tensor_rank: int, max_logits: dict[tuple[int, int], Tensor]
) -> None:
    """Collect the largest logits of all micro-batches in ``max_logits``."""

    def observer(layer: Any) -> Any:
        heads = layer.num_attention_heads_per_partition
        key = layer.layer_number, tensor_rank * heads

        def update(observed: Tensor) -> None:
            assert observed.dtype == torch.float64
            max_logits[key] = torch.maximum(max_logits.get(key, observed), observed)

        return update

    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "core_attention"):
                module.core_attention.observer = observer(module)


def merged_max_logits(ranks: Sequence[dict[tuple[int, int], Tensor]]) -> dict[int, Tensor]:
    """Max logits of all heads of each layer."""
    parts: dict[tuple[int, int], Tensor] = {}
    for rank in ranks:
        for key, observed in rank.items():
            parts[key] = torch.maximum(parts.get(key, observed), observed)
    layers: dict[int, list[Tensor]] = {}
    for (layer, _), observed in sorted(parts.items()):
        layers.setdefault(layer, []).append(observed)
    return {layer: torch.cat(heads) for layer, heads in layers.items()}


@pytest.fixture(scope="module")
def dense(folder: Path) -> list[Outcome]:
    (outcomes,) = launch(outcomes_of_each, 1, str(folder), True, *EXACT_FOUR)
    return list(outcomes)


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS)
def test_attention_equals_the_dense_form_in_every_layout(
    folder: Path, dense: list[Outcome], world_size: int, layout: tuple[str, ...]
) -> None:
    overrides = (*(f"parallel.{size}" for size in layout), *EXACT_FOUR)
    ranks = launch(outcomes_of_each, world_size, str(folder), False, *overrides)
    for (sums, gradients, max_logits), outcomes in zip(
        dense, zip(*ranks, strict=True), strict=True
    ):
        expected = _merged([gradients])
        found = _merged([outcome[1] for outcome in outcomes])
        for outcome in outcomes:
            torch.testing.assert_close(outcome[0], sums, rtol=1e-10, atol=1e-10)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            # Documents of one token give queries no gradient.
            assert (found[name] - gradient).norm() <= 1e-10 * gradient.norm() + 1e-15, name
        largest = merged_max_logits([outcome[2] for outcome in outcomes])
        expected_largest = merged_max_logits([max_logits])
        assert len(expected_largest) == 4 and largest.keys() == expected_largest.keys()
        for layer, heads in expected_largest.items():
            assert len(heads) == 2
            torch.testing.assert_close(largest[layer], heads, rtol=0, atol=1e-10)
