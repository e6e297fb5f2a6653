"""The blocks of the pages about formats of data do what they show."""

import re
from pathlib import Path

import pytest

from pretrain import cli

PAGES = Path(__file__).parent.parent.parent / "docs" / "trainer"


@pytest.mark.parametrize("page", ["text_formats.md", "vision_formats.md", "conversations.md"])
def test_the_first_blocks_write_a_file_and_inspect_it(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(\w+)\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)
    assert [language for language, _ in blocks[:3]] == ["python", "sh", "yaml"]
    (_, code), (_, command), (_, output) = blocks[:3]
    exec(code, {})
    python, option, program, *arguments = command.split()
    assert (python, option, program) == ("python", "-m", "pretrain")
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == output
