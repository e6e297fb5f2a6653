"""A cached index equals a new one after any change of the files."""

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain.config import DataConfig, SourceConfig
from pretrain.data import cache, open_data
from pretrain.data.media import frames
from pretrain.data.mixture.data import MixtureData
from pretrain.data.open import sample_texts
from pretrain.data.sources import find_sources
from pretrain.data.sources.text import TextSource
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from tests.pretrain.data import make

TOKENIZER = Tokenizer.train([make.text(number) for number in range(9)], 320)


def opened(
    folder: Path, *sources: SourceConfig, where: str = "cache", **options: Any
) -> MixtureData:
    path = folder / "tokenizer.json"
    if not path.exists():
        TOKENIZER.save(path)
    options = {"seq_length": 128, "held_out": 0.0, "tokenizer": str(path)} | options
    config = DataConfig(sources=sources, cache_dir=str(folder / where), **options)
    data = open_data(config, 14, 3)
    assert isinstance(data, MixtureData)
    return data


def all_of(data: MixtureData) -> list[Any]:
    """The content of all indexes, and all skipped documents."""
    content: list[Any] = [sorted(data._skips)]
    for documents in data._documents:
        fields = {f.name: getattr(documents, f.name) for f in dataclasses.fields(documents)}
        for name in ("source", "composer", "cached", "index"):
            del fields[name]
        # Inodes and times of files are not content.
        content.append([(file.name, file.documents, file.skips) for file in fields.pop("files")])
        if stored := fields.pop("stored", None):
            fields |= {name: getattr(stored, name) for name in ("tokens", "lengths", "starts")}
        content.append(
            {
                name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in fields.items()
            }
        )
    return content


def sources_of(folder: Path) -> tuple[SourceConfig, ...]:
    return (
        SourceConfig("text", str(folder / "text")),
        SourceConfig("images", str(folder / "listed" / "captions.jsonl")),
        SourceConfig("images", str(folder / "pairs")),
    )


def picture(path: Path, width: int, colour: int = 9) -> None:
    Image.new("RGB", (width, 40), (colour, 99, 200)).save(path)


