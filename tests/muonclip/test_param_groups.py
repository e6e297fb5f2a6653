"""Every parameter is assigned to one algorithm, and the reason is reported."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from muonclip import (
    MatrixLayout,
    MuonClip,
    assign_parameters,
    choose_algorithm,
    describe_assignment,
    param_groups,
)


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
    "vision.conv.weight": (
        "adamw",
        "convolution kernel",
    ),  # maxtext#4843: depthwise is not a matrix
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
    found = {item.name: (item.algorithm, item.reason) for item in assign_parameters(model)}
    assert found.items() >= EXPECTED.items()
    assert set(found) == {name for name, _ in model.named_parameters()}


NAMES = [
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
    ("classifier.dense.weight", "muon"),
    ("classifier.out_proj.weight", "adamw"),
    ("lm_head.decoder.weight", "adamw"),
    ("self_attn.out_proj.weight", "muon"),
]


@pytest.mark.parametrize(("name", "algorithm"), NAMES)
def test_names_in_the_wild(name: str, algorithm: str) -> None:
    assert choose_algorithm(torch.zeros(4, 8), name)[0] == algorithm


@pytest.mark.parametrize(
    ("shape", "name", "algorithm"),
    [
        ((1, 8), None, "adamw"),  # speculators#821: one row
        ((8, 1), None, "adamw"),
        ((0, 8), None, "adamw"),  # MobileBERT, if its embeddings are as wide as its layers
        ((2, 8, 0), None, "adamw"),
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


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
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
            "i": nn.utils.weight_norm(nn.Linear(8, 8)),  # by a hook
            "j": nn.utils.spectral_norm(nn.Linear(8, 8)),
        }
    )
    found = {item.name: item.algorithm for item in assign_parameters(model)}
    assert [name for name, algorithm in found.items() if algorithm == "muon"] == ["h.weight"]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_other_matrices_of_a_module_with_weight_norm() -> None:
    """The hook normalizes one of them."""
    model = nn.utils.weight_norm(nn.LSTM(8, 4), "weight_hh_l0")
    found = {item.name: item.algorithm for item in assign_parameters(model)}
    assert [name for name, algorithm in found.items() if algorithm == "muon"] == ["weight_ih_l0"]


def test_names_that_are_numbers() -> None:
    items = assign_parameters(nn.ParameterList([torch.zeros(4, 8), torch.zeros(4)]))
    assert [(item.name, item.algorithm) for item in items] == [("0", "muon"), ("1", "adamw")]


def test_the_first_layout_that_matches_counts() -> None:
    """Both full names and wildcards."""
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("a", "b")})
    halves, quarters = MatrixLayout((4, 4)), MatrixLayout((2, 2, 2, 2))
    for layouts, expected in (
        ({"a.weight": halves, "*.weight": quarters}, [halves, quarters]),
        ({"*.weight": quarters, "a.weight": halves}, [quarters, quarters]),
    ):
        items = assign_parameters(model, layouts=layouts)
        assert [item.layout for item in items if item.algorithm == "muon"] == expected


def test_output_heads_reported_by_the_model() -> None:
    """As transformers' models do: Whisper calls its own proj_out."""

    class Whisper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(8, 8)
            self.proj_out = nn.Linear(8, 11)

        def get_output_embeddings(self) -> nn.Module:
            return self.proj_out

    found = {item.name: (item.algorithm, item.reason) for item in assign_parameters(Whisper())}
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
    assert {item.algorithm for item in assign_parameters(model)} == {"adamw"}
    found = {
        item.name: item
        for item in assign_parameters(model, muon=["conv2d.weight", "grouped.weight"])
        if item.algorithm == "muon"
    }
    assert found["conv2d.weight"].layout == MatrixLayout(flatten=True)
    assert found["grouped.weight"].layout == MatrixLayout((3,), 2, separate=True, flatten=True)
    assert set(found) == {"conv2d.weight", "grouped.weight"}
    with pytest.raises(ValueError, match="transposed convolution"):
        assign_parameters(nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 3)}), muon=["up.weight"])


