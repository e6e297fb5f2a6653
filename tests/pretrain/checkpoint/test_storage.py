"""Writers of blocks are chosen without communication, with a balanced load."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint import storage
from pretrain.errors import PretrainError

SIZES = st.lists(st.integers(0, 100), max_size=40)


@given(SIZES, st.integers(1, 9))
def test_every_item_has_one_rank_and_loads_are_balanced(sizes: list[int], count: int) -> None:
    chosen = storage.shares(sizes, count)
    assert sorted(index for indices in chosen for index in indices) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in indices) for indices in chosen]
    assert max(loads) - min(loads) <= max(sizes, default=0)


@pytest.mark.parametrize("number", [0, 2])
def test_a_checkpoint_whose_blocks_do_not_fill_a_tensor_is_not_to_be_removed(
    tmp_path: Path, number: int
) -> None:
    file, block = "rank-00000-0.safetensors", ["rank-00000-0.safetensors", [0], [3]]
    entry = {"dtype": "F32", "shape": [3], "blocks": [block] * number}
    manifest = {"step": 1, "facts": {}, "files": {file: ""}, "tensors": {"weight": entry}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        PretrainError, match=f"'weight' has {3 * number} elements in it, not 3"
    ) as e:
        storage.Checkpoint.open(tmp_path)
    assert "move it out of" in str(e.value) and "remove" not in str(e.value)
