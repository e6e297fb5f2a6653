"""Pipes, devices and huge files are refused without being read to the end."""

import os
from pathlib import Path

import pytest

from pretrain import config, metrics, untrusted_files
from pretrain.checkpoint import storage
from pretrain.errors import PretrainError


@pytest.fixture
def endless(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    if request.param != "pipe":
        return Path(request.param)
    os.mkfifo(tmp_path / "pipe")  # to which no one writes
    return tmp_path / "pipe"


@pytest.mark.parametrize("endless", ["pipe", "/dev/zero", "/dev/full"], indirect=True)
def test_endless_files_are_refused(endless: Path, tmp_path: Path) -> None:
    with pytest.raises(PretrainError, match=r"configuration .* is a pipe or a device"):
        config.load(endless)
    (tmp_path / "manifest.json").symlink_to(endless)
    with pytest.raises(PretrainError, match="no readable manifest"):
        storage.Checkpoint.open(tmp_path)
    assert metrics.read_lines(endless) == []


def test_a_huge_configuration_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    with (tmp_path / "huge.yaml").open("w") as file:
        file.truncate(1 << 40)  # takes no space
    with pytest.raises(PretrainError, match="it is larger than 1 MiB"):
        config.load(tmp_path / "huge.yaml")


def test_folders_and_missing_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        untrusted_files.read_bytes(tmp_path, 1)
    with pytest.raises(FileNotFoundError):
        untrusted_files.read_bytes(tmp_path / "none", 1)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"step": null}', '{"step": "7"}', "3", "{"])
def test_damaged_lines_of_metrics_are_skipped(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    assert metrics.read(path) == [{"step": 1}, {"step": 2}]
