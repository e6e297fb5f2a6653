"""Cost of an item: FLOPs or measured seconds to encode it, and bytes to send it."""

import dataclasses
import itertools
import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config import VisionConfig
from pretrain.errors import PretrainError
from pretrain.model.geometry import MERGE
from pretrain.model.projector import VisionTower
from pretrain.model.vision import Grid, num_features, observers_disabled
from pretrain.model.weights import vision_weights
from pretrain.runtime import atomic

Grids = Sequence[Grid]


@dataclass(frozen=True)
class CostModel:
    """Cost of encoding an item, in any unit: plans depend on ratios only.

    Attributes:
        per_patch: linear layers of the encoder.
        per_feature: projector; an item has one feature per 2 x 2 patches of a frame.
        per_pair: attention; an item has (number of patches)² pairs.
        per_item: overhead of each item.
    """

    per_patch: float
    per_feature: float
    per_pair: float
    per_item: float = 0.0

    def costs(self, grids: Tensor) -> npt.NDArray[np.float64]:
        """Cost of each item of int64 grids [n, 3]."""
        patches = grids.prod(1).cpu().numpy().astype(np.float64)
        features = num_features(grids).cpu().numpy().astype(np.float64)
        return (
            self.per_item
            + self.per_patch * patches
            + self.per_feature * features
            + self.per_pair * patches**2
        )

    def loads(self, grids: Tensor) -> npt.NDArray[np.int64]:
        """Costs as integers, in thousandths of ``per_patch``.

        Sums of integers are the same on every machine, see :mod:`pretrain.encoder_process.plan`.
        """
        return np.rint(self.costs(grids) * (1000 / self.per_patch)).astype(np.int64)


def analytic_cost(config: VisionConfig, language_hidden_size: int) -> CostModel:
    """FLOPs of the matrix products in a forward of encoder and projector.

    A multiply-add counts as two. A backward takes twice the FLOPs of a forward in every part, so
    the ratios are those of a whole step.
    """
    flops = dict.fromkeys(("vision encoder", "projector"), 0.0)
    for weight in vision_weights(config, language_hidden_size):
        if len(weight.shape) == 2:
            flops[weight.component] += 2 * weight.numel
    return CostModel(
        per_patch=flops["vision encoder"],
        per_feature=flops["projector"],
        # Queries times keys, and weights times values.
        per_pair=2.0 * config.num_layers * 2 * config.hidden_size,
    )


def activation_bytes(config: VisionConfig, itemsize: int) -> float:
    """Bytes per patch that autograd keeps of encoder and projector, ``itemsize`` bytes an
    element."""
    hidden = config.hidden_size
    wide = 4  # float32: the log-sum-exp of every query, and mean and deviation of two norms
    layer = (9 * hidden + 2 * config.ffn_hidden_size) * itemsize + (config.num_heads + 4) * wide
    positions = 16 * (8 + 4)  # weights and int32 indices of the interpolated table
    ends = (3 * config.patch_size**2 + 3 * hidden) * itemsize + positions
    projector = 3 * hidden * itemsize  # of a feature, whose width is that of its patches together
    return float(config.num_layers * layer + ends + projector)


def transfer_bytes(
    grids: Tensor, config: VisionConfig, language_hidden_size: int, itemsize: int
) -> npt.NDArray[np.int64]:
    """Bytes sent in a step for each item of grids [n, 3] that another rank than its owner encodes.

    They are its pixels (uint8), its features (``itemsize`` bytes an element), and their gradients.
    """
    pixels = grids.prod(1) * (3 * config.patch_size**2)
    features = num_features(grids) * (language_hidden_size * itemsize)
    sent: npt.NDArray[np.int64] = (pixels + 2 * features).cpu().numpy()
    return sent


def measured_cost(
    tower: VisionTower,
    group: dist.ProcessGroup | None,
    *,
    cache: Path | None = None,
    seconds: float = 2.0,
    max_patches: int = 4096,
) -> CostModel:
    """Cost model of this machine in seconds: the first rank measures, all ranks get the same.

    All ranks of the group must call it. Weights, gradients, observers and the random number
    generator are unchanged. Different measurements lead to different plans, and thus to another
    order in which gradients are summed: resuming is bit-exact only with ``cache``.

    Args:
        tower: encoder and projector.
        group: default: all ranks.
        cache: file of the first rank with an earlier measurement, which is used if configuration,
            device and version of torch are the same, and overwritten otherwise.
        seconds: approximate duration of the measurement.
        max_patches: most patches in one forward and backward, which bounds the memory.

    Raises:
        PretrainError: on all ranks, if the cache is damaged or cannot be written.
        RuntimeError: on all ranks, if the tower cannot run.
    """
    outcome: list[Any] = [None]
    error = None
    if dist.get_rank(group) == 0:
        try:
            outcome = [_measure(tower, cache, seconds, max_patches)]
        except PretrainError as caught:
            outcome = [caught]
        except Exception as caught:
            error, reason = caught, f"{type(caught).__name__}: {caught}"
            outcome = [
                RuntimeError(f"the first rank cannot measure the vision encoder's cost: {reason}")
            ]
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    result = outcome[0]
    if isinstance(result, CostModel):
        return result
    raise result from error


