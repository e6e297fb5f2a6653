"""What an item costs: to encode, counted from shapes or measured here; and to send."""

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
from pretrain.model.geometry import MERGE
from pretrain.model.projector import VisionTower
from pretrain.model.vision import num_features, observers_disabled

Grids = Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class CostModel:
    """Cost of encoding an item: a sum over its patches, its features and its pairs of patches.

    All in one unit, whichever: only ratios matter to a plan.

    Attributes:
        per_patch: linear layers of the encoder.
        per_feature: the projector; a feature is 2x2 patches, averaged over the frames of a clip.
        per_pair: attention, in which each patch of an item meets all of them, in all its frames.
        per_item: what each item costs, however small.
    """

    per_patch: float
    per_feature: float
    per_pair: float
    per_item: float = 0.0

    def costs(self, grids: Tensor) -> npt.NDArray[np.float64]:
        """Of each item of int64 grids [n, 3]."""
        patches = grids.prod(1).cpu().numpy().astype(np.float64)
        features = num_features(grids).cpu().numpy().astype(np.float64)
        return (
            self.per_item
            + self.per_patch * patches
            + self.per_feature * features
            + self.per_pair * patches**2
        )

    def loads(self, grids: Tensor) -> npt.NDArray[np.int64]:
        """The costs as integers: thousandths of ``per_patch``.

        Integers add up to the same on every machine, see :mod:`pretrain.encoder_process.plan`.
        """
        return np.rint(self.costs(grids) * (1000 / self.per_patch)).astype(np.int64)


def analytic_cost(config: VisionConfig, language_hidden_size: int) -> CostModel:
    """The FLOPs of a forward through encoder and projector, counted from their shapes.

    Two for each multiplication and addition in a matrix product; other work is small beside them.
    A backward is twice a forward in all parts, so that the ratios are those of a whole step.
    """
    hidden = config.hidden_size
    merged = MERGE * MERGE * hidden
    layer = 4 * hidden**2 + 2 * hidden * config.ffn_hidden_size
    return CostModel(
        per_patch=2.0 * (3 * config.patch_size**2 * hidden + config.num_layers * layer),
        per_feature=2.0 * (merged**2 + merged * language_hidden_size),
        # A product of queries with keys, and one of weights with values.
        per_pair=2.0 * config.num_layers * 2 * hidden,
    )


def transfer_bytes(
    grids: Tensor, config: VisionConfig, language_hidden_size: int, itemsize: int
) -> npt.NDArray[np.int64]:
    """Bytes sent in a step because an item is encoded away from its owner.

    Its pixels there, as uint8; its features back and their gradients there.

    Args:
        grids: int64 [n, 3].
        config: of the encoder.
        language_hidden_size: width of a feature.
        itemsize: bytes of an element of the features: 4 in float32, 2 in bfloat16.
    """
    pixels = grids.prod(1) * (3 * config.patch_size**2)
    features = num_features(grids) * (language_hidden_size * itemsize)
    sent: npt.NDArray[np.int64] = (pixels + 2 * features).cpu().numpy()
    return sent


# ---------------------------------------------------------------------- measured


def measured_cost(
    tower: VisionTower,
    group: dist.ProcessGroup | None,
    *,
    cache: Path | None = None,
    seconds: float = 2.0,
    max_patches: int = 4096,
) -> CostModel:
    """The cost model of this machine: the first rank measures, all ranks get the same.

    All ranks of the group call this. Weights, gradients, observers and random numbers stay as they
    are. Two runs measure slightly different times, plan differently, and so add gradients up in
    another order: with ``cache`` in the run's folder, a run that goes on equals one that never
    stopped.

    Args:
        tower: encoder and projector.
        group: the ranks that share the encoding; None is all.
        cache: a file of the first rank to take the model from, if it was measured there with this
            configuration on this device and version of torch; else it is written.
        seconds: about how long to measure.
        max_patches: the most patches in one forward and backward here, for the sake of memory.

    Raises:
        RuntimeError: on the first rank, the tower does not run or the cache is damaged. All ranks
            raise it.
    """
    outcome: list[Any] = [None]
    error = None
    if dist.get_rank(group) == 0:
        try:
            outcome = [dataclasses.asdict(_cached(tower, cache, seconds, max_patches))]
        except Exception as caught:
            error, outcome = caught, [f"{type(caught).__name__}: {caught}"]
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    if isinstance(outcome[0], str):
        raise RuntimeError(
            f"no cost model of the vision encoder from the first rank: {outcome[0]}"
        ) from (error)
    return CostModel(**outcome[0])


