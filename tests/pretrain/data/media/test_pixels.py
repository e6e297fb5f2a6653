"""Images look as in an image viewer, whatever their mode, orientation, profile or format.

The expected pictures are computed with NumPy from the definitions of the formats, not with Pillow.
"""

import io
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pretrain.data.media import pixels
from pretrain.data.media.frames import Media, measure
from pretrain.data.media.pixels import MAX_PIXELS, decode, open_image

Array = npt.NDArray[Any]
# EXIF's definition: how a viewer turns what is stored.
VIEWED: dict[int, Callable[[Array], Array]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


def file(image: Image.Image, kind: str, turned: int | None = None, **options: Any) -> bytes:
    if turned is not None:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = turned
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def grey(levels: Array) -> Array:
    return np.repeat(np.asarray(levels, float)[..., None], 3, -1)


def on_white(colours: Array, alpha: Array) -> Array:
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def raw(rng: np.random.Generator, channels: int, most: int = 255) -> Array:
    dtype = np.uint8 if most == 255 else np.uint16
    samples = rng.integers(0, most, (5, 7, channels), dtype, endpoint=True)
    return samples[..., 0] if channels == 1 else samples


def bits(rng: np.random.Generator) -> tuple[Image.Image, Array]:
    values = raw(rng, 1) > 127
    return Image.fromarray(values), grey(values * 255)


def plain(mode: str) -> Callable[[np.random.Generator], tuple[Image.Image, Array]]:
    def make(rng: np.random.Generator) -> tuple[Image.Image, Array]:
        values = raw(rng, len(mode))
        image = Image.frombytes(mode, (7, 5), values.tobytes())
        colours = grey(values[..., 0] if mode == "LA" else values)
        if mode.startswith("RGB"):
            colours = values[..., :3].astype(float)
        if mode == "CMYK":
            ink = values.astype(float)
            colours = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
        return image, on_white(colours, values[..., -1]) if mode.endswith("A") else colours

    return make


def palette(alphas: bool) -> Callable[[np.random.Generator], tuple[Image.Image, Array]]:
    def make(rng: np.random.Generator) -> tuple[Image.Image, Array]:
        values, colours = raw(rng, 1), rng.integers(0, 256, (256, 3), np.uint8)
        image = Image.fromarray(values, "P")
        image.putpalette(colours.tobytes())
        if not alphas:
            return image, colours[values].astype(float)
        alpha = rng.integers(0, 256, 256, np.uint8)
        image.info["transparency"] = alpha.tobytes()
        return image, on_white(colours[values].astype(float), alpha[values])

    return make


def transparent_colour(rng: np.random.Generator) -> tuple[Image.Image, Array]:
    values = raw(rng, 3)
    image = Image.fromarray(values)
    image.info["transparency"] = tuple(values[2, 3].tolist())
    hit = (values == values[2, 3]).all(-1)
    return image, np.where(hit[..., None], 255, values).astype(float)


def transparent_grey(rng: np.random.Generator) -> tuple[Image.Image, Array]:
    values = raw(rng, 1)
    image = Image.fromarray(values)
    image.info["transparency"] = int(values[2, 3])
    return image, grey(np.where(values == values[2, 3], 255, values))


def sixteen_bits(mode: str) -> Callable[[np.random.Generator], tuple[Image.Image, Array]]:
    def make(rng: np.random.Generator) -> tuple[Image.Image, Array]:
        values = raw(rng, 1, 65535)
        stored = values.astype(">u2" if mode == "I;16B" else "<u2")
        return Image.frombytes(mode, (7, 5), stored.tobytes()), grey(values / 257)

    return make


def integers(rng: np.random.Generator) -> tuple[Image.Image, Array]:
    values = rng.integers(0, 65536, (5, 7), np.int32)
    values[0, 0] = 60000
    return Image.fromarray(values), grey(values / 257)


def floats(rng: np.random.Generator) -> tuple[Image.Image, Array]:
    values = rng.random((5, 7), np.float32)
    return Image.fromarray(values), grey(values * 255.0)


MODES = {
    "1": bits,
    "L": plain("L"),
    "LA": plain("LA"),
    "RGB": plain("RGB"),
    "RGBA": plain("RGBA"),
    "CMYK": plain("CMYK"),
    "P": palette(alphas=False),
    "P with alpha": palette(alphas=True),
    "RGB with a transparent colour": transparent_colour,
    "L with a transparent level": transparent_grey,
    "I;16": sixteen_bits("I;16"),
    "I;16B": sixteen_bits("I;16B"),
    "I": integers,
    "F": floats,
}
LOSSLESS: list[tuple[str, str, dict[str, Any]]] = [
    *(("PNG", mode, {}) for mode in MODES if mode not in ("CMYK", "I", "F", "I;16B")),
    *(
        ("TIFF", mode, {"compression": packed})
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I", "F")
        for packed in (None, "tiff_lzw")
    ),
    *(("WEBP", mode, {"lossless": True, "exact": True}) for mode in ("RGB", "RGBA")),
]


@pytest.mark.parametrize(("kind", "mode", "options"), LOSSLESS)
@pytest.mark.parametrize("turned", [None, *VIEWED])
def test_modes_and_orientations_look_as_in_a_viewer(
    kind: str, mode: str, options: dict[str, Any], turned: int | None
) -> None:
    image, shown = MODES[mode](np.random.default_rng([turned or 0, len(mode)]))
    content = file(image, kind, turned, **options)
    expected = VIEWED[turned or 1](shown)
    with open_image(content) as opened:
        size = opened.size  # before anything is decoded
        pixels = opened.rgb()
    assert pixels.dtype == np.uint8 and pixels.shape == expected.shape == (*size, 3)
    assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "AVIF", "MPO"])
