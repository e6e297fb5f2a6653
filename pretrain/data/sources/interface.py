"""The interface between sources of data and their mixture.

A source goes through three stages:

1. :class:`Source`: its files have been found and can be read. They are not tokenized yet, since the
   tokenizer may be trained on them.
2. :class:`Documents`: its documents are tokenized or measured, divided into splits, and readable.
3. :class:`Cursor`: a position in the endless sequence of one split's documents.

A source type is a subclass of :class:`Source` (or, for files, of
:class:`~pretrain.data.sources.indexed.FileSource`) and a row in the table
:data:`pretrain.data.sources.SOURCES`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from pretrain.config import DataConfig
from pretrain.data.composer import Composer
from pretrain.data.interface import RankShare, Split
from pretrain.data.media.patches import VisionItem
from pretrain.data.packing import Document, Question
from pretrain.data.skipped import Skip
from pretrain.data.sources.order import Integers


class Record(Protocol):
    """A document as it is stored in a file, before tokenization."""

    @property
    def name(self) -> str:
        """The file, and the line or element in it."""

    @property
    def text(self) -> str:
        """All text in the document; a tokenizer can be trained on it."""

    @property
    def hash(self) -> int:
        """64 bits of its content (:func:`pretrain.data.content.content_hash`)."""


class Segment(NamedTuple):
    """A document, or a range of a text's tokens, that a source contributes to a sequence.

    Attributes:
        source: index of the source in ``data.sources``.
        number: number of the document in its source.
        start, stop: range of its tokens.
        document: the document itself, from a source that reads its documents in one pass and does
            not number them.
    """

    source: int
    number: int
    start: int = 0
    stop: int = 0
    document: Document | None = None


class Source(ABC):
    """An entry of ``data.sources``.

    Attributes:
        needs_path: whether ``path`` must be set; if not, it must be left out.
        reads_field: whether ``field`` applies.
        may_run_code: whether ``trust_code`` applies.
        may_download: whether ``media_urls`` applies.
        has_images: whether documents can contain images. They are mixed by ``data.vision_share``.
        is_chat: whether documents are conversations.
        key: digest of everything that the records depend on, part of the names in the cache.
        config: the entry.
        setting: the entry's name in messages, such as ``data.sources[0]``.

    Args:
        number: index of the entry in ``data.sources``.
        seed: decides the order of documents.

    Raises:
        PretrainError: nothing is found.
    """

    needs_path: ClassVar[bool] = True
    reads_field: ClassVar[bool] = True
    may_run_code: ClassVar[bool] = False
    may_download: ClassVar[bool] = False
    has_images: ClassVar[bool] = False
    is_chat: ClassVar[bool] = False
    key: str

    def __init__(self, number: int, data: DataConfig, seed: int) -> None:
        self.number, self.data, self.seed = number, data, seed
        self.config = data.sources[number]
        self.setting = f"data.sources[{number}]"

    @property
    def location(self) -> str:
        """Location of the data, for messages."""
        return self.config.path

    @abstractmethod
    def records(self) -> Iterator[Record | Skip]:
        """Read all documents, and list those that cannot be used.

        Raises:
            PretrainError: more than ``data.max_corrupt`` documents are corrupt.
        """

    @abstractmethod
    def open(self, composer: Composer) -> "Documents":
        """Tokenize or measure the documents, or load the result from the cache.

        Raises:
            PretrainError: no document can be used, too many are corrupt, the tokenizer lacks a
                token that they need, or the cache cannot be written.
        """


class Documents(ABC):
    """The documents of an opened source, by split.

    Attributes:
        source: the source.
        one_pass: whether training documents can only be read in order. Every rank then has a cursor
            over its share of them; otherwise all ranks follow the same order of documents.
        whole: whether documents are never cut.
        cached: whether :attr:`skips` come from the cache.
        note: a remark for the user.
    """

    one_pass: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    source: Source
    cached: bool = False
    note: str = ""

    @property
    def skips(self) -> Sequence[Skip]:
        """Documents that were left out when the source was opened."""
        return ()

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of the documents and their order, which a resumed run compares."""

    @abstractmethod
    def count(self, split: Split) -> int:
        """Number of documents in a split."""

    @abstractmethod
    def cursor(self, split: Split, share: RankShare) -> "Cursor":
        """A cursor at the first document of a split, over every ``share.ranks``-th document."""

    @abstractmethod
    def sizes_of(self, numbers: Integers) -> tuple[Integers, Integers]:
        """Tokens, and image placeholders among them, of documents; both int64 [n]."""

    @abstractmethod
    def document(self, segment: Segment, *, pixels: bool = True) -> Document | Skip:
        """The document of a segment, or the reason why it cannot be read any more.

        Called by several threads at a time if the source has images.

        Args:
            pixels: False: the caller needs no patches, and files of images are not read if the
                index has their sizes.
        """

    def pairs(self, split: Split) -> Iterator[VisionItem]:
        """Images with captions, and clips that are encoded in one piece."""
        return iter(())

    def questions(self, split: Split, longest: int) -> Iterator[Question]:
        """Questions about images in conversations.

        Args:
            longest: tokens of the longest reply, for which a sequence has room after the question.
        """
        return iter(())

    def token_counts(self, split: Split) -> tuple[int, int] | None:
        """(tokens, image placeholders among them) of a split; None if unknown before reading."""
        return None

    def take_skipped(self) -> list[Skip]:
        """Corrupt documents that cursors have met since the last call."""
        return []


class Cursor(Protocol):
    """A position in the endless sequence of a split's documents."""

    taken: int
    """Tokens taken so far."""

    @property
    def source(self) -> Source: ...

    @property
    def whole(self) -> bool:
        """Whether documents are never cut."""

    def peek(self) -> tuple[int, int]:
        """(tokens, image placeholders among them) of the next document."""

    def take(self, room: int) -> Segment | None:
        """The next document; of a document that can be cut, at most ``room`` tokens.

        Returns:
            None if the document is never cut and does not fit: it waits.
        """

    def state(self) -> dict[str, Any]:
        """The position, in plain values."""

    def restore(self, state: dict[str, Any]) -> None:
        """Move to a position that :meth:`state` returned."""
