from pathlib import Path

import pytest

from tests.distributed import training
from tests.distributed.launch import launch
from tests.pretrain import saved_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """A folder with tiny.yaml, cache and run, the run_dir of :func:`made`."""
    folder = tmp_path_factory.mktemp("saved")
    training.tiny_file(folder, prepared)
    return folder


@pytest.fixture(scope="session")
def made(run_folder: Path) -> saved_run.Made:
    """A saved run of randomized weights, made by the model that is trained."""
    (made,) = launch(saved_run.make, 1, str(run_folder))
    return made  # type: ignore[no-any-return]
