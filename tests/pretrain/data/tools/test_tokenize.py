"""``data tokenize``: the same bytes with any number of workers, and after any interruption."""

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from pretrain import cli
from pretrain.config import DataConfig, SourceConfig
from pretrain.data import open_data
from pretrain.data.mixture.data import MixtureData
from pretrain.data.skipped import Skip
from pretrain.data.sources import indexed, parts
from pretrain.data.sources.text import Text, TextSource
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from tests.pretrain.data import make

# Units of several files, and files of several parts.
PART = 9000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text and conversations, with a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    Tokenizer.train([make.text(number) for number in range(9)], 320).save(folder / "tokenizer.json")
    make.jsonl(folder / "text" / "large.jsonl.gz", range(300))
    for number in range(300, 312):
        make.jsonl(folder / "text" / f"{number}.jsonl", range(number, number + 3))
    make.jsonl(folder / "text" / "later.jsonl", range(400, 500))
    with (folder / "text" / "later.jsonl").open("a") as file:
        file.write('{"text": ""}\n{\n')
    messages = [
        [{"role": role, "content": make.text(number)} for role in ("user", "assistant")]
        for number in range(20)
    ]
    lines = "".join(json.dumps({"messages": one}) + "\n" for one in messages)
    (folder / "chat.jsonl").write_text(lines)
    return folder


def arguments(folder: Path, cache: Path, *more: str) -> list[str]:
    sources = f"[{{type: text, path: {folder}/text}}, {{type: chat, path: {folder}/chat.jsonl}}]"
    cache.parent.mkdir(exist_ok=True)
    (cache.parent / "tiny.yaml").write_text("data: {seq_length: 512}\n")
    return [
        *("data", "tokenize", str(cache.parent / "tiny.yaml"), f"data.sources={sources}"),
        *(f"data.tokenizer={folder}/tokenizer.json", f"data.cache_dir={cache}", *more),
    ]


def content(cache: Path) -> dict[str, bytes]:
    """All files of a cache, without those of a killed process that no other uses."""
    unused = set(cache.glob("partial-*/*"))
    files = (path for path in sorted(cache.rglob("*")) if path.is_file() and path not in unused)
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The result of one process without interruption, with parts of the default size."""
    cache = tmp_path_factory.mktemp("expected") / "cache"
    assert cli.main([*arguments(folder, cache), "--workers", "1"]) == 0
    return content(cache)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SMALLEST_PART", PART)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    small_parts: None, folder: Path, tmp_path: Path, expected: dict[str, bytes], workers: int
) -> None:
    assert cli.main([*arguments(folder, tmp_path / "cache"), "--workers", str(workers)]) == 0
    assert content(tmp_path / "cache") == expected


def test_files_are_those_that_megatron_core_reads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments(folder, tmp_path / "cache"), "--workers", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "436 documents" in lines[0] and lines[0].endswith(".bin")
    dataset = IndexedDataset(lines[0].rpartition(": ")[2].removesuffix(".bin"))
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    numbers = [*range(300), *range(400, 500)]
    numbers += [number + place for number in range(300, 312) for place in range(3)]
    assert all(tokens[-1] == tokenizer.eos for tokens in dataset[:])
    texts = sorted(tokenizer.decode(tokens) for tokens in dataset[:])
    assert texts == sorted(map(make.text, numbers))


def test_training_finds_the_tokens(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = (SourceConfig("text", str(folder / "text")),)
    config = DataConfig(
        seq_length=512,
        sources=sources,
        tokenizer=str(folder / "tokenizer.json"),
        cache_dir=str(tmp_path / "cache"),
        max_untokenized_mb=0.0,
    )
    with pytest.raises(
        PretrainError,
        match=r"^data\.sources\[0\]: \S+/text is not tokenized yet, .*data\.max_untokenized_mb=0, "
        r"the limit inside a job\. Tokenize it first: python -m pretrain data tokenize CONFIG "
        r"--workers \d+$",
    ):
        open_data(config, 14, 3)
    assert cli.main([*arguments(folder, tmp_path / "cache"), "--workers", "2"]) == 0
    monkeypatch.setattr(TextSource, "read", lambda *_: pytest.fail("read again"))
    data = open_data(config, 14, 3)
    assert isinstance(data, MixtureData) and "have not changed since" in data.describe()


def test_the_refusal_has_the_arguments_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["train", "configs/my run.yaml", "steps=5", "data.held_out=0.1"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/pretrain/__main__.py", *given])
    assert indexed._command() == (
        "python -m pretrain data tokenize 'configs/my run.yaml' steps=5 data.held_out=0.1 "
        f"--workers {os.cpu_count()}"
    )


# ---------------------------------------------------------------------- interruptions


def test_closed_outputs_do_not_matter(
    folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "pretrain", *arguments(folder, tmp_path / "cache")]
    ended = subprocess.run(
        ["bash", "-c", '"$@" --workers=2 >&- 2>&-', "", *command],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0
    assert content(tmp_path / "cache") == expected


def _killed_after(seconds: float, command: list[str]) -> bool:
    """Run the command in another process; whether it was killed before its end."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(command,))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _run(command: list[str]) -> None:
    assert cli.main(command) == 0


