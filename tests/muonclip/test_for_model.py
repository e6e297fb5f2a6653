"""``for_model``: the parts of a model decide on groups, layouts and QK-Clip."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import muonclip
from muonclip import AttentionLayout, MatrixLayout, MuonClip, QKClip, for_model

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).train()


def train(model: nn.Module, optimizer: Any, steps: int = 2) -> None:
    for step in range(steps):
        ids = torch.arange(32).view(2, 16) + step
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def algorithms(optimizer: MuonClip) -> dict[str, str]:
    return {
        name: group["algorithm"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def test_one_call_equals_the_separate_ones() -> None:
    """Weights after clipped steps are the same to the bit."""
    from muonclip.integrations.transformers import matrix_layouts, qk_clip

    one, several = llama(), llama()
    optimizer = for_model(one, 0.01, qk_clip_threshold=0.01, weight_decay=0.2, report=None)
    groups = muonclip.param_groups(several, layouts=matrix_layouts(several))
    other = MuonClip(groups, 0.01, weight_decay=0.2, qk_clip=qk_clip(several, 0.01))
    train(one, optimizer)
    train(several, other)
    assert optimizer.qk_clip is not None and optimizer.qk_clip.result is not None
    assert optimizer.qk_clip.result.num_clipped > 0
    assert all(map(torch.equal, one.parameters(), several.parameters()))


def test_the_report_names_parameters_settings_and_heads(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = for_model(llama(), 0.01)
    text = capsys.readouterr().out
    assert optimizer.report is not None and text.strip() == str(optimizer.report)
    assert optimizer.report.assignments["lm_head.weight"] == ("adamw", "output head")
    for row in (
        r"model\.layers\.\*\.self_attn\.q_proj\.weight \(2 times\) +24x24 +muon +matrix",
        r"model\.embed_tokens\.weight +64x24 +adamw +embedding",
        r"Newton-Schulz in float32",
        r"Muon: learning rate 0\.01, weight decay 0\.1",
        r"QK-Clip: limits the logits of 8 heads to 100 .*self_attn \(2 layers\) with 4 heads each",
    ):
        assert re.search(row, text), row
    assert len(text.splitlines()) < 20


def test_the_report_goes_where_it_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    for_model(llama(), report=lines.append)
    for_model(llama(), report=None)
    assert len(lines) == 1 and capsys.readouterr().out == ""


def test_normalized_attention_is_not_clipped() -> None:
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=6)).train()
    optimizer = for_model(model, report=None)
    assert optimizer.qk_clip is None
    text = str(optimizer.report)
    assert "QK-Clip: not attached, because it would have no effect" in text
    assert re.search(r"self_attn \(2 layers\): its queries and keys are normalized", text)
    train(model, optimizer)


@pytest.mark.parametrize("kind", ["Qwen3", "Gemma3Text"])
@pytest.mark.parametrize("gain", [1.0, 8.0])
def test_the_bound_of_normalized_attention_is_compared_with_the_threshold(
    kind: str, gain: float
) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = SMALL | {"head_dim": 6, "query_pre_attn_scalar": 6}
    config = getattr(transformers, f"{kind}Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                parameter.fill_(gain if kind == "Qwen3" else gain - 1)  # Gemma's add one
    bound = 6**0.5 * gain**2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = for_model(model, report=None)
    assert optimizer.report is not None
    (reason,) = set(optimizer.report.not_clipped.values())
    assert f"bounds the logits (to {bound:.3g} at most, with the present gains)" in reason
    messages = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(messages) == (bound > 100)
    if messages:
        assert f"self_attn (2 layers) only by {bound:.3g}, above qk_clip_threshold" in messages[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            for_model(model, qk_clip_exclude="*.self_attn", report=None)
            for_model(model, qk_clip_threshold=1.01 * bound, report=None)


class Vision2Text(nn.Module):
    """A vision tower of transformers, torch's attention and a language model with fused layers."""

    def __init__(self) -> None:
        super().__init__()
        small = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
        self.tower = transformers.ViTModel(
            transformers.ViTConfig(**{**small, "image_size": 8, "patch_size": 4})
        )
        self.mixer = nn.MultiheadAttention(24, 4, batch_first=True)
        self.language = transformers.Phi3ForCausalLM(
            transformers.Phi3Config(**SMALL, pad_token_id=0)
        )

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        features = self.tower(pixels).last_hidden_state
        features = features + self.mixer(features, features, features)[0]
        words = self.language.get_input_embeddings()(ids)
        inputs = torch.cat([features, words], 1)
        logits: Tensor = self.language(inputs_embeds=inputs).logits[:, features.size(1) :]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def test_all_parts_of_a_larger_model_are_found() -> None:
    torch.manual_seed(0)
    model = Vision2Text().train()
    optimizer = for_model(model, 0.01, qk_clip_threshold=0.01, report=None)
    layouts = {g["layout"] for g in optimizer.param_groups if g["layout"] is not None}
    assert MatrixLayout((24, 12, 12)) in layouts  # queries, keys and values of Phi-3
    assert MatrixLayout((32, 32)) in layouts  # gate and up
    assert MatrixLayout((24, 24, 24)) in layouts  # of nn.MultiheadAttention
    clip = optimizer.qk_clip
    assert clip is not None and len(clip.layouts) == 5
    for _ in range(2):
        model(torch.randn(2, 3, 8, 8), torch.arange(12).view(2, 6)).backward()
        optimizer.step()
        optimizer.zero_grad()
        result = clip.result
        assert result is not None
        assert all((values > -torch.inf).all() for values in result.max_logits.values())


