"""The tokenizer of a mixture: a given one, or one that is trained on the sources' text."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pretrain.config import DataConfig
from pretrain.data.cache import Progress, cached, key_of
from pretrain.data.skipped import Skip
from pretrain.data.sources.indexed import held_out_below
from pretrain.data.sources.interface import Source
from pretrain.data.tokenizer import SPECIAL_TOKENS, Tokenizer

_LONG_RUN = re.compile(r"(\S{1000}|\s{1000})")


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

    def load(folder: Path) -> Tokenizer:
        return Tokenizer.load(folder / "tokenizer.json")

    return cached(Path(config.cache_dir) / f"tokenizer-{key}", build, load)[0]


def sample_texts(source: Source, characters: int, held_out_below: int) -> Iterator[str]:
    """About the first ``characters`` characters of a source's text that is not held out.

    Words and gaps of more than 1,000 characters are split, because merges within a word take time
    quadratic in its length.
    """
    progress = Progress("reading text to train the tokenizer on")
    for number, record in enumerate(source.records()):
        progress(number)
        if characters <= 0:
            return
        if isinstance(record, Skip) or record.hash < held_out_below:
            continue
        characters -= len(record.text)
        yield from filter(None, _LONG_RUN.split(record.text))
