"""Layouts select the right rows and refuse weights of other shapes."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from muonclip import AttentionLayout, HeadRows


def test_separate() -> None:
    layout = AttentionLayout.separate(
        nn.Linear(5, 8), nn.Linear(5, 4, bias=False), num_heads=4, num_kv_groups=2
    )
    assert layout.query.rows.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.key.rows.tolist() == [[0, 1], [2, 3]]
    assert layout.query.bias is not None and layout.key.bias is None
    assert (layout.num_heads, layout.num_kv_groups) == (4, 2)


def test_fused() -> None:
    layout = AttentionLayout.fused(torch.zeros(16, 5), num_heads=4, num_kv_groups=2)
    assert layout.query.rows.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.key.rows.tolist() == [[8, 9], [10, 11]]


def test_fused_by_group() -> None:
    """q q k v | q q k v, as megatron-core stores it."""
    layout = AttentionLayout.fused_by_group(torch.zeros(16, 5), num_heads=4, num_kv_groups=2)
    assert layout.query.rows.tolist() == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert layout.key.rows.tolist() == [[4, 5], [12, 13]]


def test_fused_by_group_with_output_gate() -> None:
    """Megatron-LM#4731: q q gate gate k v | …; gates are not queries."""
    layout = AttentionLayout.fused_by_group(
        torch.zeros(12, 5), num_heads=4, num_kv_groups=2, output_gate=True
    )
    assert layout.query.rows.tolist() == [[0], [1], [6], [7]]
    assert layout.key.rows.tolist() == [[4], [10]]


def test_mla() -> None:
    layout = AttentionLayout.mla(
        torch.zeros(10, 3), torch.zeros(12, 3), num_heads=2, nope_dim=3, rope_dim=2, v_dim=3
    )
    assert layout.query.rows.tolist() == [[0, 1, 2], [5, 6, 7]]
    assert layout.query_rope is not None
    assert layout.query_rope.rows.tolist() == [[3, 4], [8, 9]]
    assert layout.key.rows.tolist() == [[0, 1, 2], [6, 7, 8]]


def test_weights_stored_as_columns() -> None:
    """GPT-2's Conv1D, [in, out]: a head's rows are columns."""
    layout = AttentionLayout.fused(
        (torch.zeros(5, 12), torch.zeros(12)), num_heads=2, num_kv_groups=1, dim=1
    )
    assert layout.query.rows.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert layout.key.rows.tolist() == [[6, 7, 8]]
    layout = AttentionLayout.separate(
        torch.zeros(5, 8), torch.zeros(5, 4), num_heads=2, num_kv_groups=1, dim=1
    )
    assert layout.query.rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_gains() -> None:
    """A norm over all heads' queries with one gain per head, [heads * d] or [heads, d]."""
    layout = AttentionLayout.separate(torch.ones(8), torch.ones(4), num_heads=4, num_kv_groups=2)
    assert layout.query.rows.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    layout = AttentionLayout.separate(nn.LayerNorm((4, 2)), torch.ones(4, 2), num_heads=4)
    assert layout.query.rows.tolist() == [[0], [1], [2], [3]]


def test_a_layout_follows_replaced_parameters() -> None:
    """FSDP2 replaces parameters after a layout is made."""
    linear = nn.Linear(5, 12)
    layout = AttentionLayout.fused(linear, num_heads=2)
    by_function = AttentionLayout.fused(lambda: (linear.weight, linear.bias), num_heads=2)
    linear.weight = nn.Parameter(torch.ones(12, 5))
    assert layout.query.weight is linear.weight and by_function.key.weight is linear.weight


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: AttentionLayout.separate(torch.zeros(9, 2), torch.zeros(8, 2), num_heads=4),
            "query has 9 rows, which cannot be split into 4 heads",
        ),
        (
            lambda: AttentionLayout.separate(torch.zeros(8, 2), torch.zeros(4, 2), num_heads=4),
            "check num_heads and num_kv_groups",
        ),
        (
            lambda: AttentionLayout.separate(
                torch.zeros(6, 2), torch.zeros(4, 2), num_heads=3, num_kv_groups=2
            ),
            "3 query heads cannot be shared by 2 key groups",
        ),
        (lambda: AttentionLayout.fused(torch.zeros(10, 2), num_heads=4), "qkv has 10 rows"),
        (
            lambda: AttentionLayout.fused_by_group(
                torch.zeros(10, 2), num_heads=3, num_kv_groups=2
            ),
            "3 query heads cannot be shared",
        ),
        (
            lambda: AttentionLayout.mla(
                torch.zeros(10, 3), torch.zeros(11, 3), num_heads=2, nope_dim=3, rope_dim=2, v_dim=3
            ),
            r"kv_up has 11 rows, but num_heads \* \(nope_dim \+ v_dim\) is 12",
        ),
        (lambda: AttentionLayout.fused(nn.ReLU(), num_heads=1), "ReLU has no weight"),
        (lambda: HeadRows(torch.zeros(3), torch.zeros(1, 1).long(), dim=1), "dim must be one of"),
        (lambda: HeadRows(torch.zeros(3, 2), torch.zeros(1, 1)), "rows must be int64"),
        (lambda: HeadRows(torch.zeros(3, 2), torch.tensor([[3]])), r"rows must lie in 0..2"),
        (lambda: HeadRows(torch.zeros(3, 2), torch.tensor([[0], [0]])), "rows must not repeat"),
        (
            lambda: HeadRows((torch.zeros(3, 2), torch.zeros(2)), torch.tensor([[0]])),
            r"bias must be \[3\]",
        ),
        (
            lambda: HeadRows(
                (torch.zeros(3, 2), torch.zeros(2)),
                torch.tensor([[0]]),
                bias_rows=torch.tensor([[2]]),
            ),
            r"bias_rows must lie in 0..1",
        ),
        (
            lambda: HeadRows(torch.zeros(3, 2), torch.tensor([[0]]), bias_rows=torch.tensor([[2]])),
            "the projection has no bias",
        ),
        (
            lambda: HeadRows(
                (torch.zeros(3, 2), torch.zeros(3)),
                torch.tensor([[0]]),
                bias_rows=torch.tensor([[0], [1]]),
            ),
            "bias_rows has 2 heads, rows has 1",
        ),
        (
            lambda: AttentionLayout.fused(torch.zeros(6), num_heads=1, dim=1),
            "dim must be one of the 1 of qkv",
        ),
    ],
)
def test_errors_name_the_shape(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