def test_given_layouts_and_patterns_count() -> None:
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**SMALL, pad_token_id=0))
    fused = "*.qkv_proj.weight"
    optimizer = for_model(
        model,
        layouts={fused: MatrixLayout((24, 24))},
        adamw=["*.down_proj.weight"],
        qk_clip_exclude="*.0.self_attn",
        report=None,
    )
    (group,) = (g for g in optimizer.param_groups if g["layout"] == MatrixLayout((24, 24)))
    assert all(name.endswith("qkv_proj.weight") for name in group["param_names"])
    assert algorithms(optimizer)["model.layers.1.mlp.down_proj.weight"] == "adamw"
    assert optimizer.qk_clip is not None and optimizer.report is not None
    assert list(optimizer.qk_clip.layouts) == ["model.layers.1.self_attn"]
    assert optimizer.report.not_clipped == {
        "model.layers.0.self_attn": "it matches qk_clip_exclude"
    }


def test_heads_are_orthogonalized_separately_on_request() -> None:
    optimizer = for_model(llama(), per_head=True, report=None)
    layouts = {n: g["layout"] for g in optimizer.param_groups for n in g["param_names"]}
    assert layouts["model.layers.0.self_attn.q_proj.weight"] == MatrixLayout.per_head(24, 4)
    with pytest.raises(ValueError, match="per_head=True has no effect"):
        for_model(nn.Linear(4, 4), per_head=True, qk_clip_threshold=None)
    model = llama().requires_grad_(False)
    model.lm_head.requires_grad_(True)  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="no effect, because LlamaForCausalLM trains no queries"):
        for_model(model, per_head=True)


