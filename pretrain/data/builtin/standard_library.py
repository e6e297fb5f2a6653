"""The built-in corpus: documentation and source of the Python standard library."""

import ast
import contextlib
import hashlib
import os
import re
import string
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.interface import Split
from pretrain.errors import PretrainError

# Repetitive tests and tables, and folders that are not part of the standard library.
_EXCLUDED = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings")
) | {"__pycache__", "_bundled", "pydoc_data", "turtledemo"}
_TOPICS = "topics/"
_COMMENT = re.compile(r"^\s*#+ (.*)$", re.MULTILINE)
_LETTERS = re.compile(r"[A-Za-z ,.]")
_MIN_BYTES = 1_000_000
_HELD_OUT_EVERY = 12
_HELD_OUT_CAPTIONS_EVERY = 8


@dataclass(frozen=True)
class TextFile:
    """A file of the corpus: a source file, named by its path, or a topic of the manual."""

    name: str
    text: str

    @property
    def split(self) -> Split:
        """One file in 12 is held out as a whole, by a hash of its name."""
        return "held_out" if _hash(self.name) % _HELD_OUT_EVERY == 0 else "train"


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def caption_split(caption: str) -> Split:
    """One caption in 8 is held out, by a hash of its text in lower case: no training image has it
    as its caption, in any case of its letters."""
    return "held_out" if _hash(caption.lower()) % _HELD_OUT_CAPTIONS_EVERY == 0 else "train"


def read_corpus(max_bytes: int) -> list[TextFile]:
    """Read the standard library's manual topics and sources, ordered by a hash of their names.

    Args:
        max_bytes: stop before exceeding this much text.

    Raises:
        PretrainError: there is too little text to train on.
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
    if total < min(_MIN_BYTES, max_bytes // 2):
        raise PretrainError(
            f"found only {total} bytes of the Python standard library's text in "
            f"{sysconfig.get_path('stdlib')}: use a full Python installation"
        )
    return chosen


def _sources() -> Iterator[tuple[str, str]]:
    """(name, text) of every file."""
    with contextlib.suppress(ImportError):  # some distributions lack the manual
        from pydoc_data.topics import topics

        yield from ((f"{_TOPICS}{name}", text) for name, text in topics.items())
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _EXCLUDED]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                with contextlib.suppress(OSError, UnicodeDecodeError):
                    yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def prose_lines(file: TextFile) -> list[str]:
    """The lines of prose in a file, suitable for drawing.

    Topics are prose; in sources, docstrings and comments are. A line is kept if it has at least
    three words, is printable ASCII and consists almost only of letters; spaces become single.
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


def distinct_words(lines: Iterable[str]) -> list[str]:
    """The words of letters alone in some lines, without punctuation around them, each once."""
    words = (word.strip(string.punctuation) for line in lines for word in line.split(" "))
    return list(dict.fromkeys(word for word in words if word.isalpha()))


def questions(file: TextFile) -> Iterator[tuple[str, str]]:
    """(question, answer) about a module, its public classes, functions and methods.

    The answer is the first paragraph of the docstring.
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
            is_function = isinstance(node, ast.FunctionDef)
            yield f"What does {name} do?" if is_function else f"What is {name}?", answer
        if not isinstance(node, ast.FunctionDef):
            members = ((getattr(child, "name", "_"), child) for child in node.body)
            nodes += [(f"{name}.{own}", child) for own, child in members if own[0] != "_"]


def _is_prose(line: str) -> bool:
    letters = len(_LETTERS.findall(line))
    plain = line.isascii() and line.isprintable()
    return plain and line.count(" ") >= 2 and letters > 0.9 * len(line)
