"""Every block of code in the documentation works: Python runs, settings are valid."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import cli as posttrain_cli
from posttrain.config import Config as PosttrainConfig
from pretrain import cli, config
from tests.docs.commands import (
    NOT_EXECUTED,
    ROOT,
    blocks,
    check,
    commands,
    inline_commands,
    is_executed,
)

DOCS = ROOT / "docs"
PAGES = [
    *sorted(DOCS.rglob("*.md")), ROOT / "benchmarks" / "README.md", ROOT / "CONTRIBUTING.md"
]  # fmt: skip
# Pages whose Python does not run here, and why.
NOT_RUN = {
    "finetuning.md": "tests/docs/test_finetuning.py runs it",
    "conversations.md": "test_text_formats.py and tests/pretrain/export/test_pipeline.py run it",
    "serving.md": "loads runs/laptop/hf; tests/pretrain/export make these calls",
}
# Pages for programs that torchrun starts.
DISTRIBUTED = ("distributed.md", "megatron.md")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page.read_text(), language)]


@pytest.mark.parametrize("page", with_blocks("python"), ids=name_of)
def test_python_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All blocks of a page, one after the other, as in a notebook."""
    codes = [compile(code, page.name, "exec") for code in blocks(page.read_text(), "python")]
    if page.name in NOT_RUN:
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if page.name in DISTRIBUTED:
        for variable, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        # As megatron-core asks for it on a machine without GPUs, too.
        monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    names: dict[str, Any] = {"__name__": "page"}
    for code in codes:
        exec(code, names)


@pytest.mark.parametrize("page", with_blocks("sh"), ids=name_of)
def test_commands_that_are_not_executed_are_valid(page: Path) -> None:
    """test_commands_run.py executes the others."""
    for words in commands(page.read_text()):
        if not is_executed(words):
            check(words)


def test_the_list_of_commands_that_are_not_executed_is_up_to_date() -> None:
    every = [ROOT / "README.md", *PAGES]
    found = [shlex.join(words) for page in every for words in commands(page.read_text())]
    for first in NOT_EXECUTED:
        assert any(command.startswith(first) for command in found), first


def test_commands_of_sentences_are_valid() -> None:
    for page in PAGES:
        for words in inline_commands(page.read_text()):
            check(words)


def test_commands_in_the_comments_of_configurations_are_valid() -> None:
    texts = [path.read_text().replace("\n# ", " ") for path in (ROOT / "configs").rglob("*.yaml")]
    found = [words for text in texts for words in inline_commands(text)]
    assert found
    for words in found:
        check(words)


def test_examples_of_the_help_are_valid() -> None:
    every = (cli._EPILOG + posttrain_cli._EPILOG).splitlines()
    lines = [line.strip().replace("… ", "") for line in every]
    examples = [shlex.split(line) for line in lines if line.startswith(("python -m", "torchrun"))]
    assert len(examples) > 5
    for words in examples:
        check(words)


@pytest.mark.parametrize("page", with_blocks("yaml"), ids=name_of)
def test_configurations_are_valid(page: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path, dirs_exist_ok=True)
    kind = PosttrainConfig if page.parent.name == "posttraining" else config.Config
    for block in blocks(page.read_text(), "yaml"):
        (tmp_path / "page.yaml").write_text(block)
        config.load_as(kind, tmp_path / "page.yaml")


@pytest.mark.parametrize("page", with_blocks("json"), ids=name_of)
def test_json_is_valid(page: Path) -> None:
    for block in blocks(page.read_text(), "json"):
        assert json.loads(block)


def test_no_block_is_left_out() -> None:
    """``text`` is output or a listing, ``mermaid`` a diagram that tests/test_imports.py checks."""
    checked = ("python", "sh", "yaml", "json", "text", "mermaid")
    for page in [*PAGES, *ROOT.glob("*.md")]:
        text = page.read_text()
        fences = len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE))
        assert fences == 2 * sum(len(blocks(text, language)) for language in checked), page
    assert set(NOT_RUN) <= {page.name for page in PAGES}


def links(page: Path) -> list[tuple[str, str]]:
    """(path, anchor) of every link to a file of the repository, outside code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    sources = re.findall(r"""<(?:a|img)[^>]*(?:href|src)="([^"#:]*)()""", text)
    return re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?[\s)]", text) + sources


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_links_lead_to_files_and_headings() -> None:
    """Also those of files that are not pages of the site, which `make docs` does not check."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    for name in subprocess.check_output(command, cwd=ROOT, text=True).splitlines():
        for path, anchor in links(ROOT / name):
            target = (ROOT / name).parent / path if path else ROOT / name
            assert target.exists(), f"{name}: {path}"
            assert not anchor or anchor in anchors(target), f"{name}: {path}#{anchor}"
