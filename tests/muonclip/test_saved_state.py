"""State dicts are matched by name in any order, with numbers of any type."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonclip import MatrixLayout, MuonClip
from muonclip.optimizer import _PendingFlags
from muonclip.precision import PRECISION

# Two of each shape, so that a match by order would go unnoticed.
SHAPES = {"q": (4, 4), "k": (4, 4), "v": (3, 5), "up": (3, 5), "g": (4,), "b": (4,), "s": ()}
MUON = ("q", "k", "v", "up")


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}


def grouped(params: dict[str, nn.Parameter], groups: list[list[str]], **options: Any) -> MuonClip:
    return MuonClip(
        [
            {
                "params": [(name, params[name]) for name in names],
                "algorithm": "muon" if names[0] in MUON else "adamw",
                "lr": 0.1 * (place + 1),
            }
            for place, names in enumerate(groups)
            if names
        ],
        **options,
    )


def train(optimizer: MuonClip, params: dict[str, nn.Parameter], seed: int = 0) -> None:
    for place, (name, p) in enumerate(params.items()):
        generator = torch.Generator().manual_seed(100 * seed + place)
        p.grad = torch.randn(SHAPES[name], generator=generator).to(p.dtype)
    optimizer.step()


@st.composite
def partitions(draw: Any) -> list[list[str]]:
    """All names in groups of one algorithm each, in any order."""
    groups: list[list[str]] = []
    for names in (MUON, tuple(SHAPES.keys() - set(MUON))):
        order = draw(st.permutations(sorted(names)))
        cut = draw(st.integers(0, len(order)))
        groups += [part for part in (order[:cut], order[cut:]) if part]
    return draw(st.permutations(groups))


@settings(max_examples=50, deadline=None)
@given(saved=partitions(), loaded=partitions())
def test_every_parameter_finds_its_own_state(
    saved: list[list[str]], loaded: list[list[str]]
) -> None:
    """pytorch#1489: swapped parameters of one shape swapped their momentum."""
    theirs, ours = parameters(), parameters()
    first, second = grouped(theirs, saved), grouped(ours, loaded)
    train(first, theirs)
    state = first.state_dict()
    before = copy.deepcopy(state)
    second.load_state_dict(state)
    for name in SHAPES:
        expected, found = first.state[theirs[name]], second.state[ours[name]]
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(value, found[key]), (name, key)
    rates = {n: g["lr"] for g in first.param_groups for n in g["param_names"]}
    for group, names in zip(second.param_groups, loaded, strict=True):
        assert group["param_names"] == names
        assert group["lr"] in {rates[name] for name in names}
        assert group["updates"] == 1
    train(second, ours, seed=1)  # which must not reach the saved tensors
    for key, value in before["state"].items():
        assert all(torch.equal(v, state["state"][key][n]) for n, v in value.items())


def test_a_group_takes_the_options_that_most_of_its_parameters_had() -> None:
    theirs, ours = parameters(), parameters()
    first = grouped(theirs, [["q", "k"], ["v", "up"], ["g", "b", "s"]])
    second = grouped(ours, [["up"], ["k", "q", "v"], ["b", "g", "s"]])
    second.load_state_dict(first.state_dict())
    assert [g["lr"] for g in second.param_groups] == [
        first.param_groups[1]["lr"],
        first.param_groups[0]["lr"],
        first.param_groups[2]["lr"],
    ]


@pytest.mark.parametrize("part", ["all", "q"])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "_forward_module."]
)
@pytest.mark.parametrize("wrapped", ["saved", "loaded"])
def test_names_under_a_wrapper(prefix: str, wrapped: str, part: str) -> None:
    """Trained under DDP, torch.compile or Fabric, all or one layer of it, and loaded without, or
    the other way round."""
    order = list(SHAPES)
    theirs, ours = parameters(), parameters()
    named = [
        [
            (
                (prefix if side == wrapped and part in ("all", name) else "") + f"layer.{name}",
                params[name],
            )
            for name in names
        ]
        for side, params, names in (
            ("saved", theirs, order),
            ("loaded", ours, ["k", "q", *order[2:]]),
        )
    ]
    first, second = (MuonClip(params) for params in named)
    train(first, theirs)
    second.load_state_dict(first.state_dict())
    for name in ("q", "k"):
        found = second.state[ours[name]]["momentum_buffer"]
        assert torch.equal(found, first.state[theirs[name]]["momentum_buffer"])
    assert second.param_groups[0]["param_names"] == [n for n, p in named[1] if p.ndim == 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names.remove("k"), "saved state has nothing for parameter 'k'"),
        (lambda names: names.append("new"), "optimizer has nothing for parameter 'new'"),
        (
            lambda names: names.__setitem__(0, "renamed"),
            "nothing for parameter 'q'.* rename it in a load_state_dict pre-hook",
        ),
    ],
)
def test_a_missing_or_unknown_name_is_refused(change: Any, message: str) -> None:
    names = ["q", "k", "v"]
    change(names)
    theirs = {name: nn.Parameter(torch.ones(4, 4)) for name in names}
    ours = {name: nn.Parameter(torch.ones(4, 4)) for name in ("q", "k", "v")}
    first, second = MuonClip(theirs.items()), MuonClip(ours.items())
    for p in theirs.values():
        p.grad = torch.ones(4, 4)
    first.step()
    with pytest.raises(ValueError, match=message):
        second.load_state_dict(first.state_dict())
    assert not second.state


