"""The built-in corpus: documentation and source of the Python standard library."""

import ast
import contextlib
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.errors import PretrainError

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

# Tests and tables repeat themselves; the rest of the list is not the standard library's.
_LEFT_OUT = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings")
) | {"__pycache__", "_bundled", "pydoc_data", "turtledemo"}
_TOPICS = "topics/"
_COMMENT = re.compile(r"^\s*#+ (.*)$", re.MULTILINE)
_LETTERS = re.compile(r"[A-Za-z ,.]")
_LEAST_BYTES = 1_000_000
_HELD_OUT_IN = 12


@dataclass(frozen=True)
class TextFile:
    """One file of the corpus, by its path in the library, or one topic of the manual."""

    name: str
    text: str

    @property
    def split(self) -> Split:
        """Whole files are held out, by a hash of their name: no part of them is trained on."""
        return "held_out" if _hash(self.name) % _HELD_OUT_IN == 0 else "train"


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def read_corpus(max_bytes: int) -> list[TextFile]:
    """Read the standard library's manual topics and sources, in an order that only names decide.

    Args:
        max_bytes: files are left out once this much text is reached.

    Raises:
        PretrainError: less text was found than a model can be trained on.
    """
    chosen: list[TextFile] = []
    seen: set[str] = set()
    total = 0
    for name, text in sorted(_sources(), key=lambda source: _hash(source[0])):
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        if total + len(text) > max_bytes:
            break
        total += len(text)
        chosen.append(TextFile(name, text))
    if total < min(_LEAST_BYTES, max_bytes // 2):
        raise PretrainError(
            f"found only {total} bytes of the Python standard library's text in "
            f"{sysconfig.get_path('stdlib')}: use a full Python installation"
        )
    return chosen


def _sources() -> Iterator[tuple[str, str]]:
    """(name, text) of every file."""
    with contextlib.suppress(ImportError):  # some distributions leave the manual out
        from pydoc_data.topics import topics

        for name, text in topics.items():
            yield f"{_TOPICS}{name}", text
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                yield path.relative_to(root).as_posix(), text


def prose_lines(file: TextFile) -> list[str]:
    """The lines of prose in a file, fit to be drawn as images.

    Topics are prose; in sources it is docstrings and comments. A line is kept if it has at least
    three words, nearly all letters, in printable ASCII; spaces are made single.
    """
    if file.name.startswith(_TOPICS):
        lines = file.text.splitlines()
    else:
        lines = _COMMENT.findall(file.text)
        try:
            tree = ast.parse(file.text)
        except (SyntaxError, ValueError):
            return []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                lines += (ast.get_docstring(node, clean=False) or "").splitlines()
    return [line for line in (" ".join(line.split()) for line in lines) if _is_prose(line)]


def questions(file: TextFile) -> Iterator[tuple[str, str]]:
    """(question, answer) about a module, its public classes, functions and methods.

    The answer is the first paragraph of what the documentation in the source says.
    """
    module = file.name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    if not file.name.endswith(".py") or any(part.startswith("_") for part in module.split(".")):
        return
    try:
        tree = ast.parse(file.text)
    except (SyntaxError, ValueError):
        return
    nodes: list[tuple[str, ast.AST]] = [(module, tree)]
    while nodes:
        name, node = nodes.pop(0)
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
        answer = " ".join(paragraph.split())
        if answer.isascii() and answer.isprintable() and answer.count(" ") >= 2:
            does = isinstance(node, ast.FunctionDef)
            yield f"What does {name} do?" if does else f"What is {name}?", answer
        if not isinstance(node, ast.FunctionDef):
            named = ((getattr(child, "name", "_"), child) for child in node.body)
            nodes += [(f"{name}.{own}", child) for own, child in named if not own.startswith("_")]


def _is_prose(line: str) -> bool:
    letters = len(_LETTERS.findall(line))
    plain = line.isascii() and line.isprintable()
    return plain and line.count(" ") >= 2 and letters > 0.9 * len(line)
