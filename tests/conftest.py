"""What tests of all folders share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for all runs of the tiny configuration; the first of them fills it."""
    return tmp_path_factory.mktemp("prepared")
