"""Every command of README and documentation is executed, page by page, with small settings.

Those of ``commands.NOT_EXECUTED`` are not; test_pages.py checks their options and settings.
"""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import __main__ as benchmarks
from pretrain import cli, config
from pretrain.metrics import read
from tests.distributed.launch import launch
from tests.docs.commands import ROOT, blocks, check, commands, is_executed, recipe, split_launcher
from tests.docs.test_pages import NOT_RUN, PAGES, name_of
from tests.pretrain.data import make
from tests.pretrain.data.media.test_video import film, greys

FEWER_SIZES = ("data.seq_length=4096", "language.num_layers=8")
LESS_TEXT = "data.max_corpus_mb=1.0"
# Settings for a run of seconds.
SMALLER = (
    "micro_batch_size=1", "global_batch_size=4", "optimizer.warmup_steps=1",
    "optimizer.decay_steps=0", "evaluation.every=1000", "evaluation.sequences=2",
    "evaluation.captions=2", "evaluation.transcriptions=2", "checkpoint.every=1000", LESS_TEXT,
)  # fmt: skip


def pages() -> list[Path]:
    every = [ROOT / "README.md", *PAGES]
    return [page for page in every if any(map(is_executed, commands(page.read_text())))]


def _main(folder: str, arguments: list[str]) -> tuple[int, str]:
    os.chdir(folder)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = cli.main(arguments)
    return status, output.getvalue()


def _execute(words: list[str], folder: Path) -> None:
    """Execute a command in a folder, in small; a training does one step."""
    check(words, folder)  # as it is, with its sizes
    module, arguments, processes = split_launcher(recipe(words) if words[0] == "make" else words)
    if module == "benchmarks":
        benchmarks.main(arguments)
        return
    assert module == "pretrain"
    if arguments[0] in ("train", "eval") and "--processes" in arguments:
        # Processes of the fork server start faster than those that the command would start.
        at = arguments.index("--processes")
        processes = int(arguments[at + 1])
        del arguments[at : at + 2]
    if arguments[0] in ("train", "eval"):
        run_dir = folder / config.load(folder / arguments[1], arguments[2:]).run_dir
        metrics = run_dir / "metrics.jsonl"
        steps = len(read(metrics)) if metrics.exists() else 1  # the first record is that of step 0
        arguments += [*SMALLER, f"steps={steps}"]
    if arguments[0] == "data" and arguments[2].endswith(".yaml"):
        arguments += [LESS_TEXT]
    if "--fit" in arguments:
        arguments += FEWER_SIZES
    results = launch(_main, processes or 1, str(folder), arguments)
    assert all(status == 0 for status, _ in results), results


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one step, and with files that the commands name."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "configs").symlink_to(ROOT / "configs")
    shutil.copy(benchmarks.README, folder)
    make.captioned_folder(folder / "pictures", 60)
    image, _ = make.picture(0)
    image.save(folder / "cat.jpg")
    film(folder / "clip.mp4", greys(8), rate=4)
    table = pa.table({"text": [make.text(number) for number in range(20)]})
    pq.write_table(table, folder / "web.parquet")
    sources = [{"type": "text", "path": "web.parquet"}]
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat"}]
    colours = [{"image": "cat.jpg", "conversations": said}]
    (folder / "colours.json").write_text(json.dumps(colours))
    mine = {"base": "configs/laptop.yaml", "data": {"sources": sources}}
    (folder / "mine.yaml").write_text(json.dumps(mine))
    (folder / "HF_DIR").symlink_to("runs/laptop/hf")
    _execute(["make", "train"], folder)
    shutil.copytree(folder / "runs" / "laptop", folder / "runs" / "another")
    return folder


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_the_commands_of_a_page_run(
    page: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, in a folder after `make train`, where the page's Python ran."""
    folder = tmp_path / "folder"
    shutil.copytree(trained, folder, symlinks=True, ignore=shutil.ignore_patterns(".cache"))
    (folder / ".cache").symlink_to(trained / ".cache")
    monkeypatch.setattr(benchmarks, "README", folder / "README.md")
    monkeypatch.chdir(folder)
    if page.name not in NOT_RUN:
        for code in blocks(page.read_text(), "python"):
            exec(code, {})
    for words in commands(page.read_text()):
        if is_executed(words) and words != ["make", "train"]:
            _execute(words, folder)
