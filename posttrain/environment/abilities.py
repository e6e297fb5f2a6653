"""Generated tasks of three abilities, each of text and of images.

Domains are abilities, not modalities (arXiv 2602.02276, section 4.4): a table to look up and a word
to read are knowledge; sums, sorting, reversing and counting are reasoning; following a chain of
records with a tool is agentic, from a name in the question or in an image.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from posttrain.environment.core import Task, Tasks
from posttrain.environment.tools import Tool, ToolError, Toolset
from posttrain.rewards.text import (
    counting_reward,
    edit_distance_reward,
    exact_reward,
    numeric_reward,
)
from pretrain.config import ImageConfig
from pretrain.data.builtin.drawing import draw

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PATCH_SIZE = 14
_SHAPE = 10  # width of a shape, in pixels
_COLUMNS = 6


def look_up(rng: random.Random) -> Task:
    """Knowledge: ``c=4,k=1,a=9;k=`` has the answer 1."""
    table = {name: rng.randrange(10) for name in rng.sample(_LETTERS, 4)}
    asked = rng.choice(list(table))
    question = ",".join(f"{k}={v}" for k, v in table.items()) + f";{asked}="
    return _task("knowledge", question, table[asked], numeric_reward)


def transcribe(rng: random.Random) -> Task:
    """Knowledge: the word in an image."""
    word = _word(rng, 3, 6)
    return _task("knowledge", "", word, edit_distance_reward, image=_written(word, rng))


def add(rng: random.Random) -> Task:
    """Reasoning: ``3+12+5=`` has the answer 20."""
    operands = [rng.randrange(20) for _ in range(rng.randint(2, 4))]
    return _task("reasoning", "+".join(map(str, operands)) + "=", sum(operands), numeric_reward)


def sort(rng: random.Random) -> Task:
    """Reasoning: ``sort:dbca`` has the answer abcd."""
    letters = rng.sample(_LETTERS, rng.randint(3, 6))
    question = "sort:" + "".join(letters)
    return _task("reasoning", question, "".join(sorted(letters)), edit_distance_reward)


def reverse(rng: random.Random) -> Task:
    """Reasoning: ``reverse:abc`` has the answer cba."""
    word = _word(rng, 3, 6)
    return _task("reasoning", f"reverse:{word}", word[::-1], edit_distance_reward)


def count_shapes(rng: random.Random) -> Task:
    """Reasoning: the number of circles in an image of circles and squares."""
    kinds = [rng.choice(("circle", "square")) for _ in range(rng.randint(1, 2 * _COLUMNS))]
    count = kinds.count("circle")
    task = _task("reasoning", "circles:", count, counting_reward, image=_shapes(kinds, rng))
    return replace(task, problem=f"circles:{'-'.join(kinds)}")


def follow(rng: random.Random) -> Task:
    """Agentic: a chain of calls of ``get`` from a name to a digit."""
    names = rng.sample(_LETTERS, rng.randint(2, 4))
    digit = f"{rng.randrange(10)}"
    table = dict(zip(names, [*names[1:], digit], strict=True))
    return _task("agentic", f"get:{names[0]}", digit, exact_reward, data=table)


def read_and_follow(rng: random.Random) -> Task:
    """Agentic: as :func:`follow`, from a name in an image."""
    task = follow(rng)
    image = _written(task.question.removeprefix("get:"), rng)
    return _task("agentic", "get:", task.truth, exact_reward, image=image, data=task.data)


TASKS: Mapping[str, Callable[[random.Random], Task]] = {
    maker.__name__: maker
    for maker in (
        *(look_up, transcribe, add, sort, reverse, count_shapes, follow, read_and_follow),
    )
}
"""All kinds of tasks."""


def mixture(shares: Mapping[str, float]) -> Tasks:
    """Tasks of several kinds, each a function of its seed.

    Args:
        shares: relative share of each kind in :data:`TASKS`.

    Raises:
        ValueError: a kind does not exist, or a share is negative, or all are 0.
    """
    unknown = [name for name in shares if name not in TASKS]
    if unknown:
        raise ValueError(f"there are no tasks {', '.join(unknown)}; kinds: {', '.join(TASKS)}")
    if not all(share >= 0 for share in shares.values()) or not sum(shares.values()) > 0:
        raise ValueError(f"shares of tasks must be at least 0, and one positive, not {shares}")

    def task(seed: int) -> Task:
        rng = random.Random(seed)
        (name,) = rng.choices(list(shares), list(shares.values()))
        return TASKS[name](rng)

    return task


def tools(task: Task) -> Toolset:
    """The tools of a task: ``get`` for the agentic ones."""
    if task.ability != "agentic":
        return Toolset()
    table: dict[str, str] = task.data

    def get(key: str) -> str:
        """Return the content of a record.

        Args:
            key: name of the record.
        """
        if key not in table:
            raise ToolError("no record")
        return table[key]

    return Toolset([Tool(get)])


def _task(ability: Any, question: str, truth: Any, reward: Any, **fields: Any) -> Task:
    return Task(f"{question}{truth}", ability, question, truth, reward, **fields)


def _word(rng: random.Random, shortest: int, longest: int) -> str:
    return "".join(rng.choices(_LETTERS, k=rng.randint(shortest, longest)))


def _written(text: str, rng: random.Random) -> Image.Image:
    config = ImageConfig(wrapped_share=0.0, clip_share=0.0)
    item = draw(text, config, _PATCH_SIZE, np.random.default_rng(rng.getrandbits(64)))
    return Image.fromarray(item.pixels[0])


def _shapes(kinds: list[str], rng: random.Random) -> Image.Image:
    """One shape in each cell of a grid, moved by some pixels."""
    cell = 2 * _PATCH_SIZE
    rows = -(-len(kinds) // _COLUMNS)
    image = Image.new("RGB", (_COLUMNS * cell, rows * cell), "white")
    canvas = ImageDraw.Draw(image)
    for index, kind in enumerate(kinds):
        x, y = (index % _COLUMNS) * cell, (index // _COLUMNS) * cell
        left, top = (edge + rng.randint(1, cell - _SHAPE - 2) for edge in (x, y))
        corners = (left, top, left + _SHAPE, top + _SHAPE)
        paint = canvas.ellipse if kind == "circle" else canvas.rectangle
        paint(corners, fill="black")
    return image
