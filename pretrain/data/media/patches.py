"""Images and clips, and the patches of them that the vision encoder reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.data.media.pixels import Pixels


@dataclass(frozen=True)
class VisionItem:
    """An image or a clip, and the text in it.

    Attributes:
        pixels: uint8 [frames, height, width, 3]; height and width are multiples of two patches.
        caption: the text, lines joined by spaces.
    """

    pixels: Pixels
    caption: str


def patchify(pixels: Pixels, patch_size: int) -> tuple[Pixels, tuple[int, int, int]]:
    """Cut [frames, height, width, 3] into patches.

    Returns:
        uint8 [frames * rows * columns, 3 * patch_size * patch_size], patches in reading order,
        each laid out (channel, y, x) like a convolution kernel; and (frames, rows, columns).

    Raises:
        ValueError: height or width is not a multiple of the patch size.
    """
    frames, height, width, channels = pixels.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"an image of {height} x {width} pixels is not a multiple of the patch size "
            f"{patch_size}: pad it (pretrain.data.media.fit.fit)"
        )
    rows, columns = height // patch_size, width // patch_size
    cut = pixels.reshape(frames, rows, patch_size, columns, patch_size, channels)
    patches = cut.transpose(0, 1, 3, 5, 2, 4).reshape(frames * rows * columns, -1)
    return np.ascontiguousarray(patches), (frames, rows, columns)


def unpatchify(patches: Pixels, grid: Sequence[int], patch_size: int) -> Pixels:
    """The inverse of :func:`patchify`: uint8 [frames, height, width, 3]."""
    frames, rows, columns = grid
    cut = patches.reshape(frames, rows, columns, 3, patch_size, patch_size)
    shape = (frames, rows * patch_size, columns * patch_size, 3)
    return cut.transpose(0, 1, 4, 2, 5, 3).reshape(shape)
