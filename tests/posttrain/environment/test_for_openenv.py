"""Environments of OpenEnv: actions are calls, and a failing server ends the task."""

import asyncio
import importlib.util
import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.environment.core import Step
from posttrain.environment.for_openenv import OpenEnvEnvironment
from posttrain.environment.markup import render_calls
from tests.ports import free_port

SERVER = """\
import sys, uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

class Guess(Action):
    number: int

class Hint(Observation):
    hint: str

class Guessing(Environment):
    def reset(self, seed=None, episode_id=None, **_):
        self.number, self._state = seed % 10, State()
        return Hint(hint="guess a digit", done=False, reward=0.0)
    def step(self, action, timeout_s=None, **_):
        right = action.number == self.number
        hint = "right" if right else "more" if action.number < self.number else "less"
        return Hint(hint=hint, done=right, reward=float(right))
    @property
    def state(self):
        return self._state

uvicorn.run(create_fastapi_app(Guessing, Guess, Hint), port=int(sys.argv[1]), log_level="error")
"""


def guess(number: int) -> dict[str, int]:
    """Guess the number."""
    return {"number": number}


class Guessing:
    """A client with the interface of OpenEnv's, whose server is this object.

    Args:
        fails: the request that is not answered, counted from 0; it waits, or raises if ``raises``.
    """

    def __init__(self, fails: int = -1, raises: bool = False) -> None:
        self._fails, self._raises, self._requests = fails, raises, 0
        self._busy = False

    async def reset(self, seed: int) -> Any:
        self._number = seed % 10
        return await self._answer("guess a digit", 0.0, False)

    async def step(self, action: dict[str, int]) -> Any:
        number = action["number"]
        right = number == self._number
        hint = "right" if right else "more" if number < self._number else "less"
        return await self._answer(hint, float(right), right)

    async def _answer(self, hint: str, reward: float, done: bool) -> Any:
        assert not self._busy, "a server takes one request after the other"
        self._busy = True
        await asyncio.sleep(0)
        self._requests += 1
        if self._requests - 1 == self._fails:
            if self._raises:
                raise ConnectionError("closed")
            await asyncio.sleep(60)
        self._busy = False
        return SimpleNamespace(observation={"hint": hint}, reward=reward, done=done)


def environment(client: Any, **options: Any) -> OpenEnvEnvironment:
    return OpenEnvEnvironment(client, [guess], text=lambda seen: seen["hint"], **options)


def calls(*numbers: int) -> str:
    return render_calls([("guess", {"number": number}) for number in numbers])


async def play(env: OpenEnvEnvironment, seed: int) -> tuple[Step, int]:
    """Guess by halves; returns the last step and the number of guesses."""
    messages, info = await env.reset(seed=seed)
    assert messages == [{"role": "user", "content": "guess a digit"}]
    assert info["tools"][0]["function"]["parameters"]["properties"] == {
        "number": {"type": "integer"}
    }
    low, high = 0, 9
    for count in range(1, 9):
        middle = (low + high) // 2
        step = await env.step(calls(middle))
        if step.terminated:
            return step, count
        if step.observation[0].content == "more":
            low = middle + 1
        else:
            high = middle - 1
    raise AssertionError("the number was not found")


@given(st.lists(st.integers(0, 99), min_size=1, max_size=3))
def test_tasks_end_when_the_server_says_so(seeds: list[int]) -> None:
    """One environment for several tasks: nothing of a task is left in the next one."""

    async def run() -> None:
        env = environment(Guessing())
        for seed in seeds:
            step, count = await play(env, seed)
            assert (step.reward, step.info["answer"], count <= 4) == (1, "right", True)

    asyncio.run(run())


def test_calls_of_a_turn_follow_each_other_until_the_end() -> None:
    async def run() -> None:
        env = environment(Guessing())
        await env.reset(seed=3)
        results = (await env.step(calls(1, 5))).observation
        assert [result.content for result in results] == ["more", "less"]
        step = await env.step(calls(3, 4))
        assert (step.reward, step.terminated) == (1, True)
        await env.reset(seed=3)
        bad = await env.step(render_calls([("guess", {"number": "three"})]))
        assert bad.observation[0].failed and not bad.terminated
        gave_up = await env.step("I do not know")
        assert (gave_up.reward, gave_up.terminated, gave_up.info["answer"]) == (
            0, True, "I do not know"
        )  # fmt: skip

    asyncio.run(run())


def test_rewards_are_mapped_or_refused() -> None:
    async def run() -> None:
        halved, _ = await play(environment(Guessing(), reward=lambda total: total / 2), 4)
        assert halved.reward == 0.5
        refused, _ = await play(environment(Guessing(), reward=lambda total: total * 9), 4)
        assert math.isnan(refused.reward) and "not in [0, 1]" in refused.info["failure"]

    asyncio.run(run())


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_failing_server_ends_the_task(fails: int, raises: bool) -> None:
    message = "server: ConnectionError: closed" if raises else r"server: no response within 0\.05 s"

    async def run() -> None:
        env = environment(Guessing(fails, raises), timeout=0.05)
        if fails > 0:
            await env.reset(seed=7)
            for _ in range(fails):
                step = await env.step(calls(1))
            assert math.isnan(step.reward) and step.truncated
            with pytest.raises(RuntimeError, match="has ended"):
                await env.step(calls(2))
        with pytest.raises(RuntimeError, match=message):
            await env.reset(seed=7)

    asyncio.run(run())


@pytest.fixture
def server() -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(port)])
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        if process.poll() is not None:
            break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.mark.skipif(importlib.util.find_spec("openenv") is None, reason="needs openenv-core")
def test_a_real_server_and_client(server: str) -> None:
    from openenv.core import GenericEnvClient

    async def run() -> None:
        async with GenericEnvClient(base_url=server) as client:
            env = environment(client)
            for seed in (7, 0, 9):
                step, count = await play(env, seed)
                assert (step.reward, step.info["answer"], count <= 4) == (1, "right", True)

    asyncio.run(run())
