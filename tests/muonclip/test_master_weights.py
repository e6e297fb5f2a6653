"""Master copies adopt weights that are written between steps."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonclip import AttentionLayout, MuonClip, QKClip, param_groups
from muonclip.precision import refresh_master


def build(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).to(dtype)


def optimizer_of(model: nn.Module, **options: Any) -> MuonClip:
    common = {"lr": 1e-2, "weight_decay": 0.0, "master_weights": True}
    return MuonClip(param_groups(model), **{**common, **options})


def train(model: nn.Module, optimizer: MuonClip, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def copy_in_place(model: nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])


def copy_data_in_place(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.data.copy_(weights[name])


def replace_data(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.data = weights[name].clone()


def load_state_dict(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.load_state_dict(weights)


def load_flat_vector(model: nn.Module, weights: dict[str, Tensor]) -> None:
    flat = torch.cat([weights[name].flatten() for name, _ in model.named_parameters()])
    nn.utils.vector_to_parameters(flat, model.parameters())


WRITES = (copy_in_place, copy_data_in_place, replace_data, load_state_dict, load_flat_vector)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["decoupled", "l2"])
def test_training_continues_from_weights_written_between_steps(
    write: Callable[..., None], dtype: torch.dtype, mode: str
) -> None:
    """SkyRL#2149, apex#42: like a model that always had these weights and this momentum."""
    model = build(dtype)
    optimizer = optimizer_of(model, weight_decay=0.1, weight_decay_mode=mode)
    train(model, optimizer, 5)
    fresh = build(dtype, seed=1)
    wanted = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    reference = optimizer_of(fresh, weight_decay=0.1, weight_decay_mode=mode)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state.pop("master")
    reference.load_state_dict(copy.deepcopy(saved))
    write(model, wanted)
    train(model, optimizer, 2, seed=1)
    train(fresh, reference, 2, seed=1)
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["master"], reference.state[b]["master"])
        assert a.main_param is optimizer.state[a]["master"]


@pytest.mark.parametrize("write", WRITES)
def test_swapping_averaged_weights_in_and_out_changes_nothing(write: Callable[..., None]) -> None:
    """Evaluation with averaged weights, which are removed before the next step."""
    straight, swapped = build(), build()
    first, second = optimizer_of(straight, lr=1e-4), optimizer_of(swapped, lr=1e-4)
    for part in range(3):
        train(straight, first, 3, seed=part)
        train(swapped, second, 3, seed=part)
        own = {name: p.detach().clone() for name, p in swapped.named_parameters()}
        write(swapped, {name: p.detach() * 0.5 for name, p in swapped.named_parameters()})
        write(swapped, own)
    for a, b in zip(straight.parameters(), swapped.parameters(), strict=True):
        assert torch.equal(first.state[a]["master"], second.state[b]["master"])


