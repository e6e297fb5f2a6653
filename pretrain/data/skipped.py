"""What of the data could not be used: counted, listed in the run's folder, and limited."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pretrain.errors import PretrainError

FILE = "skipped.jsonl"


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
        self._all: dict[str, Skip] = {}

    def __iter__(self) -> Iterator[Skip]:
        return iter(self._all.values())

    @property
    def corrupt(self) -> int:
        return sum(skip.corrupt for skip in self._all.values())

    def add(self, skips: Iterable[Skip]) -> list[Skip]:
        """Count them; returns those that are new.

        Raises:
            PretrainError: more are corrupt than the limit allows; it names the latest.
        """
        new = []
        corrupt = self.corrupt
        for skip in skips:
            if skip.name in self._all:
                continue
            self._all[skip.name] = skip
            new.append(skip)
            corrupt += skip.corrupt
            if skip.corrupt and corrupt > self.limit:
                raise PretrainError(
                    f"{corrupt} samples are corrupt, more than data.max_corrupt={self.limit}; the "
                    f"latest: {skip.name} ({skip.reason}). Mend the data, or raise data.max_corrupt"
                )
        return new


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
