"""Schedulers of learning rate and momentum change every group exactly once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from muonclip import MuonClip

CAPTURABLE: dict[str, Any] = {"capturable": True, "nonfinite": "skip"}


def make() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))]


def step(optimizer: MuonClip, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


SCHEDULERS = {
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "step": lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("shared", ["constructor", "groups", "adamw_lr"])
def test_schedulers_change_tensor_rates_like_numbers(name: str, shared: str) -> None:
    """ReduceLROnPlateau halved a rate twice that two groups shared."""

    def build(lr: float | Tensor) -> MuonClip:
        if shared == "groups":
            return MuonClip(
                [{"params": make(), "lr": lr}, {"params": make(), "lr": lr}], **CAPTURABLE
            )
        return MuonClip(make(), lr=lr, adamw_lr=lr if shared == "adamw_lr" else None, **CAPTURABLE)

    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizers = [build(rate), build(0.1)]
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in optimizers]
    for epoch in range(4):
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            step(optimizer, epoch)
            scheduler.step(*([1.0] if name == "plateau" else []))
        rates = [[float(g["lr"]) for g in o.param_groups] for o in optimizers]
        assert rates[0] == pytest.approx(rates[1])
    tensors = [group["lr"] for group in optimizers[0].param_groups]
    assert len({id(t) for t in tensors}) == len({t.data_ptr() for t in tensors}) == len(tensors)
    assert rate == 0.1  # the caller's


def test_groups_share_no_list() -> None:
    coefficients = [[3.0, -3.2, 1.2], [2.0, -1.5, 0.5]]
    tags = {"mine": [1]}
    optimizer = MuonClip(
        [{"params": make(), "tags": tags}, {"params": make(), "tags": tags}],
        ns_coefficients=coefficients,
    )
    for option in ("ns_coefficients", "tags"):
        values = [group[option] for group in optimizer.param_groups]
        assert len({id(value) for value in values}) == len(values)
    optimizer.param_groups[0]["tags"]["mine"].append(2)
    assert tags == {"mine": [1]} == optimizer.param_groups[1]["tags"]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.OneCycleLR(
            o, max_lr=0.1, total_steps=8, base_momentum=0.5, max_momentum=0.8
        ),
        lambda o: lr_scheduler.CyclicLR(
            o, base_lr=0.01, max_lr=0.1, step_size_up=3, base_momentum=0.5, max_momentum=0.8
        ),
    ],
)
def test_cycling_momentum_cycles_beta1(schedule: Any) -> None:
    """As torch's AdamW under the same scheduler; and Muon's momentum with it."""
    ours, theirs = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
    matrix = nn.Parameter(torch.ones(4, 4))
    optimizer = MuonClip([ours, matrix], lr=0.1, adamw_betas=(0.9, 0.99), weight_decay=0.1)
    adamw = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.99), weight_decay=0.1)
    schedulers = [schedule(optimizer), schedule(adamw)]
    momenta = set()
    for seed in range(7):
        generator = torch.Generator().manual_seed(seed)
        ours.grad = torch.randn(6, generator=generator)
        theirs.grad, matrix.grad = ours.grad.clone(), torch.randn(4, 4, generator=generator)
        optimizer.step()
        adamw.step()
        muon, other = sorted(optimizer.param_groups, key=lambda g: g["algorithm"] != "muon")
        beta1 = adamw.param_groups[0]["betas"][0]
        assert muon["momentum"] == pytest.approx(beta1) == other["momentum"]
        momenta.add(beta1)
        for scheduler in schedulers:
            scheduler.step()
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert len(momenta) > 3


def test_betas_become_the_momentum_of_adamws_group() -> None:
    matrix, vector = make()
    optimizer = MuonClip([matrix, vector], momentum=0.95, adamw_betas=(0.8, 0.9))
    found = {g["algorithm"]: g for g in optimizer.param_groups}
    assert found["muon"]["momentum"] == 0.95
    assert (found["adamw"]["momentum"], found["adamw"]["adamw_beta2"]) == (0.8, 0.9)
    found["adamw"]["momentum"] = 0.5  # also in an optimizer that takes these groups over
    again = MuonClip(optimizer.param_groups)
    assert [(g["momentum"], g.get("adamw_beta2")) for g in again.param_groups] == [
        (0.95, None),
        (0.5, 0.9),
    ]


@pytest.mark.parametrize("option", ["adamw_lr", "adamw_weight_decay", "adamw_betas"])
def test_options_without_effect_on_a_group_are_refused(option: str) -> None:
    optimizer = MuonClip(make())
    optimizer.param_groups[1][option] = 0.1
    with pytest.raises(ValueError, match=f"{option} has no effect on a group"):
        step(optimizer)


def test_a_captured_graph_must_update_every_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """dion#108: a parameter without a gradient at the capture would never be updated again."""
    params = make()
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    names = ("matrix", "vector", "frozen")
    optimizer = MuonClip(zip(names, [*params, frozen], strict=True), **CAPTURABLE)
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.ones(4, 4)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="'vector' has no gradient while a CUDA graph"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    params[1].grad = torch.ones(4)
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))
