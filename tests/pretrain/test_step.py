"""The learning rate warms up, stays and decays."""

import itertools
import math

import pytest

from pretrain.config import OptimizerConfig
from pretrain.step import learning_rate_factor

OPTIONS = OptimizerConfig(warmup_steps=10, decay_steps=20, final_lr_fraction=0.1)


def test_the_schedule_is_warmup_stable_decay() -> None:
    rates = [learning_rate_factor(OPTIONS, step, 100) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[9:80] == [1.0] * 71
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[79:]))
    assert rates[89] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert rates[-1] == pytest.approx(0.1)


def test_warmup_and_decay_are_optional() -> None:
    options = OptimizerConfig(warmup_steps=0, decay_steps=0)
    assert [learning_rate_factor(options, step, 3) for step in (1, 2, 3)] == [1.0] * 3
