"""Questions about words in drawn images, as conversations."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.config import DataConfig, ImageConfig
from pretrain.data.builtin import drawing
from pretrain.data.builtin.standard_library import (
    caption_split,
    distinct_words,
    prose_lines,
    read_corpus,
)
from pretrain.data.chat import REPLY
from pretrain.data.interface import SPLITS, Split

FILE = "conversations.jsonl"
_PER_MB: dict[Split, int] = {"train": 1000, "held_out": 125}
"""Conversations of each split for each 10^6 bytes of the text that words are from."""
_PATCH = 14
_QUESTIONS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("Which word is it?", lambda word: word),
    ("How many letters?", lambda word: str(len(word))),
    ("What is the first letter?", lambda word: word[0]),
    ("What is the last letter?", lambda word: word[-1]),
)


def write(folder: Path, config: DataConfig, split: Split) -> None:
    """Write images and a file of conversations, each one image, a question and its answer.

    No word of the held-out split is in an image of the training split, nor in one of the built-in
    data for training.

    Args:
        folder: empty folder.
        config: ``images`` and ``max_corpus_mb`` apply as to the built-in data, but there are no
            clips.
    """
    options = replace(config.images, clip_share=0.0)
    corpus = read_corpus(int(config.max_corpus_mb * 1e6))
    lines = [line for file in corpus for line in prose_lines(file)]
    texts = distinct_words(lines) if options.max_words == 1 else lines
    with (folder / FILE).open("w") as file:
        for number in range(int(_PER_MB[split] * config.max_corpus_mb)):
            rng = np.random.default_rng([SPLITS.index(split), number])
            word = _word(lines, texts, options, split, rng)
            pixels = drawing.draw(word, options, _PATCH, rng).pixels
            Image.fromarray(pixels[0]).save(folder / f"{number}.png", compress_level=1)
            question, answer = _QUESTIONS[number % len(_QUESTIONS)]
            image = {"type": "image", "image": f"{number}.png"}
            messages = [
                {"role": "user", "content": [image, {"type": "text", "text": question}]},
                {"role": REPLY, "content": answer(word)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def _word(
    lines: list[str],
    texts: list[str],
    options: ImageConfig,
    split: Split,
    rng: np.random.Generator,
) -> str:
    pick, choices = drawing.pick_caption, texts
    if split == "train" and rng.random() < options.pieces_share:
        pick, choices = drawing.pick_piece, lines
    return pick(choices, options, rng, lambda text: caption_split(text) == split)
