"""Every parameter has one place, one reason, and shows both."""

from typing import Any

import pytest
import torch
from torch import nn

from muonclip import MatrixLayout, MuonClip, assign, choose_algorithm, describe, param_groups


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Linear(12, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.conv = nn.Conv1d(8, 8, 3, groups=8)
        self.mlp = nn.Linear(8, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(11, 8)  # known by its type alone
        self.vision = Vision()
        self.router = nn.Linear(8, 4, bias=False)
        self.gate = nn.Linear(8, 4, bias=False)
        self.gate_proj = nn.Linear(8, 16)
        self.experts = nn.Parameter(torch.zeros(4, 16, 8))
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


EXPECTED = {
    "tok.weight": ("adamw", "embedding"),
    "vision.pos_embed": ("adamw", "embedding"),
    "vision.cls_token": ("adamw", "learned token"),
    "vision.patch_embed.0.weight": ("adamw", "patch embedding"),
    "vision.patch_embed.0.bias": ("adamw", "vector or scalar"),
    "vision.conv.weight": ("adamw", "convolution kernel"),  # maxtext#4843: depthwise is no matrix
    "vision.mlp.weight": ("muon", "matrix"),
    "router.weight": ("adamw", "router"),
    "gate.weight": ("adamw", "router"),
    "gate_proj.weight": ("muon", "matrix"),
    "experts": ("muon", "stack of matrices"),
    "norm.weight": ("adamw", "vector or scalar"),
    "lm_head.weight": ("adamw", "output head"),
    "frozen.weight": (None, "frozen"),
}


def test_every_kind_of_parameter() -> None:
    model = Model()
    found = {item.name: (item.algorithm, item.reason) for item in assign(model)}
    assert found.items() >= EXPECTED.items()
    assert set(found) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("model.embed_tokens.weight", "adamw"),
        ("embedding.word_embeddings.weight", "adamw"),
        ("transformer.wte.weight", "adamw"),
        ("output_layer.weight", "adamw"),
        ("output.weight", "adamw"),
        ("decoder.layers.0.mlp.router.weight", "adamw"),
        ("model.layers.3.mlp.gate.weight", "adamw"),
        ("model.layers.3.mlp.shared_expert_gate.weight", "adamw"),
        ("decoder.layers.0.self_attention.linear_kv_down_proj.weight", "muon"),
        ("encoder.layer.0.attention.output.dense.weight", "muon"),
        ("model.layers.0.mlp.gate_proj.weight", "muon"),
        ("model.layers.0.mlp.experts.gate_up_proj", "muon"),
        ("embedding_model.layers.0.fc.weight", "muon"),
        ("heads.0.weight", "muon"),
    ],
)
def test_names_in_the_wild(name: str, algorithm: str) -> None:
    assert choose_algorithm(torch.zeros(4, 8), name)[0] == algorithm


def test_a_gated_units_gate_is_no_router() -> None:
    """Both are called `gate`; a router maps hidden to fewer experts."""
    assert choose_algorithm(torch.zeros(32, 8), "mlp.gate.weight")[0] == "muon"


def test_groups_are_what_the_optimizer_takes() -> None:
    model = Model()
    optimizer = MuonClip(
        param_groups(model, layouts={"gate_proj.weight": MatrixLayout((8, 8))}), lr=0.1
    )
    placed = {
        name: (group["algorithm"], group["layout"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert placed["gate_proj.weight"] == ("muon", MatrixLayout((8, 8)))
    assert placed["vision.mlp.weight"] == ("muon", None)
    assert placed["tok.weight"] == ("adamw", None)
    assert set(placed) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_options_reach_every_group() -> None:
    assert {group["weight_decay"] for group in param_groups(Model(), weight_decay=0.3)} == {0.3}


def test_tied_weights_appear_once_and_stay_an_embedding() -> None:
    """Whichever of its names comes first."""
    for first, second in (("tok", "out"), ("out", "tok")):
        modules = {"tok": nn.Embedding(11, 8), "out": nn.Linear(8, 11, bias=False)}
        modules["out"].weight = modules["tok"].weight
        found = assign(nn.ModuleDict({first: modules[first], second: modules[second]}))
        assert [(item.name, item.algorithm) for item in found] == [(f"{first}.weight", "adamw")]


def test_patterns_override() -> None:
    items = assign(Model(), adamw=["vision.*"], muon=["router.weight"])
    found = {item.name: (item.algorithm, item.reason) for item in items}
    assert found["vision.mlp.weight"] == ("adamw", "matches 'vision.*'")
    assert found["router.weight"] == ("muon", "matches 'router.weight'")
    assert found["frozen.weight"][0] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adamw": ["nothing.*"]}, "adamw: the pattern 'nothing.\\*' matches no parameter"),
        ({"layouts": {"typo": MatrixLayout((1, 2))}}, "layouts: the pattern 'typo' matches no"),
        ({"adamw": ["router.*"], "muon": ["router.*"]}, "router.weight matches adamw=.* and muon="),
        (
            {"muon": ["norm.weight"]},
            r"norm.weight \(matches .*\): shape \(8,\) is no matrix",
        ),
        ({"adamw": "router.weight"}, "adamw must be a list of patterns"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        param_groups(Model(), **options)


def test_describe_shows_all_and_adds_up() -> None:
    model = Model()
    text = describe(assign(model, layouts={"gate_proj.weight": MatrixLayout((8, 8))}))
    lines = text.splitlines()
    for name, parameter in model.named_parameters():
        line = next(line for line in lines if line.split()[0] == name)
        assert "x".join(map(str, parameter.shape)) in line
    assert "rows 8 + 8" in text
    totals = [line for line in lines if "tensors" in line]
    counted = sum(int(line.split()[3].replace(",", "")) for line in totals)
    assert counted == sum(p.numel() for p in model.parameters())
