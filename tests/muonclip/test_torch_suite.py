"""The cases of PyTorch's own optimizer suite (test/test_optim.py) that apply, on MuonClip.

Inputs, error inputs and schedulers come from the installed ``torch.testing``, from its entries for
AdamW and Muon, so that those a new version of torch adds are run as well.
"""

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import muonclip.muon
from muonclip import MuonClip

pytest.importorskip("expecttest", reason="torch.testing._internal needs it: install muonclip[test]")
with pytest.MonkeyPatch.context() as patch:
    # On import it freezes torch.backends, for all tests of this process.
    patch.setattr(torch.backends, "disable_global_flags", lambda: None)
    from torch.testing._internal.common_optimizers import (
        OptimizerErrorEnum,
        OptimizerInfo,
        optim_db,
    )

OPTIONS = set(MuonClip([nn.Parameter(torch.ones(1))]).defaults)
# torch's options under MuonClip's names.
RENAMED = {
    "AdamW": {"betas": "adamw_betas", "eps": "adamw_eps"},
    "Muon": {"adjust_lr_fn": "adjust_lr"},
}
# Options that choose an implementation, or another algorithm. A new one must be decided on here.
NOT_OURS = {"amsgrad", "foreach", "fused", "differentiable"}
INFOS: list[OptimizerInfo] = [info for info in optim_db if info.name in RENAMED]


