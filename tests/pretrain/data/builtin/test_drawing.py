"""Drawn images show their caption, fit the encoder, and are reproducible."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFont

from pretrain.config import ImageConfig
from pretrain.data.builtin import drawing
from pretrain.errors import PretrainError
from pretrain.model.geometry import MAX_FRAMES

captions = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30)


@settings(deadline=None, max_examples=50)
@given(captions, st.integers(0, 2**32), st.sampled_from([8, 14]))
def test_items_fit_the_encoder_and_are_reproducible(
    caption: str, seed: int, patch_size: int
) -> None:
    options = ImageConfig(clip_share=0.3, wrapped_share=0.3, large_share=0.3)
    item = drawing.draw(caption, options, patch_size, np.random.default_rng(seed))
    frames, height, width, channels = item.pixels.shape
    assert item.caption == caption
    assert item.pixels.dtype == np.uint8
    assert 1 <= frames <= MAX_FRAMES
    assert channels == 3
    assert height % (2 * patch_size) == width % (2 * patch_size) == 0
    again = drawing.draw(caption, options, patch_size, np.random.default_rng(seed))
    assert np.array_equal(item.pixels, again.pixels)


def test_fonts_sizes_and_shapes_vary_and_some_items_are_clips() -> None:
    rng = np.random.default_rng(0)
    items = [drawing.draw("one two three", ImageConfig(), 14, rng) for _ in range(300)]
    assert len({item.pixels.shape[1:3] for item in items}) >= 10
    assert 10 < sum(item.pixels.shape[0] > 1 for item in items) < 60


def test_text_is_drawn_with_contrast() -> None:
    options = ImageConfig(clip_share=0, wrapped_share=0, large_share=0)
    for seed in range(50):
        pixels = drawing.draw("Wm", options, 14, np.random.default_rng(seed)).pixels[0]
        assert np.ptp(pixels[..., 0].astype(int)) > 60 or np.ptp(pixels[..., 2].astype(int)) > 60


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.floats(0.1, 0.9))
def test_letters_are_as_faint_as_wanted_and_otherwise_the_same(seed: int, least: float) -> None:
    """Same shapes in fainter ink: the brightest and the darkest pixels are nearer to each other."""
    plain = ImageConfig(clip_share=0, wrapped_share=0, large_share=0)
    usual = drawing.draw("Wm", plain, 14, np.random.default_rng(seed)).pixels[0].astype(int)
    options = replace(plain, min_contrast=least)
    faint = drawing.draw("Wm", options, 14, np.random.default_rng(seed)).pixels[0].astype(int)
    assert faint.shape == usual.shape
    # Noise of 8 is added to each, and 8 is kept free at both ends of the range.
    contrast, before = np.ptp(faint, axis=(0, 1)), np.ptp(usual, axis=(0, 1))
    assert np.all(contrast <= before + 32)
    assert np.all(contrast >= least * (before - 48) - 1)


def test_pixels_do_not_depend_on_the_fonts_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only matplotlib's own files are opened, by their names: a new font changes nothing."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    opened = []

    def truetype(path: str, *args: Any, **options: Any) -> ImageFont.FreeTypeFont:
        opened.append(Path(path))
        assert options["layout_engine"] == ImageFont.Layout.BASIC  # the other needs a library
        return original(path, *args, **options)

    def refuse(*_args: Any) -> None:
        raise AssertionError("folders are not searched for fonts")

    original = ImageFont.truetype
    monkeypatch.setattr(ImageFont, "truetype", truetype)
    monkeypatch.setattr(Path, "rglob", refuse)
    monkeypatch.setattr(Path, "glob", refuse)
    drawing.font_paths.cache_clear()
    drawing._font.cache_clear()
    for seed in range(100):
        drawing.draw("hello", ImageConfig(), 14, np.random.default_rng(seed))
    assert {path.parent for path in opened} == {folder}
    assert len({path.name for path in opened}) == 16


def test_every_font_has_all_printable_characters_of_ascii() -> None:
    for path in drawing.font_paths():
        with TTFont(path, lazy=True) as font:
            assert set(font.getBestCmap()) >= set(range(0x20, 0x7F)), path


def test_a_missing_font_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(PretrainError, match=r"has no font DejaVuSans.ttf .* reinstall matplotlib"):
        drawing.font_paths.__wrapped__()


@given(st.integers(0, 2**32))
def test_captions_are_words_of_a_line_within_the_length_limits(seed: int) -> None:
    lines = ["a few words of a line", "another line, of other words"]
    options = ImageConfig(min_chars=4, max_chars=12)
    caption = drawing.pick_caption(lines, options, np.random.default_rng(seed))
    assert 4 <= len(caption) <= 12
    assert any(f" {caption} " in f" {line} " for line in lines)


@given(st.integers(0, 2**32), st.booleans())
def test_captions_can_be_single_words_or_pieces_of_a_line(seed: int, cut: bool) -> None:
    lines = ["a few words of a line", "another line of other words"]
    options = ImageConfig(min_chars=3, max_chars=6, max_words=1)
    pick = drawing.pick_piece if cut else drawing.pick_caption
    caption = pick(lines, options, np.random.default_rng(seed), lambda text: text != "line")
    assert 3 <= len(caption) <= 6 and caption != "line"
    places = ["".join(filter(str.isalpha, line)) for line in lines] if cut else lines
    assert any(caption in (place if cut else place.split()) for place in places)


def test_rare_lengths_are_found_and_pieces_are_no_longer_than_lines() -> None:
    options = ImageConfig(min_chars=10, max_chars=12, max_words=1)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert drawing.pick_caption(["a"] * 2000 + ["dictionary"], options, rng) == "dictionary"
    long = ImageConfig(min_chars=3, max_chars=200)
    lengths = set()
    for seed in range(50):
        rng = np.random.default_rng(seed)
        lengths.add(len(drawing.pick_piece(["twelve letters"], long, rng)))
    assert 13 in lengths and max(lengths) == 13 and min(lengths) >= 3


def test_text_without_words_of_the_length_is_an_error() -> None:
    options = ImageConfig(min_chars=10, max_chars=12)
    with pytest.raises(PretrainError, match="min_chars=10 to max_chars=12: the text has no words"):
        drawing.pick_caption(["a b c"], options, np.random.default_rng(0))
    with pytest.raises(PretrainError, match="min_chars=10 to max_chars=12: the text has no words"):
        drawing.pick_piece(["a b c"], options, np.random.default_rng(0))