def test_a_parameter_that_changed_its_algorithm_is_refused() -> None:
    theirs, ours = parameters(), parameters()
    first = grouped(theirs, [["q", "k", "v", "up"], ["g", "b", "s"]])
    second = MuonClip(
        [
            {"params": [(n, ours[n]) for n in ("q", "k", "up")], "algorithm": "muon"},
            {"params": [(n, ours[n]) for n in ("v", "g", "b", "s")], "algorithm": "adamw"},
        ]
    )
    train(first, theirs)
    with pytest.raises(ValueError, match="'v' is trained by adamw, but its saved state is of muon"):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize("sides", ["saved", "loaded", "neither"])
def test_parameters_without_names_are_matched_by_order(sides: str) -> None:
    theirs, ours = parameters(), parameters()
    named, plain = theirs.items(), list(theirs.values())
    first = MuonClip(named if sides == "saved" else plain)
    second = MuonClip(ours.items() if sides == "loaded" else list(ours.values()))
    train(first, theirs)
    second.load_state_dict(first.state_dict())
    for name in SHAPES:
        for key, value in first.state[theirs[name]].items():
            assert torch.equal(value, second.state[ours[name]][key])
    assert ("param_names" in second.param_groups[0]) == (sides == "loaded")
    second.add_param_group(
        {"params": [("x", nn.Parameter(torch.ones(2)))] if sides == "loaded" else [
            nn.Parameter(torch.ones(2))
        ]}
    )  # fmt: skip


@pytest.mark.parametrize(
    "step",
    [
        3, 3.0, np.float32(3), np.int64(3), np.array(3.0), np.array([3]), torch.tensor(3),
        torch.tensor(3.0, dtype=torch.float64), torch.tensor([3.0]),
        torch.tensor(3.0, dtype=torch.bfloat16),
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_and_moments_of_any_kind(step: Any, dtype: torch.dtype) -> None:
    expected, ours = parameters(), parameters()
    straight = MuonClip(expected.items(), lr=0.01)
    for seed in range(3):
        train(straight, expected, seed)
    saved = copy.deepcopy(straight.state_dict())
    for state in saved["state"].values():
        for key, value in state.items():
            state[key] = copy.deepcopy(step) if key == "step" else value.to(dtype)
    resumed = MuonClip(ours.items(), lr=0.01)
    for name, p in ours.items():
        p.data.copy_(expected[name])
    resumed.load_state_dict(saved)
    train(straight, expected, 3)
    train(resumed, ours, 3)
    for name, p in ours.items():
        found: dict[str, Tensor] = resumed.state[p]
        assert all(value.dtype == torch.float32 for value in found.values())
        if "step" in found:
            assert found["step"].shape == () and found["step"] == 4
        coarse = 2.0**-7 if dtype == torch.bfloat16 else 0.0
        assert torch.allclose(p, expected[name], rtol=0, atol=0.01 * coarse + 1e-7)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("step", "three", "'g': its saved step must be a count"),
        ("step", -1, "'g': its saved step must be a count"),
        ("step", float("nan"), "'g': its saved step must be a count"),
        ("step", torch.ones(2), r"'g': its saved step must be one number, got \(2,\)"),
        ("exp_avg", [0.0] * 4, "'g': its saved exp_avg is a list, not a tensor"),
    ],
)
def test_invalid_state_is_refused(key: str, value: Any, message: str) -> None:
    params = parameters()
    optimizer = MuonClip(params.items())
    train(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][list(SHAPES).index("g")][key] = value
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, before["state"][index][n]) for n, v in state.items())


