"""Sources of text: JSON lines, tables (Parquet and Arrow) and plain text files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pretrain.data import files, remote, saved_datasets, tables
from pretrain.data.composer import Composer
from pretrain.data.content import content_hash
from pretrain.data.files import reason
from pretrain.data.packing import Document
from pretrain.data.skipped import Skip
from pretrain.data.sources.indexed import FileSource, IndexedSource
from pretrain.data.sources.interface import Segment
from pretrain.data.sources.parts import Encoded
from pretrain.data.sources.tokens import TokenDocuments, index_tokens
from pretrain.data.tokenizer import Tokenizer

_SUFFIXES = (*files.with_compressed((*files.JSON_LINES, *files.PLAIN)), *tables.SUFFIXES)
_KINDS = "files of text (.jsonl, .json, .txt, .md; .gz, .zst, .bz2 or .xz; .parquet, .arrow)"
# Limits of a batch of texts that are tokenized at once.
_BATCH_TEXTS = 256
_BATCH_CHARACTERS = 1 << 24


@dataclass(frozen=True)
class Text:
    """A document of text."""

    name: str
    text: str

    @property
    def hash(self) -> int:
        return content_hash(self.text)


class TextSource(FileSource[Text]):
    """JSON lines, arrays of JSON objects, and plain text files, compressed or not; and a column of
    tables."""

    def find(self) -> list[Path | Skip]:
        path = remote.local_path(self.config.path, self.data.cache_dir, self.setting)
        items = files.find(path, self.setting, _SUFFIXES, _KINDS)
        return saved_datasets.select(items, Path(path), self.setting)

    def check(self) -> None:
        for file in self.files:
            tables.require_column(Path(file.name), self.setting, self.config.field)

    def read(self, file: Path) -> Iterator[Text | Skip]:
        """The JSON objects or rows of a file, or its whole text."""
        field = self.config.field
        try:
            table = tables.kind(file)
            plain = not table and files.content(file) == "plain"
            if plain:
                yield _text(str(file), files.read_plain(file), "text")
        except files.UNREADABLE as error:
            yield Skip(str(file), reason(error))
            return
        if plain:
            return
        tables.require_column(file, self.setting, field)
        for name, value in tables.read_objects(file, (field, *files.MEDIA)):
            if isinstance(value, Skip):
                yield value
            elif field not in value:
                yield Skip(name, files.no_field(value, field))
            elif lost := files.lost_field(value, files.MEDIA):
                yield Skip(name, f"its {lost!r} would be lost: a source of text has no images")
            else:
                yield _text(name, value[field], field)

    def index(self, composer: Composer) -> "TextDocuments":
        return index_text(self, composer)


def _text(name: str, text: Any, field: str) -> Text | Skip:
    if not isinstance(text, str):
        return Skip(name, f"has no text in its field {field!r}")
    if not files.is_unicode(text):
        return Skip(name, "half a surrogate pair in its text")
    return Text(name, text) if text.strip() else Skip(name, "no text in it", corrupt=False)


@dataclass(frozen=True)
class TextDocuments(TokenDocuments):
    """Documents of text, each ended by the token that ends a document.

    They are cut where a sequence is full, and continue in the next one.
    """

    whole: ClassVar[bool] = False

    def document(self, segment: Segment, *, pixels: bool = True) -> Document:
        first = self.extent(segment.number).start
        tokens = self.tokens[first + segment.start : first + segment.stop]
        return Document(self.composer.tokenizer).add_tokens(tokens)


def index_text(source: IndexedSource[Text], composer: Composer) -> TextDocuments:
    """Load the index of a source of text, or build it; raises as :func:`index_tokens`."""
    tokenizer = composer.tokenizer

    def encode(records: Iterator[Text | Skip]) -> Iterator[Encoded | Skip]:
        for batch in _batches(records):
            texts = [record.text for record in batch if not isinstance(record, Skip)]
            encoded = iter(_encoded(tokenizer, texts))
            for record in batch:
                if isinstance(record, Skip):
                    yield record
                elif isinstance(tokens := next(encoded), str):
                    yield Skip(record.name, tokens)
                else:
                    yield record.hash, (np.append(tokens, tokenizer.eos),)

    columns = {"tokens": tokenizer.dtype}
    name = source.index_name("text", tokenizer)
    return index_tokens(source, composer, name, columns, TextDocuments, encode)


def _batches(records: Iterator[Text | Skip]) -> Iterator[list[Text | Skip]]:
    batch: list[Text | Skip] = []
    size = 0
    for record in records:
        batch.append(record)
        size += 0 if isinstance(record, Skip) else len(record.text)
        if len(batch) == _BATCH_TEXTS or size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> list[npt.NDArray[np.int64] | str]:
    """The tokens of each text, or the reason why it has none."""
    try:
        encoded: list[npt.NDArray[np.int64] | str] = list(tokenizer.encode_many(texts))
    except ValueError as error:
        if len(texts) == 1:
            return [reason(error)]
        return [tokens for text in texts for tokens in _encoded(tokenizer, [text])]
    return [tokens if len(tokens) else "the tokenizer makes no tokens of it" for tokens in encoded]
