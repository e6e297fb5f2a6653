"""Documents of text and images, and packing them into sequences of one length."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from pretrain.data.media.patches import VisionItem, patchify
from pretrain.data.tokenizer import Tokenizer
from pretrain.model.geometry import num_tokens

# What a label is.
NOTHING, TEXT, CAPTION = 0, 1, 2


@dataclass
class Document:
    """Text and images in reading order; it begins with the token that begins a document.

    Attributes:
        tokenizer: says which ids stand for images.
        tokens: ids, an image being its placeholders between begin and end.
        kinds: for each token, what it is as a label: NOTHING for what stands for an image.
        patches, grids: of each image; see :func:`pretrain.data.media.patches.patchify`.
    """

    tokenizer: Tokenizer
    tokens: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    patches: list[Tensor] = field(default_factory=list)
    grids: list[tuple[int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.tokens:
            self.add_tokens([self.tokenizer.bos], NOTHING)

    def __len__(self) -> int:
        return len(self.tokens)

    def add_tokens(self, tokens: Iterable[int], kind: int = TEXT) -> "Document":
        before = len(self.tokens)
        self.tokens.extend(int(token) for token in tokens)
        self.kinds.extend([kind] * (len(self.tokens) - before))
        return self

    def add_image(self, item: VisionItem, patch_size: int) -> "Document":
        patches, grid = patchify(item.pixels, patch_size)
        self.patches.append(torch.from_numpy(patches))
        self.grids.append(grid)
        ids = self.tokenizer
        placeholders = [ids.media_pad] * num_tokens(grid)
        return self.add_tokens([ids.media_begin, *placeholders, ids.media_end], NOTHING)

    def add_caption(self, caption: str) -> "Document":
        """The text in the image, ended by a newline."""
        return self.add_tokens([*self.tokenizer.encode(caption), self.tokenizer.newline], CAPTION)


@dataclass(frozen=True)
class PackedSample:
    """One sequence of packed documents.

    Attributes:
        tokens: int64 [s].
        labels: int64 [s], the next token of the same document; 0 where the kind is NOTHING.
        kinds: uint8 [s], what each label is: NOTHING, TEXT or CAPTION.
        documents: int32 [s], the number of each token's document in this sequence.
        patches: uint8 [P, 3 * patch * patch], of all images in order.
        grids: int64 [n, 3], (frames, rows, columns) of each image, in patches.
    """

    tokens: Tensor
    labels: Tensor
    kinds: Tensor
    documents: Tensor
    patches: Tensor
    grids: Tensor

    def without_labels(self) -> "PackedSample":
        """The same sequence, in which nothing counts."""
        return replace(self, labels=self.labels * 0, kinds=self.kinds * 0)


def join(documents: Sequence[Document], length: int, patch_size: int, pad: int) -> PackedSample:
    """One sequence of documents one after the other, filled up with ``pad`` at the end.

    Raises:
        ValueError: the documents are longer than the sequence.
    """
    total = sum(len(document) for document in documents)
    if total > length:
        raise ValueError(f"documents of {total} tokens do not fit a sequence of {length}")
    tokens = np.full(length, pad, dtype=np.int64)
    kinds = np.zeros(length, dtype=np.uint8)
    numbers = np.full(length, len(documents), dtype=np.int32)
    position = 0
    for number, document in enumerate(documents):
        end = position + len(document)
        tokens[position:end] = document.tokens
        numbers[position:end] = number
        # A label is the next token: what stands first in a document is nobody's.
        kinds[position : end - 1] = document.kinds[1:]
        position = end
    labels = np.zeros(length, dtype=np.int64)
    labels[:-1] = tokens[1:]
    labels[kinds == NOTHING] = 0
    images = [patches for document in documents for patches in document.patches]
    grids = [grid for document in documents for grid in document.grids]
    return PackedSample(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        kinds=torch.from_numpy(kinds),
        documents=torch.from_numpy(numbers),
        patches=torch.cat([torch.empty(0, 3 * patch_size**2, dtype=torch.uint8), *images]),
        grids=torch.tensor(grids, dtype=torch.int64).view(-1, 3),
    )


def pack(
    documents: Iterable[Document], length: int, patch_size: int, pad: int
) -> list[PackedSample]:
    """Sequences of whole documents, in order, each as full as the next document lets it be.

    Raises:
        ValueError: a document is longer than a sequence.
    """
    samples: list[PackedSample] = []
    waiting: list[Document] = []
    for document in documents:
        if waiting and sum(map(len, waiting)) + len(document) > length:
            samples.append(join(waiting, length, patch_size, pad))
            waiting = []
        waiting.append(document)
    if waiting:
        samples.append(join(waiting, length, patch_size, pad))
    return samples
