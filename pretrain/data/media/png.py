"""Images as text, for HTML pages and JSON."""

import base64
import io

import numpy as np
from PIL import Image

from pretrain.data.media.pixels import Pixels


def png_base64(pixels: Pixels, largest: tuple[int, int] | None = None) -> str:
    """A PNG file of an image, in base64.

    Args:
        pixels: uint8 [height, width, 3].
        largest: width and height to which a larger image is shrunk; None: its own.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if largest is not None:
        image.thumbnail(largest)
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
