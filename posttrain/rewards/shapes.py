"""Boxes, points and polygons that are written in an answer.

Coordinates are numbers in brackets: a box is ``[x1, y1, x2, y2]``, a point ``[x, y]``, a polygon
``[[x, y], [x, y], [x, y]]`` or ``[x, y, x, y, x, y]``. Round brackets, braces and any words between
them are accepted. Reading never raises, is not recursive, and takes linear time.
"""

import math
import re
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from posttrain.rewards.text import MAX_CHARS

MAX_SHAPES = 256
"""Shapes of an answer that are read: the first ones; the time of matching is bounded."""
MAX_VERTICES = 256
"""Polygons with more vertices are not read."""

Array = npt.NDArray[np.float64]

_TOKEN = re.compile(r"[\[({]|[\])}]|[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_LARGEST = 1e6  # of coordinates: areas and distances are far from overflow


@dataclass
class _Group:
    """Content of a pair of brackets."""

    numbers: list[float] = field(default_factory=list)
    points: list[list[float]] = field(default_factory=list)


def read_boxes(answer: str) -> Array:
    """The boxes, [n, 4] as x1, y1, x2, y2; those without an area are among them."""
    boxes = [group.numbers for group in _groups(answer) if len(group.numbers) == 4]
    return np.array(boxes[:MAX_SHAPES], dtype=np.float64).reshape(-1, 4)


def read_points(answer: str) -> Array:
    """The points, [n, 2]."""
    points = [group.numbers for group in _groups(answer) if len(group.numbers) == 2]
    return np.array(points[:MAX_SHAPES], dtype=np.float64).reshape(-1, 2)


def read_polygons(answer: str) -> list[Array]:
    """The polygons, each [vertices, 2]."""
    polygons = []
    for group in _groups(answer):
        if group.points:
            points = group.points
        elif len(group.numbers) % 2 == 0:
            points = [group.numbers[i : i + 2] for i in range(0, len(group.numbers), 2)]
        else:
            continue
        if 3 <= len(points) <= MAX_VERTICES and np.isfinite(points).all():
            polygons.append(np.array(points, dtype=np.float64))
    return polygons[:MAX_SHAPES]


def _groups(answer: str) -> list[_Group]:
    """All brackets with finite numbers, in the order in which they are closed."""
    if len(answer) > MAX_CHARS:
        return []
    groups: list[_Group] = []
    opened: list[_Group] = []
    for token in _TOKEN.findall(answer):
        if token in "[({":
            opened.append(_Group())
        elif token in "])}":
            if opened:
                group = opened.pop()
                groups.append(group)
                if opened and len(group.numbers) == 2:
                    opened[-1].points.append(group.numbers)
        elif opened:
            opened[-1].numbers.append(_coordinate(token))
    return [group for group in groups if all(map(math.isfinite, group.numbers))]


def _coordinate(text: str) -> float:
    number = float(text)
    return number if abs(number) <= _LARGEST else math.nan