@pytest.mark.parametrize("turned", [None, *VIEWED])
def test_lossy_formats_are_rotated_upright(kind: str, turned: int | None) -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32, 0], picture[16:, :32, 1], picture[:16, 32:, 2] = 240, 240, 240
    options: dict[str, Any] = {"quality": 100}
    if kind == "MPO":
        options |= {"save_all": True, "append_images": [Image.new("RGB", (64, 32))]}
    pixels = decode(file(Image.fromarray(picture), kind, turned, **options))
    expected = VIEWED[turned or 1](picture.astype(float))
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() < 12


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_in_other_modes_keep_their_brightness(mode: str) -> None:
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (16, 1))
    image = Image.fromarray(ramp)
    if mode == "CMYK":  # stored inverted, as Adobe does
        ink = np.stack([255 - ramp] * 3 + [np.zeros_like(ramp)], -1)
        image = Image.frombytes("CMYK", (64, 16), ink.tobytes())
    pixels = decode(file(image, "JPEG", quality=100))
    assert np.abs(pixels - grey(ramp)).max() <= 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.25, 1], [0, 63.75, 255]),
        ([0, 128, 255], [0, 128, 255]),
        ([0, 25700, 65535], [0, 100, 255]),
        ([-1, 0, 1], [0, 127.5, 255]),
        ([-40, 0, 2960], [0, 3.4, 255]),
        ([0, 5e8, 1e9], [0, 127.5, 255]),
        ([0, 0.5, 1.3], [0, 127.5, 255]),
        ([0, np.nan, 1], [0, 0, 255]),
        ([0, -np.inf, 1], [0, 0, 255]),
        ([0.5, 0.5, 0.5], [127.5] * 3),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_floats_of_any_range_keep_their_contrast(
    values: list[float], expected: list[float]
) -> None:
    image = Image.fromarray(np.array([values], np.float32))
    assert np.abs(decode(file(image, "TIFF"))[0, :, 0] - np.array(expected)).max() <= 0.51
    if np.isfinite(values).all():
        assert np.abs(decode(file(image, "PPM"))[0, :, 0] - np.array(expected)).max() <= 0.51


