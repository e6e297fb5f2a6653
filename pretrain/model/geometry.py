"""Images and clips in patches: how the encoder merges them, and the tokens they become.

Sizes are those of MoonViT-3D (Kimi K2.5 report, section 3).
"""

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

Size = TypeVar("Size", int, Tensor)

# 2 x 2 patches become one token.
MERGE = 2
# Frames of a clip that are pooled into one feature map.
MAX_FRAMES = 4
PATCHES_PER_TOKEN = MERGE * MERGE


def num_tokens(grid: Sequence[Size]) -> Size:
    """Language-model tokens of an item of (frames, rows, columns) patches: frames are pooled.

    Of many items if the sizes are int64 [n].
    """
    _, rows, columns = grid
    return (rows // MERGE) * (columns // MERGE)
