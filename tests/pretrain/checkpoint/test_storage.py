"""Writers of blocks are chosen without communication, with a balanced load."""

from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint import storage

SIZES = st.lists(st.integers(0, 100), max_size=40)


@given(SIZES, st.integers(1, 9))
def test_every_item_has_one_rank_and_loads_are_balanced(sizes: list[int], count: int) -> None:
    chosen = storage.shares(sizes, count)
    assert sorted(index for indices in chosen for index in indices) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in indices) for indices in chosen]
    assert max(loads) - min(loads) <= max(sizes, default=0)
