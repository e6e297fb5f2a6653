"""Tokens in Megatron's files: written by its tools or by ``pretrain data``."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.config import DataConfig
from pretrain.data import files
from pretrain.data.cache import key_of, map_array, stamp
from pretrain.data.composer import Composer
from pretrain.data.files import reason
from pretrain.data.megatron_format import (
    DESCRIPTION,
    HASHES,
    IndexedTokens,
    bin_path,
    column_path,
    idx_path,
)
from pretrain.data.packing import Document
from pretrain.data.skipped import Skip
from pretrain.data.sources import chat
from pretrain.data.sources.indexed import IndexedDocuments, IndexedSource
from pretrain.data.sources.interface import Segment
from pretrain.data.sources.order import Integers, Words, mixed
from pretrain.data.sources.splits import Column
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError

_SUFFIXES = (".bin", ".idx")
_SAMPLED_DOCUMENTS = 64
_SAMPLED_TOKENS = 4096
"""Tokens of each sampled document."""
# Fewer documents may end with the same token by chance.
_ENOUGH = 32
# All documents may well end with one of these, such as files of code with a newline.
_TEXT_ENDS = ("\n", " ", ".", "}", ")", ">", "。")

D = TypeVar("D", bound="MegatronDocuments")


class MegatronSource(IndexedSource[Any]):
    """Pairs of files, ``PREFIX.bin`` and ``PREFIX.idx``.

    Attributes:
        columns: columns of the files besides the tokens, with their dtypes.
        pairs: the files, mapped into memory.
    """

    reads_field = False
    columns: ClassVar[Mapping[str, npt.DTypeLike]] = {}

    def __init__(self, number: int, data: DataConfig, seed: int) -> None:
        super().__init__(number, data, seed)
        prefixes = _prefixes(self.config.path, self.setting)
        names = [*map(bin_path, prefixes), *map(idx_path, prefixes)]
        others = (DESCRIPTION, HASHES, *self.columns)
        paths = names + [column_path(prefix, name) for prefix in prefixes for name in others]
        self.key = key_of(self.config.type, stamps=[(str(path), stamp(path)) for path in paths])
        self.files = ()
        try:
            self.pairs = [IndexedTokens.open(prefix) for prefix in prefixes]
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> PretrainError:
        return PretrainError(
            f"{self.setting}.path: {reason(error)}: copy the files again, or make them again"
        )

    def records(self) -> NoReturn:
        raise PretrainError(
            f"{self.setting}: {self.location} has tokens instead of text: set data.tokenizer to "
            "the tokenizer that made them"
        )

    def index(self, composer: Composer) -> "MegatronDocuments":
        return self._index(composer, MegatronDocuments)

    def _index(self, composer: Composer, make: type[D]) -> D:
        described = [_description(pair.prefix) for pair in self.pairs]
        note = ""
        for pair, description in zip(self.pairs, described, strict=True):
            if description:
                self._check_description(pair, description, composer.tokenizer)
            else:
                note = self.check_tokens(pair, composer.tokenizer) or note
        try:
            hashes = _Hashes.of(self.pairs)
        except ValueError as error:
            raise self._damaged(error) from error
        index = f"megatron-{self.key}"
        values = [[self._column(pair, name) for name in self.columns] for pair in self.pairs]
        return make(self, composer, hashes, [], values, index=index, note=note)

    def _column(self, pair: IndexedTokens, name: str) -> npt.NDArray[Any]:
        path = column_path(pair.prefix, name)
        try:
            values = map_array(path, self.columns[name])
            if len(values) != len(pair.tokens):
                raise ValueError(f"{len(values):,} values for {len(pair.tokens):,} tokens")
        except (OSError, ValueError) as error:
            raise PretrainError(
                f"{self.setting}.path: {path}: {reason(error)}: copy the files again, or convert "
                "the conversations again"
            ) from error
        return values

    def _check_description(
        self, pair: IndexedTokens, description: dict[str, Any], tokenizer: Tokenizer
    ) -> None:
        """Check a file of ``pretrain data``."""
        if description["columns"] != ["tokens", *self.columns]:
            found, type = "text", "megatron"
            if not self.columns:
                found, type = "conversations, of which some tokens are not learned", "megatron_chat"
            raise PretrainError(
                f"{self.setting}.type: {pair.prefix}.bin has {found}: set it to {type}"
            )
        if description["tokenizer"] != tokenizer.digest:
            raise self._other_tokenizer(pair, "was made with another tokenizer", tokenizer)

    def check_tokens(self, pair: IndexedTokens, tokenizer: Tokenizer) -> str:
        """Check a sample of the tokens, which do not name their tokenizer; returns a note."""
        documents = [tokens for tokens in _sample(pair) if len(tokens)]
        if not documents:
            return ""
        ids = np.concatenate([tokens[:_SAMPLED_TOKENS] for tokens in documents]).astype(np.int64)
        for token in (ids.min(), ids.max()):
            if not 0 <= token < tokenizer.vocab_size:
                why = f"has the token {token}, but there are {tokenizer.vocab_size:,}"
                raise self._other_tokenizer(pair, why, tokenizer)
        last = {int(tokens[-1]) for tokens in documents}
        if tokenizer.eos in last:
            return ""
        alike = len(last) == 1 and len(documents) >= _ENOUGH
        text = alike and tokenizer.decode(last).endswith(_TEXT_ENDS)
        if alike and not text and not tokenizer.is_special(*last):
            why = (
                f"has documents that all end with the token {last.pop()}, not with {tokenizer.eos}"
            )
            raise self._other_tokenizer(pair, why, tokenizer)
        end = tokenizer.name_of(tokenizer.eos)
        return (
            f"{self.setting}: the documents of {pair.prefix}.bin do not end with {end}, so the "
            "model does not learn where documents end (Megatron's --append-eod)"
        )

    def _other_tokenizer(
        self, pair: IndexedTokens, why: str, tokenizer: Tokenizer
    ) -> PretrainError:
        return PretrainError(
            f"{self.setting}.path: {pair.prefix}.bin {why} in {tokenizer.name}: set data.tokenizer "
            "to the tokenizer that made the file, or tokenize its text again"
        )


class MegatronChatSource(MegatronSource):
    """Conversations as ``pretrain data`` writes them, with a weight of each token."""

    is_chat = True
    columns = chat.COLUMNS

    def index(self, composer: Composer) -> "MegatronChatDocuments":
        composer.tokenizer.require_chat()
        return self._index(composer, MegatronChatDocuments)

    def check_tokens(self, pair: IndexedTokens, tokenizer: Tokenizer) -> NoReturn:
        raise PretrainError(
            f"{self.setting}.path: {pair.prefix}.bin is not of `data convert` or `data tokenize`, "
            "which say what of a conversation is learned: convert the conversations again"
        )


def _prefixes(path: str, setting: str) -> list[Path]:
    """The files of a source without their suffixes, sorted.

    Raises:
        PretrainError: there are none, or one of a pair is missing.
    """
    root = Path(path)
    if root.suffix in _SUFFIXES:
        root = root.with_suffix("")
    if bin_path(root).exists() or idx_path(root).exists():
        found = {bin_path(root), idx_path(root)}
        prefixes = [root]
    else:
        items = files.find(path, setting, _SUFFIXES, "files of tokens (.bin with .idx)")
        found = {item for item in items if isinstance(item, Path) and item.suffix in _SUFFIXES}
        prefixes = sorted({item.with_suffix("") for item in found})
    for prefix in prefixes:
        data, index = bin_path(prefix), idx_path(prefix)
        for there, missing in ((data, index), (index, data)):
            if not missing.exists():
                raise PretrainError(
                    f"{setting}.path: {there} exists, but {missing.name} does not: copy it, too, "
                    "or make both again"
                )
    if not prefixes:
        raise PretrainError(f"{setting}.path: no files of tokens (.bin with .idx) match {path}")
    return prefixes


def _description(prefix: Path) -> dict[str, Any] | None:
    """The description that ``pretrain data`` writes; None of other files."""
    try:
        description = json.loads(column_path(prefix, DESCRIPTION).read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(description, dict) and {"tokenizer", "columns"} <= set(description)
    return description if known else None


def has_conversations(prefix: Path) -> bool:
    """Whether ``pretrain data`` wrote conversations as a pair of files."""
    description = _description(prefix)
    return description is not None and description["columns"] != ["tokens"]


def _sample(pair: IndexedTokens) -> Iterator[npt.NDArray[Any]]:
    """Documents at equal distances."""
    for number in np.linspace(0, len(pair) - 1, min(len(pair), _SAMPLED_DOCUMENTS), dtype=int):
        yield pair.tokens[pair.extent(int(number))]


# ---------------------------------------------------------------------- documents


@dataclass(frozen=True)
class _Hashes:
    """A hash of each document of several pairs, of which only those are in memory that are read.

    Documents of ``pretrain data tokenize`` have hashes of their content in a file. Those of others
    are hashes of the document's number and a number for each pair.

    Attributes:
        firsts: int64 [pairs + 1], number of documents before each pair.
        parts: for each pair, uint64 [documents], mapped into memory; or the pair's number.
    """

    firsts: Integers
    parts: Sequence[Words | int]

    @classmethod
    def of(cls, pairs: Sequence[IndexedTokens]) -> "_Hashes":
        firsts = np.cumsum([0, *map(len, pairs)])
        return cls(firsts, [_content_hashes(pair) for pair in pairs])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, numbers: slice) -> Words:
        start, stop, _ = numbers.indices(len(self))
        pieces = [np.empty(0, np.uint64)]
        for part, first, after in zip(self.parts, self.firsts[:-1], self.firsts[1:], strict=True):
            low, high = max(start - first, 0), min(stop, after) - first
            if low < high:
                if isinstance(part, int):
                    pieces.append(mixed(np.arange(low, high, dtype=np.uint64) + np.uint64(part)))
                else:
                    pieces.append(part[low:high])
        return np.concatenate(pieces)


def _content_hashes(pair: IndexedTokens) -> Words | int:
    """The hashes of a pair's documents, or a number that depends on the pair's content.

    Raises:
        ValueError: there are not as many hashes as documents. With numbers in their place, others
            would be held out.
    """
    path = column_path(pair.prefix, HASHES)
    if path.exists() and _description(pair.prefix):
        size, expected = path.stat().st_size, np.dtype(np.uint64).itemsize * len(pair)
        if size != expected:
            raise ValueError(f"{path} has {size:,} bytes instead of {expected:,}")
        return map_array(path, np.uint64)
    digest = hashlib.blake2b(digest_size=8)
    for array in (pair.lengths[:: max(1, len(pair) // _SAMPLED_TOKENS)], *_sample(pair)):
        digest.update(array[:_SAMPLED_TOKENS].tobytes())
    return int.from_bytes(digest.digest(), "big")


@dataclass(frozen=True)
class MegatronDocuments(IndexedDocuments):
    """Documents of text in one or more pairs of files, in the order of the files' names.

    Attributes:
        hashes: documents with small ones are held out.
        values: for each pair, its columns.
        note: a remark for the user.
    """

    whole: ClassVar[bool] = False
    source: MegatronSource
    hashes: _Hashes
    values: Sequence[Sequence[npt.NDArray[Any]]]
    note: str = field(kw_only=True, default="")

    @cached_property
    def _firsts(self) -> Integers:
        return np.cumsum([0, *map(len, self.source.pairs)])

    def _pairs(self, numbers: Integers) -> Integers:
        """The pair of each document."""
        return np.searchsorted(self._firsts, numbers, side="right") - 1

    def _place(self, number: int) -> tuple[int, int]:
        """The pair of a document, and its number in it."""
        pair = int(self._pairs(np.array(number)))
        return pair, number - int(self._firsts[pair])

    def sizes_of(self, numbers: Integers) -> tuple[Integers, Integers]:
        sizes, pairs = np.zeros_like(numbers), self._pairs(numbers)
        for pair in np.unique(pairs):
            chosen = pairs == pair
            tokens = self.source.pairs[pair]
            start, stop = tokens.extents(numbers[chosen] - self._firsts[pair])
            if not np.all((start >= 0) & (start <= stop) & (stop <= len(tokens.tokens))):
                raise PretrainError(
                    f"{self.source.setting}.path: {idx_path(tokens.prefix)} is damaged: it has "
                    "documents outside of the tokens: copy the files again, or make them again"
                )
            sizes[chosen] = stop - start
        return sizes, np.zeros_like(numbers)

    @property
    def identity(self) -> Sequence[Column]:
        """Hashes of the content; of other files, the lengths and a digest of a sample of tokens."""
        arrays: list[Column] = []
        for pair, hashes in zip(self.source.pairs, self.hashes.parts, strict=True):
            if isinstance(hashes, int):
                arrays += [pair.lengths, np.array([hashes], np.uint64)]
            else:
                arrays.append(hashes)
        return arrays

    def content(self, number: int) -> npt.NDArray[Any]:
        place, inside = self._place(number)
        pair = self.source.pairs[place]
        tokens = pair.tokens[pair.extent(inside)]
        return tokens[1:] if len(tokens) and tokens[0] == self.composer.tokenizer.bos else tokens

    def document(self, segment: Segment, *, pixels: bool = True) -> Document | Skip:
        """A range of a document, without the token with which every :class:`Document` begins."""
        place, number = self._place(segment.number)
        pair = self.source.pairs[place]
        tokenizer, first = self.composer.tokenizer, pair.extent(number).start
        tokens = pair.tokens[first + segment.start : first + segment.stop]
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
            return Skip(f"{pair.prefix}.bin: document {number}", "has tokens of another tokenizer")
        if np.any(tokens == tokenizer.media_pad):
            why = "has placeholders of images without the images"
            return Skip(f"{pair.prefix}.bin: document {number}", why)
        if segment.start == 0 and len(tokens) and tokens[0] == tokenizer.bos != tokenizer.eos:
            tokens = tokens[1:]
        return Document(tokenizer).add_tokens(tokens)


@dataclass(frozen=True)
class MegatronChatDocuments(MegatronDocuments):
    """Conversations, which are never cut."""

    whole: ClassVar[bool] = True

    def content(self, number: int) -> npt.NDArray[Any]:
        place, inside = self._place(number)
        pair = self.source.pairs[place]
        return pair.tokens[pair.extent(inside)]

    def document(self, segment: Segment, *, pixels: bool = True) -> Document | Skip:
        found = super().document(segment, pixels=pixels)
        if isinstance(found, Skip):
            return found
        place, number = self._place(segment.number)
        pair = self.source.pairs[place]
        extent = pair.extent(number)
        columns = (pair.tokens, *self.values[place])
        return Document(found.tokenizer, *(column[extent].tolist() for column in columns))
