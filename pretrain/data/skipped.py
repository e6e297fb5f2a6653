"""Data that could not be used: counted, listed in the run's folder, and limited."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from pretrain.errors import PretrainError

FILE = "skipped.jsonl"
T = TypeVar("T")


class Skip(NamedTuple):
    """A document that is left out.

    Attributes:
        name: the file, with the line's number in it where it has several.
        reason: what is wrong with it.
        corrupt: whether it counts against ``data.max_corrupt``; what is only too long does not.
    """

    name: str
    reason: str
    corrupt: bool = True


class Skipped:
    """Everything skipped so far, each once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.corrupt = 0
        self._all: dict[str, Skip] = {}

    def __iter__(self) -> Iterator[Skip]:
        return iter(self._all.values())

    def add(self, skips: Iterable[Skip]) -> list[Skip]:
        """Count them; returns those that are new.

        Raises:
            PretrainError: more are corrupt than the limit allows; it names the latest.
        """
        new = []
        for skip in skips:
            if skip.name in self._all:
                continue
            self._all[skip.name] = skip
            new.append(skip)
            self.corrupt += skip.corrupt
            if skip.corrupt and self.corrupt > self.limit:
                raise PretrainError(
                    f"{self.corrupt} samples are corrupt, more than "
                    f"data.max_corrupt={self.limit}; the latest: {skip.name} ({skip.reason}). "
                    "Repair the data, or raise data.max_corrupt"
                )
        return new


def within_limit(records: Iterable[T], limit: int) -> Iterator[T]:
    """The records, while no more of them are corrupt than the limit allows.

    Raises:
        PretrainError: more are; it names the latest.
    """
    skipped = Skipped(limit)
    for record in records:
        if isinstance(record, Skip):
            skipped.add([record])
        yield record


def take_all(skips: list[Skip]) -> list[Skip]:
    """Empty a list that another thread may be appending to, and return what was in it."""
    taken = []
    while skips:
        taken.append(skips.pop(0))
    return taken


def write(path: Path, skips: Iterable[Skip]) -> None:
    """Append to the list that a run keeps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(skip._asdict()) + "\n" for skip in skips)


def read(path: Path) -> list[Skip]:
    """The list that a run kept; empty where there is none."""
    skips = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            skips.append(Skip(**json.loads(line)))
        except (ValueError, TypeError):  # cut short by a kill
            break
    return skips
