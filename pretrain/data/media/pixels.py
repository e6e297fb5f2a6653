"""Decode image files to the picture that an image viewer shows.

All readers of images use :func:`open_image`. Exports contain a copy of this file for their
processor, so it imports only Pillow, its plugins and NumPy.

- The first image of a file, or one frame of an animation, is rotated by its EXIF orientation.
- Colours are converted to sRGB by the embedded ICC profile, or else by a PNG's gamma.
- Transparent pixels are blended with white.
- 16-bit samples are scaled to 8 bits. Floats and 32-bit integers have no defined white: they are
  read as 0..1 (floats), 0..255 or 0..65535, the first range that contains their maximum. With
  negative or larger values, they are stretched from their minimum to their maximum.

Formats that Pillow renders with another program (EPS through Ghostscript, WMF through Windows) are
not read, because such a file could execute code, whatever its suffix.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 178_956_970
"""Pixels of the largest image that is decoded: 512 MiB as RGB, and Pillow's own limit."""
MAX_FILM_FRAMES = 10**6
"""Frames of the longest animation or video: more than fit any sequence."""
MAX_FILM_PIXELS = 2**35
"""Pixels of all frames of an animation or video: an hour of 1920 x 1080 at 4 frames a second."""
# Plugins, and the function that adds their formats unless importing them does.
_PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_jxl": ""}
_RENDERED_BY_PROGRAMS = frozenset({"EPS", "WMF"})
_ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 0x0112, 258, 262, 339
# Pillow's modes of the colour spaces of ICC profiles.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
# Modes with another storage of the same content (premultiplied, bits), and the plain mode.
_PLAIN_MODES = {"La": "LA", "RGBa": "RGBA", "1": "L"}
# Levels by which sRGB encoders differ, up to which a transform counts as the identity.
_ROUNDING = 2
_DISPLAY_GAMMA = 2.2


@lru_cache(maxsize=1)
def _load_plugins() -> None:
    """Add the formats of Pillow's plugins that are installed."""
    for name, register in _PLUGINS.items():
        with suppress(ImportError):
            plugin = import_module(name)
            getattr(plugin, register, lambda: None)()


def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read, those of installed plugins included."""
    Image.init()
    _load_plugins()
    return tuple(name for name in Image.ID if name not in _RENDERED_BY_PROGRAMS)


def suffixes() -> tuple[str, ...]:
    """The usual suffixes of the formats that are read, in lower case, each with its dot."""
    names = set(formats())
    return tuple(suffix for suffix, name in Image.registered_extensions().items() if name in names)


class ImageFile:
    """An opened image file."""

    def __init__(self, image: Image.Image, name: str = "") -> None:
        self._image, self._name = image, name

    @property
    def suffix(self) -> str:
        """The usual suffix of its format, with the dot."""
        known = Image.registered_extensions().items()
        return next((suffix for suffix, name in known if name == self._image.format), "")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the upright picture, without decoding it."""
        width, height = self._image.size
        return (width, height) if _orientation(self._image) >= 5 else (height, width)

    @property
    def num_frames(self) -> int:
        """Frames of an animation; 1 for other images.

        Raises:
            ValueError: the file is damaged, or has more than :data:`MAX_FILM_FRAMES`.
        """
        with _named(self._name):
            count = int(getattr(self._image, "n_frames", 1)) - _num_stills(self._image)
            if count > MAX_FILM_FRAMES:
                raise ValueError(
                    f"{count:,} frames, more than the {MAX_FILM_FRAMES:,} that are read"
                )
            return count

    def rgb(self, frame: int | None = None) -> Pixels:
        """Decode a frame of an animation, or by default the file's first image.

        Returns:
            uint8 [height, width, 3], sRGB, upright.

        Raises:
            ValueError: the file is damaged or cut off.
        """
        image = self._image
        with _named(self._name):
            rotation = _ROTATIONS.get(_orientation(image))
            if image.format == "WEBP" and getattr(image, "n_frames", 1) > 1:
                # Pillow drops the alpha of animations that do not declare it, although it decodes
                # it: the area outside their frames is transparent.
                image._mode = image.rawmode = "RGBA"  # type: ignore[attr-defined]
            if frame is not None:
                image.seek(frame + _num_stills(image))
            image.load()
            shown = _on_white(image)
            return np.asarray(shown if rotation is None else shown.transpose(rotation))


