"""Tokenizing the files of a source in parts, by several processes, so that little work is lost when
they are killed.

Files are divided into units: a large file, or consecutive small ones. The records of a unit are
divided into parts of about :func:`part_size` characters; both depend on the files alone. Each
process starts units that nobody has started; when there are none left, it helps with the others: it
reads their records again, and tokenizes the parts that nobody else has claimed. Reading is far
cheaper than tokenizing. A part is a folder that appears by renaming, so it is complete or absent.

Meanwhile :class:`Merger` appends the parts in order to the columns, and deletes their data. The
sizes of the columns say which parts have been appended. The result therefore does not depend on the
number of processes or on interruptions.
"""

import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic

import numpy as np
import numpy.typing as npt

from pretrain.data.skipped import Skip, Skipped
from pretrain.data.sources.indexed import IndexedFile, InputFile, R
from pretrain.errors import PretrainError
from pretrain.runtime.progress import Progress

Encoded = tuple[int, tuple[npt.ArrayLike, ...]]
"""A document: the hash of its content, and its values in each column."""

SMALLEST_PART, LARGEST_PART = 1 << 20, 1 << 25
_PARTS = 256  # enough to divide a source evenly among many processes
_RECORD_CHARACTERS = 100  # Counted for each record, so that records without text also fill a part.
_POLL_SECONDS = 0.05
_PARALLELISM = "TOKENIZERS_PARALLELISM"

LENGTHS, HASHES = "lengths", "tokens.hashes"


@dataclass(frozen=True)
class Unit(Generic[R]):
    """Consecutive files of a source, by their numbers."""

    files: Sequence[tuple[int, InputFile[R]]]

    def records(self) -> Iterator[tuple[int, R | Skip]]:
        return ((number, record) for number, file in self.files for record in file.records())


