"""A folder of the cache that several processes build is built by one at a time."""

import fcntl
import shutil
import threading
from pathlib import Path

import pytest

from pretrain.data import cache


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
    assert [*tmp_path.iterdir()] == [folder]