class Custom(nn.Module):
    """An attention that is not recognized and reports its queries and keys itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.observe: Any = None

    def forward(self, x: Tensor) -> Tensor:
        q, k = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k))
        if self.observe is not None:
            self.observe("", q, k)
        return (q @ k.mT).softmax(-1).square().mean()


def test_attention_that_is_not_recognized_is_reported_or_declared() -> None:
    with pytest.warns(UserWarning, match="found no attention layer in Linear"):
        assert for_model(nn.Linear(8, 8), report=None).qk_clip is None
    model = Custom()
    with pytest.warns(UserWarning, match="the logits of the model itself: its attention is"):
        assert for_model(model, report=None).qk_clip is None
    with pytest.warns(UserWarning, match=r"the logits of \*.attention \(2 layers\): its attention"):
        for_model(nn.ModuleList(nn.ModuleDict({"attention": Custom()}) for _ in "ab"), report=None)
    layouts = {"": AttentionLayout.separate(model.q, model.k, num_heads=2)}
    optimizer = for_model(model, qk_clip_threshold=0.01, attention_layouts=layouts, report=None)
    assert "2 heads to 0.01 (the model itself with 2 heads each)" in str(optimizer.report)
    assert optimizer.qk_clip is not None
    model.observe = optimizer.qk_clip.observe_attention
    model(torch.randn(2, 3, 8)).backward()
    optimizer.step()
    assert optimizer.qk_clip.result is not None
    assert optimizer.qk_clip.result.num_clipped == 2


def test_unknown_attention_next_to_known_attention_is_reported() -> None:
    """Text layers of GIT do not call transformers' registry, the layers of its images do."""
    small = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    vision = {**small, "image_size": 8, "patch_size": 4}
    model = transformers.GitForCausalLM(transformers.GitConfig(**small, vision_config=vision))
    unknown = [f"git.encoder.layer.{index}.attention.self" for index in range(2)]
    message = r"limit the logits of git.encoder.layer.\*.attention.self \(2 layers\): its attention"
    with pytest.warns(UserWarning, match=message):
        optimizer = for_model(model, report=None)
    assert optimizer.report is not None and optimizer.qk_clip is not None
    assert list(optimizer.report.not_clipped) == unknown
    assert len(optimizer.report.clipped) == 2
    text = model.git.encoder.layer
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer = for_model(model, qk_clip_exclude="git.encoder.*", report=None)
        assert optimizer.report is not None
        reasons = dict.fromkeys(unknown, "it matches qk_clip_exclude")
        assert optimizer.report.not_clipped == reasons
        layouts = {
            f"text {index}": AttentionLayout.separate(
                layer.attention.self.query, layer.attention.self.key, num_heads=4
            )
            for index, layer in enumerate(text)
        }
        optimizer = for_model(model, attention_layouts=layouts, report=None)
        assert optimizer.report is not None and optimizer.report.not_clipped == {}
        for layer in text:
            for projection in (layer.attention.self.query, layer.attention.self.key):
                projection.requires_grad_(False)
        optimizer = for_model(model, report=None)
        assert optimizer.report is not None and optimizer.report.not_clipped == {}


def shared(model: nn.Module, *projections: str, as_parameter: bool = False) -> nn.Module:
    """The model, whose first two layers share weights of their attention."""
    first, second = (layer.self_attn for layer in model.model.layers[:2])  # type: ignore[union-attr, index]
    for projection in projections:
        if as_parameter:
            getattr(second, projection).weight = getattr(first, projection).weight
        else:
            setattr(second, projection, getattr(first, projection))
    return model


@pytest.mark.parametrize("as_parameter", [False, True])
@pytest.mark.parametrize("projections", [["q_proj"], ["k_proj"], ["q_proj", "k_proj", "v_proj"]])
def test_layers_that_share_weights_are_reported(projections: list[str], as_parameter: bool) -> None:
    """A factor for the logits of one would scale those of the other; the rest is clipped."""
    config = transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 3})
    model = shared(transformers.LlamaForCausalLM(config), *projections, as_parameter=as_parameter)
    names = [f"model.layers.{index}.self_attn" for index in range(3)]
    with pytest.warns(UserWarning, match=r"\(2 layers\): its query or key weights are shared"):
        optimizer = for_model(model.train(), 0.01, qk_clip_threshold=1e-3, report=None)
    assert optimizer.report is not None and optimizer.qk_clip is not None
    assert list(optimizer.report.not_clipped) == names[:2]
    assert list(optimizer.qk_clip.layouts) == names[2:]
    train(model, optimizer)
    assert optimizer.qk_clip.result is not None and optimizer.qk_clip.result.num_clipped > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer = for_model(model, qk_clip_exclude=names[0], report=None)
        assert optimizer.qk_clip is not None and list(optimizer.qk_clip.layouts) == names[1:]
        for_model(model, qk_clip_threshold=None, report=None)
    # One layout for both, which the caller observes.
    attention: Any = model.get_submodule(names[0])
    layouts = {
        "shared": AttentionLayout.separate(
            attention.q_proj, attention.k_proj, num_heads=4, num_kv_groups=2
        )
    }
    with pytest.warns(UserWarning, match="its query or key weights are shared"):
        optimizer = for_model(model, attention_layouts=layouts, report=None)
    assert optimizer.qk_clip is not None
    assert list(optimizer.qk_clip.layouts) == ["shared", names[2]]


