"""A folder of the cache that several processes build is built by one at a time."""

import fcntl
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from pretrain.data import cache
from pretrain.errors import PretrainError


def test_a_lock_that_was_removed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process removes unfinished folders while this one waits for the lock in its own."""
    folder, removed = tmp_path / "text-digest-key", threading.Event()
    plain = cache._lock

    def removing(file: object, folder: Path) -> None:
        if not removed.is_set():
            removed.set()
            shutil.rmtree(tmp_path / f"unfinished-{folder.name}")
        plain(file, folder)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "_lock", removing)

    def build(partial: Path) -> None:
        (partial / "content").write_text("made")
        with (partial.parent / "lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

    cache.make_folder(folder, build, resumable=True)
    assert removed.is_set() and (folder / "content").read_text() == "made"
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


@pytest.mark.parametrize("content", ["", "folder"])
def test_a_folder_with_other_files_is_not_marked_as_a_cache(tmp_path: Path, content: str) -> None:
    """Programs that make backups, and searches for data, would leave the other files out."""
    (tmp_path / content).mkdir(exist_ok=True)
    for name in ("first", "second"):
        cache.make_folder(tmp_path / name, lambda partial: (partial / "file").touch())
        assert (tmp_path / cache.TAG).exists() == (not content)


@pytest.mark.parametrize("moment", ["while it is made", "after it was made"])
def test_a_folder_that_another_process_removes_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder = tmp_path / "result"
    mkdir, removed = Path.mkdir, False

    def raced(path: Path, *arguments: Any, **options: Any) -> None:
        nonlocal removed
        if path.name != "unfinished-result" or removed:
            return mkdir(path, *arguments, **options)
        removed = True
        if moment == "while it is made":
            raise FileExistsError(str(path))
        mkdir(path, *arguments, **options)
        path.rmdir()

    monkeypatch.setattr(Path, "mkdir", raced)
    cache.make_folder(folder, lambda partial: (partial / "file").touch(), resumable=True)
    assert removed and (folder / "file").is_file()


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "unfinished-result").touch()
    with pytest.raises(PretrainError, match="cannot write the cache"):
        cache.make_folder(tmp_path / "result", lambda _: None, resumable=True)


@pytest.mark.parametrize("made", [False, True])
def test_no_process_can_enter_a_folder_that_is_being_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    """It would find ``result`` in it, and then not: 'File exists'."""
    removed: list[Path] = []
    rmtree = shutil.rmtree

    def noted(path: Path, **options: Any) -> None:
        removed.append(Path(path))
        rmtree(path, **options)

    folder, earlier = tmp_path / "text-digest-new", tmp_path / "unfinished-text-digest-old"
    earlier.mkdir()
    (earlier / "lock").touch()
    if made:
        folder.mkdir()
    monkeypatch.setattr(shutil, "rmtree", noted)
    cache.make_folder(folder, lambda partial: (partial / "file").touch(), resumable=True)
    assert removed and not any(path.name.startswith("unfinished-") for path in removed)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


@pytest.mark.parametrize("marked", [True, False])
def test_what_killed_processes_left_in_a_cache_is_removed(tmp_path: Path, marked: bool) -> None:
    """A build takes less than a week. In another folder, it could be a user's."""
    for name in ("partial-left", "partial-recent"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").touch()
    os.utime(tmp_path / "partial-left", (0, 0))
    if marked:
        (tmp_path / cache.TAG).touch()
    cache.make_folder(tmp_path / "text-key", lambda partial: (partial / "file").touch())
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {"text-key", "partial-recent", *(() if marked else ("partial-left",))}


def test_another_process_never_meets_a_damaged_folder_that_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that builds it meanwhile could not rename its own to a name that still has files."""
    folder = tmp_path / "text"
    (folder / "damaged").mkdir(parents=True)
    plain = shutil.rmtree

    def build(partial: Path) -> None:
        (partial / "whole").touch()

    def load(folder: Path) -> str:
        (file,) = folder.iterdir()
        if file.name == "damaged":
            raise ValueError
        return file.name

    def removing(path: Path, **options: Any) -> None:
        monkeypatch.setattr(shutil, "rmtree", plain)
        assert not folder.exists()
        cache.make_folder(folder, build)  # the other process
        plain(path, **options)

    monkeypatch.setattr(shutil, "rmtree", removing)
    assert cache.cached(folder, build, load) == ("whole", False)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["text"]
