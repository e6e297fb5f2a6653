"""Features of an image are cut where the next token is on another rank."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.encoder_process.exchange import cut


@given(items=st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=6))
def test_items_are_cut_into_the_longest_runs_of_one_rank(items: list[list[int]]) -> None:
    ranks = torch.tensor([rank for item in items for rank in item], dtype=torch.int64)
    cuts = cut(ranks, [len(item) for item in items])
    assert [[rank for rank, rows in runs for _ in range(rows)] for runs in cuts] == items
    for runs in cuts:
        assert all(before[0] != after[0] for before, after in pairwise(runs))
