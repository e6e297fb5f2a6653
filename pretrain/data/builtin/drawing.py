"""Images and short clips of text, drawn with Pillow."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pretrain.config import ImageConfig
from pretrain.data.media.patches import VisionItem
from pretrain.errors import PretrainError
from pretrain.model.geometry import MAX_FRAMES, MERGE

# Fonts that matplotlib contains, with all printable ASCII characters. They are listed by name: the
# data is the same on every machine, and a font added by another version does not change it.
_FONTS = tuple(
    f"{name}.ttf"
    for name in (
        *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSans-Oblique"),
        *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique"),
        *("DejaVuSansMono-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic"),
        *("DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta"),
        "STIXGeneralItalic",
    )
)
# Draws of words after which the text is taken to have no caption. One word of thousands is found.
_MAX_DRAWS = 100_000
# Draws of lines after which a piece may be shorter than wanted.
_DRAWS_OF_LONG_LINES = 10


@lru_cache(maxsize=1)
def font_paths() -> tuple[str, ...]:
    """Paths of the fonts that texts are drawn in, always in the same order.

    Raises:
        PretrainError: the installed matplotlib lacks one of them.
    """
    import matplotlib

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    for name in _FONTS:
        if not (folder / name).is_file():
            raise PretrainError(
                f"matplotlib {matplotlib.__version__} has no font {name} in {folder}, which the "
                "built-in images are drawn with: reinstall matplotlib"
            )
    return tuple(str(folder / name) for name in _FONTS)


_RULER = ImageDraw.Draw(Image.new("L", (1, 1)))


@lru_cache(maxsize=4096)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    # The other layout engine depends on a library of the system, and places letters differently.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def draw(text: str, config: ImageConfig, patch_size: int, rng: np.random.Generator) -> VisionItem:
    """Draw a text in a random font, size, colour and position; some wrapped, some as clips.

    Args:
        text: single-spaced printable ASCII.
        patch_size: height and width become multiples of two patches.
        rng: the source of all randomness.
    """
    fonts = font_paths()
    path = fonts[rng.integers(len(fonts))]
    size = int(rng.integers(config.min_font_size, config.max_font_size + 1))
    if rng.random() < config.large_share:
        size = int(rng.integers(config.max_font_size, 2 * config.max_font_size + 1))
    font = _font(path, size)
    lines = _wrap(text, int(rng.integers(2, 4))) if rng.random() < config.wrapped_share else [text]
    body = "\n".join(lines)

    spacing = max(1, size // 8)
    left, top, right, bottom = _RULER.multiline_textbbox((0, 0), body, font, spacing=spacing)
    margin_x, margin_y = rng.integers(1, 5), rng.integers(1, 3)
    cell = patch_size * MERGE
    width = _round_up(right - left + 2 * margin_x, cell)
    height = _round_up(bottom - top + 2 * margin_y, cell)
    # Horizontally, the text starts near the left edge; vertically, it is anywhere.
    origin = np.array(
        [margin_x - left, rng.uniform(margin_y, height - margin_y - bottom + top) - top]
    )

    ink, paper = _colours(rng)
    if config.min_contrast < 1:  # otherwise no number is drawn: the images are those of before
        ink = paper + rng.uniform(config.min_contrast, 1) * (ink - paper)
    is_clip = rng.random() < config.clip_share
    frames = []
    for _ in range(int(rng.integers(2, MAX_FRAMES + 1)) if is_clip else 1):
        shift = rng.integers(-1, 2, size=2) if is_clip else 0
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).multiline_text(
            tuple(origin + shift), body, fill=255, font=font, spacing=spacing
        )
        light = rng.uniform(0.9, 1.1) if is_clip else 1.0
        # Coverage 0..255 to a colour by table: fast, because drawing runs during training.
        cover = np.arange(256, dtype=np.float32)[:, None] / 255
        colours = ((paper + cover * (ink - paper)) * light).clip(8, 247).astype(np.uint8)
        noise = rng.integers(-8, 9, size=(height, width, 1), dtype=np.int8)
        # np.take is ten times as fast as an index.
        frames.append(np.take(colours, np.asarray(mask), axis=0) + noise.view(np.uint8))
    return VisionItem(np.stack(frames), text)


def _wrap(text: str, count: int) -> list[str]:
    """Wrap a text into up to ``count`` lines of about equal length."""
    words, lines = text.split(" "), [""]
    for word in words:
        if len(lines) < count and len(lines[-1]) + len(word) / 2 > len(text) / count and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".lstrip()
    return lines


def _round_up(length: float, multiple: int) -> int:
    return -(-int(np.ceil(length)) // multiple) * multiple


def _colours(rng: np.random.Generator) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Ink and paper, [3] each in 0..255: dark on light, or the reverse for a third of images."""
    dark = rng.uniform(0, 90, 3).astype(np.float32)
    light = rng.uniform(170, 255, 3).astype(np.float32)
    return (light, dark) if rng.random() < 1 / 3 else (dark, light)


def pick_caption(
    lines: Sequence[str],
    config: ImageConfig,
    rng: np.random.Generator,
    is_allowed: Callable[[str], bool] = lambda _caption: True,
) -> str:
    """Draw consecutive words of a random line, ``min_chars`` to ``max_chars`` characters in all.

    Args:
        lines: single-spaced texts.
        config: limits of the caption.
        rng: the source of all randomness.
        is_allowed: other captions are drawn again.

    Raises:
        PretrainError: 100,000 draws gave no such words.
    """
    wanted = _length(config, rng)
    for _ in range(_MAX_DRAWS):
        words = lines[int(rng.integers(len(lines)))].split(" ")
        first = int(rng.integers(len(words)))
        last = None if config.max_words is None else first + config.max_words
        caption = words[first]
        for word in words[first + 1 : last]:
            if len(caption) + 1 + len(word) > wanted:
                break
            caption += " " + word
        if config.min_chars <= len(caption) <= config.max_chars and is_allowed(caption):
            return caption
    raise _no_caption(config)


def pick_piece(
    lines: Sequence[str],
    config: ImageConfig,
    rng: np.random.Generator,
    is_allowed: Callable[[str], bool] = lambda _caption: True,
) -> str:
    """Cut consecutive letters out of a random line, from anywhere and without the spaces.

    If few lines have as many letters as wanted, the whole line is one piece. Arguments and errors
    are those of :func:`pick_caption`.
    """
    wanted = _length(config, rng)
    for draw_number in range(_MAX_DRAWS):
        letters = "".join(filter(str.isalpha, lines[int(rng.integers(len(lines)))]))
        if draw_number >= _DRAWS_OF_LONG_LINES:
            wanted = max(config.min_chars, min(wanted, len(letters)))
        if len(letters) >= wanted:
            start = int(rng.integers(len(letters) - wanted + 1))
            caption = letters[start : start + wanted]
            if is_allowed(caption):
                return caption
    raise _no_caption(config)


def _length(config: ImageConfig, rng: np.random.Generator) -> int:
    return int(rng.integers(config.min_chars, config.max_chars + 1))


def _no_caption(config: ImageConfig) -> PretrainError:
    return PretrainError(
        f"data.images.min_chars={config.min_chars} to max_chars={config.max_chars}: the text has "
        "no words of that length; choose a wider range"
    )
