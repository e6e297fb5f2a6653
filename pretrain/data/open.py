"""The entry point to the data of a run: :func:`open_data`."""

from dataclasses import replace
from pathlib import Path

from pretrain.config import Config, DataConfig
from pretrain.data.builtin.dataset import open_builtin
from pretrain.data.composer import Composer
from pretrain.data.interface import Data, RankShare
from pretrain.data.mixture.data import MixtureData
from pretrain.data.mixture.tokenizer import load_tokenizer
from pretrain.data.sources import find_sources
from pretrain.errors import PretrainError


def data_config(config: Config) -> DataConfig:
    """``config.data``; a run that starts from another one's weights gets that one's tokenizer.

    Raises:
        PretrainError: the other run has no tokenizer.
    """
    if config.start_from is None or config.data.tokenizer is not None:
        return config.data
    for run_dir in (config.run_dir, config.start_from):  # a resumed run has a copy
        path = Path(run_dir, "tokenizer.json")
        if path.is_file():
            return replace(config.data, tokenizer=str(path))
    raise PretrainError(
        f"start_from={config.start_from} has no tokenizer.json: give the run_dir of a run that has "
        "been trained"
    )


def open_data(
    config: DataConfig, patch_size: int, seed: int, share: RankShare | None = None
) -> Data:
    """Open the data of a run: the sources it names, or the built-in data.

    Tokenizers and indexes come from the cache, and are made first if they are missing.

    Args:
        patch_size: side of an image patch in pixels.
        seed: decides the order of documents and, in the built-in data, their content.
        share: the sequences that this rank reads; by default all of them.

    Raises:
        PretrainError: a source is missing, empty, misconfigured or damaged beyond
            ``data.max_corrupt``, the sources do not fit together, or this machine has no corpus.
    """
    if config.sources:
        return _open_mixture(config, patch_size, seed, share or RankShare())
    return open_builtin(config, patch_size, seed)


def _open_mixture(config: DataConfig, patch_size: int, seed: int, share: RankShare) -> MixtureData:
    sources = find_sources(config, seed)
    tokenizer = load_tokenizer(config, sources)
    composer = Composer.of(config, tokenizer, patch_size)
    documents = [source.open(composer) for source in sources]
    return MixtureData(config, seed, composer, documents, share)
