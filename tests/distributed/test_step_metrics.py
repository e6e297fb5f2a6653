"""What a step shows of itself is what happened, however the model is spread over processes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from muonclip import MuonClip, param_groups
from pretrain.step_metrics import UpdateRms
from tests.distributed import training
from tests.distributed.launch import launch

FOUR_LAYERS = ("language.num_layers=4", "language.dense_layers=1")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return launch(training.first_step, 1, str(folder), training.EXACT, *FOUR_LAYERS)[0]


def test_a_step_of_one_process_shows_what_happened(alone: dict[str, Any]) -> None:
    metrics, seen = alone["metrics"], alone["seen"]
    by_layer = metrics["language_max_logits"] + metrics["vision_max_logits"]
    assert by_layer == pytest.approx(seen["max_logits"], rel=1e-4)
    assert metrics["max_logit"] == max(seen["max_logits"])
    # Tokens that each expert got, by layer; no token goes missing.
    tokens = 8 * 96 * 2
    assert len(seen["routed"]) == 3 and all(sum(layer) == tokens for layer in seen["routed"])
    assert metrics["dropped_tokens"] == 0
    loads = [max(layer) / (tokens / 4) for layer in seen["routed"]]
    assert metrics["expert_loads"] == pytest.approx(loads, rel=1e-4)
    assert metrics["expert_load"] == pytest.approx(sum(loads) / 3)
    for algorithm in ("muon", "adamw"):
        assert metrics[f"update_rms_{algorithm}"] == pytest.approx(seen[algorithm], rel=1e-4)
    # The very first update of AdamW is the gradient's sign; of Muon, of AdamW's usual size.
    assert 0.8 < metrics["update_rms_adamw"] < 1.01
    assert 0.1 < metrics["update_rms_muon"] < 0.3
    assert 0.1 < metrics["memory_gib"] < 10


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, ("parallel.expert=2", "recompute.granularity=full")),
        (4, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2")),
        (4, ("parallel.pipeline=2", "parallel.interleave=2", "parallel.expert=2")),
    ],
)
def test_every_rank_shows_what_one_process_does(
    folder: Path, alone: dict[str, Any], world_size: int, parallel: tuple[str, ...]
) -> None:
    """Each has some layers, heads, experts and images; measures are of all."""
    settings = (str(folder), training.EXACT, *FOUR_LAYERS, *parallel)
    ranks = launch(training.first_step, world_size, *settings)
    for rank in ranks:
        for name, expected in alone["metrics"].items():
            if name in ("memory_gib", "encoder_balance", "encoder_least_balance"):
                continue
            # Some measures are kept in float32.
            assert rank["metrics"][name] == pytest.approx(expected, rel=1e-5), name
        assert rank["metrics"] == ranks[0]["metrics"]


def test_every_head_of_every_rank_that_is_clipped_is_counted_once(folder: Path) -> None:
    # Two data-parallel ranks clip the same heads; two tensor-parallel ones have other heads.
    overrides = [f"parallel.{name}=2" for name in ("tensor", "expert")]
    clipping = "optimizer.qk_clip_threshold=1e-9"
    ranks = launch(training.first_step, 4, str(folder), *FOUR_LAYERS, *overrides, clipping)
    for rank in ranks:
        assert rank["metrics"]["heads"] == 4 * 2 + 1 * 2
        assert rank["metrics"]["heads_clipped"] == rank["metrics"]["heads"]


def test_the_flops_of_a_token_are_those_that_torch_counts(folder: Path) -> None:
    """Attention here computes all pairs and masks the later ones: as if causal at twice the
    length."""
    counted, expected = launch(training.counted_flops, 1, str(folder), *FOUR_LAYERS)[0]
    assert counted == expected


def test_samples_of_large_matrices_give_their_updates_rms() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.Linear(300, 400), "down": nn.Linear(400, 300, bias=False)})
    optimizer = MuonClip(param_groups(model), lr=1e-2, weight_decay=0.1)
    updates = UpdateRms(optimizer, {parameter: 2 for parameter in model.parameters()})
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    weights = [model["up"].weight, model["down"].weight]
    before = [weight.detach().clone() for weight in weights]
    assert updates.after(torch.device("cpu")).tolist() == [[0, 0], [0, 0]]
    updates.before()
    optimizer.step()
    (muon, muon_count), (_, adamw_count) = updates.after(torch.device("cpu")).tolist()
    # Each of two copies counts a half.
    assert (muon_count, adamw_count) == (120_000, 200)
    moved = [
        (old * (1 - 1e-3) - new.detach()) / 1e-2 for old, new in zip(before, weights, strict=True)
    ]
    exact = torch.cat([m.flatten() for m in moved]).square().mean().sqrt()
    assert math.sqrt(muon / muon_count) == pytest.approx(float(exact), rel=0.03)
