"""QK-Clip over real processes: the largest logit of any rank decides on every rank."""

import pytest
import torch
import torch.distributed as dist

from muonclip import AttentionLayout, QKClip
from tests.distributed.launch import launch


def clip_once(pairs: bool) -> tuple[list[list[float]], int, torch.Tensor]:
    """One step where rank r's logits are 100 * (r + 1) in head 0 and 1 in head 1.

    With ``pairs`` only ranks (0, 1), (2, 3)… are joined.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = None
    if pairs:
        groups = [dist.new_group([first, first + 1]) for first in range(0, world_size, 2)]
        group = groups[rank // 2]
    query, key = torch.ones(4, 3), torch.ones(4, 3)
    layout = AttentionLayout.separate(query, key, num_heads=2)
    other = AttentionLayout.separate(torch.ones(4, 3), torch.ones(4, 3), num_heads=2)
    clip = QKClip({"layer": layout, "other": other}, threshold=100.0, process_group=group)
    clip.observe("layer", torch.tensor([100.0 * (rank + 1), 1.0]))
    result = clip.step()
    maxima = [maximum.tolist() for maximum in result.max_logits.values()]
    return maxima, int(result.num_clipped), query @ key.T


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_maximum_over_ranks(world_size: int) -> None:
    untouched = torch.ones(4, 3) @ torch.ones(4, 3).T
    for maxima, num_clipped, logits in launch(clip_once, world_size, False):
        assert maxima == [[100.0 * world_size, 1.0], [-torch.inf, -torch.inf]]
        assert num_clipped == (world_size > 1)
        assert torch.allclose(logits[:2, :2], untouched[:2, :2] / world_size)
        assert torch.equal(logits[2:, 2:], untouched[2:, 2:])


def test_only_the_process_group_counts() -> None:
    """Tensor-parallel neighbours hold other heads: their maxima must stay out."""
    results = launch(clip_once, 4, True)
    assert [maxima[0][0] for maxima, _, _ in results] == [200.0, 200.0, 400.0, 400.0]
