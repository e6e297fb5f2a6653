"""The documents of text alone in sequences of pretraining."""

from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain import data
from pretrain.errors import PretrainError


@given(period=st.integers(1, 40), offset=st.integers(0, 50), start=st.integers(0, 99))
def test_replayed_documents_are_those_of_the_next_sequences_with_text(
    period: int, offset: int, start: int
) -> None:
    """Or an error, instead of an endless search: every ``period``-th sequence has text."""

    def texts(_data: Any, _split: str, index: int) -> list[Any]:
        return [(torch.tensor([index]), torch.ones(1))] * (index % period == offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "texts", texts)
        found = data.replayed(None, "sft.replay_share", start)  # type: ignore[arg-type]
        expected = [i for i in range(start, start + 4 * period) if i % period == offset]
        if expected:
            assert [int(one[0][0]) for one in islice(found, 4)] == expected[:4]
        else:
            with pytest.raises(PretrainError, match=r"no document of text.*sft\.replay_share=0"):
                next(found)
