"""The first blocks of the page on data quality do what they show."""

import re
from pathlib import Path

import pytest

from pretrain import cli

PAGE = Path(__file__).parent.parent.parent / "docs" / "trainer" / "data_quality.md"


def test_the_first_blocks_write_files_and_report_their_duplicates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [language for language, _ in blocks[:3]] == ["python", "sh", "text"]
    (_, code), (_, command), (_, output) = blocks[:3]
    exec(code, {})
    assert cli.main(command.split()[3:]) == 0
    assert capsys.readouterr().out == output
