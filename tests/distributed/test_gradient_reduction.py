"""Options of gradient reduction change when it happens, not its result."""

from pathlib import Path

import pytest
import torch

from tests.distributed import training
from tests.distributed.launch import launch

OVERLAP = "ddp.overlap_grad_reduce=true"
SMALL_BUCKETS = "ddp.bucket_size=1000"


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, ("expert=2",)),
        (2, ("tensor=2",)),
        (4, ("pipeline=2", "interleave=2", "expert=2")),
    ],
)
def test_reduction_during_the_backward_pass_gives_the_same_gradients(
    folder: Path, world_size: int, layout: tuple[str, ...]
) -> None:
    sizes = [f"parallel.{size}" for size in layout]
    every = [(), (OVERLAP,), (OVERLAP, SMALL_BUCKETS)]
    for afterwards, *during in launch(
        training.gradients_of_each, world_size, str(folder), every, training.EXACT, *sizes,
        "language.num_layers=4",
    ):  # fmt: skip
        for gradients in during:
            assert gradients.keys() == afterwards.keys()
            for name, shard in gradients.items():
                for (_, one), (_, other) in zip(shard.blocks, afterwards[name].blocks, strict=True):
                    assert torch.equal(one, other), name
