"""The README is short, its examples and commands work, its figures are those of the benchmarks."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs.commands import ROOT, blocks, check, inline_commands

README = (ROOT / "README.md").read_text()


def section(text: str, anchor: str) -> str:
    """The part of a Markdown text under the heading that an anchor names."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    (part,) = (p for p in parts if _anchor(p.partition("\n")[0].lstrip("# ")) == anchor)
    return part


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_it_has_two_screens() -> None:
    assert len(README.splitlines()) <= 150


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder with nothing but them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    examples = blocks(README, "python")
    assert len(examples) == 2
    for code in examples:
        names: dict[str, Any] = {}
        exec(compile(code, "README.md", "exec"), names)
        optimizer = names["optimizer"]
        assert names["step"] == 19
        assert {group["algorithm"] for group in optimizer.param_groups} == {"muon", "adamw"}
        assert all(len(heads) == 4 for heads in optimizer.qk_clip.result.max_logits.values())


@pytest.mark.parametrize("command", inline_commands(README), ids=" ".join)
def test_the_commands_of_its_sentences_are_valid(command: list[str]) -> None:
    """tests/docs/test_commands_run.py executes those of its blocks."""
    check(command)


def measured() -> list[tuple[str, str]]:
    """Every row of a table that links a section of benchmarks/README.md, and the section's name."""
    return re.findall(r"^(\|.*)\(benchmarks/README\.md#([\w-]+)\) \|$", README, re.MULTILINE)


@pytest.mark.parametrize(("row", "anchor"), measured(), ids=[row[2:40] for row, _ in measured()])
def test_its_figures_are_those_of_the_benchmarks(row: str, anchor: str) -> None:
    """Numbers with a decimal point or a comma, in rows about the same optimizer, or its columns."""
    header = next(line for line in README.splitlines() if line.endswith("| Benchmark |"))
    text = section((ROOT / "benchmarks" / "README.md").read_text(), anchor)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for name, cell in zip(header.split("|")[2:6], row.split("|")[2:6], strict=True):
        optimizer = name.strip().removeprefix("torch's ")
        about = [line for line in rows if optimizer in line.split("|")[1]]
        for figure in re.findall(r"\d[\d,]*[.,]\d+%?", cell):
            assert any(f" {figure}" in line for line in about or rows), f"{optimizer}: {figure}"


def test_the_figures_of_its_limits_are_in_the_benchmarks() -> None:
    limits, _, _ = section(README, "limits").partition("- **Versions")
    found = re.findall(r"(?<![\w.])(?:\d[\d,]*\.\d+%?|\d+%|\d+,\d+)", limits)
    figures = set(found) - {"2.13", "1.5"}  # a version and a target
    known = (ROOT / "benchmarks" / "README.md").read_text()
    assert len(figures) >= 6 and all(f" {figure}" in known for figure in figures), figures


def test_its_result_of_the_trainer_is_that_of_the_quick_start() -> None:
    figures = re.findall(r"[\d.]+ %", section(README, "the-trainer"))
    page = (ROOT / "docs" / "trainer" / "quick_start.md").read_text()
    assert figures and all(figure in page for figure in figures)
