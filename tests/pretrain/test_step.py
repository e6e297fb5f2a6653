"""The schedule warms up, stays and decays; losses are told apart by kind."""

import itertools
import math

import pytest
import torch

from pretrain.config import OptimizerConfig
from pretrain.data import CAPTION, NOTHING, TEXT
from pretrain.step import learning_rate_factor, loss_sums, mean_losses

OPTIONS = OptimizerConfig(warmup_steps=10, decay_steps=20, final_lr_fraction=0.1)


def test_the_rate_rises_stays_and_falls_to_its_end() -> None:
    rates = [learning_rate_factor(OPTIONS, step, 100) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[9:80] == [1.0] * 71
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[79:]))
    assert rates[89] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert rates[-1] == pytest.approx(0.1)


def test_a_run_may_have_neither_warm_up_nor_decay() -> None:
    options = OptimizerConfig(warmup_steps=0, decay_steps=0)
    assert [learning_rate_factor(options, step, 3) for step in (1, 2, 3)] == [1.0] * 3


def test_losses_are_means_over_their_own_tokens() -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0, 100.0]])
    kinds = torch.tensor([[TEXT, TEXT, CAPTION, NOTHING]])
    assert mean_losses(loss_sums(losses, kinds)) == {
        "loss": 7 / 3,
        "text_loss": 1.5,
        "caption_loss": 4.0,
    }
    nothing = mean_losses(loss_sums(losses, kinds * 0))
    assert nothing == {"loss": None, "text_loss": None, "caption_loss": None}
