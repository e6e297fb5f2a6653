"""Blocks of fp8 weights are multiplied by their scales."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.export.hf_folder import dequantize
from tests.pretrain.export import published

sizes = st.integers(1, 40)


@given(sizes, sizes, sizes, sizes | st.just(1 << 60), st.integers(0, 99))
def test_dequantization_multiplies_each_block_by_its_scale(
    rows: int, columns: int, block_rows: int, block_columns: int, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    block = block_rows, block_columns
    quantized, scales = published.quantize(weight, block)
    found = dequantize(quantized, scales, block)
    assert torch.equal(found, published.dequantize(quantized, scales, block))
    # Three bits of the mantissa, and at most 2^-10 of the largest entry of the block.
    torch.testing.assert_close(found.float(), weight, rtol=1 / 15, atol=5e-3)
