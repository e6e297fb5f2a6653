"""Context-parallel ranks compute what one process computes, in every layout of the others."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

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
    (),
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
    (4, ("context=2", "expert=4")),
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
