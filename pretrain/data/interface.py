"""The interface between the trainer and its data."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pretrain.config import DataConfig
from pretrain.data import packing, skipped
from pretrain.data.media.patches import VisionItem
from pretrain.data.packing import Document, PackedSample, Question
from pretrain.data.skipped import Skip
from pretrain.data.tokenizer import Tokenizer

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")


@dataclass(frozen=True)
class RankShare:
    """The sequences of each global batch that data-parallel rank ``rank`` of ``ranks`` reads: an
    equal, contiguous share."""

    rank: int = 0
    ranks: int = 1
    global_batch_size: int = 1

    @property
    def local_batch_size(self) -> int:
        return self.global_batch_size // self.ranks


class Data(ABC):
    """Packed sequences of a training and a held-out split, and captioned images of each."""

    config: DataConfig
    patch_size: int
    seed: int
    tokenizer: Tokenizer

    @abstractmethod
    def sample(self, split: Split, index: int) -> PackedSample:
        """Packed sequence number ``index``; there is no last one."""

    def samples(
        self,
        split: Split,
        indices: Iterable[int],
        *,
        pixels: bool = True,
        left_out: Collection[tuple[int, int]] = (),
    ) -> list[PackedSample]:
        """Several sequences; their images are decoded together.

        Args:
            pixels: False: the caller needs no patches, and images are not decoded if their sizes
                are known.
            left_out: (source, number) of documents that are left out in addition to those that
                cannot be read.
        """
        return [self.sample(split, index) for index in indices]

    @abstractmethod
    def captioned_items(self, split: Split, count: int) -> list[VisionItem]:
        """Up to ``count`` single images with different captions, the same ones in every call."""

    @property
    def has_held_out(self) -> bool:
        """Whether the held-out split has documents."""
        return True

    @property
    def has_images(self) -> bool:
        """Whether the training split has images."""
        return True

    @property
    def image_share(self) -> float | None:
        """Share of the tokens of the training split, without padding, that are image placeholders;
        None if it is unknown before reading."""
        return self.config.vision_share

    def question(self, item: VisionItem) -> Document:
        """A document of the item's image alone, to be continued by its caption."""
        return Document(self.tokenizer).add_image(item, self.patch_size)

    def questions(self, split: Split, count: int) -> list[Question]:
        """Up to ``count`` questions about images: their captions, or replies in conversations."""
        end = self.tokenizer.newline
        return [
            Question(self.question(item), item.caption, end, item.pixels[0])
            for item in self.captioned_items(split, count)
        ]

    def caption_documents(self, split: Split, count: int) -> tuple[list[Document], list[Document]]:
        """Captions after their own image, and the same captions after the image of another one.

        Captions that do not fit a sequence with either image are left out. Both lists are empty if
        the data has fewer than two captions.
        """
        items = self.captioned_items(split, count)
        if len(items) < 2:
            return [], []
        swapped = [*items[1:], items[0]]
        pairs = [
            [self.question(shown).add_caption(item.caption) for shown in (item, other)]
            for item, other in zip(items, swapped, strict=True)
        ]
        fitting = [pair for pair in pairs if max(map(len, pair)) <= self.config.seq_length]
        return [right for right, _ in fitting], [wrong for _, wrong in fitting]

    def pack(self, documents: Sequence[Document], length: int) -> list[PackedSample]:
        """Pack whole documents in order into sequences of ``length`` tokens."""
        return packing.pack(documents, length, self.patch_size, self.tokenizer.pad)

    def state_dict(self, step: int) -> dict[str, Any]:
        """This rank's position in the data after step ``step``, in plain values.

        Empty if sequences are functions of their number alone.
        """
        return {}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the position that :meth:`state_dict` returned.

        Args:
            states: the state of every data-parallel rank in order; or a single one if all were
                equal.

        Raises:
            PretrainError: the documents have changed since, or cannot be divided among the current
                number of ranks.
        """
        return None

    def take_skipped(self) -> list[Skip]:
        """Documents that this rank has skipped since the last call."""
        return []

    @property
    def fingerprint(self) -> str:
        """Digest of the documents, equal on all ranks."""
        return ""

    def describe(self, skipped_file: str = skipped.FILE) -> str:
        """A readable description of the sources; empty for the built-in data."""
        return ""