def make_all(folder: Path) -> None:
    for name in ("text", "listed", "pairs"):
        (folder / name).mkdir(parents=True)
    for name in "abc":
        make.jsonl(folder / "text" / f"{name}.jsonl", range(ord(name), ord(name) + 3))
        picture(folder / "listed" / f"{name}.png", 40)
        picture(folder / "pairs" / f"{name}.png", 40)
        (folder / "pairs" / f"{name}.txt").write_text(f"caption of {name}")
    lines = [{"image": f"{name}.png", "caption": f"a picture {name}"} for name in "abcd"]
    lines.append({"parts": [{"text": "b again "}, {"image": "b.png"}]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "listed" / "captions.jsonl").write_text(text)


def replace_in_place(path: Path, content: bytes) -> None:
    """An edit that keeps the size and restores the modification time."""
    status = path.stat()
    with path.open("r+b") as file:
        file.write(content[: status.st_size].ljust(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


EDITS: dict[str, Callable[[Path], Any]] = {
    "a text grows": lambda f: make.jsonl(f / "text" / "a.jsonl", range(4, 9)),
    "a text is new": lambda f: make.jsonl(f / "text" / "aa.jsonl.gz", range(2)),
    "a text is gone": lambda f: (f / "text" / "b.jsonl").unlink(missing_ok=True),
    "a text is renamed": lambda f: (f / "text" / "c.jsonl").replace(f / "text" / "0.jsonl"),
    "a text changes within the second": lambda f: replace_in_place(
        f / "text" / "a.jsonl", b'{"text": "another one"}\n'
    ),
    "a text is damaged": lambda f: (f / "text" / "b.jsonl").write_bytes(b'{"text": "x"}\n{'),
    "a missing picture is copied there": lambda f: picture(f / "listed" / "d.png", 40),
    "a picture is damaged": lambda f: (f / "listed" / "a.png").write_bytes(b"<html>"),
    "a picture is repaired": lambda f: picture(f / "listed" / "a.png", 40),
    "a picture is resized": lambda f: picture(f / "listed" / "b.png", 90),
    "a picture is another one of the same size": lambda f: picture(f / "listed" / "b.png", 40, 8),
    "a picture of a pair is resized": lambda f: picture(f / "pairs" / "a.png", 90),
    "a caption is edited": lambda f: (f / "pairs" / "b.txt").write_text("another caption"),
    "a caption is gone": lambda f: (f / "pairs" / "c.txt").unlink(missing_ok=True),
    "a pair is new": lambda f: (
        picture(f / "pairs" / "e.png", 30),
        (f / "pairs" / "e.txt").write_text("new"),
    ),
    "another tokenizer": lambda f: Tokenizer.train(["aaaa bbbb"], 330).save(f / "tokenizer.json"),
}


@settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.sets(st.sampled_from(sorted(EDITS)), max_size=4), min_size=1, max_size=3))
def test_an_index_after_any_edits_equals_a_new_one(
    tmp_path_factory: pytest.TempPathFactory, steps: list[set[str]]
) -> None:
    folder = tmp_path_factory.mktemp("edits")
    make_all(folder)
    opened(folder, *sources_of(folder))
    for number, edits in enumerate(steps):
        for name in sorted(edits):
            try:
                EDITS[name](folder)
            except FileNotFoundError:
                continue  # the file was renamed or removed before
        now = opened(folder, *sources_of(folder))
        fresh = opened(folder, *sources_of(folder), where=f"fresh-{number}")
        assert all_of(now) == all_of(fresh)
        assert not any(skip.reason.endswith("since its size was noted") for skip in now._skips)


@pytest.mark.parametrize("name", EDITS)
def test_every_kind_of_edit_is_noticed(tmp_path: Path, name: str) -> None:
    make_all(tmp_path)
    before = all_of(opened(tmp_path, *sources_of(tmp_path)))
    EDITS[name](tmp_path)
    now = opened(tmp_path, *sources_of(tmp_path))
    assert all_of(now) == all_of(opened(tmp_path, *sources_of(tmp_path), where="fresh"))
    unchanged = {"a picture is repaired", "a picture is another one of the same size"}
    assert (all_of(now) == before) == (name in unchanged)


@pytest.mark.parametrize(
    "options", [{"max_image_tokens": 1}, {"video_fps": 1.0}, {"seq_length": 64}]
)
def test_settings_that_affect_indexes_are_part_of_their_names(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    make_all(tmp_path)
    opened(tmp_path, *sources_of(tmp_path))
    now = opened(tmp_path, *sources_of(tmp_path), **options)
    fresh = opened(tmp_path, *sources_of(tmp_path), where="fresh", **options)
    assert all_of(now) == all_of(fresh)


def test_only_changed_files_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_all(tmp_path)
    data = opened(tmp_path, *sources_of(tmp_path))
    assert "have not changed since" not in data.describe()
    read, measured = [], []
    plain, measure = TextSource.read, frames.measure
    monkeypatch.setattr(
        TextSource, "read", lambda source, file: read.append(file.name) or plain(source, file)
    )
    monkeypatch.setattr(
        frames, "measure", lambda media, fps: measured.append(media.paths) or measure(media, fps)
    )
    again = opened(tmp_path, *sources_of(tmp_path))
    assert (read, measured) == ([], [])
    assert "have not changed since" in again.describe() and all_of(again) == all_of(data)
    EDITS["a text grows"](tmp_path)
    EDITS["a picture is resized"](tmp_path)
    EDITS["a missing picture is copied there"](tmp_path)
    opened(tmp_path, *sources_of(tmp_path))
    assert read == ["a.jsonl"]
    names = sorted(Path(path).name for paths in measured for path in paths)
    assert names == ["b.png", "d.png"]


def test_an_index_can_be_built_concurrently(tmp_path: Path) -> None:
    make_all(tmp_path)
    opened(tmp_path, *sources_of(tmp_path), where="other")  # makes the tokenizer
    results: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(all_of(opened(tmp_path, *sources_of(tmp_path))))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(result == results[0] for result in results)
    assert not list((tmp_path / "cache").glob("partial-*"))


def test_truncated_indexes_are_rebuilt(tmp_path: Path) -> None:
    make_all(tmp_path)
    whole = all_of(opened(tmp_path, *sources_of(tmp_path)))
    for path in sorted((tmp_path / "cache").rglob("*")):
        if path.is_file() and path.stat().st_size:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            assert all_of(opened(tmp_path, *sources_of(tmp_path))) == whole, path


def test_loading_an_index_runs_no_code(tmp_path: Path) -> None:
    make_all(tmp_path)
    whole = all_of(opened(tmp_path, *sources_of(tmp_path)))
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    for path in sorted((tmp_path / "cache").rglob("*")):
        if path.is_file():
            np.save(tmp_path / "payload.npy", np.array([Payload()], object), allow_pickle=True)
            shutil.copy(tmp_path / "payload.npy", path)
            assert all_of(opened(tmp_path, *sources_of(tmp_path))) == whole, path
    assert not marker.exists()


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_all(tmp_path)
    opened(tmp_path, *sources_of(tmp_path))

    def refuse(**options: Any) -> str:
        raise OSError(30, "Read-only file system", str(options["dir"]))

    monkeypatch.setattr(cache.tempfile, "mkdtemp", refuse)
    opened(tmp_path, *sources_of(tmp_path))  # all there
    EDITS["a text grows"](tmp_path)
    with pytest.raises(PretrainError, match=r"cannot write the cache \S+: Read-only file system: "):
        opened(tmp_path, *sources_of(tmp_path))


def test_text_that_the_tokenizer_cannot_encode_is_listed(tmp_path: Path) -> None:
    described = json.loads(TOKENIZER._backend.to_str())
    # Exponential in the length of a run of a: the regular expression gives up.
    split = {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated"}
    described["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split | {"invert": False}, described["pre_tokenizer"]],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    texts = [make.text(1), "a" * 60 + "!", make.text(2), "\u200b"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = opened(tmp_path, SourceConfig("text", str(path)))
    (skip,) = data.take_skipped()
    assert skip.name == f"{path}:2" and "cannot encode the text" in skip.reason
    assert "3 documents" in data.describe()


def test_indexing_stops_at_the_limit_of_corrupt_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * 100_000)
    with pytest.raises(PretrainError, match="6 samples are corrupt, more than"):
        opened(tmp_path, SourceConfig("text", str(path)), max_corrupt=5)


def test_long_words_are_split_for_tokenizer_training(tmp_path: Path) -> None:
    # Merges within a word take time quadratic in its length: whole, this one takes minutes.
    texts = ["a" * 3_000_000, " " * 3_000_000 + "b", make.text(1)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (source,) = find_sources(DataConfig(sources=(SourceConfig("text", str(path)),)), 0)
    pieces = list(sample_texts(source, 10**7, 0))
    assert "".join(pieces) == "".join(texts)
    assert pieces[-1] == texts[-1], "other texts are whole"
    assert max(map(len, pieces)) == 1000


@pytest.mark.parametrize("where", ["corpus/cache", "corpus/a/b", "linked/cache", "corpus/.cache"])
@pytest.mark.parametrize("pattern", ["", "**", "**/*.json*"])
def test_a_cache_among_the_data_is_not_read(tmp_path: Path, where: str, pattern: str) -> None:
    """Otherwise each start would find more files, and make the tokenizer and the index again."""
    (tmp_path / "corpus").mkdir()
    make.jsonl(tmp_path / "corpus" / "a.jsonl", range(3))
    (tmp_path / "linked").symlink_to("corpus")
    source = SourceConfig("text", str(tmp_path / "corpus" / pattern))
    first = opened(tmp_path, source, where=where)
    made = sorted((tmp_path / where).iterdir())
    again = opened(tmp_path, source, where=where)
    assert again.documents[0].count("train") == first.documents[0].count("train") == 3
    assert sorted((tmp_path / where).iterdir()) == made


def test_a_cache_in_place_of_the_data_is_refused(tmp_path: Path) -> None:
    make.jsonl(tmp_path / "corpus" / "a.jsonl", range(3))
    source = SourceConfig("text", str(tmp_path / "corpus"))
    with pytest.raises(PretrainError, match=r"^data\.cache_dir=\S+ is also the folder of "):
        opened(tmp_path, source, where="corpus/../corpus")


@pytest.mark.parametrize(
    ("source_type", "pattern"), [("text", ""), ("text", "**/*.jsonl"), ("images", "")]
)
def test_the_folder_of_another_cache_is_named(
    tmp_path: Path, source_type: str, pattern: str
) -> None:
    make.jsonl(tmp_path / "corpus" / "a.jsonl", range(3))
    (tmp_path / "corpus" / "CACHEDIR.TAG").touch()
    source = SourceConfig(source_type, str(tmp_path / "corpus" / pattern))
    with pytest.raises(PretrainError, match=r"corpus: a cache \(it contains CACHEDIR\.TAG\)\)$"):
        opened(tmp_path, source)


def test_a_cache_that_cannot_be_repaired_is_named(tmp_path: Path) -> None:
    def load(folder: Path) -> None:
        raise ValueError("not what was written")

    folder = tmp_path / "cache"
    folder.mkdir()
    with pytest.raises(PretrainError, match=r"cannot be replaced.*data\.cache_dir"):
        cache.cached(folder, lambda partial: None, load)
