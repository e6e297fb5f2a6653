"""Rewards of shapes are in [0, 1], 1 for the truth, and independent of the order of shapes."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.rewards.grounding import (
    boxes_reward,
    iou,
    points_reward,
    polygons_reward,
    rasterize,
    soft_f1,
)
from posttrain.rewards.shapes import (
    MAX_SHAPES,
    MAX_VERTICES,
    read_boxes,
    read_points,
    read_polygons,
)
from posttrain.rewards.text import MAX_CHARS

coordinate = st.integers(0, 20)
box = st.tuples(coordinate, coordinate, st.integers(1, 9), st.integers(1, 9)).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
boxes = st.lists(box, max_size=4)
point = st.tuples(coordinate, coordinate).map(list)
points = st.lists(point, max_size=4)
# Texts that resemble shapes more often than not.
hostile = (
    st.text(st.sampled_from("[](){},. 0123456789-eEnaif\u0663\ud800"), max_size=60) | st.text()
)
SQUARE = [[2, 2], [8, 2], [8, 8], [2, 8]]


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 1000))
def test_matching_is_the_best_of_all(answers: int, truths: int, seed: int) -> None:
    similarity = np.random.default_rng(seed).random((answers, truths))
    wide = similarity if answers <= truths else similarity.T
    rows = range(len(wide))
    totals = (
        sum(wide[row, column] for row, column in zip(rows, columns, strict=True))
        for columns in itertools.permutations(range(wide.shape[1]), len(wide))
    )
    best = max(totals, default=0.0)
    expected = 2 * best / (answers + truths) if answers + truths else 1.0
    assert soft_f1(similarity) == pytest.approx(expected, abs=1e-12)


@given(boxes, boxes, st.randoms())
def test_boxes(answer: list[Any], truth: list[Any], rng: random.Random) -> None:
    reward = boxes_reward(f"{answer}", truth)
    assert 0 <= reward <= 1
    assert boxes_reward(f"{truth}", truth) == 1
    assert reward == pytest.approx(boxes_reward(f"{truth}", answer), abs=1e-12)
    shuffled = rng.sample(answer, len(answer))
    assert boxes_reward(f"{shuffled}", truth) == pytest.approx(reward, abs=1e-12)


@given(box, box)
def test_iou_counts_cells(first: list[int], second: list[int]) -> None:
    def cells(b: list[int]) -> set[tuple[int, int]]:
        return {(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])}

    expected = len(cells(first) & cells(second)) / len(cells(first) | cells(second))
    assert iou(np.array([first], float), np.array([second], float)).item() == expected


@given(boxes.filter(bool))
def test_a_false_box_costs_reward(truth: list[Any]) -> None:
    count = len(truth)
    for false in ([100, 100, 101, 101], [5, 5, 5, 9], [9, 9, 1, 1]):  # two have no area
        assert boxes_reward(f"{[*truth, false]}", truth) == 2 * count / (2 * count + 1)
    assert boxes_reward(f"{truth[1:]}", truth) == pytest.approx(2 * (count - 1) / (2 * count - 1))


@given(points, points, st.randoms())
def test_points(answer: list[Any], truth: list[Any], rng: random.Random) -> None:
    reward = points_reward(f"{answer}", truth, sigma=2)
    assert 0 <= reward <= 1
    assert points_reward(f"{truth}", truth, sigma=2) == 1
    shuffled = rng.sample(truth, len(truth))
    assert points_reward(f"{answer}", shuffled, sigma=2) == pytest.approx(reward, abs=1e-12)


@given(point, point, point)
def test_a_closer_point_has_no_smaller_reward(truth: Any, first: Any, second: Any) -> None:
    closer, other = sorted((first, second), key=lambda p: np.square(np.subtract(p, truth)).sum())
    rewards = [points_reward(f"{p}", [truth], sigma=3) for p in (closer, other)]
    assert rewards[0] >= rewards[1]


def test_points_by_hand() -> None:
    # One standard deviation from the first of two points: 2 · exp(-1/2) / (1 + 2).
    reward = points_reward("(3, 0)", [[0, 0], [50, 50]], sigma=3)
    assert reward == pytest.approx(2 * np.exp(-0.5) / 3)


def test_polygons_by_hand() -> None:
    size, half = (10, 10), [[2, 2], [5, 2], [5, 8], [2, 8]]
    assert polygons_reward(f"{SQUARE}", [SQUARE], size=size) == 1
    assert polygons_reward(f"{half}", [SQUARE], size=size, resolution=100) == 0.5
    assert polygons_reward("2 2 8 8", [SQUARE], size=size) == 0
    # The rest of the square, as a second polygon.
    rest = [[5, 2], [8, 2], [8, 8], [5, 8]]
    assert polygons_reward(f"{half} and {rest}", [SQUARE], size=size, resolution=100) == 1
    flat = [number for vertex in SQUARE for number in vertex]
    assert polygons_reward(f"{flat}", [SQUARE], size=size) == 1


@settings(max_examples=50)
@given(st.lists(point, min_size=3, max_size=6), st.integers(0, 5))
def test_a_raster_is_the_even_odd_rule(polygon: list[Any], start: int) -> None:
    mask = rasterize(np.array(polygon, float), (20, 20), 16)
    for row, column in itertools.product(range(16), repeat=2):
        x, y = (column + 0.5) * 20 / 16, (row + 0.5) * 20 / 16
        inside = False
        for (x1, y1), (x2, y2) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
            if (y1 > y) != (y2 > y):
                crossing = x1 + (y - y1) * (x2 - x1) / (y2 - y1)
                if abs(crossing - x) < 1e-9:  # on an edge: either side
                    break
                inside ^= crossing < x
        else:
            assert mask[row, column] == inside
    # Neither the first vertex nor the direction matters.
    turned = np.roll(np.array(polygon, float), start, axis=0)
    assert (rasterize(turned[::-1], (20, 20), 16) == mask).mean() > 0.9


@given(hostile)
def test_any_answer_has_a_reward(answer: str) -> None:
    assert 0 <= boxes_reward(answer, [[0, 0, 1, 1]]) <= 1
    assert 0 <= points_reward(answer, [[0, 0]], sigma=1) <= 1
    assert 0 <= polygons_reward(answer, [SQUARE], size=(10, 10), resolution=16) <= 1


@pytest.mark.parametrize("answer", ["[" * MAX_CHARS, "[1e999, 2, 3, 4]", "[1,2,3]", "1, 2, 3, 4"])
def test_unreadable_boxes_are_not_there(answer: str) -> None:
    assert len(read_boxes(answer)) == 0
    assert boxes_reward(answer, []) == 1
    assert boxes_reward(answer, [[0, 0, 1, 1]]) == 0


def test_sizes_are_bounded() -> None:
    assert len(read_boxes("[1,2,3,4]" * 1000)) == MAX_SHAPES
    assert len(read_points("(1,2)" * 1000)) == MAX_SHAPES
    assert not read_polygons("[[1, 2], [1e9, 3], [4, 5], [6, 7]]")
    assert not read_polygons(f"{[[0, 1]] * (MAX_VERTICES + 1)}")
    assert len(read_boxes("[1,2,3,4]" * MAX_CHARS)) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        *((boxes_reward, [[0, 0, 0, 1]], {}), (boxes_reward, [[1, 2]], {})),
        *((boxes_reward, [[0, 0, float("nan"), 1]], {}), (points_reward, [[1, 2]], {"sigma": 0})),
        (points_reward, [[float("inf"), 2]], {"sigma": 1}),
        (polygons_reward, [[[0, 0], [0, 1e-9], [1e-9, 0]]], {"size": (10, 10)}),
        (polygons_reward, [SQUARE], {"size": (0, 10)}),
        (polygons_reward, [SQUARE * 100], {"size": (10, 10)}),
    ],
)
def test_a_wrong_truth_is_an_error(arguments: Any) -> None:
    reward, truth, options = arguments
    with pytest.raises(ValueError):
        reward("", truth, **options)
