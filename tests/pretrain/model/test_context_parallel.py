"""The ranks of a context-parallel group share every sequence evenly, and restore its order."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.model.context_parallel import SequenceShare


def _shares(size: int) -> list[SequenceShare]:
    return [SequenceShare(rank, size) for rank in range(size)]


@given(size=st.integers(1, 9), chunk=st.integers(1, 5), dim=st.integers(0, 2))
def test_gathered_shares_are_the_sequence(size: int, chunk: int, dim: int) -> None:
    length = 2 * size * chunk
    whole = torch.randn(length, 2, 3).movedim(0, dim)
    parts = [share.take(whole, dim) for share in _shares(size)]
    assert {part.shape[dim] for part in parts} == {2 * chunk}
    for share in _shares(size):
        gathered = torch.cat([part.movedim(dim, 0) for part in parts])
        assert torch.equal(share.restore(gathered).movedim(0, dim), whole)


@given(size=st.integers(1, 9), chunk=st.integers(1, 5))
def test_each_token_is_on_the_rank_that_takes_it(size: int, chunk: int) -> None:
    length = 2 * size * chunk
    positions = torch.arange(length)
    for share in _shares(size):
        local = share.take(positions, 0)
        assert torch.equal(local, (share.ranks(length) == share.rank).nonzero()[:, 0])
        # Ascending: image features keep their order.
        assert local.tolist() == sorted(local.tolist())


@given(size=st.integers(1, 9), chunk=st.integers(1, 5))
def test_all_ranks_have_the_same_number_of_keys(size: int, chunk: int) -> None:
    length = 2 * size * chunk
    keys = torch.arange(1, length + 1)  # of each token, with causal attention
    totals = {int(share.take(keys, 0).sum()) for share in _shares(size)}
    assert totals == {length * (length + 1) // 2 // size}


def test_gradients_return_to_the_tokens() -> None:
    whole = torch.zeros(12, requires_grad=True)
    share = SequenceShare(1, 3)
    share.take(whole, 0).backward(torch.tensor([1.0, 2, 3, 4]))
    assert whole.grad is not None
    assert whole.grad.tolist() == [0, 0, 1, 2, 0, 0, 0, 0, 3, 4, 0, 0]
