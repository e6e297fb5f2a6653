from pathlib import Path

import pytest

from pretrain.config import DataConfig
from pretrain.data import Data, prepare

PATCH = 14


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def data(cache_dir: Path) -> Data:
    config = DataConfig(vocab_size=512, max_corpus_mb=2.0, cache_dir=str(cache_dir))
    return prepare(config, PATCH, seed=3)