def _measure(tower: VisionTower, cache: Path | None, seconds: float, max_patches: int) -> CostModel:
    """Read the cost model from the cache, or measure it and write the cache."""
    weight = tower.projector.fc2.weight
    device = weight.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    setting = {
        "config": dataclasses.asdict(tower.encoder.config),
        "language_hidden_size": weight.shape[0],
        "dtype": str(weight.dtype),
        "device": f"{name}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    if cache is not None and cache.exists():
        try:
            stored = json.loads(cache.read_text())
            stored_setting, model = stored["setting"], CostModel(**stored["model"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PretrainError(f"{cache} has no measured cost model: delete it") from error
        if stored_setting == setting:
            return model
    flops = analytic_cost(tower.encoder.config, weight.shape[0])
    model = fit_cost(flops, time_packs(tower, seconds=seconds, max_patches=max_patches))
    if cache is not None:
        stored = {"setting": setting, "model": dataclasses.asdict(model)}
        atomic.write_text(cache, json.dumps(stored, indent=1) + "\n")
    return model


def fit_cost(flops: CostModel, samples: Sequence[tuple[Grids, float]]) -> CostModel:
    """Fit seconds to FLOPs by non-negative least squares of the relative errors.

    The coefficients are the overhead of a pass (not part of the result, because every rank has it),
    the overhead of an item, and the time per FLOP of matrix products and of attention. A weak prior
    says that both kinds of FLOPs are equally fast: if attention is a small part of all samples,
    noise would otherwise determine the cost of much larger items.

    Args:
        flops: :func:`analytic_cost`.
        samples: (items of a pack, seconds of the pack), see :func:`time_packs`.

    Returns:
        The model in seconds; ``flops``, with a warning, if time does not grow with patches, because
        the samples were too small or disturbed.
    """
    linear = dataclasses.replace(flops, per_pair=0.0, per_item=0.0)
    pairs = CostModel(0.0, 0.0, flops.per_pair)
    rows = []
    for grids, seconds in samples:
        shapes = torch.tensor(grids)
        columns = [1.0, len(grids), linear.costs(shapes).sum(), pairs.costs(shapes).sum()]
        rows.append(np.array(columns) / seconds)
    # Weighs as much as one sample in which attention is a twentieth.
    prior = max(row[2] for row in rows) / 20
    rows.append(np.array([0.0, 0.0, -prior, prior]))
    targets = np.append(np.ones(len(samples)), 0.0)
    _, per_item, product, attention = _non_negative_least_squares(np.array(rows), targets)
    if not product > 0:
        warnings.warn(
            "the measured time of the vision encoder does not grow with its patches: FLOPs are "
            "used as its cost instead",
            stacklevel=2,
        )
        return flops
    return CostModel(
        per_patch=product * flops.per_patch,
        per_feature=product * flops.per_feature,
        per_pair=attention * flops.per_pair,
        per_item=per_item,
    )


def _non_negative_least_squares(
    design: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]
) -> list[float]:
    """The x >= 0 that minimizes |design x - targets|: the best over all subsets of the columns."""
    scale = np.abs(design).max(0)
    scale = np.where(scale, scale, 1)
    design = design / scale
    num_columns = design.shape[1]
    best_error, best = math.inf, np.zeros(num_columns)
    for size in range(1, num_columns + 1):
        for subset in map(list, itertools.combinations(range(num_columns), size)):
            x = np.zeros(num_columns)
            x[subset] = np.linalg.lstsq(design[:, subset], targets, rcond=None)[0]
            error = float(np.square(design @ x - targets).sum())
            if (x >= 0).all() and error < best_error:
                best_error, best = error, x
    solution: list[float] = (best / scale).tolist()
    return solution


def time_packs(
    tower: VisionTower, *, seconds: float, max_patches: int
) -> list[tuple[Grids, float]]:
    """(pack, better of two :func:`step_seconds`) of few and many patches, small and large items."""
    total = 64
    # As many patches as time allows, so that the overhead of a pass does not hide the rest.
    while 2 * total <= max_patches and step_seconds(tower, _pack(total, 8.0)) < seconds / 40:
        total *= 2
    # Sides of an item on a logarithmic scale, from small to all patches in one item.
    smallest, largest = 4 * MERGE, math.isqrt(total)
    sides = [smallest * (largest / smallest) ** (step / 3) for step in range(4)]
    packs = [_pack(patches, side) for patches in (total // 4, total) for side in sides]
    for pack in packs:
        step_seconds(tower, pack)
    times = [[step_seconds(tower, pack) for pack in packs] for _ in range(2)]
    return list(zip(packs, map(min, zip(*times, strict=True)), strict=True))


def _pack(total: int, side: float) -> Grids:
    """Items with about ``total`` patches and different grids, whose sides are about ``side``."""
    grids: list[Grid] = []
    while total > 0:
        # A low-discrepancy sequence: multiples of two irrational numbers fill a square evenly.
        point = (0.7549 * len(grids) % 1, 0.5698 * len(grids) % 1)
        rows, columns = (
            max(MERGE, round(min(side * 4 ** (x - 0.5), math.sqrt(total)) / MERGE) * MERGE)
            for x in point
        )
        grids.append((1, rows, columns))
        total -= rows * columns
    return grids


def step_seconds(tower: VisionTower, grids: Grids) -> float:
    """Seconds of DEP's stages for these items: forward, recomputation and backward.

    Process time on a CPU, which does not depend on other processes.
    """
    weights = [weight for weight in tower.parameters() if weight.requires_grad]
    device = next(tower.parameters()).device
    shapes = torch.tensor(grids, device=device)
    width = 3 * tower.encoder.config.patch_size**2
    patches = torch.zeros(int(shapes.prod(1).sum()), width, dtype=torch.uint8, device=device)

    def now() -> float:
        if device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(device)
        return time.perf_counter()

    with observers_disabled(tower):
        start = now()
        with torch.no_grad():
            tower(patches, shapes)
        with torch.enable_grad():
            features = tower(patches, shapes)
            if weights:
                # Unlike backward(), it does not write .grad.
                torch.autograd.grad(features.sum(), weights)
        return now() - start