def test_wide_integers_keep_their_contrast() -> None:
    def shown(values: list[int]) -> list[int]:
        image = Image.fromarray(np.array([values], np.int32))
        return decode(file(image, "TIFF"))[0, :, 0].tolist()

    assert shown([0, 100, 255]) == [0, 100, 255]
    assert shown([0, 25700, 65535]) == [0, 100, 255]
    assert shown([-1000, 0, 1000]) == [0, 128, 255]
    assert shown([0, 10**9, 2 * 10**9]) == [0, 128, 255]


def tiff(samples: Array, photometric: int, bits: int, sample_format: int = 1) -> bytes:
    """A minimal little-endian TIFF of one strip."""
    data = samples.tobytes()
    height, width = samples.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1}
    tags |= {278: height, 279: len(data), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    header = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return header + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("dtype", "bits", "sample_format", "white"),
    [("<u1", 8, 1, 255), ("<u2", 16, 1, 65535), ("<f4", 32, 3, 1)],
)
def test_a_tiff_whose_zero_is_white_is_not_shown_as_a_negative(
    dtype: str, bits: int, sample_format: int, white: int
) -> None:
    samples = (np.linspace(0, 1, 8).reshape(2, 4) * white).astype(dtype)
    found = decode(tiff(samples, 0, bits, sample_format))
    assert np.abs(found - grey(255 - samples * (255 / white))).max() <= 1
    found = decode(tiff(samples, 1, bits, sample_format))
    assert np.abs(found - grey(samples * (255 / white))).max() <= 1


def test_unsigned_integers_of_32_bits_are_not_negative() -> None:
    samples = np.array([[0, 2**31, 2**32 - 1]], "<u4")
    assert decode(tiff(samples, 1, 32))[0, :, 0].tolist() == [0, 128, 255]


SRGB = np.array(  # linear RGB to XYZ of D50, as in ICC profiles
    [[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]]
)
ADOBE = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])


