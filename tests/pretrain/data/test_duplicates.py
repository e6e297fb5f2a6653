"""Duplicates are found, left out of training, and never on both sides of the held-out split."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import cli, config
from pretrain.config import DataConfig, SourceConfig
from pretrain.data import duplicates, open_data
from pretrain.data.duplicates import shingles
from pretrain.data.mixture.data import MixtureData
from pretrain.data.sources.tokens import TokenDocuments
from pretrain.errors import PretrainError
from tests.pretrain.data import make


def similarity(a: Any, b: Any) -> float:
    first, second = set(shingles(a).tolist()), set(shingles(b).tolist())
    return len(first & second) / len(first | second)


@settings(max_examples=25)
@given(
    st.integers(0, 2**32),
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 2), st.booleans()), min_size=1, max_size=24
    ),
)
def test_no_document_to_train_on_is_a_duplicate_of_a_held_out_one(
    tmp_path_factory: pytest.TempPathFactory, seed: int, drawn: list[tuple[int, int, bool]]
) -> None:
    """Each document is a copy of one of five texts with up to two changed tokens."""
    rng = np.random.default_rng(seed)
    texts = rng.integers(0, 1000, (5, 400))
    contents = []
    for text, changes, _ in drawn:
        tokens = texts[text].copy()
        tokens[rng.integers(0, 400, changes)] = 1000 + rng.integers(0, 1000, changes)
        contents.append(tokens)
    held_out = np.array([one for *_, one in drawn])
    source = SimpleNamespace(
        hashes=contents,
        content=contents.__getitem__,
        numbers={"held_out": np.flatnonzero(held_out), "train": np.flatnonzero(~held_out)},
    )
    folder = tmp_path_factory.mktemp("search")
    numbers, originals, near = duplicates._find(folder, [source], "near", 0.8)  # type: ignore[list-item]
    kept = set(range(len(drawn))) - set(numbers.tolist())
    # One of each text that was drawn, held out if any copy is.
    assert sorted(drawn[one][0] for one in kept) == sorted({text for text, *_ in drawn})
    for one in kept:
        same = [held_out[n] for n, (text, *_) in enumerate(drawn) if text == drawn[one][0]]
        assert held_out[one] == any(same)
    for number, original, is_near in zip(numbers, originals, near, strict=True):
        assert similarity(contents[number], contents[original]) > 0.9
        assert is_near != np.array_equal(contents[number], contents[original])
        assert held_out[original] >= held_out[number]
    exact, *_ = duplicates._find(folder, [source], "exact", 0.8)  # type: ignore[list-item]
    distinct = {tokens.tobytes() for tokens in contents}
    assert len(exact) == len(contents) - len(distinct)


def test_different_documents_are_kept(tmp_path: Path) -> None:
    """Half of their tokens are the same."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, 1000, 200)
    contents = [np.concatenate([common, rng.integers(0, 1000, 200)]) for _ in range(200)]
    numbers = {"held_out": np.arange(20), "train": np.arange(20, 200)}
    source = SimpleNamespace(hashes=contents, content=contents.__getitem__, numbers=numbers)
    found, *_ = duplicates._find(tmp_path, [source], "near", 0.8)  # type: ignore[list-item]
    assert not len(found)


def edited(number: int) -> str:
    return long_text(number).replace("fox", "cat", 1)


def long_text(number: int) -> str:
    return " ".join(make.text(1000 * number + n) for n in range(12))


