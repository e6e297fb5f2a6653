"""QK-Clip scales only trained weights of its model."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonclip import AttentionLayout, MaxLogitMonitor, MuonClip, QKClip
from muonclip.adapters import base_layer, effective
from tests.muonclip.test_qk_clip import (
    HIDDEN,
    KINDS,
    THRESHOLD,
    Attention,
    Fused,
    Separate,
    scenario,
)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def step(attention: Attention, x: Tensor, clip: QKClip) -> Any:
    clip.observe("layer", attention.largest(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return clip.step()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    frozen=st.sets(st.integers(0, 5)),
)
def test_frozen_weights_do_not_change_and_clipped_heads_are_exact(
    kind: type[Attention], groups: int, per_group: int, seed: int, frozen: set[int]
) -> None:
    """Whichever parameters are frozen: every head comes down exactly, or the layer is reported and
    not a bit of it changes."""
    attention, x = scenario(kind, groups * per_group, groups, seed)
    for index, parameter in enumerate(attention.parameters()):
        parameter.requires_grad_(index not in frozen)
    before, logits, largest = bits(attention), attention(x).detach(), attention.largest(x)
    clip = QKClip({"layer": attention.layout}, threshold=THRESHOLD)
    result = step(attention, x, clip)
    for name, parameter in attention.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name])
    if result.skipped:
        assert not changed(attention, before) and result.num_clipped == 0
        assert (result.factors["layer"] == 1).all()
    else:
        gamma = (THRESHOLD / largest).where(largest > THRESHOLD, 1.0)
        assert torch.allclose(attention(x), logits * gamma[:, None, None], rtol=1e-5, atol=1e-5)
        assert result.num_clipped == (largest > THRESHOLD).sum()
    assert torch.allclose(result.max_logits["layer"].double(), largest, rtol=1e-6)


@pytest.mark.parametrize(
    ("heads", "groups", "frozen", "scaled"),
    [
        (4, 2, "k", {"q.weight", "q.bias"}),  # the query takes the whole factor
        (4, 4, "q", {"k.weight", "k.bias"}),  # as does a key that one query head uses
        (4, 2, "q", set()),  # a shared key cannot
        (4, 2, "qk", set()),
        (4, 4, "k.bias", {"q.weight", "q.bias"}),
        (4, 4, "q.bias", {"k.weight", "k.bias"}),
        (4, 2, "q.bias", set()),
    ],
)
def test_the_trained_projection_takes_the_factor_if_that_is_exact(
    heads: int, groups: int, frozen: str, scaled: set[str]
) -> None:
    attention, x = scenario(Separate, heads, groups, seed=3)
    for name, parameter in attention.named_parameters():
        if name == frozen or name.split(".")[0] in frozen:
            parameter.requires_grad_(False)
    before = bits(attention)
    clip = QKClip({"layer": attention.layout}, threshold=THRESHOLD)
    result = step(attention, x, clip)
    assert changed(attention, before) == scaled
    assert bool(result.skipped) == (not scaled)


def test_layers_can_be_frozen_and_unfrozen() -> None:
    """Gradual unfreezing: ``requires_grad`` at the step decides."""
    attention, x = scenario(Separate, 4, 4, seed=3)
    attention.requires_grad_(False)
    clip = QKClip({"layer": attention.layout}, threshold=THRESHOLD)
    before = bits(attention)
    step(attention, x, clip)
    assert not changed(attention, before)
    attention.k.requires_grad_(True)
    result = step(attention, x, clip)
    assert changed(attention, before) == {"k.weight", "k.bias"} and not result.skipped
    attention.q.requires_grad_(True)
    attention.k.requires_grad_(False)
    before = bits(attention)
    clip.observe("layer", torch.full((4,), 4 * THRESHOLD))
    clip.step()
    assert changed(attention, before) == {"q.weight", "q.bias"}


def test_a_frozen_layer_is_reported_once_and_still_observed() -> None:
    attention, x = scenario(Separate, 4, 2, seed=3)
    attention.requires_grad_(False)
    clip = QKClip({"layer": attention.layout}, threshold=THRESHOLD)
    monitor = MaxLogitMonitor(clip)
    with pytest.warns(UserWarning, match="does not scale layer: its query and key weights are fro"):
        clip.observe("layer", attention.largest(x))
        result = clip.step()
    assert "frozen" in result.skipped["layer"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip.observe("layer", attention.largest(x))
        clip.step()
    assert torch.allclose(monitor.latest["layer"].double(), attention.largest(x), rtol=1e-6)


def test_frozen_layers_may_share_a_weight() -> None:
    attention, _ = scenario(Separate, 4, 2, seed=3)
    attention.requires_grad_(False)
    clip = QKClip({"a": attention.layout, "b": attention.layout})
    attention.requires_grad_(True)
    with pytest.raises(ValueError, match="'a' and 'b' share a weight"):
        clip.step()


def test_views_of_a_parameter_are_trained_with_it() -> None:
    fused = nn.Parameter(torch.randn(12, HIDDEN))
    layout = AttentionLayout.separate(
        lambda: (fused[:4], None), lambda: (fused[4:8], None), num_heads=2
    )
    clip = QKClip({"layer": layout}, threshold=1.0)
    before = fused.detach().clone()
    clip.observe("layer", torch.tensor([4.0, 4.0]))
    clip.step()
    assert torch.allclose(fused[:8], before[:8] * 0.5)
    fused.requires_grad_(False)
    before = fused.detach().clone()
    clip.observe("layer", torch.tensor([4.0, 4.0]))
    with pytest.warns(UserWarning, match="frozen"):
        clip.step()
    assert torch.equal(fused, before)


def weight_norm(attention: Attention) -> None:
    nn.utils.parametrizations.weight_norm(attention.q)


def old_weight_norm(attention: Attention) -> None:
    nn.utils.weight_norm(attention.q)


def spectral_norm(attention: Attention) -> None:
    nn.utils.parametrizations.spectral_norm(attention.q)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("compute", [weight_norm, old_weight_norm, spectral_norm])
def test_a_computed_weight_is_refused(compute: Callable[[Attention], None]) -> None:
    """Scaling the result of a parametrization would change nothing."""
    attention, x = scenario(Separate, 4, 2, seed=3)
    clip = QKClip({"layer": attention.layout}, threshold=THRESHOLD)
    compute(attention)
    with pytest.raises(ValueError, match=r"'layer' is trained, but .*computed from other"):
        QKClip({"layer": attention.layout})
    with pytest.raises(ValueError, match=r"'layer' is trained, but .*computed from other"):
        step(attention, x, clip)


class OwnLoRA(nn.Linear):
    """LoRA as in other libraries: matrices in the layer, a frozen weight."""

    def __init__(self, rows: int) -> None:
        super().__init__(HIDDEN, rows, bias=False)
        self.weight.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(HIDDEN, 2), nn.Linear(2, rows)


def test_other_adapters_are_refused() -> None:
    attention, _ = scenario(Separate, 4, 2, seed=3)
    attention.q = OwnLoRA(16)
    layout = AttentionLayout.separate(attention.q, attention.k, num_heads=4, num_kv_groups=2)
    with pytest.raises(
        ValueError, match=r"'layer' is trained, but .*matrices other than its weight"
    ):
        QKClip({"layer": layout})
    attention.requires_grad_(False)
    QKClip({"layer": layout})  # frozen altogether


# ---------------------------------------------------------------------- PEFT


class Projected(nn.Module):
    """Separate projections, named as PEFT's targets, with layouts that follow replaced modules."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.q_proj = nn.Linear(HIDDEN, 16, bias=bias)
        self.k_proj = nn.Linear(HIDDEN, 16, bias=bias)
        self.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        query, key = (
            p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj)
        )
        return query @ key.mT / 2

    def layout(self) -> AttentionLayout:
        return AttentionLayout.separate(
            partial(getattr, self, "q_proj"), partial(getattr, self, "k_proj"), num_heads=4
        )


