"""Layouts find the model's matrices in storage, and a step treats each separately."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonclip import MatrixLayout, MuonClip


@dataclass(frozen=True)
class Stored:
    """A layout, and the shape of a parameter that it describes."""

    layout: MatrixLayout
    shape: tuple[int, ...]


def stored(
    inputs: int,
    blocks: tuple[int, ...] | None = None,
    repeats: int = 1,
    *,
    rows: int | None = None,
    experts: int | None = None,
    separate: bool = False,
    transposed: bool = False,
) -> Stored:
    """Matrices with this number of inputs, stored in a matrix or a stack."""
    outputs = repeats * sum(blocks) if blocks else rows or 1
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    layout = MatrixLayout(blocks, repeats, separate=separate, transposed=transposed)
    return Stored(layout, shape if experts is None else (experts, *shape))


@st.composite
def layouts(draw: st.DrawFn) -> Stored:
    """Any layout, with a parameter that has it."""
    sizes = st.integers(1, 4)
    blocks = draw(st.none() | st.lists(sizes, min_size=1, max_size=3).map(tuple))
    repeats = draw(sizes) if blocks else 1
    kind = draw(st.sampled_from(["matrix", "stack", "kernel", "view"]))
    plain = stored(
        draw(sizes),
        blocks,
        repeats,
        rows=draw(sizes),
        experts=draw(sizes) if kind == "stack" else None,
        separate=draw(st.booleans()),
        transposed=kind != "kernel" and draw(st.booleans()),
    )
    if kind == "kernel":
        kernel = draw(st.lists(sizes, min_size=1, max_size=3))
        layout = MatrixLayout(blocks, repeats, separate=plain.layout.separate, flatten=True)
        return Stored(layout, (*plain.shape, *kernel))
    if kind == "view":
        layout = MatrixLayout(
            blocks,
            repeats,
            separate=plain.layout.separate,
            transposed=plain.layout.transposed,
            view=plain.shape,
        )
        n, m = plain.shape
        return Stored(layout, draw(st.sampled_from([(m, n), (1, n * m), (n, m, 1)])))
    return plain


def matrices_of(parameter: Tensor, layout: MatrixLayout) -> list[Tensor]:
    """The definition in the class's docstring, row by row."""
    if layout.view is not None:
        parameter = parameter.contiguous().view(layout.view)
    if layout.flatten:
        parameter = parameter.flatten(1)
    stack = parameter if parameter.ndim == 3 else parameter[None]
    found = []
    for one in stack:
        rows = list(one.T if layout.transposed else one)
        if layout.blocks is None:
            found.append(torch.stack(rows))
            continue
        of_block: list[list[list[Tensor]]] = [[] for _ in layout.blocks]
        for _ in range(layout.repeats):
            for block, count in enumerate(layout.blocks):
                of_block[block].append([rows.pop(0) for _ in range(count)])
        for repeats in of_block:
            if layout.separate:
                found += [torch.stack(matrix) for matrix in repeats]
            else:
                found.append(torch.stack([row for matrix in repeats for row in matrix]))
    return found


def sorted_matrices(matrices: Sequence[Tensor]) -> list[Any]:
    return sorted(matrix.tolist() for matrix in matrices)


@settings(deadline=None)
@given(layouts())
def test_split_gives_the_matrices_of_the_definition(case: Stored) -> None:
    parameter = torch.arange(float(torch.Size(case.shape).numel())).view(case.shape)
    case.layout.check(case.shape)
    split = [matrix for stack in case.layout.split(parameter) for matrix in stack]
    assert sorted_matrices(split) == sorted_matrices(matrices_of(parameter, case.layout))


@settings(deadline=None)
@given(layouts())
def test_join_is_the_inverse_of_split(case: Stored) -> None:
    parameter = torch.randn(case.shape)
    assert torch.equal(case.layout.join(case.layout.split(parameter), case.shape), parameter)
    # Also of storage that is not contiguous.
    strided = torch.randn(*case.shape, 2)[..., 0]
    assert torch.equal(case.layout.join(case.layout.split(strided), case.shape), strided)


