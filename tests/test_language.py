"""Docstrings, comments and messages are plain English: none uses a phrase that CONTRIBUTING lists.

``python -m tests.test_language [PATH …]`` prints every violation in the files given.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Files that quote the phrases.
_QUOTING = ("CONTRIBUTING.md", "tests/test_language.py", "LICENSE")


def listed(heading: str) -> list[str]:
    """The entries of the fenced block that follows a comment naming it in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(rf"```text\n# {re.escape(heading)}\n(.*?)```", text, re.S)
    assert block, f"CONTRIBUTING.md has no block of {heading}"
    return block[1].split("\n")[:-1]


def _pattern(phrase: str) -> str:
    """A phrase as a regular expression; ``a|b`` lists alternatives, ``*`` ends a stem."""
    words = [re.escape(word).replace(r"\|", "|").replace(r"\*", r"\w*") for word in phrase.split()]
    return r"\s+".join(f"(?:{word})" for word in words)


def phrases() -> re.Pattern[str]:
    return re.compile(
        rf"(?<![\w-])(?:{'|'.join(map(_pattern, listed('phrases')))})(?![\w-])", re.IGNORECASE
    )


def openings() -> re.Pattern[str]:
    return re.compile(rf"(?:{'|'.join(map(_pattern, listed('openings')))})\b")


def comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every block of comments, its lines joined."""
    block: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if block and token.start[0] != block[-1][0] + 1:
            yield block[0][0], " ".join(text for _, text in block)
            block = []
        block.append((token.start[0], token.string.lstrip("# ")))
    if block:
        yield block[0][0], " ".join(text for _, text in block)


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Strings of several words, such as errors and help; docstrings are among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def test_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")


test_names.__test__ = False  # type: ignore[attr-defined]


def violations(file: Path) -> list[str]:
    """``path:line: text`` of every text with a listed phrase or opening."""
    source, name = file.read_text(), file.relative_to(ROOT)
    wrong, opening = phrases(), openings()
    if file.suffix != ".py":
        text = re.sub(r"```.*?```|`[^`]*`", lambda m: "\n" * m[0].count("\n"), source, flags=re.S)
        return [
            f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}"
            for match in wrong.finditer(text)
        ]
    tree = ast.parse(source)
    # Strings in tests are inputs, too, and may say anything.
    texts = [*comments(source), *docstrings(tree), *test_names(tree)]
    texts += [] if name.parts[0] == "tests" else messages(tree)
    found = [(line, match[0]) for line, text in texts for match in wrong.finditer(text)]
    found += [(line, match[0]) for line, text in docstrings(tree) if (match := opening.match(text))]
    return [f"{name}:{line}: {' '.join(text.split())!r}" for line, text in sorted(set(found))]


def tracked() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(command, cwd=ROOT, text=True).split("\n")
    kinds = (".py", ".md", ".yaml", ".toml")
    return [
        ROOT / n for n in names if n.endswith(kinds) and n not in _QUOTING and (ROOT / n).exists()
    ]


@pytest.mark.parametrize(
    "folder", ["muonclip", "pretrain", "posttrain", "benchmarks", "tests", "docs", ""]
)
def test_no_text_uses_a_phrase_that_contributing_lists(folder: str) -> None:
    files = [f for f in tracked() if (f.relative_to(ROOT).parts[:-1] or ("",))[0] == folder]
    assert [line for file in files for line in violations(file)] == []


if __name__ == "__main__":
    for argument in map(Path, sys.argv[1:] or [ROOT]):
        for path in tracked():
            if path.is_relative_to(argument.resolve()):
                print(*violations(path), sep="\n", end="\n" if violations(path) else "")
