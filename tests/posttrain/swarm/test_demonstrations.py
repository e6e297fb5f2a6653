"""Demonstrations are conversations that the environment would have had."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.environment.chat import KimiChat
from posttrain.environment.rollouts import Sample
from posttrain.swarm.demonstrations import Demonstrations, alone, parallel, sub_agent
from posttrain.swarm.orchestrator import Limits, run_swarms
from posttrain.swarm.tasks import SEPARATOR, LookUps, tools
from pretrain.data import chat
from pretrain.data.chat import Message
from pretrain.data.packing import Document
from pretrain.data.tokenizer import Tokenizer

LOOK_UPS = LookUps(records=3, depth=2, deep_share=0.3)
TOKENIZER = Tokenizer.train(["look up"], 300)


class Player:
    """A model that plays the replies of conversations, found by their prompts."""

    def __init__(self, conversations: Sequence[Document]) -> None:
        self.conversations = [document.tokens for document in conversations]

    def __call__(self, prompts: list[list[int]]) -> list[Sample]:
        samples = []
        for prompt in prompts:
            (rest, *_) = (
                c[len(prompt) :] for c in self.conversations if c[: len(prompt)] == prompt
            )
            tokens = rest[: rest.index(TOKENIZER.im_end) + 1]
            samples.append(Sample(tokens, [0.0] * len(tokens)))
        return samples


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["parallel", "alone"])
def test_a_demonstration_is_an_episode(seed: int, kind: str) -> None:
    task = LOOK_UPS.task(seed)
    names = task.question.split(SEPARATOR)
    conversation = parallel(task) if kind == "parallel" else alone(task, names)
    main = chat.render(TOKENIZER, conversation)
    sub = [chat.render(TOKENIZER, sub_agent(task, name)) for name in names]
    (episode,) = run_swarms(
        *(LOOK_UPS.task, tools, [seed]),
        orchestrator=Player([main]),
        sub_agent=Player(sub),
        chat=KimiChat(TOKENIZER, declare_tools=False),
        limits=Limits(critical_steps=20, sub_steps=9, context=9999, sub_context=9999),
    )
    assert episode.episode.reward == 1
    assert episode.episode.trajectory.tokens == main.tokens
    # The same tokens are learned in the supervised start and in reinforcement learning.
    mask = [0] * len(episode.episode.trajectory.prompt) + episode.episode.trajectory.mask
    assert mask == main.weights


@given(st.integers(0, 10_000))
def test_conversations(seed: int) -> None:
    demonstrations = Demonstrations(LOOK_UPS)
    conversation = demonstrations.conversation(seed)
    assert conversation == demonstrations.conversation(seed)
    assert conversation[-1].role == "assistant" and not conversation[-1].calls
    task, answer = LOOK_UPS.task(seed), str(conversation[-1].content).split(SEPARATOR)
    if conversation[0].role == "system":
        assert len(answer) == 1 and answer[0] in task.truth
    elif is_parallel(conversation):
        assert answer == task.truth[: len(answer)]
    else:
        assert answer == task.truth


def is_parallel(conversation: Sequence[Message]) -> bool:
    return any(call.name == "assign_task" for m in conversation for call in m.calls)


@given(st.integers(0, 10_000))
def test_answers_are_learned_without_the_decision_to_assign(seed: int) -> None:
    look_ups = LookUps(records=3, deep_share=0)
    demonstrations = Demonstrations(look_ups, answer_share=1, sub_agent_share=0)
    conversation = demonstrations.conversation(seed)
    assert is_parallel(conversation)
    document = chat.render(TOKENIZER, conversation)
    learned = [t for t, w in zip(document.tokens, document.weights, strict=True) if w]
    answer = SEPARATOR.join(look_ups.task(seed).truth)
    assert TOKENIZER.decode(learned, skip_special_tokens=True) == answer


@pytest.mark.parametrize("deep_share", [0.0, 1.0])
def test_shares(deep_share: float) -> None:
    look_ups = LookUps(records=3, deep=4, deep_share=deep_share)
    for share in (0.0, 1.0):
        demonstrations = Demonstrations(
            look_ups, parallel_share=share, answer_share=0, sub_agent_share=0
        )
        found = [is_parallel(demonstrations.conversation(seed)) for seed in range(5)]
        assert found == [bool(share)] * 5


def test_shares_are_those_of_each_kind_of_task() -> None:
    demonstrations = Demonstrations(
        LookUps(deep=4, deep_share=0.5), 0.5, 0.5, answer_share=0, sub_agent_share=0.5
    )
    kinds = Counter(
        (len(LookUps(deep=4, deep_share=0.5).task(seed).truth) > 1, c[0].role, is_parallel(c))
        for seed in range(800)
        if (c := demonstrations.conversation(seed))
    )
    for is_wide in (False, True):
        assert 160 < kinds[is_wide, "system", False] < 240
        assert 70 < kinds[is_wide, "user", True] < 130
        assert 70 < kinds[is_wide, "user", False] < 130


def test_demonstrated_sub_agents_can_finish() -> None:
    demonstrations = Demonstrations(
        LookUps(deep_share=1), parallel_share=1, answer_share=0, sub_steps=3, sub_agent_share=0
    )
    for seed in range(20):
        calls = len(demonstrations.look_ups.task(seed).data)
        assert is_parallel(demonstrations.conversation(seed)) == (calls < 3)
