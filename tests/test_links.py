"""Links in Markdown files lead to files of the repository and to headings that exist."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)


def markdown() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    return subprocess.check_output(command, cwd=ROOT, text=True).splitlines()


@cache
def anchors(path: Path) -> set[str]:
    """The names that hosts of repositories, and mkdocs, give to the headings of a file."""
    headings = re.findall(r"^#+ +(.*)$", _CODE.sub("", path.read_text()), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in words}


def broken(path: Path) -> list[str]:
    """The relative links of a file that lead nowhere."""
    found = []
    for link in _LINK.findall(_CODE.sub("", path.read_text())):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        missing = not target.exists() or ROOT not in [target, *target.parents]
        if missing or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("name", markdown())
def test_links_lead_somewhere(name: str) -> None:
    assert not broken(ROOT / name)


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# The first, and `only` one\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#the-first-and-only-one) [c](https://example.org/none)\n"
        "[d](gone.md) [e](other.md#second) [f](#here) [g](../)\n\n```\n[h](gone.md)\n```\n"
    )
    assert broken(page) == ["gone.md", "other.md#second", "#here", "../"]