def test_an_option_out_of_range_is_refused() -> None:
    params = parameters()
    optimizer = MuonClip(params.items())
    saved = optimizer.state_dict()
    saved["param_groups"][0] = {**saved["param_groups"][0], "momentum_dtype": "torch.float16"}
    with pytest.raises(ValueError, match="saved state has an option out of range: momentum_dtype"):
        optimizer.load_state_dict(saved)


FORMS: list[dict[str, Any]] = [
    {},
    {"master_weights": True},
    {"master_weights": "remainder"},
    {"stochastic_rounding": True},
    {"momentum_dtype": torch.float32},
    {"momentum_dtype": torch.bfloat16, "master_weights": True},
    {"momentum_dtype": torch.int8},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("after", FORMS)
@pytest.mark.parametrize("before", FORMS)
def test_options_of_precision_are_those_of_the_optimizer_that_loads(
    before: dict[str, Any], after: dict[str, Any], dtype: torch.dtype
) -> None:
    """Its memory was planned with them. The state is converted, with a warning if it differs."""

    def trained(options: dict[str, Any]) -> tuple[dict[str, nn.Parameter], MuonClip]:
        params = {name: nn.Parameter(p.detach().to(dtype)) for name, p in parameters().items()}
        optimizer = MuonClip(params.items(), **options)
        train(optimizer, params)
        return params, optimizer

    def kept(optimizer: MuonClip) -> list[dict[str, torch.dtype]]:
        """The dtypes of the state."""
        states = optimizer.state.values()
        return [{name: value.dtype for name, value in entries.items()} for entries in states]

    params, saving = trained(before)
    others, loading = trained(after)
    expected, saved = kept(loading), copy.deepcopy(saving.state_dict())
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(params[name])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loading.load_state_dict(saved)
    is_announced = any("and this optimizer has" in str(w.message) for w in caught)
    assert is_announced or kept(saving) == expected
    for group in loading.param_groups:
        assert {option: group[option] for option in after} == after
        assert not any(group[option] for option in PRECISION.keys() - after.keys())
    train(loading, others)
    assert kept(loading) == expected
    loading.load_named_state(copy.deepcopy(saving.named_state(params.items())), others.items())
    train(loading, others)
    assert kept(loading) == expected


def test_steps_that_are_numbers_are_loaded_under_another_default_device() -> None:
    params = parameters()
    optimizer = MuonClip(params.items())
    train(optimizer, params)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = int(state["step"])
    with torch.device("meta"):
        optimizer.load_state_dict(saved)
        flags = _PendingFlags(torch.ones((), device="cpu"), None)
    assert all(v.device.type == "cpu" for s in optimizer.state.values() for v in s.values())
    assert flags.read() == [True, False, False, False]


def test_optimizers_loaded_from_one_state_share_nothing() -> None:
    theirs, ours = parameters(), parameters()
    first, second = MuonClip(theirs.items()), MuonClip(ours.items())
    train(first, theirs)
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(first.state_dict()["state"])
    train(second, ours, seed=1)
    for key, state in first.state_dict()["state"].items():
        assert all(torch.equal(value, before[key][name]) for name, value in state.items())


def test_state_of_a_view_that_joins_inputs_and_outputs_is_loaded() -> None:
    """Such a layout has no dimension of inputs, which only variants of Muon need."""
    param = nn.Parameter(torch.ones(6, 4))
    group = {"params": [param], "algorithm": "muon", "layout": MatrixLayout(view=(8, 3))}
    optimizer = MuonClip([group])
    param.grad = torch.randn(6, 4)
    optimizer.step()
    before = optimizer.state_dict()
    optimizer.load_state_dict(copy.deepcopy(before))
    optimizer.load_named_state(optimizer.named_state([("w", param)]), [("w", param)])
    assert torch.equal(
        optimizer.state[param]["momentum_buffer"], before["state"][0]["momentum_buffer"]
    )


def test_parameters_replaced_before_training_leave_no_state_behind() -> None:
    """Accelerate reads the state, loads it, and then puts sharded parameters in place."""
    params = parameters()
    optimizer = MuonClip(params.items())
    optimizer.load_state_dict(optimizer.state_dict())
    sharded = parameters()
    for group in optimizer.param_groups:
        group["params"] = [sharded[name] for name in group["param_names"]]
    train(optimizer, sharded)
    assert len(optimizer.state_dict()["state"]) == len(SHAPES) == len(optimizer.state)


def test_parameters_replaced_during_training_are_refused() -> None:
    """Their momentum would be lost without a word."""
    params = parameters()
    optimizer = MuonClip(params.items())
    train(optimizer, params)
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    with pytest.raises(RuntimeError, match=r"of shape \(4, 4\) was replaced .* after training"):
        optimizer.state_dict()


class TestNamedState:
    """``named_state`` and ``load_named_state``."""

    def trained(self, **options: Any) -> tuple[dict[str, nn.Parameter], MuonClip]:
        params = parameters()
        if options.get("master_weights"):
            params = {name: nn.Parameter(p.detach().bfloat16()) for name, p in params.items()}
        optimizer = grouped(params, [list(MUON), ["g", "b", "s"]], **options)
        train(optimizer, params)
        return params, optimizer

    def test_is_the_state_itself(self) -> None:
        params, optimizer = self.trained()
        state = optimizer.named_state(params.items())
        assert state.keys() == SHAPES.keys()
        assert state["q"].keys() == {"momentum_buffer"}
        assert state["g"].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, entries in state.items():
            for key, value in entries.items():
                assert value is optimizer.state[params[name]][key]

    @pytest.mark.parametrize("master_weights", [False, True])
    def test_training_continues_bit_exactly_from_a_loaded_state(self, master_weights: bool) -> None:
        params, optimizer = self.trained(master_weights=master_weights)
        others, other = self.trained(master_weights=master_weights)
        train(other, others, seed=1)  # the state that is replaced
        for name, p in others.items():
            p.data.copy_(params[name])
        state = copy.deepcopy(optimizer.named_state(params.items()))
        other.load_named_state(state, others.items())
        for name, p in others.items():
            for key, value in other.state[p].items():
                assert value.data_ptr() == state[name][key].data_ptr()
            assert getattr(p, "main_param", None) is state[name].get("master")
        train(optimizer, params, seed=2)
        train(other, others, seed=2)
        for name, p in others.items():
            assert torch.equal(p, params[name])
            for key, value in other.state[p].items():
                assert torch.equal(value, optimizer.state[params[name]][key])

    def test_state_in_another_dtype_is_converted(self) -> None:
        params, optimizer = self.trained(variant="normuon", master_weights=True)
        state = optimizer.named_state(params.items())
        rounded = {n: {key: v.bfloat16() for key, v in e.items()} for n, e in state.items()}
        optimizer.load_named_state(rounded, params.items())
        for name, entries in optimizer.named_state(params.items()).items():
            for key, value in entries.items():
                assert torch.equal(value, rounded[name][key].float()), (name, key)
                assert value.dtype == torch.float32, (name, key)

    def test_a_parameter_without_entries_has_no_state(self) -> None:
        params, optimizer = self.trained()
        state = optimizer.named_state(params.items())
        del state["q"]
        optimizer.load_named_state(state, params.items())
        assert params["q"] not in optimizer.state
        assert optimizer.named_state(params.items()) == {**state, "q": {}}

    def test_master_alone_starts_everything_else_at_zero(self) -> None:
        params, optimizer = self.trained(master_weights=True)
        master = torch.full((4, 4), 0.5)
        optimizer.load_named_state({"q": {"master": master}}, params.items())
        assert optimizer.named_state(params.items())["q"].keys() == {"master"}
        assert params["q"].main_param is master
        assert not hasattr(params["k"], "main_param")
        assert params["k"] not in optimizer.state
        params["q"].data.copy_(master)
        train(optimizer, params)
        fresh = torch.zeros(4, 4).lerp_(params["q"].grad.float(), 0.05)
        assert torch.equal(optimizer.named_state(params.items())["q"]["momentum_buffer"], fresh)

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"w": {}}, "the optimizer has no parameter 'w'"),
            ({"q": {"exp_avg": torch.zeros(4, 4)}}, r"parameter 'q': .* muon needs"),
            ({"q": {"momentum_buffer": torch.zeros(4)}}, "parameter 'q' has shape"),
            ({"q": {"master": torch.zeros(4)}}, "parameter 'q' has shape"),
        ],
    )
    def test_state_of_other_parameters_is_refused(self, state: Any, message: str) -> None:
        params, optimizer = self.trained()
        before = optimizer.named_state(params.items())
        with pytest.raises(ValueError, match=message):
            optimizer.load_named_state({"g": {}, **state}, params.items())
        assert optimizer.named_state(params.items()) == before
