"""Generated sums are right, and held-out ones are never drawn for training."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain import tasks
from posttrain.config import TASK_NAMES, SumsConfig

CONFIG = SumsConfig(min_operands=2, max_operands=5, largest=12)
seeds = st.integers(0, 1 << 40)


@given(seeds)
def test_sums_and_their_workings_are_right(seed: int) -> None:
    task = tasks.sum_task(CONFIG, seed)
    operands = list(map(int, task.question.removesuffix("=").split("+")))
    assert operands == task.data and task.truth == sum(operands)
    assert 2 <= len(operands) <= 5 and max(operands) <= 12
    assert task.reward(str(task.truth), task.truth) == 1
    terse, redundant, skipping = (tasks.working(task, style).split() for style in tasks.STYLES)
    assert skipping == [f"{task.question}{task.truth}"]
    assert redundant == [step for step in terse for _ in range(2)]
    total = operands[0]
    for step, operand in zip(terse, operands[1:], strict=True):
        numbers = list(map(int, re.split(r"[+=]", step)))
        assert numbers == [total, operand, total + operand]
        total += operand


@given(seeds, seeds)
def test_held_out_sums_are_others(one: int, other: int) -> None:
    training = tasks.sum_task(CONFIG, one).problem
    assert training != tasks.sum_task(CONFIG, other, held_out=True).problem


@given(st.sampled_from([name for name in TASK_NAMES if name != "read"]), seeds, seeds)
def test_held_out_problems_are_others(name: str, one: int, other: int) -> None:
    training = tasks.generated_task(name, CONFIG, one)
    held_out = tasks.generated_task(name, CONFIG, other, held_out=True)
    assert training.problem != held_out.problem
    assert training == tasks.generated_task(name, CONFIG, one) or training.image is not None
    assert (training.image is not None) == (name in tasks.OF_IMAGES)


@pytest.mark.parametrize("mode", ["instant", "thinking", "agent"])
def test_demonstrations_end_with_the_answer(mode: str) -> None:
    for seed in range(20):
        conversation = tasks.demonstration(CONFIG, seed, mode)
        task = tasks.sum_task(CONFIG, seed)
        assert conversation[0].content == task.question
        assert conversation[-1].content == str(task.truth)
        assert bool(conversation[1].reasoning) == (mode == "thinking")
        assert bool(conversation[1].calls) == (mode == "agent")
