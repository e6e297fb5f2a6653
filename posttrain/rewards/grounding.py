"""Rewards of boxes, points and polygons.

The report (arXiv 2602.02276, section 4.4) names the rewards; limits, scales and formats are this
project's choice. Answers are text of a model: a shape that cannot be read does not count. The truth
is data: a wrong one is an error.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from posttrain.rewards.shapes import (
    MAX_SHAPES,
    MAX_VERTICES,
    Array,
    read_boxes,
    read_points,
    read_polygons,
)

SIGMA = 0.02
"""Default standard deviation of points, as a share of the larger side of the image."""
RESOLUTION = 256
"""Default number of rows and columns of a raster."""


def soft_f1(similarity: Array) -> float:
    """F1 with soft matches, in [0, 1], under the one-to-one matching of largest total similarity.

    With total similarity S of n answers and m truths, precision is S/n and recall S/m, so that F1
    is 2S / (n + m). It is 1 if there are neither answers nor truths.

    Args:
        similarity: [n, m], each in [0, 1].
    """
    answers, truths = similarity.shape
    if answers + truths == 0:
        return 1.0
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return float(min(1.0, 2 * similarity[rows, columns].sum() / (answers + truths)))


def iou(first: Array, second: Array) -> Array:
    """Intersection over union of each pair of boxes, [n, m]; 0 for boxes without an area.

    Args:
        first: [n, 4] as x1, y1, x2, y2.
        second: [m, 4].
    """
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    intersection = np.clip(high - low, 0, None).prod(axis=2)
    union = _areas(first)[:, None] + _areas(second)[None] - intersection
    return np.asarray(
        np.divide(intersection, union, out=np.zeros_like(union), where=intersection > 0)
    )


def _areas(boxes: Array) -> Array:
    return np.asarray(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1))


def boxes_reward(answer: str, truth: Sequence[Sequence[float]]) -> float:
    """F1 of the boxes of an answer with their IoU as soft matches (:func:`soft_f1`), in [0, 1].

    Args:
        answer: text with boxes as in :mod:`posttrain.rewards.shapes`.
        truth: the boxes, each x1, y1, x2, y2 in the units of the answer; none is possible.

    Raises:
        ValueError: a box of the truth has no area or is not finite.
    """
    boxes = _shapes(truth, 4)
    if not (_areas(boxes) > 0).all():
        raise ValueError(f"truth={truth}: boxes are x1, y1, x2, y2 with x1 < x2 and y1 < y2")
    return soft_f1(iou(read_boxes(answer), boxes))


def points_reward(answer: str, truth: Sequence[Sequence[float]], *, sigma: float) -> float:
    """F1 of the points of an answer, with exp(-(d / sigma)² / 2) of their distances d as matches.

    Args:
        answer: text with points as in :mod:`posttrain.rewards.shapes`.
        truth: the points, each x, y in the units of the answer; none is possible.
        sigma: standard deviation in the same units. The report does not publish it;
            :data:`SIGMA` of the image's larger side is this project's choice.

    Raises:
        ValueError: a point of the truth is not finite, or ``sigma`` is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma={sigma}: must be positive")
    points = _shapes(truth, 2)
    offsets = (read_points(answer)[:, None] - points[None]) / sigma
    return soft_f1(np.exp(-0.5 * np.square(offsets).sum(axis=2)))


def _shapes(truth: Sequence[Sequence[float]], size: int) -> Array:
    """
    Raises:
        ValueError: a shape does not have ``size`` finite numbers.
    """
    if any(len(shape) != size for shape in truth) or len(truth) > MAX_SHAPES:
        raise ValueError(f"truth={truth}: must be up to {MAX_SHAPES} lists of {size} numbers")
    shapes = np.array(truth, dtype=np.float64).reshape(-1, size)
    if not np.isfinite(shapes).all():
        raise ValueError(f"truth={truth}: must be finite")
    return shapes


def rasterize(polygon: Array, size: tuple[float, float], resolution: int) -> npt.NDArray[np.bool_]:
    """Cells of an image whose center is inside a polygon by the even-odd rule.

    Args:
        polygon: [vertices, 2] as x, y; parts outside the image are cut off.
        size: width and height of the image, in the units of the polygon.
        resolution: number of rows and of columns.

    Returns:
        bool [resolution, resolution], rows first.
    """
    scaled = polygon * (resolution / np.array(size)) - 0.5  # centers are integers
    crossings = np.zeros((resolution, resolution + 1), dtype=np.int64)
    for (x1, y1), (x2, y2) in zip(scaled, np.roll(scaled, -1, axis=0), strict=True):
        if y1 == y2:
            continue
        low, high = sorted((y1, y2))  # rows low <= y < high cross the edge
        first, last = (int(np.clip(np.ceil(y), 0, resolution)) for y in (low, high))
        rows = np.arange(first, last)
        crossed = x1 + (rows - y1) * ((x2 - x1) / (y2 - y1))
        # The cells from here on, to the right, are on the other side of the edge.
        crossings[rows, np.clip(np.ceil(crossed), 0, resolution).astype(np.int64)] += 1
    return np.asarray(crossings[:, :-1].cumsum(axis=1) % 2 == 1)


def polygons_reward(
    answer: str,
    truth: Sequence[Sequence[Sequence[float]]],
    *,
    size: tuple[float, float],
    resolution: int = RESOLUTION,
) -> float:
    """IoU of the mask of an answer's polygons with the mask of the truth, in [0, 1].

    The polygons of each are drawn into one mask.

    Args:
        answer: text with polygons as in :mod:`posttrain.rewards.shapes`.
        truth: one or more polygons, each a list of x, y.
        size: width and height of the image, in the units of the polygons.
        resolution: rows and columns of the masks.

    Raises:
        ValueError: ``size`` or ``resolution`` is not positive, or the truth has no cell of the
            raster.
    """
    if not (min(size) > 0 and resolution > 0):
        raise ValueError(f"size={size}, resolution={resolution}: must be positive")
    if any(len(polygon) > MAX_VERTICES for polygon in truth):
        raise ValueError(f"truth has a polygon with more than {MAX_VERTICES} vertices")
    true_mask = _mask([_shapes(polygon, 2) for polygon in truth], size, resolution)
    if not true_mask.any():
        raise ValueError(
            f"truth={truth} covers no cell of {resolution} x {resolution}: increase resolution"
        )
    mask = _mask(read_polygons(answer), size, resolution)
    return float((mask & true_mask).sum() / (mask | true_mask).sum())


def _mask(
    polygons: Sequence[Array], size: tuple[float, float], resolution: int
) -> npt.NDArray[np.bool_]:
    mask = np.zeros((resolution, resolution), dtype=bool)
    for polygon in polygons:
        mask |= rasterize(polygon, size, resolution)
    return mask
