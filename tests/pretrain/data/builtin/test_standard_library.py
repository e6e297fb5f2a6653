"""The corpus is real text, split by file; captions are prose."""

from pathlib import Path

import pytest

from pretrain.data.builtin import standard_library
from pretrain.errors import PretrainError


def test_files_are_distinct_and_split_by_name_within_the_limit() -> None:
    files = standard_library.read_corpus(2_000_000)
    assert 1_500_000 < sum(len(file.text) for file in files) <= 2_000_000
    assert len({file.text for file in files}) == len({file.name for file in files}) == len(files)
    held_out = [file for file in files if file.split == "held_out"]
    assert 0.02 < len(held_out) / len(files) < 0.2
    assert any(file.name.startswith("topics/") for file in files)
    assert not any("test" in Path(file.name).parts for file in files)


def test_prose_is_docstrings_and_comments_without_code() -> None:
    source = '''
"""A module about   reading things."""
import os  # trailing words are not taken

# a comment of some words
# x = {1: 2}; y = [3]
def f(argument):
    """Give back the argument, unchanged."""
    return "no line of prose here"
'''
    lines = standard_library.prose_lines(standard_library.TextFile("f.py", source))
    assert sorted(lines) == [
        "A module about reading things.",
        "Give back the argument, unchanged.",
        "a comment of some words",
    ]
    assert standard_library.prose_lines(standard_library.TextFile("broken.py", "def (")) == []


def test_questions_are_about_public_documented_objects() -> None:
    source = '''
"""Things that read.

Not of the first paragraph."""
class Reader:
    """One who reads,
    and reads on."""
    def read(self):
        """Read a thing."""
    def _skip(self):
        """Skip a private thing."""
def close():
    pass
def f():
    """Döes a thing or two."""
'''
    assert list(
        standard_library.questions(standard_library.TextFile("pages/__init__.py", source))
    ) == [
        ("What is pages?", "Things that read."),
        ("What is pages.Reader?", "One who reads, and reads on."),
        ("What does pages.Reader.read do?", "Read a thing."),
    ]
    assert list(standard_library.questions(standard_library.TextFile("_pages.py", source))) == []
    assert list(standard_library.questions(standard_library.TextFile("topics/pages", source))) == []
    assert list(standard_library.questions(standard_library.TextFile("broken.py", "def ("))) == []


def test_a_python_without_its_standard_library_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standard_library.sysconfig, "get_path", lambda _name: str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(PretrainError, match="use a full Python installation"):
        standard_library.read_corpus(8_000_000)
