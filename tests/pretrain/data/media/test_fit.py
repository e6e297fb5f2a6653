"""Images of any size are fitted as the published processor fits them."""

import ast
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.media.fit import Limits, fit, fitted_size, frame_groups, limits
from pretrain.data.media.patches import patchify

lengths = st.one_of(st.integers(1, 100), st.integers(1, 20000))


def their_sizes() -> Callable[..., Any]:
    """The published function, taken from a module whose import requires torchvision."""
    pytest.importorskip("transformers", minversion="5.23")
    spec = importlib.util.find_spec("transformers.models.kimi_k25.image_processing_kimi_k25")
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    functions = [node for node in tree.body if getattr(node, "name", "") == "navit_resize"]
    names: dict[str, Any] = {"math": math}
    exec(compile(ast.Module(functions, []), spec.origin, "exec"), names)
    return names["navit_resize"]  # type: ignore[no-any-return]


def test_sizes_are_those_of_transformers() -> None:
    theirs = their_sizes()

    @settings(deadline=None, max_examples=300)
    @given(lengths, lengths, st.integers(1, 20), st.integers(4, 20000), st.integers(2, 600))
    def agree(height: int, width: int, patch: int, max_patches: int, max_side: int) -> None:
        chosen = Limits(image=max_patches, side=max_side)
        ours = fitted_size(height, width, patch, limits=chosen)
        assert ours == theirs(height, width, patch, 2, max_patches, max_side)

    agree()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 70), st.sampled_from([2, 14]))
def test_small_images_are_only_padded(frames: int, height: int, width: int, patch: int) -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (frames, height, width, 3), dtype=np.uint8)
    fitted = fit(pixels, patch)
    assert np.array_equal(fitted[:, :height, :width], pixels)
    assert not fitted[:, height:].any() and not fitted[:, :, width:].any()
    _, (_, rows, columns) = patchify(fitted, patch)
    assert rows % 2 == columns % 2 == 0
    assert (rows - 2) * patch < height <= rows * patch


@settings(deadline=None, max_examples=300)
@given(
    lengths,
    lengths,
    st.integers(64, 600) | st.sampled_from([4096, 131072]),
    st.none() | st.integers(1, 5000),
    st.sampled_from([2, 14, 16]),
)
def test_images_of_any_shape_fit_the_context(
    height: int, width: int, seq_length: int, max_image_tokens: int | None, patch: int
) -> None:
    most = limits(seq_length, max_image_tokens)
    for num_frames in (1, 2):
        _, (rows, columns) = fitted_size(height, width, patch, num_frames, most)
        tokens = (rows // patch // 2) * (columns // patch // 2)
        assert tokens + 4 <= seq_length


def test_limits_follow_the_settings_if_these_fit_the_context() -> None:
    assert limits(128).image == 128
    assert limits(4096, 1000) == (4000, 4000, 512)
    assert limits(131072, 10**6) == (16384, 4096, 512)


def test_large_clips_are_shrunk_with_their_content() -> None:
    # Left half dark, right half bright.
    pixels = np.full((2, 100, 300, 3), 50, dtype=np.uint8)
    pixels[:, :, 150:] = 200
    fitted = fit(pixels, 4, limits=Limits(frame=200))
    (height, width), padded = fitted_size(100, 300, 4, 2, Limits(frame=200))
    assert (height // 4) * (width // 4) <= 200 and (height, width) != (100, 300)
    assert fitted.shape == (2, *padded, 3)
    assert (fitted[:, :height, : width // 2 - 2] == 50).all()
    assert (fitted[:, :height, width // 2 + 2 : width] == 200).all()


def test_frames_of_clips_are_limited_more_than_images() -> None:
    image = np.zeros((1, 300, 300, 3), dtype=np.uint8)
    assert fit(image, 3).shape == (1, 300, 300, 3)
    assert fit(np.repeat(image, 2, 0), 3).shape == (2, 192, 192, 3)


@given(st.integers(1, 100))
def test_a_clip_is_cut_into_groups_of_four_frames(frames: int) -> None:
    groups = [list(range(frames))[group] for group in frame_groups(frames)]
    assert [frame for group in groups for frame in group] == list(range(frames))
    assert [len(group) for group in groups[:-1]] == [4] * (len(groups) - 1)
    assert 1 <= len(groups[-1]) <= 4


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((1, 4, 4, 3), dtype=np.float32), "pixels must be uint8"),
        (np.zeros((4, 4, 3), dtype=np.uint8), r"\[frames, height, width, 3\]"),
        (np.zeros((1, 4, 4, 4), dtype=np.uint8), r"not uint8 \[1, 4, 4, 4\]"),
        (np.zeros((0, 4, 4, 3), dtype=np.uint8), "at least one frame"),
        (np.zeros((1, 0, 4, 3), dtype=np.uint8), "0 x 4 pixels is empty"),
    ],
)
def test_arrays_other_than_rgb_images_are_rejected(pixels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(pixels, 2)


def test_a_clip_without_frames_is_rejected() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        frame_groups(0)
