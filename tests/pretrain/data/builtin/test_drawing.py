"""Drawn images show their caption, fit the encoder, and are reproducible."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert len(drawing.font_paths()) >= 5


def test_text_is_drawn_with_contrast() -> None:
    options = ImageConfig(clip_share=0, wrapped_share=0, large_share=0)
    for seed in range(50):
        pixels = drawing.draw("Wm", options, 14, np.random.default_rng(seed)).pixels[0]
        assert np.ptp(pixels[..., 0].astype(int)) > 60 or np.ptp(pixels[..., 2].astype(int)) > 60


def test_machines_without_fonts_use_the_font_in_pillow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drawing, "font_paths", tuple)
    item = drawing.draw("hello", ImageConfig(), 14, np.random.default_rng(0))
    assert np.ptp(item.pixels.astype(int)) > 60


@given(st.integers(0, 2**32))
def test_captions_are_words_of_a_line_within_the_length_limits(seed: int) -> None:
    lines = ["a few words of a line", "another line, of other words"]
    options = ImageConfig(min_chars=4, max_chars=12)
    caption = drawing.pick_caption(lines, options, np.random.default_rng(seed))
    assert 4 <= len(caption) <= 12
    assert any(f" {caption} " in f" {line} " for line in lines)


def test_text_without_words_of_the_length_is_an_error() -> None:
    options = ImageConfig(min_chars=10, max_chars=12)
    with pytest.raises(PretrainError, match="min_chars=10 to max_chars=12: the text has no words"):
        drawing.pick_caption(["a b c"], options, np.random.default_rng(0))