@contextmanager
def open_image(source: str | Path | bytes | IO[bytes], name: str = "") -> Iterator[ImageFile]:
    """Open an image, detecting its format by content; no pixel is decoded.

    Args:
        source: a path, the content of a file, or a file opened for reading, which is closed.
        name: name in messages; default: the path.

    Raises:
        ValueError: the file is missing, unreadable or not an image, or has more than
            :data:`MAX_PIXELS` pixels. The message starts with the name, if there is one.
    """
    if isinstance(source, str | Path):
        name = name or str(source)
    name = name and f"{name}: "
    with ExitStack() as stack:
        with _named(name):
            file: IO[bytes]
            if isinstance(source, bytes):
                file = io.BytesIO(source)
            else:
                file = _regular_file(source) if isinstance(source, str | Path) else source
            image = Image.open(stack.enter_context(file), formats=formats())
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
        yield ImageFile(image, name)


def decode(source: str | Path | bytes) -> Pixels:
    """Decode the first image of a file, uint8 [height, width, 3].

    Raises:
        ValueError: as :func:`open_image` and :meth:`ImageFile.rgb`.
    """
    with open_image(source) as image:
        return image.rgb()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn all exceptions of Pillow about a damaged file into a ValueError with its name."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{name.removesuffix(': ')} does not exist") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}cannot identify image file") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}more than the {MAX_PIXELS:,} pixels that are read") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(name + " ".join(reason.split())[:300]) from error


def _regular_file(path: str | Path) -> IO[bytes]:
    if Path(path).exists() and not Path(path).is_file():  # opening a pipe would block
        raise ValueError("not a regular file")
    return Path(path).open("rb")