def adapted(config: Any, bias: bool = False) -> tuple[Projected, Tensor]:
    peft = pytest.importorskip("peft")
    attention = Projected(bias)
    peft.inject_adapter_in_model(config, attention)
    attention.double()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if parameter.requires_grad or "lora" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return attention, torch.randn(2, 7, HIDDEN, dtype=torch.float64, generator=generator)


def clipped_exactly(attention: Projected, x: Tensor) -> set[str]:
    """Clip at half of the largest logit, and return the names of changed parameters."""
    logits = attention(x).detach()
    largest = logits.amax((0, 2, 3))
    threshold = float(largest.sort().values[1])
    before = bits(attention)
    clip = QKClip({"layer": attention.layout()}, threshold=threshold)
    clip.observe("layer", largest)
    result = clip.step()
    for name, parameter in attention.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name])
    assert not result.skipped
    gamma = (threshold / largest).clamp(max=1)
    assert torch.allclose(attention(x), logits * gamma[:, None, None], rtol=1e-5, atol=1e-5)
    return changed(attention, before)


def lora(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"r": 3, "target_modules": ["q_proj", "k_proj"], **options})


@pytest.mark.parametrize(
    ("options", "bias"),
    [
        ({}, False),
        ({"use_rslora": True}, False),
        ({"lora_bias": True}, True),
        ({"bias": "all"}, True),
        ({"target_modules": ["q_proj"]}, False),  # the frozen key cannot take the factor
        ({"use_dora": True}, True),  # the frozen bias is not scaled by the magnitude
        ({"init_lora_weights": "pissa"}, False),
        # The frozen weight multiplies the input without dropout, too, and the magnitude does not.
        ({"use_dora": True, "lora_dropout": 0.1}, False),
    ],
)
def test_lora_over_a_frozen_weight_is_refused(options: dict[str, Any], bias: bool) -> None:
    """No B' satisfies gamma (W + sBA) = W + sB'A, so nothing is scaled."""
    attention, _ = adapted(lora(**options), bias)
    before = bits(attention)
    with pytest.raises(ValueError, match="'layer' is trained, but QK-Clip cannot scale its logits"):
        QKClip({"layer": attention.layout()})
    assert not changed(attention, before)