def test_layouts_of_torch_modules() -> None:
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
    found = {
        i.name: i.layout for i in assign_parameters(model) if i.algorithm == "muon" and i.layout
    }
    assert found == {
        "attention.in_proj_weight": MatrixLayout((8, 8, 8)),
        "lstm.weight_ih_l0": MatrixLayout((6, 6, 6, 6)),
        "lstm.weight_hh_l0": MatrixLayout((6, 6, 6, 6)),
        "gru.weight_ih_l0": MatrixLayout((6, 6, 6)),
        "gru.weight_hh_l0": MatrixLayout((6, 6, 6)),
        "cell.weight_ih": MatrixLayout((6, 6, 6)),
        "cell.weight_hh": MatrixLayout((6, 6, 6)),
    }
    whole = {item.name for item in assign_parameters(model) if item.algorithm == "muon"} - set(
        found
    )
    assert {"apart.q_proj_weight", "lstm.weight_hr_l0", "rnn.weight_ih_l0"} <= whole


def test_the_gate_of_a_gated_unit_is_not_a_router() -> None:
    """Both are called `gate`; a router maps hidden to fewer experts."""
    assert choose_algorithm(torch.zeros(32, 8), "mlp.gate.weight")[0] == "muon"


def test_groups_can_be_passed_to_the_optimizer() -> None:
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
        found = assign_parameters(nn.ModuleDict({first: modules[first], second: modules[second]}))
        assert [(item.name, item.algorithm) for item in found] == [(f"{first}.weight", "adamw")]


def test_patterns_override() -> None:
    items = assign_parameters(Model(), adamw=["vision.*"], muon=["router.weight"])
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
            r"norm.weight \(matches .*\): shape \(8,\) is neither a matrix",
        ),
        ({"adamw": "router.weight"}, "adamw must be a list of patterns"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        param_groups(Model(), **options)


def test_describe_shows_all_and_adds_up() -> None:
    model = Model()
    text = describe_assignment(
        assign_parameters(model, layouts={"gate_proj.weight": MatrixLayout((8, 8))})
    )
    lines = text.splitlines()
    for name, parameter in model.named_parameters():
        line = next(line for line in lines if line.split()[0] == name)
        assert "x".join(map(str, parameter.shape)) in line
    assert "rows 8 + 8" in text
    totals = [line for line in lines if "tensors" in line]
    counted = sum(int(line.split()[3].replace(",", "")) for line in totals)
    assert counted == sum(p.numel() for p in model.parameters())


def test_only_numbers_that_differ_are_left_out_of_names() -> None:
    blocks = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "last": nn.Sequential(nn.Linear(4, 9))})
    text = describe_assignment(assign_parameters(model), by_layer=False)
    names = [re.split("  +", line)[0] for line in text.splitlines() if "matrix" in line]
    assert names == ["blocks.*.0.weight (3 times)", "blocks.*.2.weight (3 times)", "last.0.weight"]


# ---------------------------------------------------------------------- wrappers and adapters

WRAPPERS = ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
            "modules_to_save.default", "modules_to_save.my_head", "base_layer"]  # fmt: skip


@given(
    name=st.sampled_from([name for name, _ in NAMES]),
    places=st.lists(st.tuples(st.integers(0, 8), st.sampled_from(WRAPPERS)), max_size=4),
    prefix=st.sampled_from(["", "base_model.model."]),
)
def test_wrappers_do_not_change_the_assignment(
    name: str, places: list[tuple[int, str]], prefix: str
) -> None:
    """Any of them, anywhere in front of the parameter."""
    *path, leaf = name.split(".")
    wrapped = list(path)
    for place, wrapper in places:
        wrapped.insert(min(place, len(wrapped)), wrapper)
    found = choose_algorithm(torch.zeros(4, 8), prefix + ".".join([*wrapped, leaf]))
    assert found == choose_algorithm(torch.zeros(4, 8), name)


