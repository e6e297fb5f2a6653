"""Data: time to choose the documents of a sequence, memory of an index, and opening a table."""

import argparse
import functools
import itertools
import multiprocessing
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from benchmarks.runner import Result, markdown, quartiles, stopwatch
from pretrain.config import DataConfig, SourceConfig
from pretrain.data import RankShare, open_data
from pretrain.data.interface import SPLITS, Data
from pretrain.data.mixture.stream import Sequences, Stream
from pretrain.data.sources.indexed import DocumentCursor
from pretrain.data.sources.interface import Documents
from pretrain.data.sources.order import Integers
from pretrain.data.sources.splits import Splits, Subset, open_splits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTH = 4096
HELD_OUT = 0.01
# Documents of a source whose sizes are computed instead of being read.
DOCUMENTS = {"full": 10**6, "quick": 10**6, "tiny": 1000}
SOURCES = {"full": (1, 4, 16, 40, 160), "quick": (1, 4, 16, 40, 160), "tiny": (1, 3)}
MAIN_SOURCES = {"full": 40, "quick": 40, "tiny": 3}
STEPS = {"full": 10_000, "quick": 10_000, "tiny": 20}
BATCH = {"full": 256, "quick": 16, "tiny": 4}
ROUNDS = {"full": 11, "quick": 5, "tiny": 2}
INDEX_DOCUMENTS = {
    "full": (10**6, 10**7, 10**8, 10**9),
    "quick": (10**6, 10**7, 10**8, 10**9),
    "tiny": (10**3, 10**4),
}
TABLE_ROWS = {"full": 10**6, "quick": 10**6, "tiny": 1000}
FUNCTION, ARRAYS = "function", "arrays, 16 kept"


@dataclass
class Simulated:
    """Documents of text whose hashes and sizes are functions of their number."""

    number: int
    documents: int
    weight: float = 1.0
    whole: bool = False

    def __post_init__(self) -> None:
        config = SimpleNamespace(weight=self.weight)
        self.source = SimpleNamespace(seed=3, number=self.number, has_images=False, config=config)
        self.index = f"simulated-{self.documents}-{self.number}"
        self.removed, self.removed_by = np.empty(0, np.int64), ""

    @property
    def hashes(self) -> npt.NDArray[np.uint64]:
        return cast(npt.NDArray[np.uint64], self)

    def __len__(self) -> int:
        return self.documents

    def __getitem__(self, part: slice) -> npt.NDArray[np.uint64]:
        numbers = np.arange(*part.indices(self.documents), dtype=np.uint64)
        return numbers * np.uint64(0x9E3779B97F4A7C15)

    @property
    def identity(self) -> Sequence[npt.NDArray[Any]]:
        return (self.hashes,)

    def sizes_of(self, numbers: Integers) -> tuple[Integers, Integers]:
        """50 to 2,097 tokens."""
        return 50 + ((numbers * 0x9E3779B1) >> 10 & 2047), np.zeros_like(numbers)

    def cursor(
        self, numbers: Subset | Integers, kind: type[DocumentCursor] = DocumentCursor
    ) -> DocumentCursor:
        return kind(cast(Documents, self), numbers, RankShare())


class ArrayCursor(DocumentCursor):
    """Orders documents by arrays, of which a process keeps 16, and looks up one at a time."""

    def _look_ahead(self) -> None:
        epoch, index = divmod(self.position, len(self.numbers))
        order = _permutation(self.source.seed, self.source.number, epoch, len(self.numbers))
        number = int(self.numbers[order[index]])
        tokens, placeholders = self.documents.sizes_of(np.array([number]))
        self._next = [(number, int(tokens[0]), int(placeholders[0]))]


@functools.lru_cache(maxsize=16)
def _permutation(seed: int, source: int, epoch: int, count: int) -> Integers:
    return np.random.default_rng([seed, source, epoch]).permutation(count)


def sources(count: int, documents: int) -> list[Simulated]:
    """Sources with weights from 1 to 5."""
    return [Simulated(number, documents, 1 + number % 5) for number in range(count)]


# ---------------------------------------------------------------------- run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are no options."""


def run(options: argparse.Namespace) -> Result:
    return {
        "length": LENGTH,
        "documents": DOCUMENTS[options.form],
        "sampling": _sampling(options),
        "after_steps": _after_steps(options),
        "memory": _memory(options),
        "table": _table(options),
    }


def _sequences(
    count: int, documents: int, batch: int = 256, kind: type[DocumentCursor] = DocumentCursor
) -> Sequences:
    everything = Subset(documents, np.empty(0, np.int64), leaves_out=True)
    cursors = [source.cursor(everything, kind) for source in sources(count, documents)]
    return Sequences(lambda: Stream(cursors, LENGTH, 0.0), batch)


