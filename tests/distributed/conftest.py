"""What the tests of whole runs share."""

from pathlib import Path

import pytest

from tests.distributed import training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """One for all tests of a module; each test has a run_dir of its own in it."""
    folder = tmp_path_factory.mktemp("runs")
    training.tiny_file(folder, prepared)
    return folder
