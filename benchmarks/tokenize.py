"""`data tokenize`: time and processor time by the number of workers, in one file and in several.

All runs must write the same bytes. Wall times are only meaningful on a machine without other load.
The processor time of each worker is what a run takes on one core for each worker.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.runner import Result, markdown, quartiles
from pretrain.config import Config, DataConfig, SourceConfig
from pretrain.data.builtin.standard_library import read_corpus
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.tools.tokenize import tokenize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEGABYTES = {"full": 64.0, "quick": 16.0, "tiny": 0.1}
ROUNDS = {"full": 5, "quick": 3, "tiny": 1}
WORKERS = {"full": (1, 2, 4, 8), "quick": (1, 2), "tiny": (1, 2)}
FILES = (1, 16)
_PIECE = 4000  # characters in a document


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are no options."""


def run(options: argparse.Namespace) -> Result:
    megabytes, rounds = MEGABYTES[options.form], ROUNDS[options.form]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = _write(folder, int(megabytes * 1e6))
        for files in FILES:
            measured: dict[int, list[tuple[float, float, str]]] = {}
            for _, workers in itertools.product(range(rounds), WORKERS[options.form]):
                measured.setdefault(workers, []).append(_measure(folder, files, workers))
                print(f"timed {workers} workers, {files} files", flush=True)
            if len({digest for runs in measured.values() for *_, digest in runs}) > 1:
                raise RuntimeError("numbers of workers differ in the bytes that they write")
            for workers, runs in measured.items():
                wall, cpu = (quartiles(seconds) for seconds in list(zip(*runs, strict=True))[:2])
                rows.append({"files": files, "workers": workers, "wall_s": wall, "cpu_s": cpu})
    return {"bytes": size, "rows": rows}


def _write(folder: Path, size: int) -> int:
    """Write the same text into one file and into several; return its size."""
    text = "\n".join(file.text for file in read_corpus(8_000_000))
    pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
    documents = list(itertools.islice(itertools.cycle(pieces), max(1, size // _PIECE)))
    Tokenizer.train(pieces[:400], 8192).save(folder / "tokenizer.json")
    for files in FILES:
        (folder / f"{files}").mkdir()
        share = -(-len(documents) // files)
        for number in range(files):
            part = documents[number * share : (number + 1) * share]
            lines = "".join(json.dumps({"text": piece}) + "\n" for piece in part)
            (folder / f"{files}" / f"{number:02}.jsonl").write_text(lines)
    return sum(map(len, documents))


def _measure(folder: Path, files: int, workers: int) -> tuple[float, float, str]:
    """Seconds of wall time, processor seconds of each worker, and a digest of the tokens."""
    cache = folder / "cache"
    data = DataConfig(
        tokenizer=str(folder / "tokenizer.json"),
        sources=(SourceConfig("text", str(folder / f"{files}")),),
        cache_dir=str(cache),
    )
    started, before = time.perf_counter(), _children()
    with contextlib.redirect_stderr(io.StringIO()):
        list(tokenize(Config(data=data), workers))
    wall, cpu = time.perf_counter() - started, (_children() - before) / workers
    (tokens,) = cache.glob("*/tokens.bin")
    digest = hashlib.sha256(tokens.read_bytes()).hexdigest()
    shutil.rmtree(cache)
    return wall, cpu, digest


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def plot(result: Result, figure: "Figure") -> None:
    axes = figure.subplots()
    for files in FILES:
        rows = [row for row in result["rows"] if row["files"] == files]
        for name, style in (("wall_s", "-"), ("cpu_s", "--")):
            speeds = [result["bytes"] / row[name][1] / 1e6 for row in rows]
            workers = [row["workers"] for row in rows]
            axes.plot(workers, speeds, style, marker="o", label=f"{files} files, {name[:-2]}")
    axes.set_xlabel("workers")
    axes.set_ylabel("MB of text per second")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def table(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        (one,) = (r for r in result["rows"] if r["files"] == row["files"] and r["workers"] == 1)
        values = [f"{row['files']}", row["workers"]]
        for name in ("wall_s", "cpu_s"):
            values += [f"{row[name][1]:.2f}", f"{one[name][1] / row[name][1]:.2f}"]
        rows.append(values)
    header = ["files", "workers", "wall, s", "ratio", "processor time of each worker, s", "ratio"]
    return f"**{result['bytes'] / 1e6:.1f} MB of text**\n\n{markdown(header, rows)}"
