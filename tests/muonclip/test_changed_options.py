"""Options that are set in ``param_groups`` between steps are checked as the constructor's are."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from muonclip import MatrixLayout, MuonClip

BAD: list[tuple[str, Any]] = [
    ("lr", -1.0),
    ("lr", float("nan")),
    ("lr", float("inf")),
    ("lr", torch.tensor(float("nan"))),
    ("lr", torch.tensor([0.1, 0.2])),
    ("weight_decay", -0.1),
    ("weight_decay", float("nan")),
    ("momentum", 1.0),
    ("momentum", "high"),
    ("eps", -1.0),
    ("ns_steps", 0),
    ("ns_coefficients", "nope"),
    ("ns_dtype", "float8"),
    ("adjust_lr", "nope"),
    ("update_rms", 0.0),
    ("weight_decay_mode", "nope"),
    ("adamw_weight_decay_mode", "nope"),
    ("variant", "nope"),
    ("momentum_warmup_steps", -1),
    ("momentum_dtype", torch.int16),
    ("momentum_dtype", torch.bfloat16),  # in the middle of a run
    ("stochastic_rounding", "no"),
    ("maximize", "no"),
    ("nesterov", "no"),
    ("nonfinite", "nope"),
    ("nonfinite", "skip"),  # in one of two groups
    ("adamw_eps", -1.0),
    ("algorithm", "nope"),
]
BAD_FOR_MUON = [
    ("algorithm", "adamw"),
    ("layout", "transposed"),
    ("layout", MatrixLayout((4, 5))),
    ("normuon_beta2", 0.5),  # has no effect without the variant
]
BAD_FOR_ADAMW = [
    ("algorithm", "muon"),
    ("layout", MatrixLayout(transposed=True)),
    ("variant", "normuon"),
]


def trained(**options: Any) -> tuple[MuonClip, list[nn.Parameter]]:
    """An optimizer after one step: a group of Muon, and one of AdamW."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8, 6))]
    groups = [
        {"params": [params[0]], "algorithm": "muon"},
        {"params": [params[1]], "algorithm": "adamw"},
    ]
    optimizer = MuonClip(groups, lr=0.1, **options)
    step(optimizer, params)
    return optimizer, params


def step(optimizer: MuonClip, params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.linspace(-1, 2, p.numel()).view_as(p) ** 3
    optimizer.step()


@pytest.mark.parametrize("number", [0, 1])
@given(data=st.data())
def test_a_bad_value_is_named_and_changes_nothing(number: int, data: st.DataObject) -> None:
    """The next step with the value from before is as if there had been no other."""
    option, value = data.draw(st.sampled_from(BAD + (BAD_FOR_ADAMW if number else BAD_FOR_MUON)))
    optimizer, params = trained()
    undisturbed, expected = trained()
    group = optimizer.param_groups[number]
    before, saved = group[option], copy.deepcopy(optimizer.state_dict())
    group[option] = value
    with pytest.raises((ValueError, TypeError), match=option):
        step(optimizer, params)
    group[option] = before
    now = optimizer.state_dict()
    assert now["param_groups"] == saved["param_groups"]
    for key, entries in saved["state"].items():
        assert all(torch.equal(entry, now["state"][key][name]) for name, entry in entries.items())
    step(optimizer, params)
    step(undisturbed, expected)
    assert all(map(torch.equal, params, expected))


@pytest.mark.parametrize(
    "change",
    [
        lambda group: group.update(layout=MatrixLayout(transposed=True)),
        lambda group: group.update(layout=MatrixLayout(flatten=True), variant="muon"),
    ],
)
def test_a_layout_with_other_outputs_than_the_state_of_a_variant_is_refused(
    change: Callable[[dict[str, Any]], None],
) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(8, 6, 2))]
    groups = [{"params": params, "algorithm": "muon", "variant": "normuon"}]
    optimizer = MuonClip(groups)
    step(optimizer, params)
    change(optimizer.param_groups[0])
    with pytest.raises(ValueError, match="number 0 of the muon group has state of a variant"):
        step(optimizer, params)


