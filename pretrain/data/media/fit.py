"""Images and clips of any size, made into what the vision encoder takes.

As the processors of Kimi K2.5 do in transformers: shrink what is too large, never enlarge, pad with
black to whole 2x2 patches, and cut clips into groups of four frames.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from pretrain.data.media.pixels import Pixels
from pretrain.model.geometry import MAX_FRAMES, MERGE, PATCHES_PER_TOKEN

# The processors' limits, in patches.
MAX_PATCHES_OF_AN_IMAGE = 16384
MAX_PATCHES_OF_A_FRAME = 4096
MAX_PATCHES_OF_A_SIDE = 512

Size = tuple[int, int]


class Limits(NamedTuple):
    """Above which size an image is shrunk, in patches before padding.

    Attributes:
        image: of an image.
        frame: of one frame of a clip.
        side: along a side.
    """

    image: int = MAX_PATCHES_OF_AN_IMAGE
    frame: int = MAX_PATCHES_OF_A_FRAME
    side: int = MAX_PATCHES_OF_A_SIDE


# Tokens of a document beside those of its image: BOS, EOS, and the image's begin and end.
_AROUND = 4


def limits(seq_length: int, max_image_tokens: int | None = None) -> Limits:
    """The limits of a run, by which an image or a group of frames of any shape fits a sequence.

    Args:
        seq_length: tokens of a sequence, at least 64.
        max_image_tokens: images are shrunk to about this many; default: a quarter of seq_length.
    """
    room = seq_length - _AROUND
    side = min(MAX_PATCHES_OF_A_SIDE, MERGE * room)
    wanted = PATCHES_PER_TOKEN * (max_image_tokens or max(1, seq_length // 4))
    low, high = 1, min(MAX_PATCHES_OF_AN_IMAGE, wanted)
    while low < high:  # the largest that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _most_tokens(middle, side) <= room else (low, middle - 1)
    return Limits(low, min(low, MAX_PATCHES_OF_A_FRAME), side)


def _most_tokens(max_patches: int, max_side: int) -> int:
    """An upper bound of the tokens of an image of any shape that :func:`fitted_size` gives.

    Whole patches are counted before scaling, and a token is two of them, padded: an image that ends
    up m tokens high has at least 2m - 2 whole patches of height and is scaled by more than
    (2m - 2) / (2m - 1), which bounds its width. Of a width of more than two patches, the part of a
    patch that is not counted is at most a third, and at most one patch.
    """
    cells = -(-max_side // MERGE)
    most = cells  # of a single row
    for high in range(2, cells + 1):
        least = 2 * high - 2
        counted = max_patches * (least + 1) / least**2
        width = min(max_side, counted + 1, max(MERGE, 1.5 * counted))
        most = max(most, high * math.ceil(width / MERGE))
    return most


def fitted_size(
    height: int,
    width: int,
    patch_size: int,
    *,
    max_patches: int = MAX_PATCHES_OF_AN_IMAGE,
    max_side: int = MAX_PATCHES_OF_A_SIDE,
) -> tuple[Size, Size]:
    """How large an image becomes, in pixels.

    Args:
        height, width: at least 1.
        max_patches: of one frame, before padding.
        max_side: patches along a side.

    Returns:
        (height, width) after shrinking, and after padding: multiples of two patches.

    Raises:
        ValueError: height or width is below 1.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height} x {width} pixels has nothing in it")
    patches = max(1, height // patch_size) * max(1, width // patch_size)
    longest = max_side * patch_size
    scale = min(1.0, math.sqrt(max_patches / patches), longest / height, longest / width)
    shrunk = tuple(min(max(1, int(length * scale)), longest) for length in (height, width))
    cell = MERGE * patch_size
    padded = tuple(-(-length // cell) * cell for length in shrunk)
    return (shrunk[0], shrunk[1]), (padded[0], padded[1])


def fit(
    pixels: Pixels,
    patch_size: int,
    *,
    max_patches: int | None = None,
    max_side: int = MAX_PATCHES_OF_A_SIDE,
) -> Pixels:
    """Shrink an image or clip where it is too large, and pad it on the right and below.

    Args:
        pixels: uint8 [frames, height, width, 3].
        max_patches: of one frame; default: 16384 for an image, 4096 for a clip's.
        max_side: patches along a side.

    Returns:
        uint8 [frames, height', width', 3], multiples of two patches; the same array where it fits.

    Raises:
        ValueError: these are no pixels, or there are none.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(
            "pixels must be uint8 [frames, height, width, 3] (RGB), not "
            f"{pixels.dtype} {list(pixels.shape)}"
        )
    frames, height, width, _ = pixels.shape
    if frames < 1:
        raise ValueError("a clip of no frames has nothing in it")
    if max_patches is None:
        max_patches = MAX_PATCHES_OF_AN_IMAGE if frames == 1 else MAX_PATCHES_OF_A_FRAME
    size, padded = fitted_size(
        height, width, patch_size, max_patches=max_patches, max_side=max_side
    )
    if size != (height, width):
        to = size[::-1]
        shrunk = (Image.fromarray(f).resize(to, Image.Resampling.BICUBIC) for f in pixels)
        pixels = np.stack([np.asarray(frame) for frame in shrunk])
    if padded != size:
        margins = [(0, whole - part) for whole, part in zip(padded, size, strict=True)]
        pixels = np.pad(pixels, [(0, 0), *margins, (0, 0)])
    return pixels


def frame_groups(num_frames: int) -> list[slice]:
    """Cut a clip into items of up to 4 frames, in order; only the last may have fewer.

    Raises:
        ValueError: there are no frames.
    """
    if num_frames < 1:
        raise ValueError("a clip of no frames has nothing in it")
    return [
        slice(first, min(first + MAX_FRAMES, num_frames))
        for first in range(0, num_frames, MAX_FRAMES)
    ]