def test_ten_kills_leave_the_same_bytes(
    small_parts: None, folder: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """Killed at random moments of an uninterrupted run, and of what remains of it."""
    rng, kills, begun = random.Random(5), 0, 0
    command = [*arguments(folder, tmp_path / "0" / "cache"), "--workers", "2"]
    started = time.monotonic()
    assert not _killed_after(600, command)
    seconds = time.monotonic() - started
    while kills < 10:
        begun += 1
        cache = tmp_path / str(begun) / "cache"
        command = [*arguments(folder, cache), "--workers", "2"]
        while _killed_after(seconds * rng.random(), command):
            kills += 1
        assert content(cache) == expected


class _InterruptedError(Exception):
    pass


@pytest.mark.parametrize("at", range(0, 60, 4))
def test_an_interruption_at_any_change_of_the_disk_is_continued(
    small_parts: None, folder: Path, tmp_path: Path, expected: dict[str, bytes], at: int
) -> None:
    """Every operation that a kill can precede: renaming, deleting, and writing parts through."""
    count = itertools.count()

    def interrupting(plain: Callable[..., object]) -> Callable[..., object]:
        def operation(*arguments: object, **options: object) -> object:
            if next(count) == at:
                raise _InterruptedError
            return plain(*arguments, **options)

        return operation

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(_InterruptedError):
        for name in ("rename", "fsync", "unlink"):
            patch.setattr(os, name, interrupting(getattr(os, name)))
        _tokenize(folder, tmp_path / "cache")
    assert next(count) > at
    _tokenize(folder, tmp_path / "cache")
    assert content(tmp_path / "cache") == expected


def _tokenize(folder: Path, cache: Path) -> None:
    """In this process, as inside a job."""
    sources = (
        SourceConfig("text", str(folder / "text")),
        SourceConfig("chat", str(folder / "chat.jsonl")),
    )
    tokenizer = str(folder / "tokenizer.json")
    config = DataConfig(512, sources=sources, tokenizer=tokenizer, cache_dir=str(cache))
    open_data(config, 14, 3)


def test_finished_parts_are_not_tokenized_again(
    small_parts: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    plain = Tokenizer.encode_many

    def counted(self: Tokenizer, texts: list[str]) -> list[np.ndarray]:
        if sum(encoded) > 200:
            raise _InterruptedError
        encoded.append(len(texts))
        return plain(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_many", counted)
    with pytest.raises(_InterruptedError):
        _tokenize(folder, tmp_path / "cache")
    first = sum(encoded)
    encoded.clear()
    monkeypatch.setattr(
        Tokenizer, "encode_many", lambda s, t: encoded.append(len(t)) or plain(s, t)
    )
    _tokenize(folder, tmp_path / "cache")
    in_a_part = 40  # documents, at most
    assert 436 <= first + sum(encoded) <= 436 + in_a_part


def test_what_is_left_of_earlier_files_is_removed(
    small_parts: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make.jsonl(tmp_path / "a.jsonl", range(200))
    tokenizer = str(folder / "tokenizer.json")
    sources = (SourceConfig("text", str(path)),)
    config = DataConfig(512, sources=sources, tokenizer=tokenizer, cache_dir=str(tmp_path / "c"))
    with monkeypatch.context() as patch, pytest.raises(_InterruptedError):
        patch.setattr(parts.Merger, "merge", lambda self: _raise())
        open_data(config, 14, 3)
    assert len([*(tmp_path / "c").glob("unfinished-*")]) == 1
    make.jsonl(path, range(210))
    open_data(config, 14, 3)
    assert not [*(tmp_path / "c").glob("unfinished-*")]


def _raise() -> Iterator[None]:
    raise _InterruptedError
    yield


# ---------------------------------------------------------------------- errors


def test_a_killed_worker_is_one_line(
    small_parts: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    parent = os.getpid()
    plain = TextSource.read

    def dying(self: TextSource, file: Path) -> Iterator[Text | Skip]:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, file)

    monkeypatch.setattr(TextSource, "read", dying)
    command = [*arguments(folder, tmp_path / "cache"), "--workers", "2"]
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: a tokenizing process was ended by SIGKILL: repeat the command")
    assert error.count("\n") == 1


def test_too_many_corrupt_documents_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*arguments(folder, tmp_path / "cache", "data.max_corrupt=0"), "--workers", "2"]
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: 1 samples are corrupt, more than data.max_corrupt=0")
    assert error.count("\n") == 1


def test_skipped_documents_are_reported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a line that is too long, of which nobody would learn before training."""
    assert cli.main([*arguments(folder, tmp_path / "cache"), "--workers", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("data.sources[0]: 2 files and documents are skipped; the first: ")
    assert "later.jsonl:102 (not JSON: " in lines[1]
    assert len(lines) == 3


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_a_full_disk_is_one_line_with_a_remedy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int | None
) -> None:
    def full(self: object, path: Path, records: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(parts.Parts, "_write", full)
    monkeypatch.setattr(TextSource, "workers", workers)
    with pytest.raises(
        PretrainError,
        match=r"^cannot write the cache \S+: No space left on device: set data\.cache_dir to",
    ):
        _tokenize(folder, tmp_path / "cache")


def test_a_file_that_changes_meanwhile_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make.jsonl(tmp_path / "a.jsonl", range(5))
    plain = TextSource.read

    def growing(self: TextSource, file: Path) -> Iterator[Text | Skip]:
        yield from plain(self, file)
        make.jsonl(path, range(6))

    monkeypatch.setattr(TextSource, "read", growing)
    config = DataConfig(
        512,
        sources=(SourceConfig("text", str(path)),),
        tokenizer=str(folder / "tokenizer.json"),
        cache_dir=str(tmp_path / "cache"),
    )
    with pytest.raises(PretrainError, match=r"a\.jsonl has changed while it was tokenized"):
        open_data(config, 14, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "error: --workers must be > 0, not 0\n"),
        (["data.sources=[]"], "error: data.sources is empty: the built-in data "),
    ],
)
def test_invalid_options_are_one_line(
    folder: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*arguments(folder, tmp_path / "cache"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
