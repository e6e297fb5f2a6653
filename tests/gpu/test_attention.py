"""Attention over packed documents on a GPU equals the dense form on a CPU in float64."""

import pytest
import torch

from pretrain.model.attention import PackedDocuments, attend, attend_dense
from tests.gpu.devices import DEVICES

# Document lengths of each sequence, and rows of queries and keys: a short and a long sequence.
LENGTHS = {
    "cuda": ([[512], [1] * 512], [[1, 2000, 47, 2048], [4096]], [[3, 130, 67]]),
    "cpu": ([[64], [1] * 64], [[3, 20, 7]]),
}
# Heads, groups of keys, and widths of queries and values: MLA, GQA and the tests' tiny model.
SHAPES = {
    "cuda": [(4, 4, 192, 128), (8, 2, 128, 128), (2, 2, 16, 8)],
    "cpu": [(4, 4, 24, 16), (4, 2, 16, 16)],
}
# Relative error of outputs and gradients; of the max logits, which are not rounded to bfloat16.
TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (3e-2, 1e-4)}


@DEVICES
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_packed_attention_equals_the_dense_form(device: str, dtype: torch.dtype) -> None:
    close, exact = TOLERANCES[dtype]
    generator = torch.Generator().manual_seed(0)
    for lengths in LENGTHS[device]:
        for heads, groups, d, v in SHAPES[device]:
            shapes = [(heads, d), (groups, d), (groups, v)]
            rows = sum(lengths[0]), len(lengths)
            expected = [
                torch.randn(*rows, *shape, generator=generator).to(dtype).double().requires_grad_()
                for shape in shapes
            ]
            actual = [x.detach().to(device, dtype).requires_grad_() for x in expected]
            found, found_max = attend(
                *actual, PackedDocuments(lengths, torch.device(device)), d**-0.5
            )
            output, output_max = attend_dense(
                *expected, PackedDocuments(lengths, torch.device("cpu")), d**-0.5
            )
            gradient = torch.randn(output.shape, generator=generator).to(dtype)
            found.backward(gradient.to(device))
            output.backward(gradient.double())
            pairs = [
                (found, output),
                *((a.grad, e.grad) for a, e in zip(actual, expected, strict=True)),
            ]
            for ours, theirs in pairs:
                error = (ours.cpu().double() - theirs).norm() / theirs.norm()
                assert error < close, (lengths, heads, d)
            torch.testing.assert_close(found_max.cpu().double(), output_max, rtol=exact, atol=exact)