def settings_of(root: Path, **changes: Any) -> DataConfig:
    """100 documents, 20 of them also in a second source, and 30 edited ones there."""
    if not root.exists():
        root.mkdir()
        first, second = map(long_text, range(100)), map(edited, range(20, 50))
        (root / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in first))
        copies = map(long_text, range(20))
        lines = (json.dumps({"text": text}) + "\n" for text in (*copies, *second))
        (root / "b.jsonl").write_text("".join(lines))
    sources = tuple(SourceConfig(path=str(root / f"{name}.jsonl")) for name in "ab")
    cache = str(root / "cache")
    settings = DataConfig(
        seq_length=128, vocab_size=400, cache_dir=cache, held_out=0.2, sources=sources
    )
    return replace(settings, **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("duplicates") / "data"
    settings_of(root)
    return root


def opened(config: DataConfig) -> MixtureData:
    data = open_data(config, 14, 0)
    assert isinstance(data, MixtureData)
    return data


@pytest.mark.parametrize(("mode", "count"), [("none", 0), ("exact", 20), ("near", 50)])
def test_the_number_left_out_is_printed_and_listed(root: Path, mode: Any, count: int) -> None:
    data = opened(settings_of(root, deduplicate=mode))
    documents = sum(one.count(split) for one in data.documents for split in ("train", "held_out"))
    assert documents == 150 - count
    skips = data.take_skipped()
    assert len(skips) == count and not any(skip.corrupt for skip in skips)
    exact = min(count, 20)
    line = f"{count} of 150 documents ({count / 150:.1%}) are duplicates: {exact} exact, "
    assert (line in data.describe()) == (mode != "none")
    assert sum("an exact duplicate of" in skip.reason for skip in skips) == exact


def test_the_search_is_made_once_and_the_same_everywhere(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(settings_of(root, deduplicate="near"))
    monkeypatch.setattr(TokenDocuments, "content", lambda *_: pytest.fail("searched again"))
    again = opened(settings_of(root, deduplicate="near"))
    assert again.take_skipped() == first.take_skipped()
    assert again.fingerprint == first.fingerprint
    for index in range(20):
        assert again.sample("train", index).tokens.equal(first.sample("train", index).tokens)


def test_a_source_of_nothing_but_duplicates_is_refused(root: Path) -> None:
    copies = settings_of(root, deduplicate="exact")
    path = root / "copies.jsonl"
    path.write_text((root / "a.jsonl").read_text())
    sources = (copies.sources[0], SourceConfig(path=str(path)))
    with pytest.raises(PretrainError, match=r"sources\[1\]: every document of .* is a duplicate"):
        opened(replace(copies, sources=sources))


def test_images_with_the_same_content_and_caption_are_duplicates(tmp_path: Path) -> None:
    folder = make.captioned_folder(tmp_path / "pictures", 6)
    for suffix in ("png", "txt"):
        shutil.copy(folder / f"002.{suffix}", folder / f"copy.{suffix}")
    shutil.copy(folder / "003.png", folder / "other.png")
    (folder / "other.txt").write_text("another caption")
    data = opened(
        DataConfig(
            vocab_size=300, cache_dir=str(tmp_path / "cache"), held_out=0, deduplicate="exact",
            sources=(SourceConfig(type="images", path=str(folder)),),
        )
    )  # fmt: skip
    (skip,) = data.take_skipped()
    assert skip.name.endswith("copy.png") and "exact duplicate of" in skip.reason


def test_settings_that_have_no_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"duplicate_threshold=0\.9 has no effect"):
        DataConfig(sources=(SourceConfig(path="a"),), duplicate_threshold=0.9)
    with pytest.raises(ValueError, match=r"deduplicate='near' has no effect with sources=\[\]"):
        DataConfig(deduplicate="near")


def test_missing_library_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(PretrainError, match="need datasketch, which is not installed: pip install"):
        opened(settings_of(root, deduplicate="near", duplicate_threshold=0.85))


def test_inspect_reports_duplicates_and_the_overlap(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = settings_of(root)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"data": config.to_dict(config.Config(data=data))["data"]}))
    command = ["data", "inspect", str(path), "--duplicates", "--count=1"]
    command.append(f"--out={tmp_path}/page.html")
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4] == "50 of 150 documents (33.3%) are duplicates: 20 exact, 30 near"
    assert lines[-3].startswith("example: ") and lines[-2].startswith("near duplicate: ")
    overlap, total = int(lines[-1].split()[0]), int(lines[-1].split()[2])
    assert 0 < overlap < total and "held-out documents have duplicates to train on" in lines[-1]
    assert cli.main([*command[:3], "data.deduplicate=near", *command[3:]]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("none of ") and last.endswith(
        "a duplicate to train on: they are left out"
    )
