"""Composing documents of text, images and video clips, and computing their sizes beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.config import DataConfig
from pretrain.data.media import frames
from pretrain.data.media.fit import Limits, fit, fitted_size, frame_groups, limits
from pretrain.data.media.frames import Media
from pretrain.data.media.patches import VisionItem
from pretrain.data.media.pixels import Pixels
from pretrain.data.packing import Document
from pretrain.data.tokenizer import Tokenizer
from pretrain.model.geometry import MERGE


@dataclass(frozen=True)
class Composer:
    """Makes documents of text and pixels, and knows beforehand how long they become.

    Attributes:
        limits: larger images and frames are shrunk.
        video_fps: frames a second that are taken of a video file.
    """

    tokenizer: Tokenizer
    patch_size: int
    limits: Limits
    video_fps: float

    @classmethod
    def of(cls, config: DataConfig, tokenizer: Tokenizer, patch_size: int) -> "Composer":
        """With a run's own settings."""
        largest = limits(config.seq_length, config.max_image_tokens)
        return cls(tokenizer, patch_size, largest, config.video_fps)

    def _max_patches(self, frames: int) -> int:
        return self.limits.image if frames == 1 else self.limits.frame

    def fit(self, pixels: Pixels, frames: int = 1) -> Pixels:
        """Frames of an image or a clip, which has so many in all."""
        return fit(
            pixels,
            self.patch_size,
            max_patches=self._max_patches(frames),
            max_side=self.limits.side,
        )

    def read(self, media: Media, shape: tuple[int, int, int]) -> Pixels:
        """Its frames, fitted.

        Args:
            shape: (frames, height, width), as :func:`pretrain.data.media.frames.measure` found it.

        Raises:
            ValueError: a file is missing, damaged or another one than when it was measured.
            PretrainError: PyAV is needed and not installed.
        """
        count, *size = shape
        fitted = []
        # One at a time: before they are shrunk, those of a film may be more than memory holds.
        for frame in frames.read(media, self.video_fps):
            if list(frame.shape[:2]) != size:
                raise ValueError(f"{media.paths[0]} has changed since its size was noted")
            fitted.append(self.fit(frame[None], count))
        if len(fitted) != count:
            raise ValueError(f"{media.paths[0]} has changed since its frames were counted")
        return np.concatenate(fitted)

    def add(self, document: Document, pixels: Pixels) -> None:
        """An image or a clip (fitted) at the document's end."""
        for group in frame_groups(len(pixels)):
            document.add_image(VisionItem(pixels[group], ""), self.patch_size)

    def document(self, parts: Sequence[str | Pixels]) -> Document:
        """Text and pixels (fitted) in order; an image and one text are a pair, with a caption."""
        document = Document(self.tokenizer)
        pair = is_pair(parts)
        for part in parts:
            if not isinstance(part, str):
                self.add(document, part)
            elif pair:
                document.add_caption(part)
            else:
                document.add_tokens(self.tokenizer.encode(part))
        return document.add_tokens([self.tokenizer.eos])

    def size(self, parts: Sequence[str | tuple[int, int, int]]) -> tuple[int, int]:
        """(tokens, placeholders among them) of the document that these would be.

        Args:
            parts: text, and (frames, height, width) of what is to be fitted.
        """
        length, placeholders = 2, 0
        pair = is_pair(parts)
        for part in parts:
            if isinstance(part, str):
                length += len(self.tokenizer.encode(part)) + pair
                continue
            frames, height, width = part
            _, (rows, columns) = fitted_size(
                height,
                width,
                self.patch_size,
                max_patches=self._max_patches(frames),
                max_side=self.limits.side,
            )
            groups = len(frame_groups(frames))
            each = (rows // self.patch_size // MERGE) * (columns // self.patch_size // MERGE)
            length += groups * (each + 2)
            placeholders += groups * each
        return length, placeholders


def is_pair(parts: Sequence[Any]) -> bool:
    """An image or a video, and then a text that is of it."""
    return len(parts) == 2 and not isinstance(parts[0], str) and isinstance(parts[1], str)
