"""The README's examples run, and the files that it names exist."""

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One after the other, as in a notebook."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    for code in blocks:
        exec(compile(code, str(README), "exec"), names)
    assert len(blocks) == 2 and names["step"] == 19
    assert names["optimizer"].qk_clip is None  # the Trainer's clip of the same model replaced it
    assert names["trainer"].optimizer.optimizer.qk_clip.result is not None


def test_every_file_that_it_names_exists() -> None:
    for path in re.findall(
        r"(?:configs|docs|pretrain|muonclip|tests|benchmarks)/[\w./]+", README.read_text()
    ):
        assert (README.parent / path.rstrip(".")).exists(), path