def test_layers_that_share_a_frozen_weight_are_clipped_by_the_other_side() -> None:
    config = transformers.LlamaConfig(**SMALL)
    model = shared(transformers.LlamaForCausalLM(config), "k_proj")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj" not in name)
    optimizer = for_model(model, report=None)
    assert optimizer.qk_clip is not None and len(optimizer.qk_clip.layouts) == 2


def test_frozen_attention_is_left_alone() -> None:
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" not in name)
    optimizer = for_model(model, report=None)
    assert optimizer.qk_clip is None and optimizer.report is not None
    assert set(optimizer.report.not_clipped.values()) == {"it is frozen"}
    with pytest.raises(ValueError, match="LlamaForCausalLM has no trainable parameter"):
        for_model(model.requires_grad_(False))


def test_bad_patterns_and_clips_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'\*.attn' matches no attention layer \(layers: model"):
        for_model(llama(), qk_clip_exclude="*.attn")
    with pytest.raises(ValueError, match="qk_clip_threshold must be above 0"):
        for_model(llama(), qk_clip_threshold=0.0)
    with pytest.raises(ValueError, match="adamw: the pattern 'x' matches no parameter"):
        for_model(llama(), adamw=["x"])
    with pytest.raises(TypeError, match="qk_clip must be a QKClip, got dict"):
        MuonClip(nn.Linear(2, 2).parameters(), qk_clip={})  # type: ignore[arg-type]


def test_an_optimizer_knows_the_clip_that_is_attached() -> None:
    model = llama()
    optimizer = for_model(model, report=None)
    clip = optimizer.qk_clip
    assert isinstance(clip, QKClip)
    assert copy.deepcopy(optimizer).qk_clip is None
    clip.remove()
    assert optimizer.qk_clip is None


def test_ddp_shares_the_work(tmp_path: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(llama())
        compiled: Any = torch.compile(ddp, backend="eager")
        assert for_model(compiled, report=None).process_group is ddp.process_group
        optimizer = for_model(ddp, report=None)
        assert optimizer.process_group is ddp.process_group
        train(ddp, optimizer)
        assert optimizer.qk_clip is not None and optimizer.qk_clip.result is not None
    finally:
        dist.destroy_process_group()


def test_weights_of_16_bits_need_a_remedy() -> None:
    model = llama().to(torch.bfloat16)
    with pytest.warns(UserWarning, match="in bfloat16, which rounds small updates away: set"):
        optimizer = for_model(model, report=None)
    assert "warning: trained parameters are in bfloat16" in str(optimizer.report)
    for_model(model, master_weights=True, report=None)
    for_model(model, master_weights=False, report=None)


class Quantized(nn.Module):
    """A linear layer of packed 4-bit weights with a plain LoRA, as other libraries write it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        packed = torch.randint(256, (outputs * inputs // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.out_features, self.in_features = outputs, inputs
        self.lora_down, self.lora_up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack([self.weight.remainder(16), self.weight // 16])
        weight = codes.float().view(self.out_features, self.in_features) / 8 - 1
        y: Tensor = nn.functional.linear(x, weight) + self.lora_up(self.lora_down(x))
        return y


def test_quantized_layers_are_left_alone_and_their_lora_is_trained() -> None:
    """B by Muon, A by AdamW; patterns change that."""
    model = llama().requires_grad_(False)
    for layer in model.model.layers:  # type: ignore[union-attr, operator]
        for projection in ("q_proj", "v_proj"):
            old = getattr(layer.self_attn, projection)
            setattr(layer.self_attn, projection, Quantized(old.out_features, old.in_features))
    with pytest.warns(UserWarning, match="cannot limit the logits of model.layers.*2 layers"):
        optimizer = for_model(model, 0.01, report=None)
    assert optimizer.qk_clip is None
    found = algorithms(optimizer)
    assert {a for n, a in found.items() if "lora_down" in n} == {"adamw"}
    assert {a for n, a in found.items() if "lora_up.weight" in n} == {"muon"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(found)
    assert not any(name.endswith("_proj.weight") for name in changed)
    optimizer = for_model(
        model, muon=["*lora_down*"], adamw=["*lora_up*"], qk_clip_threshold=None, report=None
    )
    found = algorithms(optimizer)
    assert {a for n, a in found.items() if "lora_down" in n} == {"muon"}
    assert {a for n, a in found.items() if "lora_up" in n} == {"adamw"}


class Linear4bit(nn.Linear):
    """A layer with the storage of bitsandbytes: a frozen column of packed weights."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.unpacked = layer.weight.detach()
        self.weight = nn.Parameter(
            torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpacked)


def quantized(model: nn.Module) -> nn.Module:
    """The model, whose linear layers except for adapters and the head are in 4 bits."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lora" not in name and "head" not in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Linear4bit(module))
    return model


MLA = SMALL | {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8}
MLA |= {"qk_rope_head_dim": 2, "qk_nope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 2}


@pytest.mark.parametrize("kind", ["Llama", "Phi3", "DeepseekV3", "Qwen3"])
def test_quantized_layers_of_every_structure_are_left_alone(kind: str) -> None:
    options = MLA if kind == "DeepseekV3" else SMALL | {"pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**options)
    model = quantized(transformers.AutoModelForCausalLM.from_config(config)).train()
    model.requires_grad_(False)
    norms = {name for name, _ in model.named_parameters() if "layernorm.weight" in name}
    for name in norms:
        model.get_parameter(name).requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer = for_model(model, report=None)
        for_model(model, qk_clip_threshold=None, report=None)
    assert algorithms(optimizer) == dict.fromkeys(norms, "adamw")
    assert optimizer.qk_clip is None
    train(model, optimizer)


@pytest.mark.parametrize("packed", [False, True])
def test_lora_over_frozen_weights_is_not_clipped(packed: bool) -> None:
    """The reason is the same for quantized weights."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(llama(), config).train()
    if packed:
        quantized(model)
    reason = "query: it is trained through LoRA over a frozen weight.*key: its weights are frozen"
    with pytest.warns(UserWarning, match=reason):
        optimizer = for_model(model, report=None)
    assert optimizer.qk_clip is None
    train(model, optimizer)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Phi3"])
def test_dora_is_clipped_through_its_magnitudes(
    kind: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{kind}Config")(**SMALL, pad_token_id=0)
    )
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "qkv_proj"], use_dora=True)
    model = peft.get_peft_model(model, config).train()
    if packed:
        quantized(model)
        monkeypatch.setattr(
            peft.tuners.lora.dora, "dequantize_module_weight", lambda layer: layer.unpacked
        )
    optimizer = for_model(model, 0.01, qk_clip_threshold=0.01, report=None)
    train(model, optimizer)
    assert optimizer.qk_clip is not None and optimizer.qk_clip.result is not None
    assert optimizer.qk_clip.result.num_clipped > 0


