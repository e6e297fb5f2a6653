"""Checkpoints in the local tier reach run_dir, or one line says why not."""

import contextlib
import itertools
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoint import storage
from pretrain.checkpoint.local_tier import LocalTier
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.storage import Checkpoint
from pretrain.errors import PretrainError
from tests.distributed.launch import launch

NUMEL = 1 << 15


def _tier(folder: str, keep: int = 2) -> LocalTier:
    return LocalTier(Path(folder) / "local", Path(folder) / "run" / "checkpoints", keep)


def _save(folder: str, step: int, *, copied: bool = True, limit: bool = False) -> str:
    """Save a tensor of this rank, with the step as its value; the error, if there is one."""
    tier = _tier(folder)
    if not copied:
        tier._copy = _killed  # type: ignore[method-assign]
    if limit and dist.get_rank() == 1:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    values = torch.full((NUMEL,), float(step))
    saver = Saver(Path(folder) / "run" / "checkpoints", 2, True, local_tier=tier)
    with saver:
        try:
            saver.save(step, {f"rank.{dist.get_rank()}": values}, {"fact": step})
            saver.wait()
        except PretrainError as error:
            return str(error)
        except InterruptedError:
            pass
    return ""


def _killed(*_arguments: object) -> None:
    raise InterruptedError


def _flush(folder: str, newest: int | None) -> str:
    try:
        _tier(folder).flush(newest, None)
    except PretrainError as error:
        return str(error)
    return ""


def _is_whole(folder: Path, step: int) -> bool:
    saved = Checkpoint.open(storage.path_of(folder / "run" / "checkpoints", step))
    saved.verify()
    tensors = {f"rank.{rank}": torch.zeros(NUMEL) for rank in range(2)}
    saved.load(tensors)
    return saved.facts == {"fact": step} and all((x == step).all() for x in tensors.values())


def _steps(folder: Path) -> list[int]:
    return storage.steps(folder / "run" / "checkpoints")


def _saves(folder: Path) -> list[Path]:
    return sorted(folder.glob("local/*/rank-*/step-*"))


@pytest.mark.parametrize("restarted_with", [1, 2, 4])
def test_an_interrupted_copy_is_made_at_the_next_start(tmp_path: Path, restarted_with: int) -> None:
    assert launch(_save, 2, str(tmp_path), 1) == ["", ""]
    assert _steps(tmp_path) == [1] and _is_whole(tmp_path, 1) and not _saves(tmp_path)
    launch(_save_interrupted, 2, str(tmp_path), 2)
    assert _steps(tmp_path) == [1] and len(_saves(tmp_path)) == 2
    assert launch(_flush, restarted_with, str(tmp_path), 1) == [""] * restarted_with
    assert _steps(tmp_path) == [1, 2] and _is_whole(tmp_path, 2) and not _saves(tmp_path)


def _save_interrupted(folder: str, step: int) -> str:
    return _save(folder, step, copied=False)


def test_a_save_without_the_files_of_a_node_is_left_out(tmp_path: Path) -> None:
    launch(_save, 2, str(tmp_path), 1)
    launch(_save_interrupted, 2, str(tmp_path), 2)
    _, other = _saves(tmp_path)
    other.rename(other.with_name(f"step-00000002-{'0' * 16}"))  # of another save of this step
    assert launch(_flush, 2, str(tmp_path), 1) == ["", ""]
    assert _steps(tmp_path) == [1] and _is_whole(tmp_path, 1)


