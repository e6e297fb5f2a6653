"""Warnings name a line of the user's code."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from muonclip import AttentionLayout, MuonClip, QKClip


def step_under_a_scheduler(optimizer: MuonClip) -> None:
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # torch calls ``step``
    optimizer.step()


CALLS: dict[str, Callable[[MuonClip], object]] = {
    "step": lambda optimizer: optimizer.step(),
    "scheduler": step_under_a_scheduler,
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "load_named_state": lambda optimizer: optimizer.load_named_state({}, []),
    "create_state": lambda optimizer: optimizer.create_state(),
    "full_state_dict": lambda optimizer: (optimizer.create_state(), optimizer.full_state_dict()),
}


@pytest.mark.parametrize("call", CALLS)
def test_of_the_optimizer_names_the_line_that_called_it(call: str) -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = MuonClip([("w", weight)], shard_state=True)
    weight.grad = torch.ones_like(weight)
    with pytest.warns(UserWarning, match="shard_state=True has no effect") as seen:
        CALLS[call](optimizer)
    assert [warning.filename for warning in seen] == [__file__]


@pytest.mark.parametrize("attached", [False, True])
def test_of_the_clip_names_the_line_that_called_it(attached: bool) -> None:
    query, key = (nn.Parameter(torch.ones(4, 4)) for _ in "qk")
    clip = QKClip({"layer": AttentionLayout.separate(query, key, num_heads=2)})
    optimizer = torch.optim.SGD([query, key], lr=0.1)
    handle = clip.attach(optimizer)
    if not attached:
        handle.remove()
    query.grad = torch.ones_like(query)
    with pytest.warns(UserWarning, match="did not observe layer") as seen:
        if attached:
            optimizer.step()
        else:
            clip.step()
    assert [warning.filename for warning in seen] == [__file__]
