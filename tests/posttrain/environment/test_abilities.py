"""Generated tasks are functions of their seed, and their truth has the reward 1."""

import asyncio
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.environment.abilities import TASKS, mixture, tools
from posttrain.environment.core import Environment
from posttrain.environment.markup import render_calls


@settings(max_examples=15)
@pytest.mark.parametrize("name", list(TASKS))
@given(seed=st.integers(0, 1 << 60))
def test_tasks(name: str, seed: int) -> None:
    task, same = (TASKS[name](random.Random(seed)) for _ in range(2))
    assert (task.question, task.truth, task.problem) == (same.question, same.truth, same.problem)
    assert task.reward(str(task.truth), task.truth) == 1
    assert 0 <= task.reward("x", task.truth) <= 1
    if task.image is not None:
        assert np.array_equal(np.asarray(task.image), np.asarray(same.image))


def test_each_ability_has_text_and_images() -> None:
    tasks = [make(random.Random(0)) for make in TASKS.values()]
    kinds = {(task.ability, task.image is not None) for task in tasks}
    assert kinds == {(a, i) for a in ("knowledge", "reasoning", "agentic") for i in (False, True)}


@given(st.integers(0, 1 << 60))
def test_answers(seed: int) -> None:
    rng = random.Random(seed)
    table = TASKS["look_up"](rng)
    entries = table.question.partition(";")
    assert f"{entries[2]}{table.truth}" in entries[0].split(",")
    operands = TASKS["add"](rng)
    assert operands.truth == sum(map(int, operands.question.rstrip("=").split("+")))
    letters = TASKS["sort"](rng)
    assert sorted(letters.question.removeprefix("sort:")) == list(letters.truth)


def test_an_agentic_task_is_solved_with_its_tool() -> None:
    async def run() -> None:
        environment = Environment(mixture({"follow": 1}), tools=tools)
        messages, info = await environment.reset(seed=3)
        assert [tool["function"]["name"] for tool in info["tools"]] == ["get"]
        content = messages[0]["content"].removeprefix("get:")
        while not content.isdigit():
            step = await environment.step(render_calls([("get", {"key": content})]))
            content = step.observation[0].content
        assert (await environment.step(content)).reward == 1

    asyncio.run(run())


def test_a_mixture_has_its_shares() -> None:
    task = mixture({"add": 3, "sort": 1, "reverse": 0})
    assert task(5).problem == task(5).problem
    kinds = [task(seed).question[:4] for seed in range(200)]
    assert "reve" not in kinds
    assert 20 < kinds.count("sort") < 80
    for shares in ({"sums": 1.0}, {"add": -1.0}, {"add": 0.0}, {}):
        with pytest.raises(ValueError):
            mixture(shares)