def encoded(linear: Array) -> Array:
    """sRGB's transfer function, to 0..255."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_lab_is_converted_to_rgb() -> None:
    colours = np.random.default_rng(0).integers(60, 200, (5, 7, 3)).astype(float)
    linear = ((colours / 255 + 0.055) / 1.055) ** 2.4
    x, y, z = np.cbrt(linear @ SRGB.T / (0.9642, 1, 0.8249)).transpose(2, 0, 1)
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)
    stored = np.rint(lab * (2.55, 1, 1)).astype(np.int16).astype(np.uint8)
    image = Image.frombytes("LAB", (7, 5), stored.tobytes())
    assert np.abs(decode(file(image, "TIFF")) - colours).max() <= 5


def profile(space: bytes, gamma: float, matrix: Array | None = None) -> bytes:
    """A minimal ICC profile of version 2."""

    def xyz(values: Any) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": xyz((0.9642, 1, 0.8249)), b"kTRC": curve}
    tags[b"desc"] = b"desc" + bytes(4) + struct.pack(">I5s", 5, b"test\0") + bytes(79)
    tags[b"cprt"] = b"text" + bytes(4) + b"none\0\0\0\0"
    if matrix is not None:
        tags |= {b"rgb"[i : i + 1] + b"XYZ": xyz(matrix[:, i]) for i in range(3)}
        tags |= {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")}
    table, body = b"", b""
    for name, content in tags.items():
        offset = 128 + 4 + 12 * len(tags) + len(body)
        table += name + struct.pack(">II", offset, len(content))
        body += content + bytes(-len(content) % 4)
    size = 128 + 4 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s12s", size, b"none", 0x02100000, b"mntr", space, b"XYZ ", b"")
    header += b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("TIFF", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
    ],
)
def test_embedded_profiles_are_converted_to_srgb(
    kind: str, mode: str, options: dict[str, Any]
) -> None:
    image, _ = MODES[mode](np.random.default_rng(0))
    straight = np.asarray(image.convert("RGBA")).astype(float)
    linear = (straight[..., :3] / 255) ** 2.2
    expected = encoded(linear @ (np.linalg.inv(SRGB) @ ADOBE).T)
    if mode == "RGBA":
        expected = on_white(expected, straight[..., 3])
    adobe = profile(b"RGB ", 2.2, ADOBE)
    pixels = decode(file(image, kind, icc_profile=adobe, **options))
    assert np.abs(pixels - expected).max() <= 4
    assert np.abs(pixels - expected).mean() <= 1.5
    # The same picture without one is left as it is.
    assert np.abs(decode(file(image, kind, **options)) - expected).max() > 20


def test_a_grey_profile_is_converted_to_srgb() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    dark = profile(b"GRAY", 3.0)
    pixels = decode(file(Image.fromarray(levels), "PNG", icc_profile=dark))
    assert np.abs(pixels - grey(encoded((levels / 255) ** 3))).max() <= 2


@pytest.mark.parametrize(
    "icc", [b"", b"nonsense", profile(b"CMYK", 2.2), profile(b"RGB ", 2.2, ADOBE)[:200]]
)
def test_unusable_profiles_are_ignored(icc: bytes) -> None:
    image, expected = MODES["RGB"](np.random.default_rng(1))
    assert np.array_equal(decode(file(image, "PNG", icc_profile=icc)), expected)


def test_an_srgb_profile_changes_nothing() -> None:
    from PIL import ImageCms

    image, expected = MODES["RGB"](np.random.default_rng(1))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode(file(image, "PNG", icc_profile=srgb)), expected)


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def with_chunk(png: bytes, kind: bytes, data: bytes, *, last: bool = False) -> bytes:
    place = png.index(b"IEND") - 4 if last else 33  # after the header
    return png[:place] + chunk(kind, data) + png[place:]


def test_the_gamma_of_a_png_is_applied_unless_it_is_srgb() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    png = file(Image.fromarray(levels), "PNG")
    linear = with_chunk(png, b"gAMA", struct.pack(">I", 100000))
    expected = 255 * (levels / 255) ** (1 / 2.2)
    assert np.abs(decode(linear) - grey(expected)).max() <= 1
    usual = with_chunk(png, b"gAMA", struct.pack(">I", 45455))
    both = with_chunk(linear, b"sRGB", b"\0")
    for content in (usual, both, with_chunk(png, b"gAMA", bytes(4))):
        assert np.array_equal(decode(content), grey(levels))


@pytest.mark.parametrize("turned", VIEWED)
def test_orientations_that_follow_the_pixels_of_a_png_are_applied(turned: int) -> None:
    image, shown = MODES["RGB"](np.random.default_rng(2))
    exif = Image.Exif()
    exif[0x0112] = turned
    content = with_chunk(file(image, "PNG"), b"eXIf", exif.tobytes()[6:], last=True)
    with open_image(content) as opened:
        assert opened.size == VIEWED[turned](shown).shape[:2]
        assert np.array_equal(opened.rgb(), VIEWED[turned](shown))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_invalid_orientations_are_ignored(value: int) -> None:
    image, shown = MODES["RGB"](np.random.default_rng(3))
    assert np.array_equal(decode(file(image, "PNG", value)), shown)
    assert np.array_equal(decode(file(image, "TIFF", value)), shown)


def test_damaged_metadata_does_not_hide_the_picture() -> None:
    image, shown = MODES["RGB"](np.random.default_rng(3))
    content = with_chunk(file(image, "PNG"), b"eXIf", b"II*\0\xff\xff\xff\xff nonsense")
    assert np.array_equal(decode(content), shown)


def test_frames_of_animations_are_composed_with_earlier_ones() -> None:
    red, blue = (255, 0, 0, 255), (0, 0, 255, 255)
    frames = [Image.new("RGBA", (4, 4)) for _ in range(2)]
    frames[0].paste(red, (0, 0, 2, 2))
    frames[1].paste(blue, (2, 2, 4, 4))
    expected = np.full((2, 4, 4, 3), 255, np.uint8)
    expected[0, :2, :2], expected[1, 2:, 2:] = red[:3], blue[:3]
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 100}
    for kind, more in (
        ("GIF", {"disposal": 2}),
        ("PNG", {"disposal": PngImagePlugin.Disposal.OP_BACKGROUND}),
        ("PNG", {"disposal": PngImagePlugin.Disposal.OP_BACKGROUND, "default_image": True}),
        ("WEBP", {"lossless": True}),
    ):
        if "default_image" in more:
            options["append_images"] = frames
        content = file(frames[0], kind, **options, **more)
        options["append_images"] = frames[1:]
        with open_image(content) as opened:
            assert opened.num_frames == 2
            found = np.stack([opened.rgb(number) for number in range(2)])
        assert np.array_equal(found, expected), (kind, more)
        assert np.array_equal(decode(content), expected[0])


def test_animated_webp_is_shown_on_white() -> None:
    made = [MODES["RGBA"](np.random.default_rng(number)) for number in range(3)]
    images = [image for image, _ in made]
    options: dict[str, Any] = {"lossless": True, "exact": True, "save_all": True}
    content = file(images[0], "WEBP", append_images=images[1:], **options)
    with open_image(content) as opened:
        assert opened.num_frames == 3
        for number in (2, 0, 1):
            assert np.abs(opened.rgb(number) - made[number][1]).max() <= 1


def test_the_first_page_of_a_document_is_shown() -> None:
    pages = [Image.new("L", (3, 2), level) for level in (10, 20)]
    content = file(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(decode(content), np.full((2, 3, 3), 10))
    with open_image(content) as opened:
        assert [int(opened.rgb(number)[0, 0, 0]) for number in range(2)] == [10, 20]


@given(st.sampled_from(["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM"]), st.data())
@settings(deadline=None, max_examples=150)
def test_damaged_files_raise_only_a_value_error_of_one_line(kind: str, data: st.DataObject) -> None:
    content = bytearray(file(Image.new("RGB", (9, 6), (40, 90, 200)), kind))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        with open_image(cut) as opened:
            size, count, pixels = opened.size, opened.num_frames, opened.rgb()
        assert pixels.shape == (*size, 3) and pixels.dtype == np.uint8 and count >= 1
    except ValueError as error:
        assert str(error) and "\n" not in str(error)


def test_too_large_images_are_rejected_before_decoding(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5) + 1
    for width, height in ((side, side), (2**31 - 1, 2**31 - 1), (65535, 65535)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
        path = tmp_path / "bomb.png"
        path.write_bytes(bomb + chunk(b"IEND", b""))
        with pytest.raises(ValueError, match=r"bomb\.png: more than the 178,956,970 pixels"):
            decode(path)


def test_irregular_files_are_rejected_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            decode(path)
    with pytest.raises(ValueError, match=r"none\.png does not exist"):
        decode(tmp_path / "none.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty\.png: cannot identify image file"):
        decode(tmp_path / "empty.png")


def test_animations_with_too_many_frames_are_rejected() -> None:
    png = file(Image.new("L", (2, 2)), "PNG")
    content = with_chunk(png, b"acTL", struct.pack(">II", 2**31 - 1, 0))
    with (
        pytest.raises(ValueError, match=r"frames, more than the 1,000,000"),
        open_image(content) as it,
    ):
        _ = it.num_frames


def test_animations_with_too_many_pixels_are_rejected_before_decoding(tmp_path: Path) -> None:
    frames = [Image.new("1", (20000, 8000), number % 2) for number in range(2)]
    content = file(frames[0], "PNG", save_all=True, append_images=frames[1:])
    place = content.index(b"acTL") - 4
    content = content[:place] + chunk(b"acTL", struct.pack(">II", 300, 0)) + content[place + 20 :]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png: 300 frames of 20000 x 8000 pixels, in all more"):
        measure(Media((str(path),), moving=True), 1)
    assert measure(Media((str(path),), moving=False), 1) == (1, 8000, 20000)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 10000), (10000, 1)])
def test_one_pixel_and_very_long_images_are_read(height: int, width: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    assert np.array_equal(decode(file(Image.fromarray(values), "PNG")), values)


def test_formats_of_installed_plugins_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another plugin is missing."""
    added = []
    plugin = ModuleType("pillow_heif")
    plugin.register_heif_opener = lambda: added.append("HEIF")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    pixels._load_plugins.cache_clear()
    assert "PNG" in pixels.formats() and "EPS" not in pixels.formats()
    assert added == ["HEIF"]
