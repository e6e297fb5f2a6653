from pathlib import Path

import pytest

from pretrain.data import files
from pretrain.errors import PretrainError
from pretrain.runtime import atomic


def test_a_file_is_replaced_and_a_folder_appears_when_all_is_written(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file"
    for text in ("one", "zwölf"):
        atomic.write_text(file, text)
        assert file.read_text(encoding="utf-8") == text
    folder = tmp_path / "new" / "folder"
    folder.mkdir()
    with atomic.written(folder) as partial:
        partial.mkdir()
        (partial / "content").touch()
        assert not list(folder.iterdir())
    assert sorted(path.name for path in file.parent.rglob("*")) == ["content", "file", "folder"]
    assert folder.stat().st_mode == file.parent.stat().st_mode


def test_an_error_changes_nothing(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("before")
    with pytest.raises(KeyboardInterrupt), atomic.written(file) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    no_space = pytest.raises(PretrainError, match=f"^cannot write {file}: No space left on device$")
    with no_space, atomic.written(file) as partial:
        partial.symlink_to("/dev/full")
        partial.write_text("half")
    occupied = pytest.raises(PretrainError, match=f"^cannot write {folder}: Directory not empty$")
    with occupied, atomic.written(folder) as partial:
        partial.mkdir()
        (folder / "other").mkdir(parents=True)
    with pytest.raises(PretrainError, match=r"^cannot write .*/below: File exists"):
        atomic.write_text(file / "below", "")
    assert file.read_text() == "before"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "other"]


def test_an_unfinished_folder_is_not_read_as_data(tmp_path: Path) -> None:
    """A killed process leaves it, next to other data."""
    (tmp_path / "other.jsonl").touch()
    with atomic.written(tmp_path / "new") as partial:
        partial.mkdir()
        (partial / "half.jsonl").touch()
        found = [item for item in files.walk(tmp_path, (".jsonl",), "") if isinstance(item, Path)]
    assert found == [tmp_path / "other.jsonl"]
