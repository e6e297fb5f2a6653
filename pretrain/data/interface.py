"""The interface between the trainer and its data."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.config import DataConfig
from pretrain.data import packing
from pretrain.data.builtin.standard_library import Split
from pretrain.data.media.patches import VisionItem
from pretrain.data.packing import Document, PackedSample
from pretrain.data.skipped import Skip
from pretrain.data.tokenizer import Tokenizer


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
    """Packed sequences of a training and a held-out split, and captions to test sight with."""

    config: DataConfig
    patch_size: int
    seed: int
    tokenizer: Tokenizer

    @abstractmethod
    def sample(self, split: Split, index: int) -> PackedSample:
        """Packed sequence number ``index`` of an endless supply."""

    @abstractmethod
    def captioned_items(self, split: Split, count: int) -> list[VisionItem]:
        """Up to ``count`` single images, no caption twice; the same ones every time."""

    @property
    def has_held_out(self) -> bool:
        """Whether there is anything to evaluate on."""
        return True

    @property
    def has_images(self) -> bool:
        """Whether there is anything to see in the training split."""
        return True

    def question(self, item: VisionItem) -> Document:
        """A document that ends where the item's caption would begin."""
        return Document(self.tokenizer).add_image(item, self.patch_size)

    def caption_documents(self, split: Split, count: int) -> tuple[list[Document], list[Document]]:
        """The same captions, after their own image, and after another caption's image.

        Pairs that do not fit a sequence are left out. Two empty lists if the data has no two
        captions.
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
        """Sequences of ``length`` made of whole documents, in order."""
        return packing.pack(documents, length, self.patch_size, self.tokenizer.pad)

    def state_dict(self, step: int) -> dict[str, Any]:
        """Where this rank's reading stands after update ``step``, in plain values.

        Empty where sequences are functions of their number alone.
        """
        return {}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from there.

        Args:
            states: of every data-parallel rank at that time, in order; a single one where they
                were all the same.

        Raises:
            PretrainError: the data has changed since, or cannot be divided among the ranks of now.
        """
        return None

    def take_skipped(self) -> list[Skip]:
        """Corrupt samples that this rank found since the last call."""
        return []

    @property
    def fingerprint(self) -> str:
        """A digest of the documents, the same on all ranks; empty for the built-in data."""
        return ""

    def describe(self) -> str:
        """Description of the sources, for people; empty for the built-in data."""
        return ""
