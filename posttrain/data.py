"""The data of the pretraining: images to read, and held-out text."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from posttrain.config import Config
from pretrain import config as configuration
from pretrain.data import Data, open_data
from pretrain.data.interface import Split
from pretrain.errors import PretrainError

_MAX_WITHOUT_TEXT = 1000


@dataclass(frozen=True)
class Picture:
    """An image and the text in it."""

    image: Image.Image
    text: str


def open_pretraining_data(
    file: str, model: Path, changes: Sequence[str] = (), *, text_alone: bool = False
) -> Data:
    """Open the data of a pretraining configuration, with the tokenizer of an exported model.

    Its held-out split is the one that pretraining did not see.

    Args:
        changes: of the configuration, ``key.sub=value``.
        text_alone: leave the images of the built-in data out, which take most of the time.

    Raises:
        PretrainError: as :func:`pretrain.config.load` and :func:`pretrain.data.open_data`.
    """
    config = configuration.load(file, changes)
    data = replace(config.data, tokenizer=str(model / "tokenizer.json"))
    if text_alone and not data.sources:
        data = replace(data, vision_share=0)
    return open_data(data, config.vision.patch_size, config.seed)


def open_images(config: Config, model: Path) -> Data | None:
    """Open the data with the changes of ``rl.tasks.read.images``; None without changes."""
    changes = config.changed_images
    return open_pretraining_data(config.pretraining, model, changes) if changes else None


def pictures(data: Data, split: Split, count: int) -> list[Picture]:
    """Up to ``count`` images with different texts, always the same ones; clips are left out."""
    found: list[Picture] = []
    asked = count
    while True:
        items = data.captioned_items(split, asked)
        found = [
            Picture(Image.fromarray(item.pixels[0]), item.caption)
            for item in items
            if len(item.pixels) == 1
        ]
        if len(found) >= count or len(items) < asked:
            return found[:count]
        asked += max(1, count - len(found)) * 2


def texts(data: Data, split: Split, index: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The documents of text alone in a sequence of pretraining.

    Yields:
        Tokens, int64 [s], and the weight of each as a label, float32 [s]; the first has none.
    """
    sample = data.sample(split, index)
    for number in range(int(sample.documents.max()) + 1):
        here = sample.documents == number
        tokens, weights = sample.tokens[here], sample.weights[here]
        if not (tokens == data.tokenizer.media_pad).any() and (weights > 0).any():
            yield tokens, torch.cat([weights.new_zeros(1), weights[:-1]])


def replayed(
    data: Data, setting: str, start: int = 0, stride: int = 1
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The documents of text alone in every ``stride``-th training sequence from ``start`` on.

    The iterator has no end. It skips sequences without such a document; see :func:`texts`.

    Args:
        setting: that disables the replay, for the message.

    Raises:
        PretrainError: a thousand sequences in a row have none.
    """
    missing = 0
    for index in itertools.count(start, stride):
        if found := list(texts(data, "train", index)):
            missing = 0
            yield found
        elif (missing := missing + 1) == _MAX_WITHOUT_TEXT:
            raise PretrainError(
                f"{missing} sequences of the pretraining data have no document of text alone to "
                f"replay: add one to its data.sources, or set {setting}=0"
            )


def held_out_texts(data: Data, sequences: int) -> list[tuple[Tensor, Tensor]]:
    """The documents of text alone in the first held-out sequences; see :func:`texts`."""
    count = sequences if data.has_held_out else 0
    return [text for index in range(count) for text in texts(data, "held_out", index)]