def test_copies_that_peft_trains_are_split_as_the_model_is() -> None:
    peft = pytest.importorskip("peft")
    config = transformers.Phi3Config(**SMALL, pad_token_id=0)
    model = peft.get_peft_model(
        transformers.Phi3ForCausalLM(config),
        peft.LoraConfig(
            r=2, target_modules=["o_proj"], modules_to_save=["qkv_proj", "gate_up_proj"]
        ),
    ).train()
    expected = {
        False: {MatrixLayout((24, 12, 12)), MatrixLayout((32, 32)), None},
        True: {MatrixLayout.per_head(48, 8), MatrixLayout((32, 32)), None},
    }
    for per_head, layouts in expected.items():
        optimizer = for_model(model, per_head=per_head, report=None)
        assert {group["layout"] for group in optimizer.param_groups} == layouts
        assert optimizer.qk_clip is not None and len(optimizer.qk_clip.layouts) == 2
        train(model, optimizer)


def test_unknown_fused_layers_need_a_layout_if_they_are_trained() -> None:
    model = llama()
    layer: Any = model.model.layers[1]  # type: ignore[union-attr, index]
    layer.attn_qkv = nn.Linear(24, 100)
    name = "model.layers.1.attn_qkv.weight"
    with pytest.raises(ValueError, match=r"matrices that it fuses .* layouts=") as error:
        for_model(model, report=None)
    assert f"{{'{name}': MatrixLayout()}}" in str(error.value)
    assert "exclude" not in str(error.value)
    assert algorithms(for_model(model, layouts={name: MatrixLayout()}, report=None))[name] == "muon"
    larger = nn.ModuleDict({"part": model})
    with pytest.raises(ValueError, match=rf"^part\.{name} of .*layouts={{'part\.{name}'"):
        for_model(larger, report=None)
    layer.attn_qkv.requires_grad_(False)
    assert name not in algorithms(for_model(model, report=None))


