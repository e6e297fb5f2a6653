from pathlib import Path

import pytest


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A configuration file without settings."""
    path = tmp_path / "run.yaml"
    path.write_text("")
    return path
