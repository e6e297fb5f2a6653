"""Files of a folder are suggested by split, wherever their names say it."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.skipped import Skip
from pretrain.data.tools import split_names
from pretrain.data.tools.recognize import recognize
from tests.pretrain.data import make
from tests.pretrain.data.test_files import read

names = st.sampled_from(list(split_names.SPLITS))
words = st.sampled_from(["data", "en", "my_data", "[x]", "a b"])
places = st.sampled_from(
    ["{split}.jsonl", "{split}-00000-of-00002.jsonl", "{word}_{split}.jsonl", "{word}.{split}.json"]
)
files = st.one_of(
    st.builds("{1}/{0}/a.jsonl".format, names, words),
    st.builds("{0}/{1}/a.jsonl".format, names, words),
    st.builds(lambda split, word, at: at.format(split=split, word=word), names, words, places),
    st.builds(lambda s, w, at: f"{w}/" + at.format(split=s, word=w), names, words, places),
)


@settings(deadline=None, max_examples=60)
@given(st.sets(files, min_size=2, max_size=6))
def test_every_file_is_in_its_split_once(
    tmp_path_factory: pytest.TempPathFactory, paths: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("[splits]")
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps({"text": path}))
    (folder / "README.md").write_text("# Not data")
    found = recognize(str(folder))
    splits = {entry.get("split") for entry in found.entries}
    if splits == {None}:
        assert len({part for path in paths for part in split_names.SPLITS if part in path}) < 4
        return
    seen = {}
    for entry in found.entries:
        texts, skips = read(entry["path"])
        assert not any(skip.corrupt for skip in skips)
        for text in texts:
            assert text not in seen
            seen[text] = entry["split"]
    assert seen.keys() == paths
    for path, split in seen.items():
        assert any(purpose == split for name, purpose in split_names.SPLITS.items() if name in path)


def test_files_may_be_empty(tmp_path: Path) -> None:
    """As those at a URL are, of which only the first is read."""
    for name in ("data/train-0.jsonl", "data/test-0.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "data" / "test-0.jsonl").write_text(json.dumps({"text": "a"}))
    assert [entry["split"] for entry in recognize(str(tmp_path)).entries] == ["held_out", "train"]


def test_other_files_are_named(tmp_path: Path) -> None:
    for name in ("train", "test", "more"):
        make.jsonl(tmp_path / f"{name}.jsonl", range(2))
    found = recognize(str(tmp_path))
    assert found.description.endswith("; its splits: test, train; in none of them: more.jsonl")
    assert [entry["split"] for entry in found.entries] == ["held_out", "train"]
    found = recognize(f"{tmp_path}/*.jsonl")
    assert f"its splits: test, train; inspect {tmp_path} for a configuration" in found.description


def test_files_in_no_split_do_not_decide_the_format(tmp_path: Path) -> None:
    for name in ("train", "test"):
        make.jsonl(tmp_path / "data" / f"{name}.jsonl", range(2), field="body")
    make.jsonl(tmp_path / "about.jsonl", range(9), field="reason")
    assert [entry["field"] for entry in recognize(str(tmp_path)).entries] == ["body", "body"]
    (tmp_path / "data" / "test.jsonl").unlink()
    (tmp_path / "about.jsonl").rename(tmp_path / "about.json")
    make.jsonl(tmp_path / "data" / "train.jsonl", range(99), field="body")
    found = recognize(str(tmp_path))
    assert [entry["field"] for entry in found.entries] == ["body"], "most bytes"
    assert "other files differ, such as about.json: the text is probably 'reason'" in (
        found.description
    )


def test_folders_of_captioned_images_are_splits(tmp_path: Path) -> None:
    make.captioned_folder(tmp_path / "train", 2)
    make.captioned_folder(tmp_path / "val", 1)
    (tmp_path / "LICENSE.txt").write_text("MIT")
    found = recognize(str(tmp_path))
    assert [(entry["path"], entry["split"]) for entry in found.entries] == [
        (f"{tmp_path}/train", "train"),
        (f"{tmp_path}/val", "held_out"),
    ]


def test_a_readme_next_to_data_is_not_data(tmp_path: Path) -> None:
    make.jsonl(tmp_path / "data" / "a.jsonl", range(2))
    about = ("README.md", "LICENSE.txt", "sha256sums.txt", "dataset_infos.json", "skipped.jsonl")
    for name in about:
        (tmp_path / name).write_text("{}")
    assert recognize(str(tmp_path)).description.startswith("a file of JSON lines")
    texts, skips = read(tmp_path)
    assert texts == [make.text(0), make.text(1)]
    assert {Path(skip.name).name for skip in skips} == set(about)
    assert {skip[1:] for skip in skips} == {Skip("", "describes the other files", False)[1:]}
    (tmp_path / "data" / "a.jsonl").rename(tmp_path / "a.rst")  # next to plain text, it may be one
    assert len(read(tmp_path)[0]) == 5
