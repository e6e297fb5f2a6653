"""The data of a run: what is cached of it, and sequences made from it on the fly."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pretrain.config import DataConfig
from pretrain.data import images, packing
from pretrain.data.images import VisionItem
from pretrain.data.packing import Document, PackedSample
from pretrain.data.text import SPLITS, Split, TextFile, prose_lines, read_corpus
from pretrain.data.tokenizer import EOS, Tokenizer

logger = logging.getLogger(__name__)

# Part of the cache's key: to be raised when what is cached changes.
_FORMAT = 2
_MAX_IMAGES_PER_DOCUMENT = 3
_MAX_TEXT_BEFORE_IMAGE = 12


@dataclass(frozen=True)
class Corpus:
    """One split: its text as tokens, each file ended by EOS, and its lines of prose."""

    tokens: npt.NDArray[np.uint16]
    lines: list[str]


@dataclass(frozen=True)
class Data:
    """Tokenizer and splits; sequences are functions of (seed, split, index) alone."""

    config: DataConfig
    patch_size: int
    seed: int
    tokenizer: Tokenizer
    corpora: dict[Split, Corpus]

    def sample(self, split: Split, index: int) -> PackedSample:
        """Packed sequence number ``index`` of an endless supply.

        One text document, and vision documents before and after it: images between text, each
        followed by its caption. Over sequences, placeholders make up ``vision_share`` of tokens.
        """
        rng = self._rng(split, 0, index)
        length = self.config.seq_length
        items = self._draw_items(split, rng)
        # An image is its tokens, begin, end, caption, newline, and at worst a document's BOS; what
        # is left over may be text before the images.
        needed = sum(
            self._num_tokens(item) + len(self.tokenizer.encode(item.caption)) + 4 for item in items
        )
        spare = (length - needed) // max(1, len(items))
        most_text = min(max(spare, 0), _MAX_TEXT_BEFORE_IMAGE)

        documents: list[Document] = []
        room = length
        for group in self._group(items, rng):
            document = Document()
            for item in group:
                before = self._text(split, int(rng.integers(most_text + 1)), rng)
                document.add_tokens(before[before != EOS])
                document.add_image(item, self.patch_size).add_caption(item.caption, self.tokenizer)
            if len(document) <= room:
                documents.append(document)
                room -= len(document)
        place = int(rng.integers(len(documents) + 1))
        while room > 1:
            text = Document().add_tokens(self._text(split, room - 1, rng))
            documents.insert(place, text)
            room -= len(text)
        return packing.join(documents, length, self.patch_size)

    def captioned_items(self, split: Split, count: int) -> list[VisionItem]:
        """``count`` single images, no caption twice; the same ones every time."""
        items: dict[str, VisionItem] = {}
        for index in range(100 * count):
            if len(items) == count:
                break
            item = self._draw(split, self._rng(split, 1, index))
            items.setdefault(item.caption, item)
        if len(items) < count:
            raise ValueError(f"{split} has fewer than {count} different captions")
        return list(items.values())

    def question(self, item: VisionItem) -> Document:
        """A document that ends where the item's caption would begin."""
        return Document().add_image(item, self.patch_size)

    def caption_documents(self, split: Split, count: int) -> tuple[list[Document], list[Document]]:
        """The same captions, after the image they are of, and after another one's."""
        items = self.captioned_items(split, count)
        swapped = [*items[1:], items[0]]
        right, wrong = (
            [
                self.question(shown).add_caption(item.caption, self.tokenizer)
                for item, shown in zip(items, others, strict=True)
            ]
            for others in (items, swapped)
        )
        return right, wrong

    def pack(self, documents: Sequence[Document], length: int) -> list[PackedSample]:
        """Sequences of ``length`` made of whole documents, in order."""
        return packing.pack(documents, length, self.patch_size)

    def _rng(self, split: Split, purpose: int, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(split), purpose, index])

    def _num_tokens(self, item: VisionItem) -> int:
        frames, height, width, _ = item.pixels.shape
        return images.num_tokens((frames, height // self.patch_size, width // self.patch_size))

    def _draw(self, split: Split, rng: np.random.Generator) -> VisionItem:
        options = self.config.images
        caption = images.pick_caption(self.corpora[split].lines, options, rng)
        return images.draw(caption, options, self.patch_size, rng)

    def _draw_items(self, split: Split, rng: np.random.Generator) -> list[VisionItem]:
        """Items whose tokens are on average exactly the sequence's share.

        The one that oversteps the share is kept with the probability that makes it so.
        """
        left = self.config.seq_length * self.config.vision_share
        items: list[VisionItem] = []
        while left > 0:
            item = self._draw(split, rng)
            size = self._num_tokens(item)
            if size > left and rng.random() * size > left:
                break
            items.append(item)
            left -= size
        return items

    def _group(self, items: list[VisionItem], rng: np.random.Generator) -> list[list[VisionItem]]:
        groups = []
        while items:
            count = int(rng.integers(1, _MAX_IMAGES_PER_DOCUMENT + 1))
            groups.append(items[:count])
            items = items[count:]
        return groups

    def _text(self, split: Split, length: int, rng: np.random.Generator) -> npt.NDArray[np.uint16]:
        """``length`` tokens of one file from anywhere in it; fewer, ended by EOS, at its end."""
        tokens = self.corpora[split].tokens
        start = int(rng.integers(len(tokens) - length))
        chunk = tokens[start : start + length]
        ends = np.flatnonzero(chunk == EOS)
        return chunk[: ends[0] + 1] if len(ends) else chunk


def prepare(config: DataConfig, patch_size: int, seed: int) -> Data:
    """Train the tokenizer and tokenize the text, or take both from the cache.

    Raises:
        PretrainError: there is no corpus on this machine.
    """
    files = read_corpus(int(config.max_corpus_mb * 1e6))
    digest = hashlib.sha256(f"{_FORMAT} {config.vocab_size}".encode())
    for file in files:
        digest.update(f"{file.name}\0{file.text}\0".encode())
    folder = Path(config.cache_dir) / digest.hexdigest()[:16]
    make = partial(Data, config, patch_size, seed)
    if folder.is_dir():
        try:
            return make(*_load(folder))
        except Exception as error:  # a damaged cache costs seconds; it must not cost the run
            logger.warning("rebuilding the damaged cache %s (%s)", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    _build(folder, files, config.vocab_size)
    return make(*_load(folder))


def _build(folder: Path, files: list[TextFile], vocab_size: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made aside and renamed: whoever else builds it too, or is killed, leaves nothing half-made.
    partial_folder = Path(tempfile.mkdtemp(dir=folder.parent, prefix="partial-"))
    tokenizer = Tokenizer.train((file.text for file in files if file.split == "train"), vocab_size)
    tokenizer.save(partial_folder / "tokenizer.json")
    trained_on: set[str] = set()
    for split in SPLITS:
        chosen = [file for file in files if file.split == split]
        encoded = tokenizer.encode_many([file.text for file in chosen])
        parts = [part for one in encoded for part in (one, [EOS])]
        np.save(partial_folder / f"{split}.npy", np.concatenate(parts).astype(np.uint16))
        # A line that also stands in a training file is nothing new to read.
        lines = [line for file in chosen for line in prose_lines(file)]
        lines = [line for line in dict.fromkeys(lines) if line not in trained_on]
        trained_on.update(lines)
        (partial_folder / f"{split}.json").write_text(json.dumps(lines))
    try:
        os.rename(partial_folder, folder)
    except OSError:
        shutil.rmtree(partial_folder)
        if not folder.is_dir():
            raise


def _load(folder: Path) -> tuple[Tokenizer, dict[Split, Corpus]]:
    corpora = {}
    for split in SPLITS:
        tokens = np.load(folder / f"{split}.npy")
        lines = json.loads((folder / f"{split}.json").read_text())
        if tokens.dtype != np.uint16 or tokens.ndim != 1 or not lines:
            raise ValueError(f"{split} is not what was written")
        corpora[split] = Corpus(tokens, lines)
    return Tokenizer.load(folder / "tokenizer.json"), corpora