class ModulesToSaveWrapper(nn.Module):
    """As PEFT keeps a module that is trained in full, next to the original."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = copy.deepcopy(original).requires_grad_(False)
        self.modules_to_save = nn.ModuleDict({"default": original})


class LoraLinear(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})


class LoraEmbedding(nn.Module):
    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        rows, width = base.weight.shape
        self.base_layer = base.requires_grad_(False)
        self.lora_embedding_A = nn.ParameterDict({"default": torch.zeros(2, rows)})
        self.lora_embedding_B = nn.ParameterDict({"default": torch.zeros(width, 2)})


class Adapted(nn.Module):
    """A model as PEFT leaves it, under names that only ``get_output_embeddings`` knows too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = LoraEmbedding(nn.Embedding(11, 8))
        self.v_proj = LoraLinear(nn.Linear(8, 8))
        self.gate = LoraLinear(nn.Linear(8, 16))  # of a gated unit
        self.score = ModulesToSaveWrapper(nn.Linear(8, 3, bias=False))
        self.lm_head = LoraLinear(nn.Linear(8, 11))
        self.proj_out = ModulesToSaveWrapper(nn.Linear(8, 11, bias=False))

    def get_output_embeddings(self) -> nn.Module:
        return self.proj_out


def test_trained_heads_and_embeddings_of_adapted_models_go_to_adamw() -> None:
    model = nn.ModuleDict({"base_model": nn.ModuleDict({"model": Adapted()})})
    prefix = "base_model.model."
    found = {
        i.name.removeprefix(prefix): (i.algorithm, i.reason)
        for i in assign_parameters(model)
        if i.algorithm is not None
    }
    assert found == {
        "embed_tokens.lora_embedding_A.default": ("adamw", "embedding"),
        "embed_tokens.lora_embedding_B.default": ("adamw", "embedding"),
        "v_proj.lora_A.default.weight": ("adamw", "LoRA's A"),
        "v_proj.lora_B.default.weight": ("muon", "matrix"),
        "gate.lora_A.default.weight": ("adamw", "LoRA's A"),
        "gate.lora_B.default.weight": ("muon", "matrix"),
        "score.modules_to_save.default.weight": ("adamw", "output head"),
        "lm_head.lora_A.default.weight": ("adamw", "LoRA's A"),
        "lm_head.lora_B.default.weight": ("adamw", "output head"),
        "proj_out.modules_to_save.default.weight": ("adamw", "output head"),
    }


@pytest.mark.parametrize(
    ("kind", "task", "head"),
    [
        ("SequenceClassification", "SEQ_CLS", "score"),
        ("TokenClassification", "TOKEN_CLS", "score"),
        ("QuestionAnswering", "QUESTION_ANS", "qa_outputs"),
        ("CausalLM", "CAUSAL_LM", "lm_head"),
    ],
)
def test_heads_that_peft_trains_go_to_adamw(kind: str, task: str, head: str) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=3,
    )  # fmt: skip
    model = getattr(transformers, f"LlamaFor{kind}")(config)
    saved = ["lm_head"] if kind == "CausalLM" else None
    lora = peft.LoraConfig(r=2, target_modules=["v_proj"], task_type=task, modules_to_save=saved)
    trained = [
        i for i in assign_parameters(peft.get_peft_model(model, lora)) if i.algorithm is not None
    ]
    heads = {
        (i.algorithm, i.reason) for i in trained if f".{head}." in i.name and "weight" in i.name
    }
    assert heads == {("adamw", "output head")}
    assert {i.algorithm for i in trained if "lora_A" in i.name} == {"adamw"}
    assert {i.algorithm for i in trained if "lora_B" in i.name} == {"muon"}


def test_compiled_and_checkpointed_modules_have_the_same_assignment() -> None:
    plain = [(item.algorithm, item.reason) for item in assign_parameters(Model())]
    wrapped = Model()
    for name, module in list(wrapped.named_children()):
        setattr(wrapped, name, checkpoint_wrapper(torch.compile(module)))  # type: ignore[arg-type]
    assert [(item.algorithm, item.reason) for item in assign_parameters(wrapped)] == plain


def test_parametrizations_are_recognized_by_name_and_by_type() -> None:
    name = "layer.parametrizations.weight.original1"
    assert choose_algorithm(torch.zeros(4, 8), name) == ("adamw", "parametrization")


# ---------------------------------------------------------------------- parts of matrices


