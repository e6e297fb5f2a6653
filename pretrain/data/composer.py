"""Composing documents of text, images and video clips, and their sizes before any pixel is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pretrain.config import DataConfig
from pretrain.data.media import frames
from pretrain.data.media.fit import Limits, fit, fitted_size, frame_groups, limits
from pretrain.data.media.frames import Media
from pretrain.data.media.patches import VisionItem
from pretrain.data.media.pixels import Pixels
from pretrain.data.packing import Document
from pretrain.data.tokenizer import Tokenizer
from pretrain.model.geometry import num_tokens

T = TypeVar("T")


@dataclass(frozen=True)
class Composer:
    """Builds documents of text and pixels, and computes their sizes.

    Attributes:
        limits: larger images and frames are shrunk to these.
        video_fps: frames per second that are sampled from a video file.
    """

    tokenizer: Tokenizer
    patch_size: int
    limits: Limits
    video_fps: float

    @classmethod
    def of(cls, config: DataConfig, tokenizer: Tokenizer, patch_size: int) -> "Composer":
        """The composer of a run."""
        largest = limits(config.seq_length, config.max_image_tokens)
        return cls(tokenizer, patch_size, largest, config.video_fps)

    def fit(self, pixels: Pixels, num_frames: int = 1) -> Pixels:
        """Shrink and pad frames of an image or clip that has ``num_frames`` in all."""
        return fit(pixels, self.patch_size, num_frames, self.limits)

    def read(self, media: Media, shape: Sequence[int]) -> Pixels:
        """Read and fit the frames of an image or video.

        Args:
            shape: (frames, height, width), from :func:`pretrain.data.media.frames.measure`.

        Raises:
            ValueError: a file is missing or damaged, or has changed since it was measured.
            PretrainError: PyAV is needed and not installed.
        """
        num_frames, *size = shape
        fitted = []
        # One frame at a time: those of a film may exceed the memory before they are shrunk.
        for frame in frames.read(media, self.video_fps):
            if list(frame.shape[:2]) != size:
                raise ValueError(f"{media.paths[0]} has changed since its size was noted")
            fitted.append(self.fit(frame[None], num_frames))
        if len(fitted) != num_frames:
            raise ValueError(f"{media.paths[0]} has changed since its frames were counted")
        return np.concatenate(fitted)

    def add(
        self,
        document: Document,
        media: Pixels | tuple[int, int, int],
        kind: Sequence[int] = (),
    ) -> None:
        """Append an image or clip to a document.

        Args:
            media: its fitted pixels, or its (frames, height, width) before fitting; the patches are
                then left out.
            kind: see :meth:`Document.add_placeholders`.
        """
        if isinstance(media, tuple):
            for grid in self.grids(media):
                document.add_placeholders(grid, kind)
            return
        for group in frame_groups(len(media)):
            document.add_image(VisionItem(media[group], ""), self.patch_size, kind)

    def grids(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """The (frames, rows, columns), in patches, of the items of an image or clip.

        Args:
            shape: (frames, height, width) before fitting.
        """
        num_frames, height, width = shape
        side = self.patch_size
        _, (height, width) = fitted_size(height, width, side, num_frames, self.limits)
        groups = frame_groups(num_frames)
        return [(part.stop - part.start, height // side, width // side) for part in groups]

    def document(self, parts: Sequence[str | Pixels | tuple[int, int, int]]) -> Document:
        """A document of text and images in order; a text after nothing but images is their caption.

        Args:
            parts: text, fitted pixels, and the (frames, height, width) before fitting of images and
                clips whose patches are left out.
        """
        document = Document(self.tokenizer)
        captioned = is_captioned(parts)
        for part in parts:
            if not isinstance(part, str):
                self.add(document, part)
            elif captioned:
                document.add_caption(part)
            else:
                document.add_tokens(self.tokenizer.encode(part))
        return document.add_tokens([self.tokenizer.eos])

    def size(self, parts: Sequence[str | tuple[int, int, int]]) -> tuple[int, int]:
        """(tokens, image placeholders among them) of the document of these parts.

        Args:
            parts: text, and the (frames, height, width) of images and clips before fitting.
        """
        length, placeholders = 2, 0
        captioned = is_captioned(parts)
        for part in parts:
            if isinstance(part, str):
                length += len(self.tokenizer.encode(part)) + captioned
                continue
            counts = [num_tokens(grid) for grid in self.grids(part)]
            length += sum(counts) + 2 * len(counts)
            placeholders += sum(counts)
        return length, placeholders


def is_captioned(parts: Sequence[T | str]) -> bool:
    """Whether a document consists of images or videos, and one text after them: their caption."""
    *media, last = parts or [""]
    captioned = media and isinstance(last, str)
    return bool(captioned) and not any(isinstance(part, str) for part in media)


def as_pair(parts: Sequence[T | str]) -> tuple[T, str] | None:
    """The image or video and its caption, if a document consists of these two."""
    if len(parts) == 2:
        media, caption = parts
        if isinstance(caption, str) and not isinstance(media, str):
            return media, caption
    return None