def test_lora_added_after_the_clip_is_refused_at_the_step() -> None:
    peft = pytest.importorskip("peft")
    attention = Projected()
    clip = QKClip({"layer": attention.layout()}, threshold=1.0)
    peft.inject_adapter_in_model(lora(), attention)
    before = bits(attention)
    clip.observe("layer", torch.full((4,), 9.0))
    with pytest.raises(ValueError, match="trained through LoRA"):
        clip.step()
    assert not changed(attention, before)


def test_dora_is_scaled_by_its_magnitudes() -> None:
    names = clipped_exactly(*adapted(lora(use_dora=True)))
    assert names == {f"{p}.lora_magnitude_vector.default.weight" for p in ("q_proj", "k_proj")}


def test_lora_over_a_trained_weight_is_scaled_with_it() -> None:
    attention, x = adapted(lora(lora_bias=True), bias=True)
    attention.requires_grad_(True)
    names = clipped_exactly(attention, x)
    assert {name.split(".", 1)[1] for name in names} == {
        "base_layer.weight", "base_layer.bias", "lora_B.default.weight", "lora_B.default.bias",
    }  # fmt: skip


def test_ia3_is_scaled_by_its_vectors() -> None:
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(target_modules=["q_proj", "k_proj"], feedforward_modules=[])
    names = clipped_exactly(*adapted(config, bias=True))
    assert names == {f"{p}.ia3_l.default" for p in ("q_proj", "k_proj")}


def test_ia3_on_the_key_alone_takes_the_whole_factor() -> None:
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    assert clipped_exactly(*adapted(config)) == {"k_proj.ia3_l.default"}


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "OFTConfig", "VeraConfig"])
def test_unknown_adapters_are_refused(kind: str) -> None:
    peft = pytest.importorskip("peft")
    options = {"OFTConfig": {"oft_block_size": 4}, "VeraConfig": {"r": 4}}.get(kind, {"r": 4})
    config = getattr(peft, kind)(target_modules=["q_proj", "k_proj"], **options)
    attention = Projected()
    peft.get_peft_model(nn.ModuleDict({"attention": attention}), config)
    with pytest.raises(ValueError, match="'layer' is trained, but QK-Clip cannot scale"):
        QKClip({"layer": attention.layout()})


def test_inactive_adapters_are_ignored() -> None:
    """Disabled, merged, or another adapter active: only the frozen weight determines the logits."""
    attention, _ = adapted(lora())
    layers: list[Any] = [attention.q_proj, attention.k_proj]
    for layer in layers:
        layer.enable_adapters(False)
    QKClip({"layer": attention.layout()})
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    clip = QKClip({"layer": attention.layout()}, threshold=1.0)
    before = bits(attention)
    clip.observe("layer", torch.full((4,), 9.0))
    with pytest.warns(UserWarning, match="frozen"):
        clip.step()
    assert not changed(attention, before)
    attention.requires_grad_(True)
    with pytest.raises(ValueError, match="merged into its weight"):
        QKClip({"layer": attention.layout()})


