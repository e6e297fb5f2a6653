"""Documents that cannot be used: they are counted, limited, and listed in the run's folder."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from pretrain.errors import PretrainError, one_line

FILE = "skipped.jsonl"
T = TypeVar("T")


class Skip(NamedTuple):
    """A document that is left out.

    Attributes:
        name: the file, and the number of the line or element if it has several documents.
        reason: the reason, readable after the name.
        corrupt: whether it counts against ``data.max_corrupt``. Documents that are empty or too
            long do not.
    """

    name: str
    reason: str
    corrupt: bool = True


class EmptyRecordError(ValueError):
    """A record whose image or text is empty, such as of a failed download; it is not corrupt."""


def first(skips: Sequence[Skip]) -> str:
    """The first document that was skipped, corrupt ones before others, for the end of a message;
    empty if there is none."""
    if not skips:
        return ""
    found = next((skip for skip in skips if skip.corrupt), skips[0])
    return f"; the first: {one_line(found.name)} ({found.reason})"


class Skipped:
    """The documents skipped so far, each counted once.

    Args:
        limit: more corrupt documents are an error.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.corrupt = 0
        self._all: dict[str, Skip] = {}

    def __iter__(self) -> Iterator[Skip]:
        return iter(self._all.values())

    def add(self, skips: Iterable[Skip]) -> list[Skip]:
        """Count documents, and return those that are new.

        Raises:
            PretrainError: more documents are corrupt than allowed; the message names the latest.
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
    """Pass records on, and count the corrupt ones among them.

    Raises:
        PretrainError: more records are corrupt than allowed; the message names the latest.
    """
    skipped = Skipped(limit)
    for record in records:
        if isinstance(record, Skip):
            skipped.add([record])
        yield record


def write(path: Path, skips: Iterable[Skip]) -> None:
    """Append documents to the list of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) and file.read() != b"\n":
            file.write(b"\n")  # after a line that was cut short by a kill
        file.writelines(json.dumps(skip._asdict()).encode() + b"\n" for skip in skips)


def read(path: Path) -> list[Skip]:
    """Read the list of a run; empty if there is no such file."""
    skips = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            skips.append(Skip(**json.loads(line)))
        except (ValueError, TypeError):  # cut short by a kill
            continue
    return skips
