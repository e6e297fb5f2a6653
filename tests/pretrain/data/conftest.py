from pathlib import Path

import pytest

from pretrain.config import DataConfig
from pretrain.data import open_data
from pretrain.data.builtin.dataset import BuiltIn

PATCH = 14


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def data(cache_dir: Path) -> BuiltIn:
    config = DataConfig(vocab_size=512, max_corpus_mb=2.0, cache_dir=str(cache_dir))
    data = open_data(config, PATCH, seed=3)
    assert isinstance(data, BuiltIn)
    return data