def test_other_matrices_of_the_same_outputs() -> None:
    """A layout may change in the middle of a run: then it equals that of a new optimizer."""
    heads = MatrixLayout.per_head(8, 2)
    optimizer, params = trained()
    optimizer.param_groups[0]["layout"] = heads
    step(optimizer, params)

    other, expected = trained()
    groups = [{**group, "params": list(group["params"])} for group in other.param_groups]
    groups[0]["layout"] = heads
    new = MuonClip(groups, lr=0.1)
    new.load_state_dict(other.state_dict())
    step(new, expected)
    assert all(map(torch.equal, params, expected))


def test_nonfinite_is_the_same_in_all_groups() -> None:
    groups = [
        {"params": [nn.Parameter(torch.ones(2, 3))], "nonfinite": value}
        for value in ("raise", "ignore")
    ]
    with pytest.raises(ValueError, match="nonfinite must be the same in all groups"):
        MuonClip(groups)

    optimizer, params = trained()
    for group in optimizer.param_groups:
        group["nonfinite"] = "skip"
    params[0].grad = torch.full_like(params[0], torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1


def test_capturable_may_be_set_by_torch_compile() -> None:
    """It sets it in the groups of parameters on GPUs, whatever ``nonfinite`` is."""
    optimizer, params = trained()
    expected, others = trained()
    optimizer.param_groups[0]["capturable"] = True
    for each in (optimizer, expected):
        each.param_groups[0]["weight_decay"] = 0.5  # options are checked
    step(optimizer, params)
    step(expected, others)
    assert all(map(torch.equal, params, others))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 3))], "algorithm": "muon"})

    fresh, _ = trained()
    saved = optimizer.state_dict()
    fresh.load_state_dict({**saved, "param_groups": saved["param_groups"][:2]})
    assert not any(group["capturable"] for group in fresh.param_groups)


def test_a_compiled_step_checks_options_only_when_they_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks = []
    check = MuonClip._check_changed_options

    def counted(optimizer: MuonClip) -> None:
        checks.append(optimizer)
        check(optimizer)

    monkeypatch.setattr(MuonClip, "_check_changed_options", counted)
    torch._dynamo.reset()
    optimizer, params = trained()
    compiled = torch.compile(optimizer.step, backend="eager")
    for weight_decay, times in ((0.1, 0), (0.2, 1), (0.2, 1)):
        for group in optimizer.param_groups:
            group["weight_decay"] = weight_decay
        for p in params:
            p.grad = torch.ones_like(p)
        compiled()
        assert len(checks) == times


@pytest.mark.parametrize("form", [float, lambda lr: torch.tensor(lr, dtype=torch.float64)])
def test_a_schedule_may_end_below_zero_by_a_rounding_error(form: Callable[[float], Any]) -> None:
    optimizer, params = trained(weight_decay=0.0)
    before = [p.detach().clone() for p in params]
    for group in optimizer.param_groups:
        group["lr"] = form(0.3 - 0.1 * 3)
        assert group["lr"] < 0
    step(optimizer, params)
    assert all(torch.allclose(p, old, atol=1e-15) for p, old in zip(params, before, strict=True))


def test_groups_that_are_removed_and_added() -> None:
    """Options are those of the group, wherever it is in the list."""
    optimizer, params = trained()
    (muon, _) = optimizer.param_groups
    del optimizer.param_groups[0]
    step(optimizer, params)
    optimizer.add_param_group(muon)
    step(optimizer, params)
    optimizer.param_groups[-1]["algorithm"] = "adamw"
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 3))], "algorithm": "muon"})
    with pytest.raises(ValueError, match="algorithm of a group was changed from muon to adamw"):
        step(optimizer, params)