def test_other_adapters_go_to_adamw() -> None:
    """Also rotations that are stored as matrices; what an adapter trains whole goes to Muon."""
    peft = pytest.importorskip("peft")
    config = peft.OFTConfig(
        r=0, oft_block_size=4, target_modules=["q_proj"], modules_to_save=["down_proj"]
    )
    optimizer = for_model(peft.get_peft_model(llama(), config), qk_clip_threshold=None, report=None)
    found = algorithms(optimizer)
    assert {a for n, a in found.items() if "oft_R" in n} == {"adamw"}
    assert {a for n, a in found.items() if "modules_to_save" in n} == {"muon"}


def test_lora_of_a_stack_of_experts_goes_to_adamw() -> None:
    """Its B has the columns of all experts; of a single matrix it is a factor as any other."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=[*experts, "o_proj.weight"]
    )
    model = peft.get_peft_model(transformers.MixtralForCausalLM(config), lora).train()
    optimizer = for_model(model, qk_clip_threshold=None, report=None)
    assert optimizer.report is not None
    b = {n: choice for n, choice in optimizer.report.assignments.items() if "lora_B" in n}
    reasons = {choice for name, choice in b.items() if "experts" in name}
    assert reasons == {("adamw", "LoRA's B of several experts")}
    assert {choice[0] for name, choice in b.items() if "experts" not in name} == {"muon"}
    assert sum("experts" in name for name in b) == sum("self_attn" in name for name in b) == 4
    train(model, optimizer)


def test_adalora_goes_to_adamw_and_is_not_clipped() -> None:
    """Its factors are of a singular value decomposition."""
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(init_r=4, target_modules=["q_proj", "o_proj"], total_step=10)
    model = peft.get_peft_model(llama(), config).train()
    with pytest.warns(UserWarning, match="the rows of its adalora adapter cannot be"):
        optimizer = for_model(model, report=None)
    assert optimizer.qk_clip is None
    found = algorithms(optimizer)
    assert {name.split("lora_")[1][0] for name in found} == set("ABE")
    assert set(found.values()) == {"adamw"}
    train(model, optimizer)


@pytest.mark.parametrize("frozen", [["q_proj"], ["q_proj", "k_proj"]])
def test_a_trained_side_that_cannot_be_clipped_is_warned_of(frozen: list[str]) -> None:
    """Keys alone let the logits grow; frozen queries and keys do not."""
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = for_model(model, report=None)
    assert optimizer.qk_clip is None and optimizer.report is not None
    assert len(optimizer.report.not_clipped) == 2
    expected = ["QK-Clip cannot limit the logits of model.layers.*.self_attn (2 layers): query"]
    found = [str(warning.message).split(": its")[0] for warning in caught]
    assert found == (expected if len(frozen) == 1 else [])


def test_a_norm_of_queries_and_keys_without_gains_is_recognized() -> None:
    config = transformers.Llama4TextConfig(
        **SMALL, head_dim=6, intermediate_size_mlp=32, num_local_experts=2, no_rope_layers=[1, 0]
    )
    model = transformers.Llama4ForCausalLM(config).train()
    optimizer = for_model(model, 0.01, qk_clip_threshold=1e-3, report=None)
    assert optimizer.qk_clip is not None and optimizer.report is not None
    assert list(optimizer.qk_clip.layouts) == ["model.layers.1.self_attn"]
    assert "normalized" in optimizer.report.not_clipped["model.layers.0.self_attn"]
    train(model, optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_clip_threshold": "100"}, "qk_clip_threshold must be a number, got '100'"),
        ({"qk_clip_exclude": None}, "qk_clip_exclude must be a pattern or a list of patterns"),
        ({"attention_layouts": {"x": 3}}, "layouts must map names to AttentionLayout"),
        ({"attention_layouts": ["x"]}, "layouts must map names to AttentionLayout"),
        ({"layouts": {"*.q_proj.weight": 5}}, r"layouts: '\*.q_proj.weight' needs a MatrixLayout"),
        ({"adamw": [3]}, "adamw must contain patterns of names, got 3"),
        ({"report": False}, "report must be a function that is called with the text, or None"),
        ({"qk_clip": None}, "for_model makes qk_clip itself"),
        ({"params": []}, "for_model makes params itself"),
    ],
)
def test_arguments_of_another_type_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        for_model(llama(), **{"report": None, **options})


def test_a_model_instead_of_parameters_is_refused() -> None:
    message = r"^params must be .* got the model Linear: give model.named_parameters\(\)"
    with pytest.raises(TypeError, match=message) as error:
        MuonClip(nn.Linear(4, 4))  # type: ignore[arg-type]
    assert "param_groups(model)" in str(error.value) and "for_model(model)" in str(error.value)


@pytest.mark.parametrize("name", ["a", "layer", "it", "attention", "adds"])
def test_the_names_of_layers_do_not_change_the_words_of_a_warning(name: str) -> None:
    model = nn.ModuleDict({name: nn.MultiheadAttention(8, 2, add_bias_kv=True)})
    with pytest.warns(UserWarning) as caught:
        for_model(model, report=None)
    (message,) = (str(warning.message) for warning in caught)
    assert message.startswith(
        f"QK-Clip cannot limit the logits of {name}: add_bias_kv adds a key without a projection, "
        "which QK-Clip would not scale with the others: build the layer with add_bias_kv=False"
    )


def test_what_is_not_a_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, got generator: give it"):
        for_model(llama().parameters())  # type: ignore[arg-type]


def test_options_of_a_clip_that_has_no_effect_are_refused() -> None:
    model = Custom()
    layouts = {"": AttentionLayout.separate(model.q, model.k, num_heads=2)}
    for options in ({"qk_clip_exclude": "*"}, {"attention_layouts": layouts}):
        with pytest.raises(ValueError, match="has no effect with qk_clip_threshold=None"):
            for_model(model, qk_clip_threshold=None, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="qk_clip_threshold must be above 0 and finite, got -1"):
        for_model(nn.Linear(2, 2), qk_clip_threshold=-1)


def test_memory_is_estimated_without_qk_clip() -> None:
    """Tensors without values have no logits."""
    with FakeTensorMode():
        model = llama()
        with pytest.warns(UserWarning, match="no values under FakeTensorMode: leave QK-Clip out"):
            optimizer = for_model(model, report=None)
        train(model, optimizer)
    assert optimizer.qk_clip is None
    assert all(state.keys() & {"momentum_buffer", "exp_avg"} for state in optimizer.state.values())