def test_only_the_active_adapter_is_scaled() -> None:
    attention, x = adapted(lora(use_dora=True))
    layers: list[Any] = [attention.q_proj, attention.k_proj]
    for layer in layers:
        layer.update_layer("second", r=2, lora_alpha=4, config=lora(r=2))
    clipped_exactly(attention, x)
    for layer in layers:
        layer.set_adapter("second")
    with pytest.raises(ValueError, match="trained through LoRA"):
        QKClip({"layer": attention.layout()})


def test_projections_in_modules_to_save_are_scaled() -> None:
    peft = pytest.importorskip("peft")
    attention = Projected(bias=True)
    model: Any = peft.get_peft_model(
        nn.ModuleDict({"attention": attention, "other": nn.Linear(3, 3)}),
        peft.LoraConfig(target_modules=["other"], modules_to_save=["q_proj", "k_proj"]),
    )
    attention = model.base_model.model["attention"].double()
    names = clipped_exactly(attention, torch.randn(2, 7, HIDDEN, dtype=torch.float64))
    assert {name.split(".", 1)[1] for name in names} == {
        "modules_to_save.default.weight", "modules_to_save.default.bias",
    }  # fmt: skip
    assert isinstance(base_layer(attention.q_proj), nn.Linear)
    assert effective(attention.q_proj).adapter == ""


# ---------------------------------------------------------------------- copies


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled])
@pytest.mark.parametrize("kind", [Separate, Fused])
def test_the_clip_in_a_copied_model_scales_the_copy(
    kind: type[Attention], make_copy: Callable[[Any], Any]
) -> None:
    attention, x = scenario(kind, 4, 2, seed=3)
    clip = QKClip({"layer": attention.layout}, threshold=THRESHOLD)
    optimizer = MuonClip(attention.named_parameters(), lr=0.1)
    clip.attach(optimizer)
    clip.register_step_post_hook(lambda result: pytest.fail("a hook of the original ran"))
    clip.observe("layer", attention.largest(x))  # what the original saw, a copy did not
    attention.observe = partial(clip.observe, "layer")  # type: ignore[assignment]
    twin = make_copy(attention)
    before, logits = bits(attention), twin(x).detach()
    copied_clip = twin.observe.func.__self__
    largest = twin.largest(x)
    twin.observe(largest)
    copied_clip.step()
    gamma = (THRESHOLD / largest).clamp(max=1)
    assert torch.allclose(twin(x), logits * gamma[:, None, None], rtol=1e-5, atol=1e-5)
    assert not changed(attention, before)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled])
def test_a_copied_layout_that_reads_the_original_model_is_refused(
    make_copy: Callable[[Any], Any],
) -> None:
    """A plain function cannot be redirected to the copy and must not change the original."""
    attention, x = scenario(Separate, 4, 2, seed=3)
    layout = AttentionLayout.separate(
        lambda: (attention.q.weight, attention.q.bias), lambda: attention.k,
        num_heads=4, num_kv_groups=2,
    )  # fmt: skip
    clip = QKClip({"layer": layout}, threshold=THRESHOLD)
    attention.clip = clip  # type: ignore[assignment]
    before = bits(attention)
    twin = make_copy(attention)
    with pytest.raises(ValueError, match="still reads the weights of the original"):
        twin.clip.observe("layer", twin.largest(x))
        twin.clip.step()
    assert not changed(attention, before)
    assert step(attention, x, clip).num_clipped > 0


def test_a_copied_monitor_records_the_copied_clip() -> None:
    attention, _ = scenario(Separate, 4, 2, seed=3)
    clip = QKClip({"layer": attention.layout})
    monitor = MaxLogitMonitor(clip)
    clip.step()
    for make_copy in (copy.deepcopy, pickled):
        clip_copy, monitor_copy = make_copy((clip, monitor))
        clip_copy.observe("layer", torch.ones(4))
        clip_copy.step()
        assert monitor_copy.steps == 2 and (monitor_copy.latest["layer"] == 1).all()
    assert monitor.steps == 1 and (monitor.latest["layer"] == -math.inf).all()


def test_a_copied_optimizer_has_no_clip_attached() -> None:
    attention, _ = scenario(Separate, 4, 2, seed=3)
    optimizer = MuonClip(attention.named_parameters(), lr=0.1)
    clip = QKClip({"layer": attention.layout}, threshold=1.0)
    clip.attach(optimizer)
    for make_copy in (copy.deepcopy, pickled):
        twin = make_copy(optimizer)
        clip.observe("layer", torch.full((4,), 9.0))
        twin.zero_grad()
        twin.step()
        assert clip.result is None
