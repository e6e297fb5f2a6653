"""Context-parallel ranks compute what one process computes, in every layout of the others."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from pretrain import batches, objective, step
from pretrain.build import build
from pretrain.checkpoint.run import local_shard
from pretrain.checkpoint.storage import LocalShard
from pretrain.startup import set_up
from tests.distributed import training
from tests.distributed.launch import launch
from tests.distributed.test_precision_and_recompute import gradients_and_observations
from tests.distributed.test_training import EXACT_FOUR, _merged

Gradients = dict[str, torch.Tensor]

COLOCATED = "encoder_process.enabled=false"
YARN = (
    "language.rope_scaling.factor=4",
    "language.rope_scaling.original_max_position_embeddings=24",
    "language.rope_scaling.mscale=2",
)
# What every layout is tried with.
GQA = training.SHAPES["normalized softmax, no shared expert"]
VARIANTS = [
    ("language.load_balancing_loss=0.1",),
    (COLOCATED, *training.SHAPES["queries without LoRA"]),
    (*YARN, "recompute.granularity=full"),
    (*GQA, "recompute.granularity=selective"),
    ("recompute.granularity=selective", "megatron.recompute_modules=[core_attn,mla_up_proj]"),
]
LAYOUTS = [
    (2, ("context=2",)),
    (2, ("context=2", "expert=2")),
    (4, ("context=4",)),
    (4, ("context=2", "tensor=2")),
    (4, ("context=2", "tensor=2", "expert=2")),
    (4, ("context=2", "pipeline=2", "interleave=2", "expert=2")),
]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Gradients]:
    """The gradients of one process with each of VARIANTS."""
    (outcomes,) = launch(training.gradients_of_each, 1, str(folder), VARIANTS, *EXACT_FOUR)
    return [_merged([gradients]) for gradients in outcomes]


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS)
def test_every_layout_has_the_gradients_of_one_process(
    folder: Path, alone: list[Gradients], world_size: int, layout: Sequence[str]
) -> None:
    settings = (*(f"parallel.{size}" for size in layout), *EXACT_FOUR)
    ranks = launch(training.gradients_of_each, world_size, str(folder), VARIANTS, *settings)
    for variant, expected, outcomes in zip(VARIANTS, alone, zip(*ranks, strict=True), strict=True):
        together = _merged(outcomes)
        assert together.keys() == expected.keys()
        for name, gradient in expected.items():
            error = (together[name] - gradient).norm()
            assert error <= 1e-10 * gradient.norm(), (variant, name)


@pytest.mark.parametrize("layout", [("context=2",), ("context=2", "tensor=2")])
def test_max_logits_and_router_biases_are_those_of_one_process(
    folder: Path, layout: Sequence[str]
) -> None:
    settings = (str(folder), [YARN], *EXACT_FOUR)
    ((alone,),) = launch(gradients_and_observations, 1, *settings)
    parallel = [f"parallel.{size}" for size in layout]
    ranks = launch(gradients_and_observations, 2 * len(layout), *settings, *parallel)
    _, expected, biases, _ = alone
    for name, logits in expected.items():
        # Ranks are ordered by tensor-parallel rank, which has some of the heads, then by share.
        local = [torch.stack(observed[name]).amax(0) for ((_, observed, _, _),) in ranks]
        heads = torch.stack(local).view(2, -1).amax(0)
        torch.testing.assert_close(heads, torch.stack(logits).amax(0), rtol=1e-10, atol=0)
    assert biases
    for ((_, _, found, _),) in ranks:
        assert found.keys() == biases.keys()
        assert all(torch.equal(found[name], bias) for name, bias in biases.items())


Ends = list[set[int]]  # positions in each sequence of a micro-batch where a document ends


def _documents() -> list[Ends]:
    """Documents of any lengths: they end at, before and after the ends of chunks, too."""
    drawn: list[Ends] = [[set(), set(range(1, 96))], [{24, 48, 72}, {23, 25, 71}]]

    @seed(0)
    @settings(max_examples=3, deadline=None, database=None, phases=[Phase.generate])
    @given(st.lists(st.sets(st.integers(1, 95), max_size=20), min_size=2, max_size=2))
    def draw(ends: Ends) -> None:
        drawn.append(ends)

    draw()
    return drawn


def losses_and_gradients(
    folder: str, every: list[Ends], *overrides: str
) -> list[tuple[float | None, dict[str, LocalShard]]]:
    """Loss and gradients of the first step, with each of several lists of documents."""
    config = training.tiny(folder, *overrides)
    here, data = set_up(config)
    run = build(config, here, data)
    buffers = [x for x in run.named_tensors.values() if not x.requires_grad]
    saved = [buffer.clone() for buffer in buffers]
    micro_batches = batches.for_step(config, here, data, 1)
    outcomes = []
    for ends in every:
        starts = torch.tensor([[position in row for position in range(96)] for row in ends])
        documents = starts.cumsum(1).to(torch.int32)
        changed = [dataclasses.replace(batch, documents=documents) for batch in micro_batches]
        loss = objective.mean_losses(step.forward_backward(run, changed))["loss"]
        gradients = {n: p.grad.clone() for n, p in run.parameters() if p.grad is not None}
        outcomes.append((loss, {n: local_shard(run, n, grad) for n, grad in gradients.items()}))
        run.optimizer.zero_grad(set_to_none=True)
        for buffer, value in zip(buffers, saved, strict=True):  # the routers' biases have moved
            buffer.copy_(value)
    return outcomes


def test_documents_of_any_lengths_have_the_losses_and_gradients_of_one_process(
    folder: Path,
) -> None:
    every = _documents()
    arguments = (str(folder), every, training.EXACT)
    (alone,) = launch(losses_and_gradients, 1, *arguments)
    for layout in (("context=2",), ("context=2", "tensor=2")):
        parallel = [f"parallel.{size}" for size in layout]
        ranks = launch(losses_and_gradients, 2 * len(layout), *arguments, *parallel)
        for (loss, gradients), outcomes in zip(alone, zip(*ranks, strict=True), strict=True):
            assert all(found == pytest.approx(loss, rel=1e-12) for found, _ in outcomes)
            expected = _merged([gradients])
            together = _merged([gradients for _, gradients in outcomes])
            assert together.keys() == expected.keys()
            for name, gradient in expected.items():
                error = (together[name] - gradient).norm()
                assert error <= 1e-10 * gradient.norm(), name