@settings(deadline=None)
@given(layouts(), st.data())
def test_slices_of_a_stack_are_split_separately(case: Stored, data: st.DataObject) -> None:
    """Required when each rank orthogonalizes some of the experts."""
    slices = case.layout.slices(case.shape)
    if slices == 1:
        return
    first = data.draw(st.integers(0, slices - 1))
    last = data.draw(st.integers(first + 1, slices))
    parameter = torch.randn(case.shape)
    part = parameter[first:last]
    assert torch.equal(case.layout.join(case.layout.split(part), part.shape), part)
    whole = [matrix for stack in case.layout.split(parameter) for matrix in stack]
    for stack in case.layout.split(part):
        assert all(any(torch.equal(matrix, other) for other in whole) for matrix in stack)


def steps_apart(case: Stored, steps: int) -> float:
    """The difference between a fused parameter and its matrices trained as separate parameters.

    With a scale that tells rows from columns.
    """
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {
        "lr": 0.1, "ns_dtype": torch.float64, "adjust_lr": "original", "weight_decay": 0.1
    }  # fmt: skip
    start = torch.randn(case.shape, generator=generator, dtype=torch.float64)
    fused = nn.Parameter(start.clone())
    apart = [nn.Parameter(matrix.clone()) for matrix in matrices_of(start, case.layout)]
    one = MuonClip([{"params": [fused], "layout": case.layout, "algorithm": "muon"}], **options)
    many = MuonClip([{"params": apart, "algorithm": "muon"}], **options)
    for _ in range(steps):
        fused.grad = torch.randn(case.shape, generator=generator, dtype=torch.float64)
        for parameter, gradient in zip(apart, matrices_of(fused.grad, case.layout), strict=True):
            parameter.grad = gradient.clone()
        one.step()
        many.step()
    return max(
        float((actual - expected).detach().abs().max())
        for actual, expected in zip(matrices_of(fused.detach(), case.layout), apart, strict=True)
    )


@settings(max_examples=50, deadline=None)
@given(layouts())
@example(Stored(MatrixLayout(blocks=(1, 1), transposed=True), (1, 2)))  # of strides that say little
def test_a_step_equals_the_step_of_separate_parameters(case: Stored) -> None:
    assert steps_apart(case, 1) <= 1e-12


