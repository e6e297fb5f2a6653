"""Division of parameters in Muon's step, which later steps use again."""

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from muonclip import MatrixLayout, MuonClip, muon

SHAPES = [(8, 12), (12, 8), (8, 12), (6, 8, 12), (3, 8, 12), (16, 4)]
OPTIONS: dict[str, list[Any]] = {
    "ns_steps": [3, 5],
    "ns_coefficients": ["you", [2.0, -1.5, 0.5]],
    "ns_dtype": [None, torch.float32, torch.bfloat16, torch.float64],
    "adjust_lr": ["original", "match_rms_adamw"],
    "update_rms": [0.1, 0.3],
    "eps": [1e-7, 1e-3],
    "layout": [None, MatrixLayout.per_head(8, 2)],
    "normuon_beta2": [0.5, 0.95],
    "nesterov": [False, True],
    "lr": [0.01, 0.1],
}
CHANGES = st.one_of(
    *(
        st.tuples(st.integers(0, 1), st.just(name), st.sampled_from(values))
        for name, values in OPTIONS.items()
        if name != "layout"
    ),
    st.tuples(st.just(0), st.just("layout"), st.sampled_from(OPTIONS["layout"])),
    st.tuples(st.integers(0, 1), st.just("variant"), st.sampled_from(["muon", "normuon"])),
    st.tuples(st.integers(0, 1), st.just("momentum_buffer"), st.just(torch.float64)),
)
# Changes before a step, and whether each parameter has a gradient.
STEPS = st.lists(
    st.tuples(
        st.lists(CHANGES, max_size=2),
        st.lists(st.booleans(), min_size=len(SHAPES), max_size=len(SHAPES)),
    ),
    min_size=2,
    max_size=6,
)


def train(steps: list[Any], *, keeps: bool) -> list[torch.Tensor]:
    """The weights after these steps."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    groups = [
        {"params": members, "algorithm": "muon", "variant": "normuon"}
        for members in (params[::2][:2], [*params[1::2], *params[4::2]])
    ]
    optimizer = MuonClip(groups, lr=0.1)
    for changes, present in steps:
        for number, name, value in changes:
            group = optimizer.param_groups[number]
            if name == "momentum_buffer":
                for p in group["params"]:
                    if p in optimizer.state:
                        state = optimizer.state[p]
                        state[name] = state[name].to(value)
            else:
                group[name] = value
            if group["variant"] == "muon":  # for which another value would be refused
                group["normuon_beta2"] = optimizer.defaults["normuon_beta2"]
        for p, is_present in zip(params, present, strict=True):
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = gradient if is_present else None
        if not keeps:
            optimizer._local_muon = muon.LocalMuon()
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.filterwarnings("ignore:MuonClip's first step finds no gradient")
@settings(max_examples=200)
@given(steps=STEPS, elements=st.sampled_from([150, 2**19]))
def test_steps_do_not_depend_on_what_earlier_ones_kept(steps: list[Any], elements: int) -> None:
    """Options, dtypes of state and gradients may change between steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "_BATCH_ELEMENTS", {"cpu": elements})
        kept, new = train(steps, keeps=True), train(steps, keeps=False)
    assert all(map(torch.equal, kept, new))


def test_gradients_are_not_kept() -> None:
    """Their memory is free once ``zero_grad`` has dropped them."""
    p = nn.Parameter(torch.ones(4, 6))
    optimizer = MuonClip([{"params": [p], "algorithm": "muon"}])
    p.grad = torch.ones(4, 6)
    gradient = weakref.ref(p.grad)
    optimizer.step()
    optimizer.zero_grad()
    assert gradient() is None


def test_a_step_after_an_error_divides_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The division that the error interrupts is not used."""

    def interrupted(*_: Any) -> float:
        raise KeyboardInterrupt

    results = []
    for keeps in (True, False):
        p = nn.Parameter(torch.ones(4, 6))
        optimizer = MuonClip([{"params": [p], "algorithm": "muon"}], weight_decay=0.0)
        p.grad = torch.ones(4, 6)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(muon, "update_scale", interrupted)
            optimizer.step()
        if not keeps:
            optimizer._local_muon = muon.LocalMuon()
        optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.ones(4, 6))