def partitioned(weight: Tensor) -> nn.Parameter:
    """As DeepSpeed ZeRO-3 leaves a parameter between forward passes."""
    found = nn.Parameter(torch.empty(0))
    found.ds_id, found.ds_shape = 0, weight.shape  # type: ignore[attr-defined]
    return found


def flattened(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().flatten()[:8].clone())


@pytest.mark.parametrize(
    ("change", "message"),
    [(partitioned, "'?a.weight'? .*ZeRO-3.*fully_shard"), (flattened, "fully_shard")],
)
def test_parts_of_matrices_are_refused(change: Any, message: str) -> None:
    """Flattened matrices are refused when grouped or at the first step: as vectors, all would be
    trained by AdamW."""
    model = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(4, 8)})
    optimizer = MuonClip(param_groups(model), lr=0.1)
    broken = change(model["a"].weight)
    part = nn.ModuleDict({"a": nn.Linear(4, 8)})
    part["a"].weight = broken
    for call in (assign_parameters, param_groups):
        with pytest.raises(ValueError, match=message):
            call(part)
    if change is partitioned:
        with pytest.raises(ValueError, match=message):
            MuonClip(part.named_parameters())

    weight = model["a"].weight  # in place, as both libraries do
    weight.data = broken.data
    weight.__dict__.update(broken.__dict__)
    before = model["b"].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'a.weight' (of shape|has changed its shape)"):
            optimizer.step()
    assert torch.equal(model["b"].weight, before)


def test_frozen_parts_of_matrices_are_accepted() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(4, 8)})
    model["a"].weight = partitioned(model["a"].weight).requires_grad_(False)
    assert [i.algorithm for i in assign_parameters(model) if i.name == "a.weight"] == [None]


def test_a_vector_that_replaced_a_matrix_is_refused() -> None:
    """DeepSpeed ZeRO-1 and 2 put flat partitions into the optimizer's groups."""
    optimizer = MuonClip(param_groups(nn.Linear(4, 8)))
    flat = nn.Parameter(torch.zeros(32))
    flat.grad = torch.ones(32)
    group = next(g for g in optimizer.param_groups if g["algorithm"] == "muon")
    group["params"] = [flat]
    with pytest.raises(ValueError, match=r"'weight' .* cannot go to Muon as it is"):
        optimizer.step()


# ---------------------------------------------------------------------- parameters without names


def test_warns_once_of_a_choice_by_shape_alone() -> None:
    """transformers' Trainer passes no names: embeddings and the head would go to Muon."""
    model = Model()
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    with pytest.warns(
        UserWarning, match=r"embeddings and output heads.*param_groups\(model\)"
    ) as seen:
        optimizer = MuonClip([{"params": decay}, {"params": rest, "weight_decay": 0.0}])
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(4, 4))]})
    assert len(seen) == 1 and seen[0].filename == __file__


def test_no_warning_for_named_or_explicit_groups() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MuonClip(param_groups(Model()))
        MuonClip(Model().named_parameters())
        MuonClip([{"params": [nn.Parameter(torch.zeros(4, 4))], "algorithm": "muon"}])
        MuonClip([nn.Parameter(torch.zeros(4))])


def test_warns_of_a_first_step_without_gradients() -> None:
    """As after wrapping the model behind the optimizer's back."""
    optimizer = MuonClip(param_groups(nn.Linear(4, 8)))
    with pytest.warns(UserWarning, match="no gradient of any of its parameters") as seen:
        optimizer.step()
        optimizer.step()
    assert len(seen) == 1 and seen[0].filename == __file__


def test_a_norm_within_a_linear_layer_leaves_its_matrix_to_muon() -> None:
    """As in Transformer Engine, whose layers also contain the norm of their input."""

    class LayerNormLinear(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8, bias=False)
            self.layer_norm_weight = nn.Parameter(torch.ones(8))

    items = assign_parameters(nn.ModuleDict({"up_proj": LayerNormLinear()}))
    found = {item.name: item.algorithm for item in items}
    assert found == {"up_proj.weight": "muon", "up_proj.layer_norm_weight": "adamw"}
