"""Patches are laid out like a convolution kernel, and can be put together again."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.media.patches import patchify, unpatchify


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([2, 5, 14]),
    st.integers(0, 2**32),
)
@settings(deadline=None)
def test_a_linear_layer_on_patches_equals_a_convolution_on_pixels(
    frames: int, rows: int, columns: int, patch: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (frames, rows * patch, columns * patch, 3), dtype=np.uint8)
    kernel = torch.from_numpy(rng.normal(size=(5, 3, patch, patch)))
    patches, grid = patchify(pixels, patch)
    assert grid == (frames, rows, columns)
    assert np.array_equal(unpatchify(patches, grid, patch), pixels)
    linear = torch.from_numpy(patches).double() @ kernel.flatten(1).T
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).double()
    convolved = torch.nn.functional.conv2d(planes, kernel, stride=patch)
    torch.testing.assert_close(linear, convolved.permute(0, 2, 3, 1).flatten(0, 2))


@pytest.mark.parametrize("size", [(28, 29), (27, 28)])
def test_sizes_that_are_not_multiples_of_the_patch_size_are_rejected(size: tuple[int, int]) -> None:
    message = f"{size[0]} x {size[1]} pixels is not a multiple of the patch size 14: pad it"
    with pytest.raises(ValueError, match=message):
        patchify(np.zeros((1, *size, 3), np.uint8), 14)
