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
        ("score.weight", "adamw"),
        ("audio_lm_head.weight", "adamw"),
        ("classifier.1.weight", "adamw"),
        ("attention.q_head.weight", "muon"),
        ("vision.patch_projection.weight", "adamw"),
        ("patch_merger.merging_layer.weight", "muon"),
        ("model.layers.0.self_attn.q_norm.weight", "adamw"),  # a gain for each head
        ("mixer.A_log", "adamw"),
        ("mamba.D", "adamw"),
        ("attention.time_mix_key", "adamw"),
        ("self_attn.bias_u", "adamw"),
        ("self_attn.linear_pos.weight", "muon"),
        ("attn.rel_pos_h", "adamw"),
        ("experts.gate_up_proj_bias", "adamw"),
        ("resampler.latents", "adamw"),
        ("projector.query", "adamw"),
        ("self_attn.query.weight", "muon"),
        ("block.layer_scale_1", "adamw"),
        ("attention.in_proj_weight", "muon"),
        ("mlp.gate.wg.weight", "adamw"),
    ],
)
def test_names_in_the_wild(name: str, algorithm: str) -> None:
    assert choose_algorithm(torch.zeros(4, 8), name)[0] == algorithm


@pytest.mark.parametrize(
    ("shape", "name", "algorithm"),
    [
        ((1, 8), None, "adamw"),  # speculators#821: one row
        ((8, 1), None, "adamw"),
        ((8, 1, 4), None, "adamw"),  # maxtext#4843: a depthwise convolution, by its shape
        ((8, 1, 1), "block.gate", "adamw"),
        ((8, 4, 3), "mixer.conv1d.weight", "adamw"),
        ((8, 4, 3, 3), None, "adamw"),
        ((1, 16, 8), "vision.table", "adamw"),  # broadcast over the batch
        ((1, 16, 8), "mlp.experts.down_proj", "muon"),  # a rank's only expert
        ((4, 16, 8), None, "muon"),
    ],
)
def test_shapes_in_the_wild(shape: tuple[int, ...], name: str | None, algorithm: str) -> None:
    assert choose_algorithm(torch.zeros(shape), name)[0] == algorithm


def test_modules_in_the_wild() -> None:
    """Types speak where names say nothing."""

    class TopKRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16, 8))

    class PerHeadNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4, 8))

    model = nn.ModuleDict(
        {
            "a": TopKRouter(),  # more experts than hidden units
            "b": PerHeadNorm(),
            "c": nn.LayerNorm((4, 8)),
            "d": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "e": nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3)),
            "f": nn.ConvTranspose1d(8, 8, 3),
            "g": nn.EmbeddingBag(11, 8),
            "h": nn.Bilinear(8, 8, 4),
        }
    )
    found = {item.name: item.algorithm for item in assign(model)}
    assert [name for name, algorithm in found.items() if algorithm == "muon"] == ["h.weight"]


def test_names_that_are_numbers() -> None:
    items = assign(nn.ParameterList([torch.zeros(4, 8), torch.zeros(4)]))
    assert [(item.name, item.algorithm) for item in items] == [("0", "muon"), ("1", "adamw")]


def test_the_first_layout_that_matches_counts() -> None:
    """Full names and wildcards alike."""
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("a", "b")})
    halves, quarters = MatrixLayout((4, 4)), MatrixLayout((2, 2, 2, 2))
    for layouts, expected in (
        ({"a.weight": halves, "*.weight": quarters}, [halves, quarters]),
        ({"*.weight": quarters, "a.weight": halves}, [quarters, quarters]),
    ):
        items = assign(model, layouts=layouts)
        assert [item.layout for item in items if item.algorithm == "muon"] == expected


def test_a_head_that_the_model_tells_of() -> None:
    """As transformers' models do: Whisper calls its own proj_out."""

    class Whisper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(8, 8)
            self.proj_out = nn.Linear(8, 11)

        def get_output_embeddings(self) -> nn.Module:
            return self.proj_out

    found = {item.name: (item.algorithm, item.reason) for item in assign(Whisper())}
    assert found["proj_out.weight"] == ("adamw", "output head")
    assert found["fc1.weight"] == ("muon", "matrix")


def test_convolutions_go_to_muon_by_pattern_only() -> None:
    """Flattened, a matrix a group of channels."""
    model = nn.ModuleDict(
        {
            "conv2d": nn.Conv2d(4, 6, 3),
            "grouped": nn.Conv1d(4, 6, 3, groups=2),
            "depthwise": nn.Conv1d(4, 4, 3, groups=4),
        }
    )
    assert {item.algorithm for item in assign(model)} == {"adamw"}
    found = {
        item.name: item
        for item in assign(model, muon=["conv2d.weight", "grouped.weight"])
        if item.algorithm == "muon"
    }
    assert found["conv2d.weight"].layout == MatrixLayout(flatten=True)
    assert found["grouped.weight"].layout == MatrixLayout((3,), 2, separate=True, flatten=True)
    assert set(found) == {"conv2d.weight", "grouped.weight"}
    with pytest.raises(ValueError, match="transposed convolution"):
        assign(nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 3)}), muon=["up.weight"])


def test_what_torchs_own_modules_fuse_is_known() -> None:
    """MLM#4731 in ``nn.MultiheadAttention``: query, key and value are three matrices."""
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2),
            "apart": nn.MultiheadAttention(8, 2, kdim=4, vdim=4),
            "lstm": nn.LSTM(4, 6, proj_size=2),
            "gru": nn.GRU(4, 6),
            "rnn": nn.RNN(4, 6),
            "cell": nn.GRUCell(4, 6),
        }
    )
    found = {i.name: i.layout for i in assign(model) if i.algorithm == "muon" and i.layout}
    assert found == {
        "attention.in_proj_weight": MatrixLayout((8, 8, 8)),
        "lstm.weight_ih_l0": MatrixLayout((6, 6, 6, 6)),
        "lstm.weight_hh_l0": MatrixLayout((6, 6, 6, 6)),
        "gru.weight_ih_l0": MatrixLayout((6, 6, 6)),
        "gru.weight_hh_l0": MatrixLayout((6, 6, 6)),
        "cell.weight_ih": MatrixLayout((6, 6, 6)),
        "cell.weight_hh": MatrixLayout((6, 6, 6)),
    }
    whole = {item.name for item in assign(model) if item.algorithm == "muon"} - set(found)
    assert {"apart.q_proj_weight", "lstm.weight_hr_l0", "rnn.weight_ih_l0"} <= whole


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
