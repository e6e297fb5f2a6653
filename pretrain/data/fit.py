"""Images and clips of any size, made into what the vision encoder takes.

As the processors of Kimi K2.5 do in transformers: shrink what is too large, never enlarge, pad with
black to whole 2x2 patches, and cut clips into groups of four frames.
"""

import math

import numpy as np
from PIL import Image

from pretrain.data.images import MAX_FRAMES, MERGE
from pretrain.data.pixels import Pixels

# The processors' limits, in patches.
MAX_PATCHES_OF_AN_IMAGE = 16384
MAX_PATCHES_OF_A_FRAME = 4096
MAX_PATCHES_OF_A_SIDE = 512

Size = tuple[int, int]


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