def _sampling(options: argparse.Namespace) -> list[Result]:
    """Seconds for each sequence, by the number of sources."""
    tiny = options.form == "tiny"
    rows = []
    for count in SOURCES[options.form]:
        for name, kind in ((FUNCTION, DocumentCursor), (ARRAYS, ArrayCursor)):
            sequences = _sequences(count, DOCUMENTS[options.form], kind=kind)
            few = tiny or (kind is ArrayCursor and count > 16)
            number, rounds = (2, 3) if few else (2000, ROUNDS[options.form])
            draw = functools.partial(
                _advance, map(sequences.__getitem__, itertools.count()), number
            )
            draw()
            times = [stopwatch(draw, "cpu", options.clock) / number for _ in range(rounds)]
            low, median, high = quartiles(times)
            rows.append(
                {"order": name, "sources": count, "median_s": median, "quartiles_s": [low, high]}
            )
    return rows


def _advance(sequences: Iterator[object], number: int) -> None:
    for _ in range(number):
        next(sequences)


def _after_steps(options: argparse.Namespace) -> Result:
    """Seconds for each sequence at the start and after many steps."""
    form = options.form
    steps, batch = STEPS[form], BATCH[form]
    sequences = _sequences(MAIN_SOURCES[form], DOCUMENTS[form], batch)
    every = max(1, steps // 20)
    seconds, kept = [], 0
    for step in range(0, steps + 1, every):
        sequences[step * batch]  # reads all up to here
        start = step * batch + 1
        count = 20 if form == "tiny" else 1000

        def draw(start: int = start, count: int = count) -> None:
            for index in range(start, start + count):
                sequences[index]

        seconds.append(stopwatch(draw, "cpu", options.clock) / count)
        kept = max(kept, len(sequences._states))
    return {
        "sources": MAIN_SOURCES[form],
        "batch": batch,
        "steps": list(range(0, steps + 1, every)),
        "seconds": seconds,
        "states_kept": kept,
    }


def _memory(options: argparse.Namespace) -> list[Result]:
    """Memory that opening and sampling an index adds to a new process."""
    count = MAIN_SOURCES[options.form]
    rows = []
    for total in INDEX_DOCUMENTS[options.form]:
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            for simulated in sources(count, total // count):
                _open(simulated, folder)
            making = time.process_time() - start
            on_disk = sum(path.stat().st_size for path in Path(folder).rglob("*"))
            # A new process: it has no memory that it could use again.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as executor:
                measured = executor.submit(_measure, count, total // count, folder).result()
        print(f"measured {total:,} documents", flush=True)
        rows.append({"documents": total, "making_s": making, "disk_bytes": on_disk, **measured})
    return rows


def _open(simulated: Simulated, folder: str) -> Splits:
    sources = (SourceConfig(path="simulated"),)  # not read
    data = DataConfig(cache_dir=folder, held_out=HELD_OUT, seq_length=LENGTH, sources=sources)
    return open_splits(simulated, data, "hash")


def _measure(count: int, documents: int, folder: str) -> Result:
    """Bytes after opening all splits and sampling 2,000 sequences of each."""
    _sequences(2, 1000)[50]  # allocations that do not depend on the index
    before = _resident()
    start = time.process_time()
    opened = [(simulated, _open(simulated, folder)) for simulated in sources(count, documents)]
    opening = time.process_time() - start
    made: list[Sequences] = []
    for split in SPLITS:
        cursors = [simulated.cursor(splits.numbers[split]) for simulated, splits in opened]
        made.append(Sequences(functools.partial(Stream, cursors, LENGTH, 0.0)))
        for index in range(2000):
            made[-1][index]
    private, shared = (now - then for now, then in zip(_resident(), before, strict=True))
    return {"private_bytes": private, "mapped_bytes": shared, "opening_s": opening}


def _table(options: argparse.Namespace) -> Result:
    """Opening a tokenized Parquet file in a new process."""
    rows = TABLE_ROWS[options.form]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table.parquet")
        _write_table(path, rows)
        start = time.process_time()
        _open_table(folder)
        making = time.process_time() - start
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            measured = executor.submit(_measure_table, folder).result()
        size = path.stat().st_size
    return {"rows": rows, "bytes": size, "making_s": making, **measured}


def _write_table(path: Path, rows: int) -> None:
    """A row group of short documents of words, each different."""
    import pyarrow
    from pyarrow import parquet

    words = ("the", "rain", "falls", "on", "green", "hills", "while", "a", "fox", "sleeps")
    chosen = np.random.default_rng(3).integers(0, len(words), (rows, 12))
    texts = [" ".join((str(n), *(words[i] for i in row))) for n, row in enumerate(chosen)]
    parquet.write_table(pyarrow.table({"text": texts}), path)


def _open_table(folder: str) -> Data:
    sources = (SourceConfig("text", str(Path(folder, "table.parquet"))),)
    config = DataConfig(
        seq_length=LENGTH, held_out=HELD_OUT, sources=sources, vocab_size=512,
        cache_dir=str(Path(folder, "cache")), max_corpus_mb=0.5,
    )  # fmt: skip
    return open_data(config, 14, 3)


def _measure_table(folder: str) -> Result:
    """Seconds to open the table, and bytes that this and 100 sequences add."""
    before = _resident()
    start = time.perf_counter()
    data = _open_table(folder)
    opening = time.perf_counter() - start
    for index in range(100):
        data.sample("train", index)
    private, shared = (now - then for now, then in zip(_resident(), before, strict=True))
    return {"opening_s": opening, "private_bytes": private, "mapped_bytes": shared}


def _resident() -> tuple[int, int]:
    """Resident bytes of this process: private ones, and those of files, which processes share."""
    status = Path("/proc/self/status").read_text()
    return tuple(  # type: ignore[return-value]
        int(re.search(rf"{name}:\s*(\d+) kB", status)[1]) << 10  # type: ignore[index]
        for name in ("RssAnon", "RssFile")
    )


# ---------------------------------------------------------------------- plot and table


def plot(result: Result, figure: "Figure") -> None:
    figure.set_size_inches(13, 4.2)
    left, middle, right = figure.subplots(1, 3)
    for name, color in ((ARRAYS, "tab:orange"), (FUNCTION, "tab:blue")):
        rows = [row for row in result["sampling"] if row["order"] == name]
        left.plot(
            [row["sources"] for row in rows],
            [1e3 * row["median_s"] for row in rows],
            marker="o", color=color, label=name,
        )  # fmt: skip
    left.axhline(0.1, color="black", linestyle=":", linewidth=1, label="0.1 ms")
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel(f"sources of {result['documents']:,} documents")
    left.set_ylabel("choosing the documents of a sequence, ms")
    left.set_title(f"sequences of {result['length']:,} tokens", fontsize=10)
    after = result["after_steps"]
    middle.plot(after["steps"], [1e3 * s for s in after["seconds"]], color="tab:blue")
    middle.axhline(0.1, color="black", linestyle=":", linewidth=1, label="0.1 ms")
    middle.set_ylim(0, 0.11)
    middle.set_xlabel("steps")
    middle.set_ylabel("choosing the documents of a sequence, ms")
    middle.set_title(f"{after['sources']} sources, over a run", fontsize=10)
    memory = result["memory"]
    documents = [row["documents"] for row in memory]
    right.plot(
        documents, [row["private_bytes"] / 2**20 for row in memory],
        marker="o", color="tab:blue", label=FUNCTION,
    )  # fmt: skip
    right.plot(
        documents, [16 * row["documents"] / 2**20 for row in memory],
        color="tab:orange", linestyle="--", label="arrays: 16 bytes a document",
    )  # fmt: skip
    right.axhline(64, color="black", linestyle=":", linewidth=1, label="64 MiB")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("documents")
    right.set_ylabel("private memory of each process, MiB")
    right.set_title("memory of an index", fontsize=10)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def table(result: Result) -> str:
    rows = []
    for count in dict.fromkeys(row["sources"] for row in result["sampling"]):
        times = {
            row["order"]: row["median_s"] for row in result["sampling"] if row["sources"] == count
        }
        rows.append([count, *(f"{1e3 * times[name]:,.3f}" for name in (ARRAYS, FUNCTION))])
    title = (
        f"**Choosing the documents of a sequence of {result['length']:,} tokens, ms; sources of "
        f"{result['documents']:,} documents**"
    )
    blocks = [f"{title}\n\n{markdown(['sources', ARRAYS, FUNCTION], rows)}"]
    after = result["after_steps"]
    first, *_, last = after["seconds"]
    blocks.append(
        f"{after['sources']} sources, {after['batch']} sequences a step: {1e3 * first:.3f} ms at "
        f"the start, {1e3 * last:.3f} ms after {after['steps'][-1]:,} steps; at most "
        f"{after['states_kept']} states kept. Every rank chooses the documents of the whole batch: "
        f"{4096e3 * last:,.0f} ms for 4,096 sequences, in the thread that prepares the next step."
    )
    header = ["documents", "private memory of each process, MiB", "opening, ms", "on disk, MiB",
              "made once, s"]  # fmt: skip
    rows = [
        [
            f"{row['documents']:,}", f"{row['private_bytes'] / 2**20:.1f}",
            f"{1e3 * row['opening_s']:.1f}", f"{row['disk_bytes'] / 2**20:,.1f}",
            f"{row['making_s']:,.1f}",
        ]
        for row in result["memory"]
    ]  # fmt: skip
    blocks.append(f"**Index of {after['sources']} sources**\n\n{markdown(header, rows)}")
    if opened := result.get("table"):  # not measured by earlier versions
        size, memory = f"{opened['bytes'] / 1e6:,.0f} MB", opened["private_bytes"] / 2**20
        blocks.append(
            f"A tokenized Parquet file of {opened['rows']:,} rows, {size}, opens in "
            f"{opened['opening_s']:.2f} s, in {memory:,.0f} MiB of private memory. Tokenizing it "
            f"once: {opened['making_s']:,.0f} s."
        )
    return "\n\n".join(blocks)
