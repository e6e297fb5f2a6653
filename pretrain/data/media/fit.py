"""Fit images and clips of any size to what the vision encoder accepts.

As the processors of Kimi K2.5 in transformers do: shrink larger ones, never enlarge, pad with black
to multiples of 2x2 patches, and split clips into groups of four frames.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from pretrain.data.media.pixels import Pixels
from pretrain.model.geometry import MAX_FRAMES, MERGE, PATCHES_PER_TOKEN

Size = tuple[int, int]


class Limits(NamedTuple):
    """Sizes above which images are shrunk, in patches before padding; by default the processors'.

    Attributes:
        image: patches of an image.
        frame: patches of one frame of a clip.
        side: patches along a side.
    """

    image: int = 16384
    frame: int = 4096
    side: int = 512


# Tokens of a document besides those of its image: BOS, EOS, and the image's begin and end.
_OTHER_TOKENS = 4


def limits(seq_length: int, max_image_tokens: int | None = None) -> Limits:
    """The limits with which an image or group of frames of any shape fits a sequence.

    Args:
        seq_length: tokens of a sequence, at least 64.
        max_image_tokens: images are shrunk to about this many; default: a quarter of seq_length.
    """
    default = Limits()
    room = seq_length - _OTHER_TOKENS
    side = min(default.side, MERGE * room)
    wanted = PATCHES_PER_TOKEN * (max_image_tokens or max(1, seq_length // 4))
    low, high = 1, min(default.image, wanted)
    while low < high:  # bisection: the largest number of patches that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _max_tokens(middle, side) <= room else (low, middle - 1)
    return Limits(low, min(low, default.frame), side)


def _max_tokens(max_patches: int, max_side: int) -> int:
    """An upper bound on the tokens of an image of any shape after :func:`fitted_size`.

    Whole patches are counted before scaling, and a token is two of them per side, padded: an image
    of m rows of tokens has at least 2m - 2 whole patches of height and is scaled by more than
    (2m - 2) / (2m - 1), which bounds its width. In a width of more than two patches, the fraction
    of a patch that is not counted is at most a third of it, and at most one patch.
    """
    max_rows = -(-max_side // MERGE)
    most = max_rows  # of a single row
    for rows in range(2, max_rows + 1):
        whole = 2 * rows - 2
        counted = max_patches * (whole + 1) / whole**2
        width = min(max_side, counted + 1, max(MERGE, 1.5 * counted))
        most = max(most, rows * math.ceil(width / MERGE))
    return most


def fitted_size(
    height: int, width: int, patch_size: int, num_frames: int = 1, limits: Limits | None = None
) -> tuple[Size, Size]:
    """The size of an image or clip after fitting, in pixels.

    Args:
        height, width: at least 1.
        patch_size: side of a patch.
        num_frames: 1 for an image; frames of a clip have another limit.
        limits: default: those of the published processors.

    Returns:
        (height, width) after shrinking, and after padding: multiples of two patches.

    Raises:
        ValueError: height or width is below 1.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height} x {width} pixels is empty")
    limits = limits or Limits()
    max_patches = limits.image if num_frames == 1 else limits.frame
    patches = max(1, height // patch_size) * max(1, width // patch_size)
    longest = limits.side * patch_size
    scale = min(1.0, math.sqrt(max_patches / patches), longest / height, longest / width)
    shrunk = tuple(min(max(1, int(length * scale)), longest) for length in (height, width))
    cell = MERGE * patch_size
    padded = tuple(-(-length // cell) * cell for length in shrunk)
    return (shrunk[0], shrunk[1]), (padded[0], padded[1])


def fit(
    pixels: Pixels, patch_size: int, num_frames: int | None = None, limits: Limits | None = None
) -> Pixels:
    """Shrink an image or clip if it is too large, and pad it on the right and at the bottom.

    Args:
        pixels: uint8 [frames, height, width, 3], all or some frames.
        patch_size, num_frames, limits: see :func:`fitted_size`; by default these are all frames.

    Returns:
        uint8 [frames, height', width', 3], multiples of two patches; the same array if it fits.

    Raises:
        ValueError: dtype or shape differ from this, or the pixels are empty.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(
            "pixels must be uint8 [frames, height, width, 3] (RGB), not "
            f"{pixels.dtype} {list(pixels.shape)}"
        )
    frames, height, width, _ = pixels.shape
    if frames < 1:
        raise ValueError("a clip needs at least one frame")
    size, padded = fitted_size(height, width, patch_size, num_frames or frames, limits)
    if size != (height, width):
        to = size[::-1]
        shrunk = (Image.fromarray(f).resize(to, Image.Resampling.BICUBIC) for f in pixels)
        pixels = np.stack([np.asarray(frame) for frame in shrunk])
    if padded != size:
        margins = [(0, whole - part) for whole, part in zip(padded, size, strict=True)]
        pixels = np.pad(pixels, [(0, 0), *margins, (0, 0)])
    return pixels


def frame_groups(num_frames: int) -> list[slice]:
    """Split a clip into items of up to 4 frames, in order; only the last may have fewer.

    Raises:
        ValueError: ``num_frames`` is below 1.
    """
    if num_frames < 1:
        raise ValueError("a clip needs at least one frame")
    return [
        slice(first, min(first + MAX_FRAMES, num_frames))
        for first in range(0, num_frames, MAX_FRAMES)
    ]
