"""Documents of text and images, packed into sequences of equal length."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from pretrain.data.media.patches import VisionItem, patchify
from pretrain.data.media.pixels import Pixels
from pretrain.data.tokenizer import Tokenizer
from pretrain.model.geometry import num_tokens


class Category(IntEnum):
    """The categories under which losses are reported (``text_loss``, ``caption_loss``).

    A new category needs one line here; metrics contain its loss from then on.
    """

    TEXT = 0
    CAPTION = 1


@dataclass
class Document:
    """Text and images in reading order, starting with the BOS token.

    Attributes:
        tokenizer: the tokenizer, which has the ids of BOS and of images.
        tokens: ids. An image is a run of placeholders between a begin and an end token.
        weights: for each token, its weight in the loss as the label of the token before it; 0: the
            model does not learn to predict it.
        categories: for each token, the :class:`Category` under which its loss is reported.
        source: index in ``data.sources`` of the source that it comes from.
        patches, grids: of each image; see :func:`pretrain.data.media.patches.patchify`. There are
            no patches in a document that was read without pixels.
    """

    tokenizer: Tokenizer
    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    categories: list[int] = field(default_factory=list)
    source: int = 0
    patches: list[Tensor] = field(default_factory=list)
    grids: list[tuple[int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.tokens:
            self.add_tokens([self.tokenizer.bos], weight=0)

    def __len__(self) -> int:
        return len(self.tokens)

    def add_tokens(
        self, tokens: Iterable[int], *, weight: float = 1, category: Category = Category.TEXT
    ) -> "Document":
        """Append tokens.

        Args:
            tokens: their ids.
            weight: the weight of each in the loss (see :mod:`pretrain.objective`).
            category: the category under which their loss is reported.

        Raises:
            ValueError: the weight is negative, or not finite in float32.
        """
        if not 0 <= weight <= np.finfo(np.float32).max:
            raise ValueError(
                f"the weight of a label must be at least 0 and finite (float32), not {weight}"
            )
        before = len(self.tokens)
        self.tokens.extend(map(int, tokens))
        added = len(self.tokens) - before
        self.weights.extend([weight] * added)
        self.categories.extend([category] * added)
        return self

    def add_image(self, item: VisionItem, patch_size: int, kind: Sequence[int] = ()) -> "Document":
        """Append an image or clip: its patches, and placeholder tokens with weight 0.

        Args:
            kind: as for :meth:`add_placeholders`.
        """
        patches, grid = patchify(item.pixels, patch_size)
        self.patches.append(torch.from_numpy(patches))
        return self.add_placeholders(grid, kind)

    def add_placeholders(self, grid: tuple[int, int, int], kind: Sequence[int] = ()) -> "Document":
        """Append the tokens of an image or clip without its patches.

        Args:
            grid: (frames, rows, columns), in patches.
            kind: tokens before the placeholders, which say what they are.
        """
        self.grids.append(grid)
        ids = self.tokenizer
        placeholders = [ids.media_pad] * num_tokens(grid)
        return self.add_tokens([ids.media_begin, *kind, *placeholders, ids.media_end], weight=0)

    def add_caption(self, caption: str) -> "Document":
        """Append the text in an image, ended by a newline."""
        tokens = [*self.tokenizer.encode(caption), self.tokenizer.newline]
        return self.add_tokens(tokens, category=Category.CAPTION)


@dataclass(frozen=True)
class Question:
    """A document with images that the model continues, and the right continuation.

    Attributes:
        prompt: the document.
        answer: a short text.
        end: the token that ends an answer.
        picture: uint8 [height, width, 3], an image in the prompt.
        text: the text of the message before a reply; empty for captions.
    """

    prompt: Document
    answer: str
    end: int
    picture: Pixels
    text: str = ""


@dataclass(frozen=True)
class PackedSample:
    """One sequence of packed documents.

    Attributes:
        tokens: int64 [s].
        labels: int64 [s], the next token of the same document; 0 where the weight is 0.
        weights: float32 [s], the weight of each label in the loss.
        categories: uint8 [s], the :class:`Category` of each label.
        documents: int32 [s], the index in this sequence of each token's document.
        sources: int16 [s], the index in ``data.sources`` of each token's source; -1: padding.
        patches: uint8 [P, 3 * patch * patch], of all images in order; none if the sequence was read
            without pixels.
        grids: int64 [n, 3], (frames, rows, columns) of each image, in patches.
        left_out: (source, number) of the documents that could not be read and are left out.
    """

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    categories: Tensor
    documents: Tensor
    sources: Tensor
    patches: Tensor
    grids: Tensor
    left_out: tuple[tuple[int, int], ...] = ()

    def without_labels(self) -> "PackedSample":
        """The same sequence with all weights 0."""
        return replace(self, labels=self.labels * 0, weights=self.weights * 0)


def join(documents: Sequence[Document], length: int, patch_size: int, pad: int) -> PackedSample:
    """Concatenate documents to one sequence, padded at the end to ``length`` with ``pad``.

    Raises:
        ValueError: the documents are longer than the sequence.
    """
    total = sum(len(document) for document in documents)
    if total > length:
        raise ValueError(f"documents of {total} tokens do not fit a sequence of {length}")
    tokens = np.full(length, pad, dtype=np.int64)
    weights = np.zeros(length, dtype=np.float32)
    categories = np.zeros(length, dtype=np.uint8)
    indices = np.full(length, len(documents), dtype=np.int32)
    sources = np.full(length, -1, dtype=np.int16)
    start = 0
    for index, document in enumerate(documents):
        end = start + len(document)
        tokens[start:end] = document.tokens
        indices[start:end] = index
        sources[start:end] = document.source
        # A label is the next token, so the first token of a document is not a label.
        weights[start : end - 1] = document.weights[1:]
        categories[start : end - 1] = document.categories[1:]
        start = end
    labels = np.zeros(length, dtype=np.int64)
    labels[:-1] = tokens[1:]
    labels[weights == 0] = 0
    images = [patches for document in documents for patches in document.patches]
    grids = [grid for document in documents for grid in document.grids]
    return PackedSample(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weights),
        categories=torch.from_numpy(categories),
        documents=torch.from_numpy(indices),
        sources=torch.from_numpy(sources),
        patches=torch.cat([torch.empty(0, 3 * patch_size**2, dtype=torch.uint8), *images]),
        grids=torch.tensor(grids, dtype=torch.int64).view(-1, 3),
    )


def pack(
    documents: Iterable[Document], length: int, patch_size: int, pad: int
) -> list[PackedSample]:
    """Pack whole documents, in order, into sequences; a new one starts where the next does not fit.

    Raises:
        ValueError: a document is longer than a sequence.
    """
    samples: list[PackedSample] = []
    group: list[Document] = []
    for document in documents:
        if group and sum(map(len, group)) + len(document) > length:
            samples.append(join(group, length, patch_size, pad))
            group = []
        group.append(document)
    if group:
        samples.append(join(group, length, patch_size, pad))
    return samples
