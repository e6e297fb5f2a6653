"""Fixtures of the tests of whole runs."""

from pathlib import Path

import pytest

from tests.distributed import training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """A folder for all tests of a module, in which each test has a separate run_dir."""
    folder = tmp_path_factory.mktemp("runs")
    training.tiny_file(folder, prepared)
    return folder
