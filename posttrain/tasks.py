"""Generated tasks of text, with demonstrations of their solutions."""

import itertools
import json
import random
import zlib
from typing import Any

from posttrain.config import SumsConfig
from posttrain.environment import abilities
from posttrain.environment.core import Task
from posttrain.rewards.text import numeric_reward
from pretrain.data.chat import REPLY, Message, ToolCall

TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "add"}}]
"""The tools of the mode agent, as they are declared in its prompts."""
WORDS = ("functions.add:", '{"sum":"', "## Return of ", json.dumps(TOOLS, separators=(",", ":")))
"""Words of the markup, for which a small vocabulary has many tokens."""
OF_IMAGES = ("transcribe", "count_shapes")
"""Tasks of :func:`generated_task` with images."""
AGENTIC = ("follow",)
"""Tasks of :func:`generated_task` with tools."""
STYLES = ("terse", "redundant", "skipping")
"""Styles of a working: every step once, every step twice, or one step with all numbers."""


def sum_task(config: SumsConfig, seed: int, *, held_out: bool = False) -> Task:
    """The sum of a seed, such as ``3+9+4=``; held-out sums are never drawn for training.

    A sum is held out if the remainder of its value, when its operands are read as the digits of a
    number, is 0 by division by 7.
    """
    rng = random.Random(seed)
    while True:
        count = rng.randint(config.min_operands, config.max_operands)
        operands = [rng.randint(0, config.largest) for _ in range(count)]
        digits = 0
        for operand in operands:
            digits = digits * (config.largest + 1) + operand
        if (digits % 7 == 0) == held_out:
            break
    question = "+".join(map(str, operands)) + "="
    return Task(question, "reasoning", question, sum(operands), numeric_reward, data=operands)


def generated_task(name: str, config: SumsConfig, seed: int, *, held_out: bool = False) -> Task:
    """The task of a seed: a sum, or one of :mod:`posttrain.environment.abilities`.

    Held-out problems are never drawn for training. Of other tasks than sums, those are held out
    whose names have a checksum that 7 divides.
    """
    if name == "sums":
        return sum_task(config, seed, held_out=held_out)
    rng = random.Random(seed)
    while True:
        task = abilities.TASKS[name](rng)
        if (zlib.crc32(task.problem.encode()) % 7 == 0) == held_out:
            return task


def working(task: Task, style: str) -> str:
    """The steps of a sum in one of :data:`STYLES`, such as ``3+9=12 12+4=16``."""
    if style == "skipping":
        return f"{task.question}{task.truth}"
    steps = []
    for total, operand in zip(itertools.accumulate(task.data[:-1]), task.data[1:], strict=True):
        steps += [f"{total}+{operand}={total + operand}"] * (2 if style == "redundant" else 1)
    return " ".join(steps)


def demonstration(config: SumsConfig, seed: int, mode: str) -> list[Message]:
    """A conversation about a sum in a mode: instant, thinking or agent.

    In the mode agent, whose prompts declare :data:`TOOLS`, a tool adds the numbers.
    """
    task = sum_task(config, seed)
    rng = random.Random(f"{seed} working")
    asked, answer = Message("user", task.question), str(task.truth)
    if mode == "agent":
        call = ToolCall("add", f'{{"sum":"{task.question[:-1]}"}}')
        return [
            asked,
            Message(REPLY, "", reasoning="", calls=(call,)),
            Message("tool", answer),
            Message(REPLY, answer, reasoning=""),
        ]
    others = 1 - config.redundant_share - config.skipping_share
    (style,) = rng.choices(STYLES, (others, config.redundant_share, config.skipping_share))
    reasoning = working(task, style) if mode == "thinking" else ""
    return [asked, Message(REPLY, answer, reasoning=reasoning)]