def translated(info: OptimizerInfo, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """torch's options as MuonClip's, or None if one of them is of no concern."""
    renamed = {RENAMED[info.name].get(name, name): value for name, value in kwargs.items()}
    unknown = renamed.keys() - OPTIONS
    assert unknown <= NOT_OURS, f"torch has new options: {unknown - NOT_OURS}"
    return None if unknown else copy.deepcopy(renamed)


def inputs() -> Iterator[Any]:
    for info in INFOS:
        for given in info.optim_inputs_func(device="cpu"):
            options = translated(info, given.kwargs)
            if options is not None:
                yield pytest.param(options, id=f"{info.name}: {given.desc}")
    yield pytest.param(
        {"lr": torch.tensor(0.01), "capturable": True, "nonfinite": "skip"}, id="capturable"
    )
    yield pytest.param({"weight_decay_mode": "cautious", "weight_decay": 0.1}, id="cautious")
    yield pytest.param({"momentum_warmup_steps": 5}, id="warm-up")


every_input = pytest.mark.parametrize("options", list(inputs()))


def error_inputs() -> Iterator[Any]:
    for info in INFOS:
        for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            given = error.optimizer_error_input
            if set(given.kwargs) & NOT_OURS or given.desc.startswith("only support 2D"):
                continue  # vectors go to AdamW
            yield pytest.param(info, error, id=f"{info.name}: {given.desc}")


class Model(nn.Module):
    """Matrices, vectors, a scalar, a kernel and an empty parameter; float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, 3, 2, bias=False)  # of a bias here, the gradient is rounding noise
        self.norm = nn.BatchNorm2d(3)
        self.up, self.down = nn.Linear(12, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.ones(0))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).flatten(1)
        return self.down(torch.sigmoid(self.up(x))) * self.scale + self.empty.sum()


DATA = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0)).double()


def loss_of(model: nn.Module) -> Tensor:
    return model(DATA).square().mean()


def train(model: nn.Module, optimizer: MuonClip, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def build(options: dict[str, Any], *, named: bool = True, seed: int = 0) -> tuple[Model, MuonClip]:
    model = Model(seed)
    params = model.named_parameters() if named else model.parameters()
    return model, MuonClip(params, **copy.deepcopy(options))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def equal(a: Any, b: Any) -> bool:
    """Whether two state dicts are the same, to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


@pytest.mark.parametrize(("info", "error"), list(error_inputs()))
def test_errors(info: OptimizerInfo, error: Any) -> None:
    """Inputs that torch refuses or warns of, at construction or in a step, are refused."""
    given = error.optimizer_error_input
    assert error.error_on in OptimizerErrorEnum
    options = {RENAMED[info.name].get(name, name): value for name, value in given.kwargs.items()}
    params = [nn.Parameter(torch.ones(1, 1))] if given.params is None else given.params
    with pytest.raises((TypeError, ValueError)):
        MuonClip(params, **options)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedulers", [None, *range(len(INFOS[0].scheduler_inputs))])
@every_input
def test_goes_in_the_right_direction(
    options: dict[str, Any], contiguous: bool, schedulers: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = (
        torch.randn(10, 5, 2, generator=generator),
        torch.randn(10, 2, generator=generator),
    )
    params = [nn.Parameter(t[..., 0].clone() if contiguous else t[..., 0]) for t in (weight, bias)]
    x = torch.randn(5, generator=generator)
    optimizer = MuonClip(params, **{"lr": 1e-3, **copy.deepcopy(options)})
    made = (
        []
        if schedulers is None
        else [make(optimizer) for make in INFOS[0].scheduler_inputs[schedulers]]
    )

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (params[0].mv(x) + params[1]).square().sum()
        loss.backward()
        return loss

    initial = closure().item()
    for _ in range(20):
        optimizer.step(closure)
        for scheduler in made:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([closure().item()] if plateau else []))
    rises = options.get("maximize", False)
    assert closure().item() > initial if rises else closure().item() < initial


@every_input
def test_one_by_one_matches_batched(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's comparison of foreach and fused with the plain loop; one step has no gradients."""
    models = []
    for batch in (None, 1):
        if batch is not None:
            monkeypatch.setitem(muonclip.muon._BATCH_ELEMENTS, "cpu", batch)
            # AdamW's other kernels too.
            monkeypatch.setattr("muonclip.adamw._get_fused_kernels_supported_devices", list)
        rate = {"lr": float(options["lr"])} if "lr" in options else {}
        model, optimizer = build({**options, **rate, "ns_dtype": torch.float64})
        for step in range(7):
            optimizer.zero_grad()
            if step != 3:
                loss_of(model).backward()
            optimizer.step()
        models.append((model, optimizer))
    for a, b in zip(models[0][0].parameters(), models[1][0].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
        state = models[0][1].state[a], models[1][1].state[b]
        assert state[0].keys() == state[1].keys()
        for key, value in state[0].items():
            assert torch.allclose(value, state[1][key], atol=1e-9)


@pytest.mark.parametrize("zero", [False, True])
@every_input
def test_a_step_without_gradients_changes_nothing(options: dict[str, Any], zero: bool) -> None:
    model, optimizer = build({**options, "weight_decay": 0.0})
    before = copy.deepcopy(model)
    if zero:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    assert optimizer.step() is None
    assert same(model, before)


@every_input
def test_state_dict_is_deterministic(options: dict[str, Any]) -> None:
    model, optimizer = build(options)
    train(model, optimizer, 3)
    twin = copy.deepcopy(model)
    again = MuonClip(twin.named_parameters(), **{**copy.deepcopy(options), "lr": 1.0})
    saved = copy.deepcopy(optimizer.state_dict())
    again.load_state_dict(saved)
    assert equal(saved, optimizer.state_dict())
    assert equal(optimizer.state_dict(), again.state_dict())
    train(model, optimizer, 3)
    train(twin, again, 3)
    assert same(model, twin)
    assert equal(optimizer.state_dict(), again.state_dict())


@every_input
def test_save_load_with_weights_only(options: dict[str, Any]) -> None:
    model, optimizer = build(options)
    train(model, optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert equal(loaded, optimizer.state_dict())


@every_input
def test_older_state_dicts_load(options: dict[str, Any]) -> None:
    """Saved before any of the options was there."""
    model, optimizer = build(options)
    train(model, optimizer, 2)
    flags = {flag for info in INFOS for flag in info.not_og_supported_flags}
    for flag in (flags | OPTIONS | {"updates"}) - {"lr", "weight_decay", "momentum"}:
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            group.pop(flag, None)
        optimizer.load_state_dict(saved)
    train(model, optimizer, 1)


@pytest.mark.parametrize("saved_named", [False, True])
@pytest.mark.parametrize("loaded_named", [False, True])
def test_state_dicts_with_and_without_names(saved_named: bool, loaded_named: bool) -> None:
    model, optimizer = build({}, named=saved_named)
    # Names also choose the algorithm: the same for both here.
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    again = MuonClip(twin.named_parameters() if loaded_named else twin.parameters())
    again.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2)
    train(twin, again, 2)
    assert same(model, twin)
    assert all(("param_names" in group) == loaded_named for group in again.param_groups)


def test_hooks_of_steps() -> None:
    model, optimizer = build({})
    calls: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("all pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("all post")),
    ]
    try:
        train(model, optimizer, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["all pre", "pre", "post", "all post"]
    train(model, optimizer, 1)
    assert len(calls) == 4


def test_hooks_of_state_dicts() -> None:
    model, optimizer = build({})
    train(model, optimizer, 1)
    calls: list[str] = []
    handles = [
        optimizer.register_state_dict_pre_hook(lambda _: calls.append("save")),
        optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": "kept"}),
        optimizer.register_load_state_dict_pre_hook(lambda _, state: calls.append("second")),
        optimizer.register_load_state_dict_pre_hook(
            lambda _, state: calls.append("first"), prepend=True
        ),
        optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded")),
    ]
    saved = optimizer.state_dict()
    assert saved["note"] == "kept"
    optimizer.load_state_dict(saved)
    assert calls == ["save", "first", "second", "loaded"]
    for handle in handles:
        handle.remove()


@every_input
def test_copies_and_pickles(options: dict[str, Any]) -> None:
    """Public attributes and state are kept, nothing is shared, and training continues equally."""
    model, optimizer = build(options)
    train(model, optimizer, 2)
    for copied in (
        lambda pair: copy.deepcopy(pair),
        lambda pair: pickle.loads(pickle.dumps(pair)),
    ):
        twin, again = copied((model, optimizer))
        public = [{k for k in vars(o) if not k.startswith("_")} for o in (optimizer, again)]
        assert public[0] == public[1]
        assert equal(optimizer.state_dict(), again.state_dict())
        before = copy.deepcopy(optimizer.state_dict())
        train(twin, again, 2)
        assert equal(before, optimizer.state_dict())
        straight, other = copy.deepcopy((model, optimizer))
        train(straight, other, 2)
        assert same(straight, twin)
        assert repr(again).startswith("MuonClip (")


def test_hooks_survive_neither_copies_nor_pickles_of_others() -> None:
    """As with torch's: hooks registered on one optimizer are not called for its copy."""
    model, optimizer = build({})
    calls: list[Any] = []
    optimizer.register_step_post_hook(lambda o, *_: calls.append(o))
    twin, again = copy.deepcopy((model, optimizer))
    train(twin, again, 1)
    assert all(called is not optimizer for called in calls)


@every_input
def test_param_groups(options: dict[str, Any]) -> None:
    """Options of a group win, for its weight decay, its rate, and a rate of zero."""
    model, _ = build({})
    frozen = [p for name, p in model.named_parameters() if name.startswith("up")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("up")]
    before = [p.detach().clone() for p in model.parameters()]
    groups = [{"params": rest}, {"params": frozen, "lr": 0.0, "adamw_lr": 0.0}]
    optimizer = MuonClip(groups, **copy.deepcopy(options))
    train(model, optimizer, 2)
    moved = {
        name: not torch.equal(p, b)
        for (name, p), b in zip(model.named_parameters(), before, strict=True)
    }
    assert not moved["up.weight"] and not moved["up.bias"]
    assert moved["down.weight"] and moved["norm.weight"]


def test_weight_decay_of_a_group() -> None:
    decayed, plain = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = MuonClip(
        [{"params": decayed, "weight_decay": 0.5}, {"params": plain, "weight_decay": 0.0}], lr=0.1
    )
    for p in (decayed, plain):
        p.grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.allclose(decayed, torch.full((4, 4), 0.95)) and torch.equal(
        plain, torch.ones(4, 4)
    )


@every_input
def test_a_tensor_rate_equals_a_number(options: dict[str, Any]) -> None:
    models = []
    for rate in (0.01, torch.tensor(0.01), torch.tensor([0.01], dtype=torch.float64)):
        model, optimizer = build({**options, "lr": rate, "ns_dtype": torch.float64})
        train(model, optimizer, 3)
        models.append(model)
    for other in models[1:]:
        for a, b in zip(models[0].parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-7)


def test_complex_parameters_are_refused_with_their_name() -> None:
    with pytest.raises(ValueError, match=r"'w' .* is torch.complex64"):
        MuonClip([("w", nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)))])


def test_differentiable_and_grad_modes() -> None:
    """A step neither needs nor leaves a graph; closures run with gradients enabled."""
    model, optimizer = build({})
    with torch.no_grad():
        loss = optimizer.step(lambda: loss_of(model))  # type: ignore[arg-type,return-value]
    assert loss is not None and loss.requires_grad  # type: ignore[attr-defined]
    loss_of(model).backward()
    optimizer.step()
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert not any(
        value.requires_grad for state in optimizer.state.values() for value in state.values()
    )
