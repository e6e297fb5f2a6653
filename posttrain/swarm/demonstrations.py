"""Demonstrations for the supervised start of a swarm: the syntax of its tools, as conversations.

They mix orchestrators that do everything themselves, those that assign records to sub-agents, and
sub-agents. The shares decide how often the trained model begins with either.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.environment.core import Task
from posttrain.swarm.tasks import SEPARATOR, VALUE, LookUps
from pretrain.data.chat import Message, ToolCall

AGENT = "a"
"""Name of the sub-agent in demonstrations."""


@dataclass(frozen=True)
class Demonstrations:
    """Conversations of a family of tasks.

    Attributes:
        look_ups: the tasks.
        serial_records: records of a wide task that an orchestrator looks up alone before it
            answers, as far as its steps suffice.
        parallel_share: share of the demonstrations of wide tasks with sub-agents; of deep tasks, a
            third of it.
        sub_agent_share: share of the demonstrations of a sub-agent.
    """

    look_ups: LookUps
    serial_records: int
    parallel_share: float = 0.3
    sub_agent_share: float = 0.4

    def conversation(self, seed: int) -> list[Message]:
        """The conversation of a seed."""
        rng = random.Random(seed)
        task = self.look_ups.task(seed)
        names = task.question.split(SEPARATOR)
        if rng.random() < self.sub_agent_share:
            return alone(task, [rng.choice(names)])
        share = self.parallel_share if len(names) > 1 else self.parallel_share / 3
        if rng.random() < share:
            return parallel(task)
        return alone(task, names, self.serial_records)


def alone(task: Task, names: Sequence[str], records: int | None = None) -> list[Message]:
    """An agent that follows the chain of each name, with a note of each record that it finds.

    Args:
        names: the question.
        records: number of names that it looks up; default: all.
    """
    messages, found = [Message("user", SEPARATOR.join(names))], list[str]()
    for name in names[:records]:
        note, content = "".join(found[-1:]), name
        while not content.startswith(VALUE):
            messages.append(_calls(("get", {"key": content}), content=note))
            note, content = "", task.data[content]
            messages.append(Message("tool", content, answered="functions.get:0"))
        found.append(name + content)
    return [*messages, Message("assistant", SEPARATOR.join(found))]


def parallel(task: Task) -> list[Message]:
    """An orchestrator that assigns each name to a sub-agent, all in one turn."""
    names = task.question.split(SEPARATOR)
    create = ("create_subagent", {"name": AGENT, "system_prompt": ""})
    assigned = [("assign_task", {"agent": AGENT, "prompt": name}) for name in names]
    results = [f"created {AGENT}", *task.truth]
    ids = ["functions.create_subagent:0"]
    ids += [f"functions.assign_task:{index}" for index in range(1, 1 + len(names))]
    return [
        Message("user", task.question),
        _calls(create, *assigned),
        *(Message("tool", text, answered=id) for id, text in zip(ids, results, strict=True)),
        Message("assistant", SEPARATOR.join(task.truth)),
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
