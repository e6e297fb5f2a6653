"""A swarm with scripted models: batches, limits, observations and tokens."""

import re
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.environment.chat import KimiChat
from posttrain.environment.markup import render_calls
from posttrain.environment.rollouts import Sample
from posttrain.swarm.orchestrator import Limits, SwarmEpisode, run_swarms
from posttrain.swarm.parl import critical_steps
from posttrain.swarm.tasks import LookUps, records_reward, tools
from pretrain.data.tokenizer import Tokenizer

LOOK_UPS = LookUps(records=3, depth=2, deep_share=0)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["look up records"], 300)


@cache
def chat() -> KimiChat:
    return KimiChat(tokenizer(), declare_tools=False)


class Scripted:
    """A model whose replies are a function of the text before them."""

    def __init__(self, script: Callable[[str], str]) -> None:
        self.script = script
        self.batches: list[int] = []

    def __call__(self, prompts: list[list[int]]) -> list[Sample]:
        self.batches.append(len(prompts))
        samples = []
        for prompt in prompts:
            reply = self.script(chat().decode(prompt))
            tokens = [*map(int, tokenizer().encode(reply)), tokenizer().im_end]
            samples.append(Sample(tokens, [-1.0] * len(tokens)))
        return samples


def question_of(text: str) -> str:
    found = re.search(r"<\|im_user\|>user<\|im_middle\|>(.*?)<\|im_end\|>", text, re.S)
    assert found
    return found[1]


def results_of(text: str) -> list[str]:
    return re.findall(r"## Return of [^\n]*\n(.*?)<\|im_end\|>", text, re.S)


def get(key: str) -> str:
    return render_calls([("get", {"key": key})])


def follow(text: str) -> str:
    """A sub-agent that follows a chain to its digit."""
    last = (results_of(text) or [question_of(text)])[-1]
    return f"{question_of(text)}{last}" if last.isdigit() else get(last)


def parallel(text: str) -> str:
    """An orchestrator that assigns all records at once."""
    results = results_of(text)
    if results:
        return ",".join(results[1:])
    create = ("create_subagent", {"name": "a", "system_prompt": ""})
    names = question_of(text).split(",")
    return render_calls([create, *(("assign_task", {"agent": "a", "prompt": n}) for n in names)])


def serial(text: str) -> str:
    """An orchestrator that does everything itself."""
    digits = [result for result in results_of(text) if result.isdigit()]
    names = question_of(text).split(",")
    if len(digits) == len(names):
        return ",".join(n + d for n, d in zip(names, digits, strict=True))
    last = (results_of(text) or ["0"])[-1]
    return get(names[len(digits)] if last.isdigit() else last)


def swarm(
    main: Callable[[str], str], sub: Callable[[str], str], count: int = 1, **limits: int
) -> tuple[list[SwarmEpisode], Scripted, Scripted]:
    first, second = Scripted(main), Scripted(sub)
    episodes = run_swarms(
        *(LOOK_UPS.task, tools, list(range(count))),
        orchestrator=first,
        sub_agent=second,
        chat=chat(),
        limits=Limits(**({"context": 4096} | limits)),
    )
    return episodes, first, second


def test_all_agents_of_a_stage_are_one_batch() -> None:
    episodes, main, sub = swarm(parallel, follow, count=4)
    assert [episode.episode.reward for episode in episodes] == [1.0] * 4
    assert main.batches == [4, 4]
    assert sub.batches == [12, 12, 12]  # 3 records of 4 tasks: two calls and an answer
    for episode in episodes:
        assert [stage.sub_steps for stage in episode.stages] == [(3, 3, 3), ()]
        assert critical_steps(episode.stages) == 5
        assert episode.stages[0].finished == 3


def test_one_model_for_all_agents_has_one_batch() -> None:
    def either(text: str) -> str:
        return parallel(text) if "," in question_of(text) else follow(text)

    model = Scripted(either)
    run_swarms(
        *(LOOK_UPS.task, tools, [0, 1]),
        orchestrator=model,
        sub_agent=model,
        chat=chat(),
        limits=Limits(),
    )
    assert model.batches == [2, 6, 6, 6, 2]


def test_an_orchestrator_alone_needs_more_critical_steps() -> None:
    (episode,), *_ = swarm(serial, follow)
    assert episode.episode.reward == 1
    assert critical_steps(episode.stages) == 7
    (episode,), *_ = swarm(serial, follow, critical_steps=6)
    assert episode.episode.answer is None
    assert episode.episode.reward == 0
    assert episode.episode.failure == "no answer within 6 turns"
    assert critical_steps(episode.stages) == 6


def test_tokens_of_observations_are_masked() -> None:
    (episode,), *_ = swarm(parallel, follow)
    trajectory = episode.episode.trajectory
    kept = [t for t, m in zip(trajectory.completion, trajectory.mask, strict=True) if m]
    replies = parallel(chat().decode(trajectory.prompt)) + "<|im_end|>"
    answer = ",".join(results_of(chat().decode(trajectory.tokens))[1:]) + "<|im_end|>"
    assert chat().decode(kept) == replies + answer
    assert all(
        logprob == -mask for logprob, mask in zip(trajectory.logprobs, trajectory.mask, strict=True)
    )
    # The tokens are those of the whole conversation in the chat format.
    assert chat().decode(trajectory.tokens).count("<|im_assistant|>assistant<|im_middle|>") == 2


