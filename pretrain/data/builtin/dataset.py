"""The built-in data: a cached corpus, and sequences generated from it."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.config import DataConfig
from pretrain.data import packing
from pretrain.data.builtin import drawing
from pretrain.data.builtin.standard_library import (
    TextFile,
    caption_split,
    distinct_words,
    prose_lines,
    read_corpus,
)
from pretrain.data.cache import cached
from pretrain.data.interface import SPLITS, Data, Split
from pretrain.data.media.patches import VisionItem
from pretrain.data.packing import Document, PackedSample
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from pretrain.model.geometry import num_tokens

# Part of the cache's key and of the fingerprint: increase it when the format of the cached files
# changes, or the sequences that are generated from them.
_FORMAT = 5
_MAX_IMAGES_PER_DOCUMENT = 3
_MAX_TEXT_BEFORE_IMAGE = 12
# Draws in a row without a new caption after which the captions are taken to be exhausted.
_MAX_FAILED_DRAWS = 300


@dataclass(frozen=True)
class Corpus:
    """The corpus of one split.

    Attributes:
        tokens: the text of all files, each ended by EOS.
        lines: lines of prose, the captions of images.
    """

    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
    lines: list[str]


@dataclass(frozen=True)
class BuiltIn(Data):
    """The built-in data; sequences are functions of (seed, split, index).

    Attributes:
        key: digest of the text, the tokenizer and the version of the drawing.
    """

    config: DataConfig
    patch_size: int
    seed: int
    tokenizer: Tokenizer
    corpora: dict[Split, Corpus]
    key: str

    @property
    def has_images(self) -> bool:
        return self.config.vision_share > 0

    @property
    def fingerprint(self) -> str:
        return self.key

    def sample(self, split: Split, index: int) -> PackedSample:
        """Packed sequence number ``index`` of an infinite supply.

        Text documents in a row, and vision documents before and after them: images between text,
        each followed by its caption. On average, a share of ``vision_share`` of the tokens are
        image placeholders.
        """
        rng = self._rng(split, 0, index)
        length = self.config.seq_length
        items = self._draw_items(split, rng)
        # Each image needs its tokens, begin, end, caption, newline and possibly a BOS. The rest of
        # the sequence may be text before the images.
        needed = sum(
            self._num_tokens(item) + len(self.tokenizer.encode(item.caption)) + 4 for item in items
        )
        spare = (length - needed) // max(1, len(items))
        most_text = min(max(spare, 0), _MAX_TEXT_BEFORE_IMAGE)

        documents: list[Document] = []
        room = length
        for group in self._group(items, rng):
            document = Document(self.tokenizer)
            for item in group:
                before = self._text(split, int(rng.integers(most_text + 1)), rng)
                document.add_tokens(before[before != self.tokenizer.eos])
                document.add_image(item, self.patch_size).add_caption(item.caption)
            if len(document) <= room:
                documents.append(document)
                room -= len(document)
        place = int(rng.integers(len(documents) + 1))
        while room > 1:
            text = Document(self.tokenizer).add_tokens(self._text(split, room - 1, rng))
            documents.insert(place, text)
            room -= len(text)
        return packing.join(documents, length, self.patch_size, self.tokenizer.pad)

    def captioned_items(self, split: Split, count: int) -> list[VisionItem]:
        """Up to ``count`` images that fit a sequence, with distinct captions; always the same."""
        items: dict[str, VisionItem] = {}
        failed = 0
        for index in itertools.count():
            if len(items) == count or failed == _MAX_FAILED_DRAWS:
                break
            item = self._draw(split, self._rng(split, 1, index))
            failed += 1
            if item.caption not in items and self._fits(item):
                items[item.caption], failed = item, 0
        return list(items.values())

    def state_dict(self, step: int) -> dict[str, Any]:
        return {"fingerprint": self.key}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        # Until the fonts were those of matplotlib, checkpoints had no fingerprint.
        saved = states[0].get("fingerprint", "" if self.has_images else self.key)
        if saved != self.key:
            raise PretrainError(
                "the built-in data is not that of the checkpoint, which was made with another "
                "Python or an earlier version of this project: resume with that one, or start "
                "another run with start_from"
            )

    def require_images_that_fit(self) -> None:
        """
        Raises:
            PretrainError: images are configured, and no drawn image fits a sequence, or a split has
                no words of the configured length.
        """
        if self.has_images and not all(self.captioned_items(split, 1) for split in SPLITS):
            options = self.config.images
            raise PretrainError(
                f"no image of text fits data.seq_length={self.config.seq_length}: raise it, lower "
                f"data.images.max_font_size={options.max_font_size} or data.images.max_chars="
                f"{options.max_chars}, or raise vision.patch_size={self.patch_size}"
            )

    @cached_property
    def _caption_texts(self) -> dict[Split, list[str]]:
        """The texts of each split that captions are drawn from: lines of prose, or single words."""
        single = self.config.images.max_words == 1
        return {
            split: distinct_words(corpus.lines) if single else corpus.lines
            for split, corpus in self.corpora.items()
        }

    def _fits(self, item: VisionItem) -> bool:
        # The cheap test first: some images are far too large.
        length = self.config.seq_length
        return self._num_tokens(item) < length and (
            len(self.question(item).add_caption(item.caption)) <= length
        )

    def _rng(self, split: Split, purpose: int, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(split), purpose, index])

    def _num_tokens(self, item: VisionItem) -> int:
        frames, height, width, _ = item.pixels.shape
        return int(num_tokens((frames, height // self.patch_size, width // self.patch_size)))

    def _draw(self, split: Split, rng: np.random.Generator) -> VisionItem:
        options = self.config.images
        pick, texts = drawing.pick_caption, self._caption_texts[split]
        if split == "train" and rng.random() < options.pieces_share:
            pick, texts = drawing.pick_piece, self.corpora[split].lines
        caption = pick(texts, options, rng, lambda text: caption_split(text) == split)
        return drawing.draw(caption, options, self.patch_size, rng)

    def _draw_items(self, split: Split, rng: np.random.Generator) -> list[VisionItem]:
        """Draw images until their tokens reach the sequence's share.

        The last one, which would exceed it, is kept with the probability that makes the average
        equal to the share.
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

    def _text(self, split: Split, length: int, rng: np.random.Generator) -> npt.NDArray[Any]:
        """``length`` tokens of one file from a random start; fewer, ended by EOS, near its end."""
        tokens = self.corpora[split].tokens
        start = int(rng.integers(len(tokens) - length))
        chunk = tokens[start : start + length]
        ends = np.flatnonzero(chunk == self.tokenizer.eos)
        return chunk[: ends[0] + 1] if len(ends) else chunk