HIDDEN, HEADS, GROUPS, DIM, FFN, EXPERTS = 6, 4, 2, 3, 5, 3
QUERIES = HEADS // GROUPS * DIM


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(stored(HIDDEN, (FFN, FFN)), id="gate-up-MLM#7077-torchtitan#4532"),
        pytest.param(
            stored(HIDDEN, (FFN, FFN), repeats=2), id="gate-up-under-tensor-parallelism"
        ),
        pytest.param(stored(HIDDEN, (1, 1), repeats=FFN), id="gate-up-in-alternate-rows"),
        pytest.param(stored(HIDDEN, (DIM, DIM, DIM), HEADS), id="qkv-of-each-head"),
        pytest.param(
            stored(HIDDEN, (HEADS * DIM, GROUPS * DIM, GROUPS * DIM)), id="qkv-one-after-another"
        ),
        pytest.param(stored(HIDDEN, (QUERIES, DIM, DIM), GROUPS), id="qkv-by-group"),
        pytest.param(
            stored(HIDDEN, (DIM,) * (HEADS // GROUPS + 2), GROUPS, separate=True),
            id="qkv-by-group-each-head",
        ),
        pytest.param(
            stored(HIDDEN, (QUERIES, QUERIES, DIM, DIM), GROUPS), id="gated-qkv-MLM#4731"
        ),
        pytest.param(
            stored(HIDDEN, (DIM,) * (2 * HEADS // GROUPS + 2), GROUPS, separate=True),
            id="gated-qkv-each-head-MLM#4731",
        ),
        pytest.param(stored(HIDDEN, (4, 2), HEADS), id="mla-query-nope-rope"),
        pytest.param(stored(HIDDEN, (4, 2), HEADS, separate=True), id="mla-query-each-head"),
        pytest.param(stored(HIDDEN, (4, 3), HEADS), id="mla-kv-up"),
        pytest.param(stored(HIDDEN, (4, 3), HEADS, separate=True), id="mla-kv-up-each-head"),
        pytest.param(stored(HIDDEN, (8, 2)), id="mla-latent-and-rotary-key"),
        pytest.param(stored(HIDDEN, rows=FFN, transposed=True), id="conv1d-of-transformers"),
        pytest.param(stored(HIDDEN, (DIM,) * 3, transposed=True), id="conv1d-qkv"),
        pytest.param(stored(HIDDEN, rows=FFN, experts=EXPERTS), id="experts-maxtext#4798"),
        pytest.param(
            stored(HIDDEN, (FFN, FFN), experts=EXPERTS), id="experts-gate-up-torchtitan#4532"
        ),
        pytest.param(
            stored(HIDDEN, (FFN, FFN), experts=EXPERTS, transposed=True),
            id="experts-gate-up-transposed",
        ),
        pytest.param(
            stored(HIDDEN, (1, 1), FFN, experts=EXPERTS, transposed=True),
            id="experts-gate-up-alternate-transposed",
        ),
        pytest.param(
            stored(HIDDEN, (FFN,), EXPERTS, separate=True), id="experts-below-each-other"
        ),
        pytest.param(
            Stored(
                MatrixLayout((FFN, FFN), transposed=True, view=(EXPERTS, HIDDEN, 2 * FFN)),
                (HIDDEN, EXPERTS * 2 * FFN),
            ),
            id="experts-of-a-grouped-gemm",
        ),
        pytest.param(
            Stored(
                MatrixLayout(transposed=True, view=(HIDDEN, HEADS * DIM)), (HIDDEN, HEADS, DIM)
            ),
            id="einsum-weight",
        ),
        pytest.param(Stored(MatrixLayout(flatten=True), (4, 3, 2, 2)), id="convolution"),
        pytest.param(
            Stored(MatrixLayout((2,), 3, separate=True, flatten=True), (6, 2, 3)),
            id="grouped-convolution",
        ),
        pytest.param(stored(7, rows=1), id="one-row-speculators#821"),
        pytest.param(stored(1, rows=7), id="one-column"),
    ],
)  # fmt: skip
def test_layouts_of_real_models_equal_separate_parameters(case: Stored) -> None:
    assert steps_apart(case, 3) <= 1e-12


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_grouped_convolution_equals_one_convolution_per_group(groups: int) -> None:
    """Compared with torch's grouped convolution, not only with the layout."""
    torch.manual_seed(0)
    whole = nn.Conv1d(6, 12, 3, groups=groups, bias=False, dtype=torch.float64)
    parts = [
        nn.Conv1d(6 // groups, 12 // groups, 3, bias=False, dtype=torch.float64)
        for _ in range(groups)
    ]
    for part, rows in zip(parts, whole.weight.detach().chunk(groups), strict=True):
        part.weight.data.copy_(rows)
    layout = MatrixLayout((12 // groups,), groups, separate=True, flatten=True)
    flat = MatrixLayout(flatten=True)
    options: dict[str, Any] = {"lr": 0.1, "ns_dtype": torch.float64}
    one = MuonClip([{"params": [whole.weight], "layout": layout, "algorithm": "muon"}], **options)
    many = MuonClip(
        [{"params": [p.weight for p in parts], "layout": flat, "algorithm": "muon"}], **options
    )
    for _ in range(2):
        x = torch.randn(2, 6, 5, dtype=torch.float64)
        out = whole(x)
        out_parts = torch.cat(
            [part(piece) for part, piece in zip(parts, x.chunk(groups, 1), strict=True)], 1
        )
        torch.testing.assert_close(out, out_parts, rtol=0, atol=1e-12)
        out.square().sum().backward()
        out_parts.square().sum().backward()
        one.step()
        many.step()
        one.zero_grad()
        many.zero_grad()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MatrixLayout(()), "blocks must be a tuple of positive integers"),
        (lambda: MatrixLayout((3, 0)), r"blocks must be .* got \(3, 0\)"),
        (lambda: MatrixLayout((True, 2)), "blocks must be"),
        (lambda: MatrixLayout(4), "blocks must be .* got 4"),
        (lambda: MatrixLayout((2,), 0), "repeats must be a positive integer"),
        (lambda: MatrixLayout(repeats=2), "repeats requires blocks"),
        (lambda: MatrixLayout(transposed=True, flatten=True), "flatten cannot be combined"),
        (lambda: MatrixLayout(view=(2, 2), flatten=True), "flatten cannot be combined"),
        (lambda: MatrixLayout(view=(2,)), "view must be a shape"),
        (lambda: MatrixLayout.per_head(10, 4), "10 rows cannot be split into 4 heads"),
        (lambda: MatrixLayout.per_head(10, 0), "10 rows cannot be split into 0 heads"),
    ],
)
def test_invalid_layouts_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        (MatrixLayout(), (3,), r"shape \(3,\) is neither a matrix"),
        (MatrixLayout(), (3, 3, 3, 3), "is neither a matrix"),
        (MatrixLayout((2, 2)), (5, 4), r"1 x \(2, 2\) add up to 4 rows, not 5"),
        (MatrixLayout((2, 2), 2, transposed=True), (8, 4), r"2 x \(2, 2\) add up to 8 .* not 4"),
        (MatrixLayout((2, 2)), (4, 5, 4), "add up to 4 rows, not 5"),
        (MatrixLayout(flatten=True), (4, 4), "flatten is for kernels"),
        (MatrixLayout((3,), flatten=True), (4, 2, 2), "add up to 3 rows, not 4"),
        (MatrixLayout(view=(4, 3)), (3, 3), r"shape \(3, 3\) cannot be read as \(4, 3\)"),
    ],
)
def test_parameters_of_other_shapes_are_refused(
    layout: MatrixLayout, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layout.check(shape)


@settings(deadline=None)
@given(layouts())
def test_layouts_compare_and_load_by_value(case: Stored) -> None:
    """Parameter groups are keyed by layouts and saved with them, for torch's safe loader."""
    file = io.BytesIO()
    torch.save(case.layout, file)
    file.seek(0)
    again = torch.load(file)
    assert again == case.layout and hash(again) == hash(case.layout)
    assert str(again) == str(case.layout)
    parsed = MatrixLayout.parse(str(case.layout))
    assert parsed == case.layout or (parsed.repeats == 1 and case.layout.separate)


@settings(deadline=None)
@given(layouts(), layouts())
@example(stored(2, (2, 2), 3), stored(2, (6, 6)))
@example(stored(2, (1, 3), 4, transposed=True), stored(2, (2, 6), 2, transposed=True))
def test_layouts_that_differ_in_order(one: Stored, other: Stored) -> None:
    """The same matrices, whose rows lie elsewhere in storage."""
    numbers = torch.arange(prod(one.shape)).view(one.shape)
    differ = one.layout.differs_in_order(other.layout)
    assert differ == other.layout.differs_in_order(one.layout)
    if differ and one.shape == other.shape:
        matrices = [layout.split(numbers) for layout in (one.layout, other.layout)]
        assert [m.shape for m in matrices[0]] == [m.shape for m in matrices[1]]
        assert not all(map(torch.equal, *matrices))


def test_layouts_are_printed_in_words() -> None:
    assert str(MatrixLayout()) == "one matrix"
    assert str(MatrixLayout((4, 2))) == "rows 4 + 2"
    assert str(MatrixLayout.per_head(8, 4)) == "rows 2, 4 times, separate"
    assert (
        str(MatrixLayout((4, 4), 2, transposed=True)) == "rows 4 + 4, 2 times, merged, transposed"
    )
    assert str(MatrixLayout(view=(2, 3))) == "read as 2x3"
