"""Attention over packed documents on a GPU equals the dense form in float64."""

import pytest
import torch

from pretrain.model.attention import attend, attend_dense, choose_kernel
from pretrain.model.packed_documents import PackedDocuments

# Document lengths of each sequence of a micro-batch.
LENGTHS = {
    "cuda": ([[512], [1] * 512], [[1, 2000, 47, 2048], [4096]], [[3, 130, 67]]),
    "cpu": ([[64], [1] * 64], [[3, 20, 9]]),
}
# Heads, groups of keys, and widths of queries and values: MLA, GQA and the tests' tiny model.
SHAPES = {
    "cuda": [(4, 4, 192, 128), (8, 2, 128, 128), (2, 2, 16, 8)],
    "cpu": [(4, 4, 24, 16), (4, 2, 16, 16)],
}
CASES = [
    pytest.param(device, shape, marks=[pytest.mark.gpu] if device == "cuda" else [])
    for device, shapes in SHAPES.items()
    for shape in shapes
]
# Relative error of outputs and gradients; of the max logits, which are not rounded to bfloat16.
TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (3e-2, 1e-4)}


@pytest.mark.parametrize(("device", "shape"), CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["whole", "context-parallel"])
def test_packed_attention_equals_the_dense_form(
    device: str, shape: tuple[int, int, int, int], dtype: torch.dtype, shared: bool
) -> None:
    """With flex_attention where it is supported; a context-parallel rank has two chunks."""
    heads, groups, d, v = shape
    close, exact = TOLERANCES[dtype]
    generator = torch.Generator().manual_seed(0)
    for lengths in LENGTHS[device]:
        length = sum(lengths[0])
        quarter = length // 4
        chunks = [(0, quarter), (length - quarter, length)] if shared else [(0, length)]
        queries = sum(stop - start for start, stop in chunks)
        sizes = (queries, (heads, d)), (length, (groups, d)), (length, (groups, v))
        expected = [
            torch.randn(rows, len(lengths), *size, generator=generator)
            .to(device, dtype)
            .double()
            .requires_grad_()
            for rows, size in sizes
        ]
        actual = [x.detach().to(dtype).requires_grad_() for x in expected]
        # Which float32 kernels fit on a GPU depends on the version of torch.
        if device == "cpu" or dtype == torch.bfloat16:
            flex = device == "cuda" and v >= 16 and queries >= 128
            assert choose_kernel(actual[0], actual[2]) == ("flex" if flex else "blocks")
        documents = PackedDocuments(lengths, torch.device(device), chunks)
        found, found_max = attend(*actual, documents, d**-0.5)
        output, output_max = attend_dense(*expected, documents, d**-0.5)
        gradient = torch.randn(output.shape, generator=generator).to(device, dtype)
        found.backward(gradient)
        output.backward(gradient.double())
        for ours, theirs in (
            (found, output),
            *((a.grad, e.grad) for a, e in zip(actual, expected, strict=True)),
        ):
            error = (ours.double() - theirs).norm() / theirs.norm()
            assert error < close, (lengths, heads, d)
        torch.testing.assert_close(found_max.double(), output_max, rtol=exact, atol=exact)
