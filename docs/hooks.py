"""Hooks of the documentation site (mkdocs.yml): generated parts, diagrams, links, formulas.

Links in pages are those of the repository, so that they also work where the files are read without
the site. A link to a source file leads to a page that shows it, made here.
"""

import html
import os
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from diagram import draw
from latex2mathml import converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Pages of the site outside docs/.
PAGES = ("benchmarks/README.md", "CHANGELOG.md", "CONTRIBUTING.md")
_CODE = re.compile(r"(```.*?```|`[^`\n]+`|<!--.*?-->)", re.DOTALL)
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[#)])")
_LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and every file of the repository that a page links to."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for page in list(files.documentation_pages()):
        for path in _linked_files(page):
            if files.get_file_from_path(_uri(path)) is None:
                files.append(_new_file(path, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Insert generated parts, and let links lead to pages of the site."""
    markdown = re.sub(r"<!-- (output|list): (.+?) -->", _generated, markdown)
    markdown = re.sub(r"```mermaid\n(.*?)```", _diagram, markdown, flags=re.DOTALL)
    source, folder = _source(page.file), posixpath.dirname(page.file.src_uri)

    def resolve(match: re.Match[str]) -> str:
        path = _target(source, match[1])
        return match[1] if path is None else posixpath.relpath(_uri(path), folder)

    pieces = _CODE.split(markdown)
    pieces[::2] = [_LINK.sub(resolve, text) for text in pieces[::2]]
    return "".join(pieces)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML, which browsers show without scripts."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return converter.convert(html.unescape(match[2]), display=display)

    pattern = r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>'
    return re.sub(pattern, formula, content, flags=re.DOTALL)


def _source(file: File) -> Path:
    """The file of the repository that a page is made of; itself for a page that shows a file."""
    return Path(file.abs_src_path) if file.abs_src_path else ROOT / "docs" / file.src_uri


def _linked_files(page: File) -> Iterator[Path]:
    for text in _CODE.split(page.content_string)[::2]:
        for match in _LINK.finditer(text):
            path = _target(_source(page), match[1])
            if path is not None:
                yield path


def _target(source: Path, link: str) -> Path | None:
    """The existing file of the repository that a link leads to; others are left to MkDocs."""
    if ":" in link:
        return None
    path = (source.parent / link).resolve()
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def _uri(path: Path) -> str:
    """The address of a file in the site."""
    name = path.relative_to(ROOT).as_posix()
    if path.suffix in (".md", ".png", ".svg"):
        return name.removeprefix("docs/")
    return f"source/{name}.md"


def _new_file(path: Path, config: MkDocsConfig) -> File:
    """An image, or a page that shows a source file."""
    if not _uri(path).startswith("source/"):
        return File.generated(config, _uri(path), abs_src_path=str(path))
    name = path.relative_to(ROOT)
    code = f"````{_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n````"
    text = f"---\ntitle: {path.name}\nsearch: {{exclude: true}}\n---\n# `{name}`\n\n{code}\n"
    return File.generated(config, _uri(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV)


def _diagram(match: re.Match[str]) -> str:
    return draw(match[1])


def _generated(match: re.Match[str]) -> str:
    kind, subject = match.groups()
    if kind == "output":
        return f"```text\n{_output(subject)}```"
    return "\n".join(_settings() if subject == "settings" else _metrics())


def _output(command: str) -> str:
    """Standard output of a command of the project."""
    _python, *arguments = command.split()
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    return subprocess.check_output(
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True
    )


def _settings() -> Iterator[str]:
    """Definitions of all settings, with a heading for each section."""
    from pretrain import config

    section = ""
    for line in sorted(config.describe(config.Config), key=lambda line: "." in line.split("=")[0]):
        name, _, rest = line.partition("=")
        default, _, meaning = rest.partition("  ")
        if (parent := name.rpartition(".")[0] or "Run") != section:
            section = parent
            yield f"\n## {section}\n"
        yield f"`{name}` = `{default}`\n:   {html.escape(meaning) or '&nbsp;'}\n"


def _metrics() -> Iterator[str]:
    """A table of all metrics."""
    from pretrain.metrics import METRICS

    yield "| Key | Meaning |\n|---|---|"
    for name, metric in METRICS.items():
        yield f"| `{name}` | {metric.description} |"
