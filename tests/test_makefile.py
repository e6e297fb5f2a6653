"""`make` sets up the environment that a command needs, with the Python it is given."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


def python(folder: Path, version: tuple[int, int, int]) -> Path:
    """An interpreter that takes itself for another version."""
    path = folder / f"python{version[1]}"
    patch = f"import sys; sys.version_info = {version}; sys.version = '.'.join(map(str, {version}))"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{patch}; exec(sys.argv[1])" "$2"\n')
    path.chmod(0o755)
    return path


def make(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    # Not with the options of a `make test` that runs this.
    given = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "PYTHON", "VENV"}
    environment = {name: value for name, value in os.environ.items() if name not in given}
    return subprocess.run(
        ["make", *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_old_python_is_refused_before_anything_is_downloaded(folder: Path) -> None:
    result = make(folder, "train", f"PYTHON={python(folder, (3, 10, 4))}")
    assert result.returncode and not (folder / ".venv").exists()
    first, *_ = result.stderr.splitlines()
    assert first == "the trainer needs Python 3.11 or newer, not 3.10.4: make PYTHON=python3.12 ..."


def test_the_environment_is_made_again_for_another_version_only(folder: Path) -> None:
    """And what it needs is installed: for training without what only tests need."""
    binaries = folder / ".venv" / "bin"
    assert "venv" in make(folder, "-n", "train").stdout
    binaries.mkdir(parents=True)
    shutil.move(python(folder, (3, 11, 1)), binaries / "python")
    for stamp in (".ready-train", ".ready"):
        (folder / ".venv" / stamp).touch()
    same, other = python(folder, (3, 11, 9)), python(folder, (3, 12, 0))
    for arguments in ([], [f"PYTHON={same}"]):
        planned = make(folder, "-n", "train", *arguments).stdout
        assert "venv --clear" not in planned and "pip" not in planned
    planned = make(folder, "-n", "train", f"PYTHON={other}").stdout
    assert "venv --clear" in planned and '".[pretrain]"' in planned and "test]" not in planned
    assert '".[pretrain,test]"' in make(folder, "-n", "test", f"PYTHON={other}").stdout
