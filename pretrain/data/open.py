"""The entry point to the data of a run: :func:`open_data`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pretrain.config import Config, DataConfig
from pretrain.data.builtin.dataset import open_builtin
from pretrain.data.cache import cached, key_of
from pretrain.data.composer import Composer
from pretrain.data.duplicates import without_duplicates
from pretrain.data.interface import Data, RankShare
from pretrain.data.mixture.data import MixtureData
from pretrain.data.skipped import Skip
from pretrain.data.sources import find_sources
from pretrain.data.sources.interface import Source
from pretrain.data.sources.splits import held_out_below
from pretrain.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from pretrain.errors import PretrainError
from pretrain.runtime.progress import counted

_LONG_RUN = re.compile(r"(\S{1000}|\s{1000})")


def data_config(config: Config) -> DataConfig:
    """``config.data``; with ``start_from``, the tokenizer is that of the other run.

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
    if not config.sources:
        return open_builtin(config, patch_size, seed)
    sources = find_sources(config, seed)
    tokenizer = load_tokenizer(config, sources)
    composer = Composer.of(config, tokenizer, patch_size)
    documents, found = without_duplicates([source.open(composer) for source in sources], config)
    return MixtureData(config, seed, composer, documents, share or RankShare(), found)


def load_tokenizer(config: DataConfig, sources: Sequence[Source]) -> Tokenizer:
    """The tokenizer of ``data.tokenizer``; or one trained on text that is not held out, as much of
    each source, from the cache if it exists.

    Raises:
        PretrainError: the file is not a tokenizer, too many documents are corrupt, or the cache
            cannot be written.
    """
    if config.tokenizer is not None:
        return Tokenizer.load(Path(config.tokenizer))
    keys = [source.key for source in sources]
    key = key_of(
        *("tokenizer", keys, config.vocab_size, config.max_corpus_mb, config.held_out),
        SPECIAL_TOKENS,
    )

    def build(folder: Path) -> None:
        characters = int(config.max_corpus_mb * 1e6 / len(sources))
        below = held_out_below(config)
        texts = (text for source in sources for text in sample_texts(source, characters, below))
        Tokenizer.train(texts, config.vocab_size).save(folder / "tokenizer.json")

    cache = Path(config.cache_dir) / f"tokenizer-{key}"
    return cached(cache, build, lambda folder: Tokenizer.load(folder / "tokenizer.json"))[0]


def sample_texts(source: Source, characters: int, held_out_below: int) -> Iterator[str]:
    """About the first ``characters`` characters of a source's text that is not held out.

    Words and gaps of more than 1,000 characters are split, because merges within a word take time
    quadratic in its length.
    """
    for record in counted(source.records(), "reading text to train the tokenizer on"):
        if characters <= 0:
            return
        if isinstance(record, Skip) or record.hash < held_out_below:
            continue
        characters -= len(record.text)
        yield from filter(None, _LONG_RUN.split(record.text))