def _cached(tower: VisionTower, cache: Path | None, seconds: float, max_patches: int) -> CostModel:
    weight = tower.projector.fc2.weight
    device = weight.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    setting = {
        "config": dataclasses.asdict(tower.encoder.config),
        "language_hidden_size": weight.shape[0],
        "dtype": str(weight.dtype),
        "device": f"{where}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    if cache is not None and cache.exists():
        try:
            stored = json.loads(cache.read_text())
            stored_setting, model = stored["setting"], CostModel(**stored["model"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{cache} holds no measured cost model: delete it") from error
        if stored_setting == setting:
            return model
    counted = analytic_cost(tower.encoder.config, weight.shape[0])
    model = fit_cost(counted, time_packs(tower, seconds=seconds, max_patches=max_patches))
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        stored = {"setting": setting, "model": dataclasses.asdict(model)}
        cache.write_text(json.dumps(stored, indent=1) + "\n")
    return model


def fit_cost(counted: CostModel, samples: Sequence[tuple[Grids, float]]) -> CostModel:
    """Seconds from FLOPs: how fast matrix products are here, how fast attention, how slow an item.

    Least squares of the relative errors with coefficients that are not negative. What a pass costs
    whatever is in it, every rank pays alike: it is fitted and left out. Attention is taken to be
    as fast as the products as far as the samples do not tell: where it is a small part of all,
    noise would else decide what much larger items cost.

    Args:
        counted: the FLOPs, see :func:`analytic_cost`.
        samples: packs of items, and the seconds that each took; see :func:`time_packs`.

    Returns:
        The model in seconds. ``counted`` with a warning where the samples show no cost of a patch:
        they were too small, or disturbed.
    """
    linear = dataclasses.replace(counted, per_pair=0.0, per_item=0.0)
    pairs = CostModel(0.0, 0.0, counted.per_pair)
    rows = []
    for grids, seconds in samples:
        shapes = torch.tensor(grids)
        parts = [1.0, len(grids), linear.costs(shapes).sum(), pairs.costs(shapes).sum()]
        rows.append(np.array(parts) / seconds)
    # As much as one sample says in which attention is a twentieth.
    doubt = max(row[2] for row in rows) / 20
    rows.append(np.array([0.0, 0.0, -doubt, doubt]))
    wanted = np.append(np.ones(len(samples)), 0.0)
    _, per_item, product, attention = _non_negative_least_squares(np.array(rows), wanted)
    if not product > 0:
        warnings.warn(
            "the time of the vision encoder was not seen to grow with its patches: its cost is "
            "counted in FLOPs instead",
            stacklevel=2,
        )
        return counted
    return CostModel(
        per_patch=product * counted.per_patch,
        per_feature=product * counted.per_feature,
        per_pair=attention * counted.per_pair,
        per_item=per_item,
    )


def _non_negative_least_squares(
    design: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]
) -> list[float]:
    """The x >= 0 with the least |design x - wanted|: of the solutions for each subset of columns
    the best that is not negative. For a handful of columns, of whatever scales."""
    scale = np.abs(design).max(0)
    design = design / np.where(scale, scale, 1)
    columns = range(design.shape[1])
    best, best_x = math.inf, np.zeros(design.shape[1])
    for size in range(1, len(columns) + 1):
        for chosen in map(list, itertools.combinations(columns, size)):
            x = np.zeros(design.shape[1])
            x[chosen] = np.linalg.lstsq(design[:, chosen], wanted, rcond=None)[0]
            error = float(np.square(design @ x - wanted).sum())
            if (x >= 0).all() and error < best:
                best, best_x = error, x
    solution: list[float] = (best_x / np.where(scale, scale, 1)).tolist()
    return solution


def time_packs(
    tower: VisionTower, *, seconds: float, max_patches: int
) -> list[tuple[Grids, float]]:
    """Seconds that the encoder's part of a step takes here, for packs of few and of many patches,
    in small and in large items.

    Returns:
        (grids, seconds), the better of two :func:`step_seconds`.
    """
    total = 64
    # As large as time allows: what a pass costs whatever is in it should not hide the rest.
    while 2 * total <= max_patches and step_seconds(tower, _pack(total, 8.0)) < seconds / 40:
        total *= 2
    # Sides of an item, from small to all patches in one, evenly on a logarithmic scale.
    smallest, largest = 4 * MERGE, math.isqrt(total)
    sides = [smallest * (largest / smallest) ** (step / 3) for step in range(4)]
    packs = [_pack(part, side) for part in (total // 4, total) for side in sides]
    for pack in packs:
        step_seconds(tower, pack)
    times = [[step_seconds(tower, pack) for pack in packs] for _ in range(2)]
    return list(zip(packs, map(min, zip(*times, strict=True)), strict=True))


def _pack(total: int, side: float) -> Grids:
    """About so many patches in items whose sides are around that one, hardly two alike."""
    grids: list[tuple[int, int, int]] = []
    while total > 0:
        # Steps of two irrational numbers fill a square evenly.
        spread = (0.7549 * len(grids) % 1, 0.5698 * len(grids) % 1)
        rows, columns = (
            max(MERGE, round(min(side * 4 ** (s - 0.5), math.sqrt(total)) / MERGE) * MERGE)
            for s in spread
        )
        grids.append((1, rows, columns))
        total -= rows * columns
    return grids


def step_seconds(tower: VisionTower, grids: Grids) -> float:
    """Seconds of the encoder's part of a step for items of these grids.

    Forward, forward again and backward. On a CPU it is the processor's time, which other processes
    do not change.
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
        begun = now()
        with torch.no_grad():
            tower(patches, shapes)
        with torch.enable_grad():
            features = tower(patches, shapes)
            if weights:
                # Unlike backward(), it leaves .grad alone.
                torch.autograd.grad(features.sum(), weights)
        return now() - begun
