"""Tokenize the text of a configuration before training, with several processes."""

from collections.abc import Iterator

from pretrain.config import Config
from pretrain.data import data_config, skipped
from pretrain.data.composer import Composer
from pretrain.data.duplicates import without_duplicates
from pretrain.data.interface import SPLITS
from pretrain.data.open import load_tokenizer
from pretrain.data.sources import find_sources
from pretrain.data.sources.indexed import IndexedSource
from pretrain.data.sources.interface import Documents
from pretrain.data.sources.tokens import TokenDocuments
from pretrain.errors import PretrainError


def tokenize(config: Config, workers: int) -> Iterator[str]:
    """Tokenize every source of text or conversations into ``data.cache_dir``.

    Args:
        workers: number of processes.

    Yields:
        a line for each source when it is finished, with its tokens and their files, and one more
        if any documents were skipped; finally the number of duplicates, if they are left out.

    Raises:
        PretrainError: there is nothing to tokenize, too many documents are corrupt, or the cache
            cannot be written.
    """
    if workers < 1:
        raise PretrainError(f"--workers must be > 0, not {workers}")
    data = data_config(config)
    if not data.sources:
        raise PretrainError("data.sources is empty: the built-in data need not be tokenized")
    sources = find_sources(data, config.seed)
    tokenizer = load_tokenizer(data, sources)
    composer = Composer.of(data, tokenizer, config.vision.patch_size)
    opened: list[Documents] = []
    for source in sources:
        if isinstance(source, IndexedSource):
            source.workers = workers
        # Duplicates are looked for among all documents.
        skip = source.has_images and data.deduplicate == "none"
        documents = None if skip else source.open(composer)
        opened += [documents] if documents else []
        if not isinstance(documents, TokenDocuments):
            yield f"{source.setting}: {source.location}: no text to tokenize"
            continue
        count = sum(map(documents.count, SPLITS))
        yield (
            f"{source.setting}: {source.location}: {count:,} documents, "
            f"{len(documents.tokens):,} tokens: {documents.stored.prefix}.bin"
        )
        if skips := documents.skips:
            first = skipped.first(skips)
            yield f"{source.setting}: {len(skips):,} files and documents are skipped{first}"
    _, duplicates = without_duplicates(opened, data)
    if duplicates:
        yield duplicates.summary()