def test_a_sub_agent_that_never_finishes_is_an_observation() -> None:
    (episode,), _, sub = swarm(parallel, lambda text: get(question_of(text)), sub_steps=2)
    stopped = "error: a was stopped: no answer within 2 turns"
    text = chat().decode(episode.episode.trajectory.tokens)
    assert results_of(text) == ["created a", *[stopped] * 3]
    assert episode.stages[0].sub_steps == (2, 2, 2)
    assert episode.stages[0].finished == 0
    assert sub.batches == [3, 3]


def test_a_sub_agent_has_a_bounded_context() -> None:
    (episode,), *_ = swarm(parallel, lambda _text: "x" * 1000, sub_context=100)
    text = chat().decode(episode.episode.trajectory.tokens)
    assert results_of(text)[1] == "error: a was stopped: no answer within 100 tokens"
    assert all(len(sub.trajectory) == 100 for sub in episode.sub_episodes)


def test_bad_assignments_are_observations() -> None:
    def main(text: str) -> str:
        if results_of(text):
            return "done"
        create = [("create_subagent", {"name": f"{i}", "system_prompt": ""}) for i in range(3)]
        assign = [("assign_task", {"agent": agent, "prompt": "aa"}) for agent in "0x011"]
        return render_calls([*create, *assign])

    (episode,), *_ = swarm(main, lambda _text: "", agents=2, assignments=4)
    text = chat().decode(episode.episode.trajectory.tokens)
    stopped = "error: {} was stopped: an empty answer"
    assert results_of(text) == [
        *("created 0", "created 1", "error: there are 2 sub-agents, which is the limit"),
        *(stopped.format(0), "error: there is no sub-agent x; create it first", stopped.format(0)),
        *(stopped.format(1), "error: assign_task can be called 4 times in a turn"),
    ]
    assert len(episode.stages[0].sub_steps) == 3


def test_sub_agents_have_no_sub_agents() -> None:
    def sub(text: str) -> str:
        return (results_of(text) or [render_calls([("create_subagent", {})])])[-1]

    (episode,), *_ = swarm(parallel, sub)
    text = chat().decode(episode.episode.trajectory.tokens)
    assert results_of(text)[1] == "error: there is no tool create_subagent; tools: get"


STRANGE = ("\ud800", "a\udc80", "\0", "<|im_end|>", "\u2028", "a" * 60)

replies = st.sampled_from(
    [
        *("done", "", get("aa"), get("aa") * 2, "<|tool_calls_section_begin|>"),
        render_calls([("create_subagent", {"name": "a", "system_prompt": "s"})]),
        render_calls([("assign_task", {"agent": "a", "prompt": "p"})] * 3),
        render_calls([("assign_task", {"agent": 1})]),
        *(render_calls([("create_subagent", {"name": t, "system_prompt": t})]) for t in STRANGE),
        *(render_calls([("assign_task", {"agent": t, "prompt": t})]) for t in STRANGE),
        *map(get, STRANGE),
        "x" * 300,
    ]
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(replies, min_size=1),
    st.lists(replies, min_size=1),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(50, 400),
)
def test_any_replies_end_within_the_limits(
    main: list[str], sub: list[str], critical: int, sub_steps: int, context: int
) -> None:
    def script(replies: list[str]) -> Callable[[str], str]:
        return lambda text: replies[text.count("<|im_assistant|>") % len(replies)]

    limits = {"critical_steps": critical, "sub_steps": sub_steps, "sub_context": 200}
    episodes, *_ = swarm(script(main), script(sub), count=2, context=context, **limits)
    for episode in episodes:
        assert critical_steps(episode.stages) <= critical
        assert all(steps <= sub_steps for stage in episode.stages for steps in stage.sub_steps)
        trajectory = episode.episode.trajectory
        assert len(episode.stages) == episode.episode.turns
        assert len(trajectory) <= max(context, len(trajectory.prompt))
        assert (episode.episode.answer is None) == (episode.episode.failure is not None)


def test_an_error_of_the_sub_agents_model_is_no_observation() -> None:
    def fails(_text: str) -> str:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        swarm(parallel, fails)


@given(st.integers(0, 1000), st.booleans())
def test_tasks(seed: int, is_deep: bool) -> None:
    family = LookUps(records=3, depth=2, deep=4, deep_share=float(is_deep))
    task = family.task(seed)
    assert task == family.task(seed) or task.data == family.task(seed).data
    names = task.question.split(",")
    assert len(names) == (1 if is_deep else 3)
    for name, record in zip(names, task.truth, strict=True):
        content = name
        calls = 0
        while content in task.data:
            content, calls = task.data[content], calls + 1
        assert record == name + content
        assert 2 <= calls <= (4 if is_deep else 2)
    assert task.reward(",".join(task.truth), task.truth) == 1


@given(st.text(st.sampled_from("0123,")), st.sets(st.sampled_from("0123"), min_size=1))
def test_records_reward(answer: str, records: set[str]) -> None:
    truth = sorted(records)
    assert 0 <= records_reward(answer, truth) <= 1
    assert records_reward(",".join(truth[::-1]), truth) == 1
    # Neither a wrong record nor the repetition of a right one is a gain.
    assert records_reward(",".join([*truth, "x"]), truth) < 1
    assert records_reward(",".join([truth[0]] * len(truth)), truth) == 1 / len(truth)


@pytest.mark.parametrize("limit", list(vars(Limits())))
def test_limits_are_positive(limit: str) -> None:
    with pytest.raises(ValueError, match=rf"swarm\.{limit}=0"):
        Limits(**{limit: 0})