def open_builtin(config: DataConfig, patch_size: int, seed: int) -> BuiltIn:
    """Open the built-in data: its tokenizer and tokens come from the cache, and are made first if
    they are missing.

    Raises:
        PretrainError: this machine has no corpus, or no image fits a sequence.
    """
    tokenizer = Tokenizer.load(Path(config.tokenizer)) if config.tokenizer else None
    if tokenizer:
        tokenizer.require_media()
    files = read_corpus(int(config.max_corpus_mb * 1e6))
    digest = hashlib.sha256(
        f"{_FORMAT} {tokenizer.digest if tokenizer else config.vocab_size}".encode()
    )
    for file in files:
        digest.update(f"{file.name}\0{file.text}\0".encode())

    def build(folder: Path) -> None:
        _build(folder, files, config.vocab_size, tokenizer)

    key = digest.hexdigest()[:16]
    (loaded_tokenizer, corpora), _ = cached(Path(config.cache_dir) / key, build, _load)
    data = BuiltIn(config, patch_size, seed, loaded_tokenizer, corpora, key)
    data.require_images_that_fit()
    return data


def _build(
    folder: Path, files: list[TextFile], vocab_size: int, tokenizer: Tokenizer | None
) -> None:
    """Write the tokenizer and the corpus of each split into an empty folder."""
    tokenizer = tokenizer or Tokenizer.train(
        (file.text for file in files if file.split == "train"), vocab_size
    )
    tokenizer.save(folder / "tokenizer.json")
    trained_on: set[str] = set()
    for split in SPLITS:
        chosen = [file for file in files if file.split == split]
        encoded = tokenizer.encode_many([file.text for file in chosen])
        tokens = [array for file in encoded for array in (file, [tokenizer.eos])]
        np.save(folder / f"{split}.npy", np.concatenate(tokens).astype(tokenizer.dtype))
        # Lines that are also in a training file are not held out.
        lines = [line for file in chosen for line in prose_lines(file)]
        lines = [line for line in dict.fromkeys(lines) if line not in trained_on]
        trained_on.update(lines)
        (folder / f"{split}.json").write_text(json.dumps(lines))


def _load(folder: Path) -> tuple[Tokenizer, dict[Split, Corpus]]:
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    corpora = {}
    for split in SPLITS:
        tokens = np.load(folder / f"{split}.npy")
        lines = json.loads((folder / f"{split}.json").read_text())
        if tokens.dtype != tokenizer.dtype or tokens.ndim != 1 or not lines:
            raise ValueError(f"the files of {split} do not match")
        corpora[split] = Corpus(tokens, lines)
    return tokenizer, corpora
