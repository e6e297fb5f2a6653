"""Wide look-ups, which parallel agents answer sooner, and deep ones, which they do not.

A task has records, each behind a chain of calls of ``get``: a name returns another name, and the
last one a digit. A wide task has several records; its main agent has fewer critical
steps than calls. A deep task has one record behind a longer chain. No question asks for
parallelism.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.environment.core import Task
from posttrain.environment.tools import Tool, ToolError

SEPARATOR = ","
"""Between the names of a question, and the records of an answer, such as ``a1,b2``."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class LookUps:
    """A family of look-up tasks.

    Attributes:
        records: of a wide task (n).
        depth: calls for each of its records (h).
        deep: most calls for the record of a deep task, which has two or more.
        deep_share: share of deep tasks.
        name_length: letters of a name.
    """

    records: int = 8
    depth: int = 1
    deep: int = 6
    deep_share: float = 0.3
    name_length: int = 1

    def __post_init__(self) -> None:
        for name in ("records", "depth", "name_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"swarm.{name}={getattr(self, name)}: must be at least 1")
        if self.deep < 2:
            raise ValueError(f"swarm.deep={self.deep}: must be at least 2")
        if not 0 <= self.deep_share <= 1:
            raise ValueError(f"swarm.deep_share={self.deep_share}: must be in [0, 1]")
        most, names = max(self.records * self.depth, self.deep), 26**self.name_length // 2
        if most > names:
            raise ValueError(
                f"swarm.records={self.records} x swarm.depth={self.depth} and swarm.deep="
                f"{self.deep} must not exceed the {names} names of {self.name_length} letters"
            )

    def task(self, seed: int) -> Task:
        """The task of a seed."""
        rng = random.Random(seed)
        is_deep = rng.random() < self.deep_share
        count, depth = (1, rng.randint(2, self.deep)) if is_deep else (self.records, self.depth)
        chains = self._chains(rng, count, depth)
        table = {a: b for chain in chains for a, b in itertools.pairwise(chain)}
        question = SEPARATOR.join(chain[0] for chain in chains)
        truth = [chain[0] + chain[-1] for chain in chains]
        return Task(f"{seed}", "agentic", question, truth, records_reward, data=table)

    def _chains(self, rng: random.Random, count: int, depth: int) -> list[list[str]]:
        names: set[str] = set()
        while len(names) < count * depth:
            names.add("".join(rng.choices(_LETTERS, k=self.name_length)))
        ordered = rng.sample(sorted(names), count * depth)
        return [
            [*ordered[i * depth : (i + 1) * depth], f"{rng.randrange(10)}"] for i in range(count)
        ]


def records_reward(answer: str, truth: Sequence[str]) -> float:
    """Share of the records that an answer has right, in any order; extra ones count as wrong.

    Args:
        truth: different records, such as ``a1``.
    """
    given = answer.split(SEPARATOR)
    return len({*given} & {*truth}) / max(len(given), len(truth))


def tools(task: Task) -> list[Tool]:
    """The tool ``get`` of a task, with one call in a turn."""
    table: dict[str, Any] = task.data

    def get(key: str) -> str:
        """Return the content of a record."""
        if key not in table:
            raise ToolError("no record")
        return str(table[key])

    return [Tool(get, per_turn=1)]
