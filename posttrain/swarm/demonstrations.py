"""Demonstrations for the supervised start of a swarm: the syntax of its tools, as conversations.

They mix orchestrators that do everything themselves, those that assign records to sub-agents, and
sub-agents. The shares decide how often the trained model begins with either.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.environment.core import Task
from posttrain.swarm.tasks import SEPARATOR, LookUps
from pretrain.data.chat import Message, ToolCall

AGENT = "a"
"""Name of the sub-agent in demonstrations."""
SYSTEM_PROMPT = "search"
"""Its system prompt, which distinguishes the question of a deep task from that of a sub-agent."""


@dataclass(frozen=True)
class Demonstrations:
    """Conversations of a family of tasks.

    Attributes:
        look_ups: the tasks.
        parallel_share: share of the demonstrations of orchestrators with sub-agents, among the
            tasks whose chains are short enough for sub-agents.
        assign_more: probability that such a demonstration assigns one more name.
        answer_share: share of the demonstrations of orchestrators, among the same tasks, that
            assign all names and from which only the answer is learned: how results are combined,
            but not the decision to assign.
        sub_steps: limit of the replies of a sub-agent.
        sub_agent_share: share of the demonstrations of a sub-agent.
    """

    look_ups: LookUps
    parallel_share: float = 0.25
    assign_more: float = 0.75
    answer_share: float = 0.4
    sub_steps: int = 5
    sub_agent_share: float = 0.4

    def conversation(self, seed: int) -> list[Message]:
        """The conversation of a seed."""
        rng = random.Random(f"{seed} conversation")  # not the numbers that the task is drawn from
        task = self.look_ups.task(seed)
        names = task.question.split(SEPARATOR)
        if rng.random() < self.sub_agent_share:
            return sub_agent(task, rng.choice(names))
        calls = len(task.data) // len(names)
        if calls >= self.sub_steps:
            return alone(task, names)
        if rng.random() < self.answer_share:
            return parallel(task, learn_assignments=False)
        if rng.random() >= self.parallel_share:
            return alone(task, names)
        count = 1
        while count < len(names) and rng.random() < self.assign_more:
            count += 1
        return parallel(task, count)


def alone(task: Task, names: Sequence[str]) -> list[Message]:
    """An agent that follows the chain of each name, with a note of each record that it finds.

    Args:
        names: the question.
    """
    messages, found = [Message("user", SEPARATOR.join(names))], list[str]()
    for name in names:
        note, content = "".join(found[-1:]), name
        while content in task.data:
            messages.append(_calls(("get", {"key": content}), content=note))
            note, content = "", task.data[content]
            messages.append(Message("tool", content, answered="functions.get:0"))
        found.append(name + content)
    return [*messages, Message("assistant", SEPARATOR.join(found))]


def sub_agent(task: Task, name: str) -> list[Message]:
    """A sub-agent that looks up a name."""
    return [Message("system", SYSTEM_PROMPT), *alone(task, [name])]


def parallel(
    task: Task, count: int | None = None, *, learn_assignments: bool = True
) -> list[Message]:
    """An orchestrator that assigns each name to a sub-agent, all in one turn.

    Args:
        count: of the names, the first ones that it assigns; default: all.
        learn_assignments: whether that turn is in the loss, or the answer alone.
    """
    names, truth = task.question.split(SEPARATOR)[:count], task.truth[:count]
    create = ("create_subagent", {"name": AGENT, "system_prompt": SYSTEM_PROMPT})
    assigned = [("assign_task", {"agent": AGENT, "prompt": name}) for name in names]
    results = [f"created {AGENT}", *truth]
    ids = ["functions.create_subagent:0"]
    ids += [f"functions.assign_task:{index}" for index in range(1, 1 + len(names))]
    return [
        Message("user", task.question),
        _calls(create, *assigned)._replace(learned=learn_assignments),
        *(Message("tool", text, answered=id) for id, text in zip(ids, results, strict=True)),
        Message("assistant", SEPARATOR.join(truth)),
    ]


def _calls(*calls: tuple[str, dict[str, str]], content: str = "") -> Message:
    """A reply with calls, numbered from 0 in each turn as in :func:`render_calls`."""
    return Message(
        "assistant",
        content,
        calls=tuple(
            ToolCall(name, json.dumps(arguments, separators=(",", ":")), f"functions.{name}:{i}")
            for i, (name, arguments) in enumerate(calls)
        ),
    )
