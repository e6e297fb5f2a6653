"""The metrics of a step are correct and the same for every distribution of the model."""

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
def single_process(folder: Path) -> dict[str, Any]:
    return launch(training.first_step, 1, str(folder), training.EXACT, *FOUR_LAYERS)[0]


def test_metrics_of_one_process_are_those_of_hooks(single_process: dict[str, Any]) -> None:
    metrics, seen = single_process["metrics"], single_process["seen"]
    by_layer = metrics["language_max_logits"] + metrics["vision_max_logits"]
    assert by_layer == pytest.approx(seen["max_logits"], rel=1e-4)
    assert metrics["max_logit"] == max(seen["max_logits"])
    # Tokens of each expert by layer: none is dropped.
    tokens = 8 * 96 * 2
    assert len(seen["routed"]) == 3 and all(sum(layer) == tokens for layer in seen["routed"])
    assert metrics["dropped_tokens"] == 0
    loads = [max(layer) / (tokens / 4) for layer in seen["routed"]]
    assert metrics["expert_loads"] == pytest.approx(loads, rel=1e-4)
    assert metrics["expert_load"] == pytest.approx(sum(loads) / 3)
    for algorithm in ("muon", "adamw"):
        assert metrics[f"update_rms_{algorithm}"] == pytest.approx(seen[algorithm], rel=1e-4)
    # AdamW's first update is the sign of the gradient; Muon's update RMS is 0.2.
    assert 0.8 < metrics["update_rms_adamw"] < 1.01
    assert 0.1 < metrics["update_rms_muon"] < 0.3
    assert 0.1 < metrics["memory_gib"] < 10


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, ("parallel.expert=2", "recompute.granularity=full")),
        (4, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2")),
        (4, ("parallel.pipeline=2", "parallel.interleave=2", "parallel.expert=2")),
        (4, ("parallel.context=2", "parallel.expert=2")),
    ],
)
def test_metrics_do_not_depend_on_the_distribution(
    folder: Path, single_process: dict[str, Any], world_size: int, parallel: tuple[str, ...]
) -> None:
    """Each rank has some layers, heads, experts and images; metrics cover the whole model."""
    settings = (str(folder), training.EXACT, *FOUR_LAYERS, *parallel)
    ranks = launch(training.first_step, world_size, *settings)
    for rank in ranks:
        for name, expected in single_process["metrics"].items():
            if name in ("memory_gib", "encoder_balance", "encoder_least_balance"):
                continue
            # Some metrics are reduced in float32, and shards are sampled at other entries.
            tolerance = 1e-3 if name.startswith("update_rms") else 1e-5
            assert rank["metrics"][name] == pytest.approx(expected, rel=tolerance), name
        assert rank["metrics"] == ranks[0]["metrics"]


def test_the_balance_of_the_encoder_is_that_of_all_groups(folder: Path) -> None:
    """Alone in its group, a rank encodes its own images, as without the encoder process."""
    settings = (str(folder), training.EXACT, "encoder_process.enabled=false")
    expected = launch(training.first_step, 2, *settings)[0]["metrics"]
    settings = (str(folder), training.EXACT, "encoder_process.group_size=1")
    first, second = (rank["metrics"] for rank in launch(training.first_step, 2, *settings))
    assert first == second
    assert expected["encoder_balance"] > 1.001
    assert first["encoder_balance"] == pytest.approx(expected["encoder_balance"])
    assert first["encoder_least_balance"] == pytest.approx(first["encoder_balance"])


@pytest.mark.parametrize("other", ["expert", "context"])
def test_clipped_heads_are_counted_once(folder: Path, other: str) -> None:
    # Two data- or context-parallel ranks clip the same heads; two tensor-parallel ranks have
    # different ones.
    overrides = [f"parallel.{name}=2" for name in ("tensor", other)]
    clipping = "optimizer.qk_clip_threshold=1e-9"
    ranks = launch(training.first_step, 4, str(folder), *FOUR_LAYERS, *overrides, clipping)
    for rank in ranks:
        assert rank["metrics"]["heads"] == 4 * 2 + 1 * 2
        assert rank["metrics"]["heads_clipped"] == rank["metrics"]["heads"]


def test_flops_per_token_agree_with_the_counter_of_torch(folder: Path) -> None:
    counted, expected = launch(training.counted_flops, 1, str(folder), *FOUR_LAYERS)[0]
    assert counted == pytest.approx(expected, rel=1e-12)


def test_update_rms_is_estimated_from_samples_of_large_matrices() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.Linear(300, 400), "down": nn.Linear(400, 300, bias=False)})
    optimizer = MuonClip(param_groups(model), lr=1e-2, weight_decay=0.1)
    update_rms = UpdateRms(optimizer, {parameter: 2 for parameter in model.parameters()})
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    weights = [model["up"].weight, model["down"].weight]
    before = [weight.detach().clone() for weight in weights]
    assert update_rms.after_step(torch.device("cpu")).tolist() == [[0, 0], [0, 0]]
    update_rms.before_step()
    optimizer.step()
    (muon, muon_count), (_, adamw_count) = update_rms.after_step(torch.device("cpu")).tolist()
    # Each of the two copies counts half.
    assert (muon_count, adamw_count) == (120_000, 200)
    moved = [
        (old * (1 - 1e-3) - new.detach()) / 1e-2 for old, new in zip(before, weights, strict=True)
    ]
    exact = torch.cat([m.flatten() for m in moved]).square().mean().sqrt()
    assert math.sqrt(muon / muon_count) == pytest.approx(float(exact), rel=0.03)