def test_a_damaged_file_is_one_line_on_all_ranks(tmp_path: Path) -> None:
    launch(_save, 2, str(tmp_path), 1)
    launch(_save_interrupted, 2, str(tmp_path), 2)
    file = next(_saves(tmp_path)[1].glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    first, second = launch(_flush, 2, str(tmp_path), 1)
    assert first == second and f"{file} differs from its checksum: remove" in first
    assert "\n" not in first and _steps(tmp_path) == [1] and _is_whole(tmp_path, 1)


@pytest.mark.parametrize("name", ["rank-00000-0.safetensors", "manifest.json"])
def test_a_missing_file_is_one_line_on_all_ranks(tmp_path: Path, name: str) -> None:
    launch(_save, 2, str(tmp_path), 1)
    launch(_save_interrupted, 2, str(tmp_path), 2)
    (file,) = [path for save in _saves(tmp_path) for path in save.glob(name)]
    file.unlink()
    first, second = launch(_flush, 2, str(tmp_path), 1)
    assert first == second and f"{file} is missing: remove" in first
    assert "\n" not in first and _steps(tmp_path) == [1] and _is_whole(tmp_path, 1)


def test_a_truncated_manifest_is_not_copied(tmp_path: Path) -> None:
    launch(_save, 2, str(tmp_path), 1)
    launch(_save_interrupted, 2, str(tmp_path), 2)
    file = next(_saves(tmp_path)[0].glob("manifest.json"))
    file.write_bytes(file.read_bytes()[:-2])
    first, second = launch(_flush, 2, str(tmp_path), 1)
    assert first == second and f"{file} differs from its checksum" in first
    assert _steps(tmp_path) == [1]


def test_saves_of_a_deleted_run_are_not_those_of_the_next_one(tmp_path: Path) -> None:
    """Nor are they removed: a run in another container may have the same path."""
    launch(_save_interrupted, 2, str(tmp_path), 2)
    before = _saves(tmp_path)
    shutil.rmtree(tmp_path / "run")
    assert launch(_flush, 2, str(tmp_path), None) == ["", ""]
    assert not _steps(tmp_path)
    assert launch(_save, 2, str(tmp_path), 1) == ["", ""]
    assert _steps(tmp_path) == [1] and _is_whole(tmp_path, 1) and _saves(tmp_path) == before


def test_saves_of_a_run_are_not_those_of_its_copy(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    launch(_save, 1, str(first), 1)
    launch(_save_interrupted, 1, str(first), 2)
    before = _saves(first)
    shutil.copytree(first / "run", second / "run")
    (second / "local").symlink_to(first / "local")
    assert launch(_flush, 1, str(second), 1) == [""]
    assert _steps(second) == [1] and _saves(first) == before
    assert launch(_flush, 1, str(first), 1) == [""]
    assert _steps(first) == [1, 2] and not _saves(first)


class _Kill(BaseException):
    """A kill, which nothing handles."""


@contextlib.contextmanager
def _killed_at(number: int) -> Iterator[None]:
    """Context that ends before the system call of this number that changes files."""
    calls = itertools.count()

    def killing(call: Callable[..., Any]) -> Callable[..., Any]:
        def limited(*args: Any, **kwargs: Any) -> Any:
            if next(calls) >= number:
                raise _Kill
            return call(*args, **kwargs)

        return limited

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "rename", "fsync", "unlink", "rmdir"):
            patch.setattr(os, name, killing(getattr(os, name)))
        with contextlib.suppress(_Kill):
            yield


def _kill_at_every_moment(folder: str, local: bool) -> int:
    """Kill a save of step 2 before each of its changes of files, then start again and save step 3.

    Returns:
        The number of kills.
    """
    for number in itertools.count():
        root = Path(folder, str(number))
        checkpoints = root / "run" / "checkpoints"

        def save(step: int, root: Path = root, checkpoints: Path = checkpoints) -> None:
            tier = _tier(str(root), keep=1) if local else None
            values = {f"rank.{rank}": torch.full((NUMEL,), float(step)) for rank in range(2)}
            saver = Saver(checkpoints, 1, False, local_tier=tier)
            saver.save(step, values, {"fact": step})

        save(1)
        with _killed_at(number):
            save(2)
            return number
        seen = _steps(root)
        assert seen and all(_is_whole(root, step) for step in seen)
        if local:
            is_complete = bool(_saves(root))
            assert _flush(str(root), seen[-1]) == ""
            assert _steps(root)[-1] == (2 if is_complete else seen[-1])
            assert _is_whole(root, _steps(root)[-1])
            assert not list(root.glob("local/*/rank-*/*"))
        save(3)
        assert _steps(root) == [3] and _is_whole(root, 3)
        assert len(list(checkpoints.iterdir())) == 1
    raise AssertionError


@pytest.mark.parametrize("local", [False, True])
def test_a_kill_at_every_moment_of_a_save_loses_no_checkpoint(tmp_path: Path, local: bool) -> None:
    """Only one is kept: the old one must exist until the new one does."""
    (kills,) = launch(_kill_at_every_moment, 1, str(tmp_path), local)
    assert kills > 5


def _save_to_a_full_disk(folder: str, step: int) -> str:
    return _save(folder, step, limit=True)


def test_a_full_local_tier_is_one_line_on_all_ranks(tmp_path: Path) -> None:
    launch(_save, 2, str(tmp_path), 1)
    first, second = launch(_save_to_a_full_disk, 2, str(tmp_path), 2)
    assert first == second and "File too large" in first and str(tmp_path / "local") in first
    assert "earlier checkpoints are intact" in first and "\n" not in first
    assert _steps(tmp_path) == [1] and _is_whole(tmp_path, 1) and not _saves(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_line_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "local").write_text("a file")
    (error,) = launch(_flush, 1, str(tmp_path), None)
    assert "checkpoint.local_dir=" in error and "cannot be used" in error and "\n" not in error