@pytest.mark.parametrize("write", WRITES)
def test_qk_clip_scales_weights_written_since_the_last_step(write: Callable[..., None]) -> None:
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)}).to(torch.bfloat16)
    layout = AttentionLayout.separate(model["q"], model["k"], num_heads=2)
    clip = QKClip({"layer": layout}, threshold=1.0)
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    loaded = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    write(model, loaded)
    clip.observe("layer", torch.tensor([16.0, 1.0]))  # a factor of 1/4 on the first head's rows
    clip.step()
    factor = torch.tensor([0.25] * 4 + [1.0] * 4, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        wanted = loaded[name] * (factor[:, None] if p.ndim == 2 else factor)
        assert torch.equal(p, wanted)
        assert torch.equal(optimizer.state[p]["master"], wanted.float())


@pytest.mark.parametrize("order", ["model first", "optimizer first", "optimizer only"])
def test_model_and_optimizer_can_be_loaded_in_any_order(order: str) -> None:
    model = build()
    optimizer = optimizer_of(model)
    train(model, optimizer, 4)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    other = build(seed=1)
    loaded = optimizer_of(other)
    train(other, loaded, 2, seed=9)
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    if order == "model first":
        other.load_state_dict(weights)
    loaded.load_state_dict(state)
    if order == "optimizer first":
        other.load_state_dict(weights)
    for group in loaded.param_groups + optimizer.param_groups:
        group["lr"] = 1e-6
    train(other, loaded, 1, seed=2)
    train(model, optimizer, 1, seed=2)
    for (name, a), b in zip(other.named_parameters(), model.parameters(), strict=True):
        if order == "optimizer only":  # the weights of the model count
            assert torch.allclose(a, before[name], atol=1e-4, rtol=2**-7)
        else:
            assert torch.equal(loaded.state[a]["master"], optimizer.state[b]["master"])


@settings(max_examples=50, deadline=None)
@given(
    changed=st.lists(st.integers(0, 23), max_size=24),
    value=st.sampled_from([0.0, -0.0, 1.0, float("nan"), float("inf"), 1e-40, 3e38]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_only_written_entries_are_adopted(
    changed: list[int], value: float, dtype: torch.dtype, seed: int
) -> None:
    master = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    param = master.to(dtype)
    expected = master.clone()
    for index in changed:
        if param.view(-1)[index] != value:
            param.view(-1)[index] = value
            expected.view(-1)[index] = param.view(-1)[index]
    refresh_master(master, param)
    torch.testing.assert_close(master, expected, rtol=0, atol=0, equal_nan=True)


def test_a_converted_model_loses_or_gains_its_masters() -> None:
    model = build()
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    model.float()
    weights = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 1)
    for p, weight in zip(model.parameters(), weights, strict=True):
        assert torch.equal(p, weight)
        assert "master" not in optimizer.state[p] and not hasattr(p, "main_param")
    model.bfloat16()
    train(model, optimizer, 1)
    for p in model.parameters():
        assert p.main_param is optimizer.state[p]["master"]
        assert torch.equal(p.float(), optimizer.state[p]["master"])


@pytest.mark.parametrize("form", [True, "remainder"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("next_form", [False, True, "remainder"])
def test_masters_of_an_earlier_optimizer_are_not_scaled(
    form: Any, dtype: torch.dtype, is_saved: bool, next_form: Any
) -> None:
    """They stay attached to the parameters, also in a saved model: training continues as with
    parameters that had none."""
    if dtype != torch.bfloat16 and next_form == "remainder":
        next_form = True
    model = build()
    first = optimizer_of(model, master_weights=form)
    train(model, first, 2)
    if is_saved:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    other = build()
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        each.to(dtype)
        layout = AttentionLayout.separate(each[0], each[2], num_heads=2, num_kv_groups=1)
        clip = QKClip({"a": layout}, threshold=1.0)
        optimizer = optimizer_of(each, master_weights=next_form)
        for step in range(3):
            clip.observe("a", torch.tensor([3.0, 0.5]))
            train(each, optimizer, 1, seed=step)
            clip.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert hasattr(p, "main_param") == (bool(next_form) and dtype != torch.float32)


def test_an_earlier_optimizer_that_steps_again_has_its_masters_back() -> None:
    model = build()
    first = optimizer_of(model)
    train(model, first, 1)
    optimizer_of(model, master_weights=False)
    train(model, first, 1)
    assert all(p.main_param is first.state[p]["master"] for p in model.parameters())


def test_a_copied_optimizer_has_separate_masters() -> None:
    model = build()
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert q.main_param is twin.state[q]["master"] is not optimizer.state[p]["master"]
    before = [optimizer.state[p]["master"].clone() for p in model.parameters()]
    train(twin_model, twin, 2, seed=3)
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(optimizer.state[p]["master"], b)


def test_main_param_of_another_optimizer_is_not_changed() -> None:
    """Megatron's optimizers store their masters there."""
    (p,) = params = [nn.Parameter(torch.ones(4, 4))]
    foreign = torch.ones(4, 4)
    p.main_param = foreign  # type: ignore[attr-defined]
    optimizer = MuonClip(params)
    p.grad = torch.ones(4, 4)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert p.main_param is foreign  # type: ignore[attr-defined]


def test_qk_clip_scales_loaded_weights_and_not_the_old_master() -> None:
    attention = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("q", "k")})
    attention.bfloat16()
    train(attention, optimizer_of(attention), 1)
    q = attention["q"].weight
    clip = QKClip(
        {"a": AttentionLayout.separate(attention["q"], attention["k"], num_heads=2)}, threshold=1.0
    )
    loaded = {name: torch.randn_like(w) for name, w in attention.state_dict().items()}
    attention.load_state_dict(loaded)
    clip.observe("a", torch.tensor([16.0, 0.5]))
    clip.step()
    expected = loaded["q.weight"].float()
    expected[:4] /= 4.0  # exact in bfloat16
    assert torch.equal(q.float(), expected)
    assert torch.equal(q.main_param, expected)
