"""Simulated steps agree with formulas of the pipeline, and with cases that are known exactly."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import dep_step
from benchmarks.dep_step import (
    DEP,
    FIRST_STAGE,
    MIXES,
    RECOMPUTING,
    ROUND_ROBIN,
    TEXT,
    Images,
    Workload,
    draw,
    run_pipeline,
    schedule,
    step_seconds,
)
from pretrain.encoder_process.cost import CostModel

# A pass of a chunk takes one second without interleaving, an image of n patches 4 n.
WORKLOAD = Workload("", CostModel(4.0, 0.0, 0.0), 0.0, 0.4, 0.0, 10, 8, 16, 1.0, stages=4)


@pytest.mark.parametrize("interleave", [1, 2, 3])
@pytest.mark.parametrize("stages", [2, 4])
def test_bubbles_are_those_of_narayanan_et_al(stages: int, interleave: int) -> None:
    """Efficient Large-Scale Language Model Training (2021), section 2.2: the pipeline is idle for
    (stages - 1) / interleave forward and backward passes."""
    batches = 4 * stages
    orders = schedule(stages, interleave, batches)
    for order in orders:
        assert set(Counter(order).values()) == {1} and len(order) == 2 * batches * interleave
    zeros = np.zeros((stages, 3)), np.zeros((batches, 3))
    ends = run_pipeline(orders, interleave, 1.0, *zeros)
    assert ends.shape == (stages, 3)
    assert (ends.max(0) == 3.0 * (batches * interleave + stages - 1)).all()
    assert (ends[0] == ends.max()).all()  # the first stage ends last


def test_a_slow_replica_delays_only_itself_until_all_meet() -> None:
    extra = np.zeros((8, 2))
    extra[-1, 1] = 5.0  # the last backward pass of the second replica
    ends = run_pipeline(schedule(4, 1, 8), 1, 1.0, np.zeros((4, 2)), extra)
    assert ends[0].tolist() == [33.0, 38.0]
    assert ends[-1, 0] == ends[-1, 1]


def images_of(patches: list[int], replicas: list[int]) -> Images:
    grids = torch.tensor([[1, 1, number] for number in patches])
    return Images(grids, np.array(replicas), np.zeros(len(patches), np.int64))


def test_modes_differ_by_who_encodes() -> None:
    images = images_of([8] * 8, [0] * 8)  # all images belong to the first of two replicas
    seconds = {
        mode: step_seconds(WORKLOAD, mode, images, 2)
        for mode in (TEXT, FIRST_STAGE, ROUND_ROBIN, DEP, RECOMPUTING)
    }
    text = 3.0 * (8 + 3)
    assert seconds[TEXT] == text
    assert seconds[DEP] == seconds[ROUND_ROBIN] == text + 3 * 8  # one image for each of 8 ranks
    assert seconds[RECOMPUTING] == text + 4 * 8
    assert seconds[FIRST_STAGE] > text + 2 * 64


def test_each_forward_pass_of_the_encoder_has_a_constant_cost() -> None:
    """One for each micro-batch with images on the first stage, and one for each rank with DEP."""
    workload = replace(WORKLOAD, encoder_pass=4.0)
    images = replace(images_of([8] * 4, [0] * 4), batches=np.array([0, 0, 1, 2]))
    seconds = dep_step.first_stage_seconds(workload, images, 1)
    assert seconds[:, 0].tolist() == [17.0, 9.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    spread = dep_step.spread_seconds(workload, images, np.array([0, 1, 1, 3]), 4)
    assert spread.tolist() == [9.0, 17.0, 0.0, 9.0]


def test_plans_balance_what_round_robin_does_not() -> None:
    images = images_of([64, 1, 1, 1, 1, 1, 1, 1, 64], [0] * 9)
    wide = step_seconds(WORKLOAD, ROUND_ROBIN, images, 2)  # rank 0 encodes both large images
    assert wide - step_seconds(WORKLOAD, DEP, images, 2) == 3 * 64


@pytest.mark.parametrize("mix", MIXES)
def test_mixes_have_their_share_of_image_tokens(mix: str) -> None:
    workload = replace(WORKLOAD, sequence=4096, median_patches=256, spread=0.5, micro_batches=16)
    images = draw(workload, mix, 256, np.random.default_rng(0))
    share = int(images.grids.prod(1).sum()) / 4 / (4096 * 16 * 256)
    assert share == pytest.approx(MIXES[mix][0], rel=0.1)
    assert images.replicas.max() < 256 and images.batches.max() < 16


def test_no_rank_is_counted_twice() -> None:
    """The steps of one replica on more ranks than images take as long as the largest image."""
    images = images_of([5, 9], [0, 0])
    alone = step_seconds(WORKLOAD, DEP, images, 1) - step_seconds(WORKLOAD, TEXT, images, 1)
    assert alone == 3 * 9
    assert dep_step.COLORS.keys() == {FIRST_STAGE, ROUND_ROBIN, RECOMPUTING, DEP}