def part_size(files: Iterable[InputFile[R]]) -> int:
    """Characters in a part of a source with these files, and bytes of small files in a unit."""
    return min(max(sum(file.size for file in files) // _PARTS, SMALLEST_PART), LARGEST_PART)


def units(files: Iterable[tuple[int, InputFile[R]]], part_size: int) -> list[Unit[R]]:
    """Divide files, with their numbers, into units."""
    groups: list[list[tuple[int, InputFile[R]]]] = []
    size = 0
    for number, file in files:
        follows = groups and groups[-1][-1][0] == number - 1
        if not follows or size + file.size > part_size:
            groups.append([])
            size = 0
        groups[-1].append((number, file))
        size += file.size
    return [Unit(group) for group in groups]


@dataclass(frozen=True)
class Part:
    """A finished part: its size in each column, and its (number, documents, skips) of each file."""

    sizes: dict[str, int]
    files: list[tuple[int, int, list[Skip]]]


@dataclass(frozen=True)
class Parts(Generic[R]):
    """The parts of a source's units.

    Attributes:
        folder: contains the parts.
        columns: the dtype of each column, by the name of its file.
        encode: tokenizes records of a file.
        max_corrupt: more corrupt records in a part are an error.
        part_size: see :func:`part_size`.
    """

    folder: Path
    units: Sequence[Unit[R]]
    columns: Mapping[str, npt.DTypeLike]
    encode: Callable[[Iterator[R | Skip]], Iterator[Encoded | Skip]]
    max_corrupt: int
    part_size: int

    def path(self, unit: int, part: int) -> Path:
        return self.folder / f"{unit}-{part}"

    def read(self, unit: int, part: int) -> Part | None:
        """A part; None if it is not finished."""
        try:
            text = (self.path(unit, part) / "part.json").read_text()
        except FileNotFoundError:
            return None
        sizes, files = json.loads(text)
        return Part(
            sizes, [(n, count, [Skip(*skip) for skip in skips]) for n, count, skips in files]
        )

    def count(self, unit: int) -> int | None:
        """Number of parts of a unit; None if nobody has read it to its end."""
        try:
            return int((self.folder / f"{unit}.count").read_text())
        except FileNotFoundError:
            return None

    def work(self, claims: Path, process: int = 0, processes: int = 1) -> Iterator[None]:
        """Tokenize all parts that no other process of the same ``claims`` tokenizes.

        Args:
            claims: a folder in which processes claim units and parts.

        Yields:
            after each part.
        """

        def claim(name: str) -> bool:
            try:
                os.close(os.open(claims / name, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return False
            return True

        for unit in range(len(self.units)):
            if claim(f"{unit}") and not self._is_done(unit, claims):
                yield from self._encode(unit, claim)
        first = process * len(self.units) // processes
        for unit in itertools.chain(range(first, len(self.units)), range(first)):
            if not self._is_done(unit, claims):
                yield from self._encode(unit, claim)

    def _is_done(self, unit: int, claims: Path) -> bool:
        """Whether every part of a unit is finished or claimed."""
        count = self.count(unit)
        return count is not None and all(
            (claims / f"{unit}-{part}").exists() or self.path(unit, part).exists()
            for part in range(count)
        )

    def _encode(self, unit: int, claim: Callable[[str], bool]) -> Iterator[None]:
        records = _Records(self.units[unit].records(), self.part_size)
        for number in itertools.count():
            part = records.part()
            if not self.path(unit, number).exists() and claim(f"{unit}-{number}"):
                self._write(self.path(unit, number), part)
                yield
            collections.deque(part, maxlen=0)
            if records.at_end:
                with written(self.folder / f"{unit}.count") as file:
                    file.write_text(str(number + 1))
                return

    def _write(self, path: Path, records: Iterator[tuple[int, R | Skip]]) -> None:
        with written(path) as folder, contextlib.ExitStack() as stack:
            folder.mkdir()
            files = [stack.enter_context((folder / c).open("wb")) for c in self.all_columns]
            lengths, hashes, entries = list[int](), list[int](), list[tuple[int, int, list[Skip]]]()
            skipped = Skipped(self.max_corrupt)
            for number, group in itertools.groupby(records, lambda pair: pair[0]):
                skips, before = list[Skip](), len(hashes)
                for document in self.encode(record for _, record in group):
                    if isinstance(document, Skip):
                        skips += skipped.add([document])
                        continue
                    hash, values = document
                    dtypes = self.columns.values()
                    rows = [np.asarray(row, d) for row, d in zip(values, dtypes, strict=True)]
                    for file, row in zip(files, rows, strict=False):
                        file.write(row.tobytes())
                    lengths.append(len(rows[0]))
                    hashes.append(hash)
                entries.append((number, len(hashes) - before, skips))
            files[-2].write(np.array(lengths, np.int32).tobytes())
            files[-1].write(np.array(hashes, np.uint64).tobytes())
            for file in files:  # a crash of the machine must not leave a part that only looks whole
                file.flush()
                os.fsync(file.fileno())
            sizes = {name: file.tell() for name, file in zip(self.all_columns, files, strict=True)}
            (folder / "part.json").write_text(json.dumps([sizes, entries]))

    @property
    def all_columns(self) -> list[str]:
        """Names of the files that the data of a part consists of."""
        return [*self.columns, LENGTHS, HASHES]


class _Records(Generic[R]):
    """The records of a unit, part by part."""

    def __init__(self, records: Iterator[tuple[int, R | Skip]], part_size: int) -> None:
        self._records, self._part_size = records, part_size
        self._next = next(records, None)

    @property
    def at_end(self) -> bool:
        return self._next is None

    def part(self) -> Iterator[tuple[int, R | Skip]]:
        size = 0
        while self._next is not None and size < self._part_size:
            current, self._next = self._next, next(self._records, None)
            record = current[1]
            size += _RECORD_CHARACTERS
            size += 0 if isinstance(record, Skip) else len(record.text)
            yield current


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to ``path``, unless another process has written it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    remove(temporary)  # left by an earlier process with the same number
    yield temporary
    try:
        os.rename(temporary, path)
    except OSError:
        if not path.exists():
            raise
        remove(temporary)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------- merging


@dataclass(frozen=True)
class Known:
    """A file of which an earlier index has the documents.

    Attributes:
        blocks: the content of a column, piece by piece.
    """

    number: int
    file: IndexedFile
    sizes: dict[str, int]
    blocks: Callable[[str], Iterable[bytes]]


@dataclass
class Merger(Generic[R]):
    """Appends parts, and files that are known from an earlier index, to the columns in order.

    Attributes:
        targets: the file of each column.
        files: receives the number of documents and the skips of each file.
        skipped: counts corrupt records.
    """

    targets: Mapping[str, Path]
    parts: Parts[R]
    steps: Sequence[int | Known]
    files: Sequence[IndexedFile]
    skipped: Skipped
    progress: Progress
    documents: int = 0
    _begun: int = 0
    _done: dict[str, int] = field(default_factory=dict)

    def merge(self) -> Generator[None, None, None]:
        """Append everything, unless it has been appended before; yield to wait for parts."""
        columns = self.parts.all_columns
        self._done = dict.fromkeys(columns, 0)
        with contextlib.ExitStack() as stack:
            streams = {c: stack.enter_context(self.targets[c].open("ab")) for c in columns}
            before = {name: stream.tell() for name, stream in streams.items()}
            for step in self.steps:
                if isinstance(step, Known):
                    entry = (step.number, step.file.documents, step.file.skips)
                    self._append(streams, before, Part(step.sizes, [entry]), step.blocks)
                    continue
                for number in itertools.count():
                    while (part := self.parts.read(step, number)) is None:
                        if self.parts.count(step) == number:
                            break
                        self._report()
                        yield
                    if part is None:
                        break
                    path = self.parts.path(step, number)
                    self._append(streams, before, part, partial(_blocks, path))
                    for name in columns:
                        (path / name).unlink(missing_ok=True)

    def _append(
        self,
        streams: Mapping[str, Any],
        before: Mapping[str, int],
        part: Part,
        blocks: Callable[[str], Iterable[bytes]],
    ) -> None:
        for number, documents, skips in part.files:
            self.skipped.add(skips)
            self.files[number].skips.extend(skips)
            self.files[number].documents += documents
            self.documents += documents
            self._begun = number + 1
        ends = {name: self._done[name] + part.sizes[name] for name in streams}
        if any(before[name] < ends[name] for name in streams):
            for name, stream in streams.items():
                stream.truncate(self._done[name])
                for block in blocks(name):
                    stream.write(block)
                stream.flush()
                os.fsync(stream.fileno())
        self._done = ends
        self._report()

    def _report(self) -> None:
        tokens, dtype = next(iter(self.parts.columns.items()))
        count = self._done[tokens] // np.dtype(dtype).itemsize
        files = f"{self._begun:,} of {len(self.files):,} files"
        self.progress(self.documents, f", {count:,} tokens, {files}")


def _blocks(part: Path, column: str) -> Iterator[bytes]:
    with (part / column).open("rb") as file:
        yield from iter(lambda: file.read(1 << 22), b"")


# ---------------------------------------------------------------------- processes


def run(parts: Parts[R], merger: Merger[R], workers: int | None) -> None:
    """Tokenize all parts and merge them.

    Args:
        workers: number of processes, of one thread each; None: this process, with all its threads.

    Raises:
        PretrainError: a worker failed, or was killed.
        OSError: a part cannot be written.
    """
    for old in parts.folder.glob("claims-*"):
        shutil.rmtree(old, ignore_errors=True)
    claims = Path(tempfile.mkdtemp(dir=parts.folder, prefix="claims-"))
    merging = merger.merge()
    try:
        if workers is None:
            for _ in parts.work(claims):
                next(merging, None)
        else:
            _wait(parts, claims, merging, workers)
        if next(merging, merging) is not merging:
            raise RuntimeError(f"{parts.folder} lacks parts")
    finally:
        merging.close()


def _wait(parts: Parts[R], claims: Path, merging: Iterator[None], workers: int) -> None:
    """Merge while other processes work."""
    # Closures need not be pickled, and imports need not be repeated.
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"  # read by the tokenizers library, also when it is forked
    processes = [
        context.Process(
            target=_work, args=(parts, claims, number, workers, os.getpid(), failures), daemon=True
        )
        for number in range(workers)
    ]
    try:
        for process in processes:
            process.start()
        while next(merging, merging) is not merging:
            if not failures.empty():
                raise failures.get()
            for process in processes:
                if process.exitcode:
                    raise _ended(process.exitcode)
            time.sleep(_POLL_SECONDS)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before


def _ended(status: int) -> Exception:
    if status > 0:
        return RuntimeError("a tokenizing process failed; its traceback is above")
    return PretrainError(
        f"a tokenizing process was ended by {signal.Signals(-status).name}: repeat the command, "
        "which continues where it stopped, with fewer --workers if memory was short"
    )


def _work(
    parts: Parts[R], claims: Path, number: int, workers: int, parent: int, failures: Any
) -> None:
    """The body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends this process
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        for _ in parts.work(claims, number, workers):
            pass
    except (PretrainError, OSError) as error:
        failures.put(error)
    sys.stdout.flush()


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, even if it was killed."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
