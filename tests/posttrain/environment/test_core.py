"""Environments give a result for every action; tools and judges may fail in any way."""

import asyncio
import math
import random
from collections.abc import Awaitable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.environment.core import Environment, Task, one_of
from posttrain.environment.markup import BadCall, ToolCall, render_calls
from posttrain.environment.tools import Tool, ToolError, ToolResult, Toolset
from posttrain.rewards.text import exact_reward


def add(first: int, second: int) -> str:
    """Add two numbers."""
    return str(first + second)


async def later(text: str, times: int = 1) -> str:
    await asyncio.sleep(0)
    return text * times


def broken(text: str) -> str:
    if text == "tool":
        raise ToolError("as expected")
    raise RuntimeError("line\nline")


def sleep(seconds: float) -> Awaitable[str]:
    return asyncio.sleep(seconds, "late")


TOOLS = [Tool(add), Tool(later, per_turn=2), Tool(broken), Tool(sleep, timeout=0.01)]


def call(name: str, **arguments: Any) -> ToolResult:
    calls = [ToolCall(f"functions.{name}:0", name, arguments)]
    (result,) = asyncio.run(Toolset(TOOLS, max_result_chars=20).call_all(calls))
    assert result.id == f"functions.{name}:0"
    return result


def test_results_and_errors_are_observations() -> None:
    assert call("add", first=1, second=2).content == "3"
    assert call("later", text="ab", times=2).content == "abab"
    assert call("later", text="a" * 100).content == "a" * 20
    assert call("later", text="a\ud800").content == "a?"  # no tokenizer encodes it
    assert call("sleep", seconds=0).content == "late"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("subtract", {}, "there is no tool subtract; tools: add, later, broken, sleep"),
        ("add", {"first": 1}, "add: missing a required argument: 'second'"),
        ("add", {"first": 1, "second": "2"}, "add: second must be of type integer"),
        ("add", {"first": 1, "second": True}, "add: second must be of type integer"),
        ("add", {"first": 1, "second": 2, "x": 3}, "unexpected keyword argument 'x'"),
        ("broken", {"text": "tool"}, "as expected"),
        ("broken", {"text": ""}, "broken: RuntimeError: line line"),
        ("sleep", {"seconds": 60}, "sleep had no result within 0.01 s"),
    ],
)
def test_failed_calls(name: str, arguments: dict[str, Any], message: str) -> None:
    result = asyncio.run(
        Toolset(TOOLS).call_all([ToolCall(f"functions.{name}:0", name, arguments)])
    )[0]
    assert result.failed
    assert result.content.startswith("error: ")
    assert message in result.content


def test_calls_of_a_turn() -> None:
    calls = [ToolCall(f"functions.later:{i}", "later", {"text": f"{i}"}) for i in range(3)]
    results = asyncio.run(Toolset(TOOLS).call_all([*calls, BadCall("", "unreadable")]))
    assert [result.content for result in results] == [
        *("0", "1", "error: later can be called 2 times in a turn", "error: unreadable")
    ]


def test_declarations() -> None:
    declared = Toolset(TOOLS).schemas()[0]["function"]
    assert declared["name"] == "add"
    assert declared["description"] == "Add two numbers."
    assert declared["parameters"]["properties"] == {
        "first": {"type": "integer"},
        "second": {"type": "integer"},
    }
    with pytest.raises(ValueError, match="two tools are named add"):
        Toolset([Tool(add), Tool(add)])
    with pytest.raises(ValueError, match="x must be annotated"):
        Toolset([Tool(lambda x: "")])


def task(seed: int) -> Task:
    return Task("sum", "reasoning", f"1 + {seed}?", f"{1 + seed}", exact_reward)


def environment(**options: Any) -> Environment:
    return Environment(task, tools=lambda _task: Toolset(TOOLS), max_turns=3, **options)


CALL = render_calls([("add", {"first": 1, "second": 2})])


def test_an_episode() -> None:
    async def run() -> None:
        env = environment()
        messages, info = await env.reset(seed=2)
        assert messages == [{"role": "user", "content": "1 + 2?"}]
        assert info["tools"][0]["function"]["name"] == "add"
        observation, reward, terminated, truncated, _ = await env.step(CALL)
        assert observation == [ToolResult("functions.add:0", "3")]
        assert (reward, terminated, truncated) == (0, False, False)
        step = await env.step("<think>so</think>3<|im_end|>")
        assert (step.reward, step.terminated, step.info["answer"]) == (1, True, "3")
        with pytest.raises(RuntimeError, match="call reset"):
            await env.step("3")
        await env.reset(seed=0)
        assert (await env.step("2")).reward == 0

    asyncio.run(run())


def test_turns_are_limited() -> None:
    async def run() -> None:
        env = environment()
        with pytest.raises(RuntimeError, match="call reset"):
            await env.step("3")
        await env.reset(seed=2)
        steps = [await env.step(CALL) for _ in range(3)]
        assert [step.truncated for step in steps] == [False, False, True]
        assert steps[-1].info["failure"] == "no answer within 3 turns"

    asyncio.run(run())


async def good_judge(_task: Task, _answer: str) -> float:
    return 0.5


async def slow_judge(_task: Task, _answer: str) -> float:
    await asyncio.sleep(60)
    return 1.0


def bad_judge(_task: Task, _answer: str) -> float:
    raise RuntimeError("no server")


@pytest.mark.parametrize(
    ("judge", "reward", "failure"),
    [
        (good_judge, 0.5, None),
        (bad_judge, math.nan, "judge: RuntimeError: no server"),
        (slow_judge, math.nan, "judge: no reward within 0.01 s"),
        (lambda _task, _answer: None, math.nan, "judge: no reward"),
        (lambda _task, _answer: math.nan, math.nan, "judge: a reward of nan"),
        (lambda _task, _answer: 1.5, math.nan, "judge: a reward of 1.5"),
        (lambda _task, _answer: "good", math.nan, "judge: TypeError"),
        (lambda _task, _answer: [1.0], math.nan, "judge: TypeError"),
    ],
)
def test_judges(judge: Any, reward: float, failure: str | None) -> None:
    async def run() -> None:
        env = environment(judge=judge, judge_timeout=0.01)
        await env.reset(seed=2)
        step = await env.step("3")
        assert step.terminated
        assert step.reward == reward or (math.isnan(step.reward) and math.isnan(reward))
        assert (step.info.get("failure") or "").startswith(failure or "")
        assert bool(failure) == ("failure" in step.info)

    asyncio.run(run())


@given(st.integers(), st.text())
def test_a_diversified_prompt_contains_the_question(seed: int, question: str) -> None:
    diversify = one_of("Q: {question}", "{question} Answer:")
    prompt = diversify(question, random.Random(seed))
    assert question in prompt
    assert diversify(question, random.Random(seed)) == prompt


def test_a_template_needs_the_question() -> None:
    with pytest.raises(ValueError, match=r"has no \{question\}"):
        one_of("Q:")
