"""The blocks of the page about formats of text do what they show."""

import re
from pathlib import Path

import pytest

from pretrain import cli

PAGE = Path(__file__).parent.parent.parent / "docs" / "trainer" / "text_formats.md"


def test_the_blocks_write_a_table_and_inspect_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "sh", "yaml", "yaml"]
    (_, code), (_, command), (_, output), _ = blocks
    exec(code, {})
    python, option, program, *arguments = command.split()
    assert (python, option, program) == ("python", "-m", "pretrain")
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == output