def _num_stills(image: Image.Image) -> int:
    """1 if an animated PNG starts with a still for viewers without animation, else 0."""
    return int(bool(image.info.get("default_image")) and getattr(image, "n_frames", 1) > 1)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, of the pixels that Pillow decodes."""
    if image.format == "TIFF":  # Pillow rotates these itself
        return 1
    # Damaged metadata does not matter to viewers.
    with suppress(Exception):
        if image.format == "PNG" and "exif" not in image.info:
            late = _png_exif(image.fp)  # type: ignore[attr-defined]
            if late:
                image.info["exif"] = b"Exif\0\0" + late
        # Not PNG's own method, which decodes the image to find the chunk.
        orientation = Image.Image.getexif(image).get(_ORIENTATION, 1)
        return int(orientation) if orientation in _ROTATIONS else 1
    return 1


def _png_exif(file: Any) -> bytes:
    """The eXIf chunk of a PNG, which may follow the pixels."""
    position = file.tell()
    try:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"eXIf":
                return bytes(file.read(min(length, 1 << 16)))
            file.seek(length + 4, io.SEEK_CUR)
        return b""
    finally:
        file.seek(position)


def _on_white(image: Image.Image) -> Image.Image:
    """Convert to RGB, as sRGB, blended with white."""
    colours, alpha = _without_alpha(image)
    colours = _srgb(colours, image.info)
    if alpha is None:
        return colours
    white = Image.new("RGB", colours.size, "white")
    white.paste(colours, mask=alpha)
    return white


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Split into colours, in a mode without alpha or palette, and the alpha channel, if any."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        transparent = image.info.get("transparency")
        alpha = None
        if isinstance(transparent, int):
            alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        return Image.fromarray(_grey_levels(image, values)), alpha
    if image.mode in _PLAIN_MODES:
        image = image.convert(_PLAIN_MODES[image.mode])
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode in ("P", "RGBX") else image, None
    alpha = image.convert("RGBA").getchannel("A")
    if image.mode in ("L", "LA"):
        return image.getchannel("L"), alpha
    return image.convert("RGBA").convert("RGB"), alpha


def _grey_levels(image: Image.Image, values: npt.NDArray[Any]) -> Pixels:
    """Convert samples of more than 8 bits to uint8."""
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        white = (1 << tags.get(_BITS, (16,))[0]) - 1
        table = np.minimum((np.arange(65536) * 255 + white // 2) // white, 255).astype(np.uint8)
        levels: Pixels = table[values]
    else:
        if tags.get(_BITS) == (32,) and tags.get(_SAMPLE_FORMAT, (1,)) == (1,):
            values = values.view(np.uint32)
        levels = _scaled(values, white=65535 if image.format == "PPM" and image.mode == "I" else 0)
    # Pillow inverts TIFFs in which 0 is white only if they have 8 bits.
    return np.invert(levels) if tags.get(_PHOTOMETRIC) == 0 else levels


def _scaled(values: npt.NDArray[Any], white: int) -> Pixels:
    """Scale floats or integers to grey levels; ``white`` is 0 if the format does not define it."""
    real = values.dtype.kind == "f"
    values = values.astype(np.float64)
    values[~np.isfinite(values)] = 0
    low, high = float(values.min()), float(values.max())
    # Resampling overshoots, and floats above 1 are highlights: up to twice the white is accepted.
    if real and low >= -0.05 and high <= 2:
        low, high = 0, 1
    elif low >= 0:
        low, high = 0, white or next((scale for scale in (255, 65535) if high <= scale), high)
    values -= low
    values *= 255 / max(high - low, np.finfo(np.float64).tiny)
    levels: Pixels = np.rint(values.clip(0, 255)).astype(np.uint8)
    return levels


def _srgb(image: Image.Image, info: dict[Any, Any]) -> Image.Image:
    """Convert to RGB by the ICC profile or a PNG's gamma, if there is one."""
    profile = info.get("icc_profile")
    if profile:
        space = _colour_space(profile)
        if space == "RGB" and image.mode in ("L", "YCbCr", "HSV"):
            image = image.convert("RGB")
        transform = _transform(profile, image.mode) if image.mode == space else None
        if transform is not None:
            return _apply(transform, image)
    if image.mode == "LAB":
        return _apply(_lab_transform(), image)
    image = image.convert("RGB")
    exponent = 1 / (info.get("gamma") or 1 / _DISPLAY_GAMMA) / _DISPLAY_GAMMA
    if profile or "srgb" in info or abs(exponent - 1) < 0.05:
        return image
    levels = 255 * (np.arange(256) / 255) ** exponent
    return image.point(np.rint(levels).astype(int).tolist() * 3)


def _apply(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # None is returned in-place only
    return converted


def _colour_space(profile: bytes) -> str:
    """The mode of the images that a profile describes; empty if it cannot be read."""
    with suppress(ImageCms.PyCMSError, OSError, TypeError, ValueError):
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return _MODES.get(opened.profile.xcolor_space.strip(), "")
    return ""


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB; None if the profile is damaged or already sRGB."""
    try:
        transform = _to_srgb(ImageCms.ImageCmsProfile(io.BytesIO(profile)), mode)
        if mode == "CMYK":
            return transform
        levels = np.linspace(0, 255, 9).round().astype(np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
        probe = Image.fromarray(cube).convert(mode)
        converted, plain = _apply(transform, probe), probe.convert("RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    change = np.asarray(converted).astype(int) - np.asarray(plain)
    return transform if np.abs(change).max() > _ROUNDING else None


@lru_cache(maxsize=1)
def _lab_transform() -> ImageCms.ImageCmsTransform:
    return _to_srgb(ImageCms.createProfile("LAB"), "LAB")


def _to_srgb(profile: Any, mode: str) -> ImageCms.ImageCmsTransform:
    # The cache of the last pixel is not thread-safe.
    return ImageCms.buildTransform(
        profile, ImageCms.createProfile("sRGB"), mode, "RGB", flags=ImageCms.Flags.NOCACHE
    )
