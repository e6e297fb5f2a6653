"""Assignment of images and clips to the ranks that encode them.

Pure functions with the same result on every rank: each rank plans for itself, without
communication. Loads are integers, whose sums do not depend on the order of addition.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
IntArrayLike = Sequence[int] | IntArray

# Local search: rounds, partners of an item on either side of the best load, and how often items
# choose again in a round after another item has taken their partner.
_ROUNDS, _NEIGHBOURS, _CHOICES = 12, 4, 4
# MULTIFIT: bisection steps, and the most items per rank for which it can improve on swaps.
_BISECTIONS, _FEW_ITEMS = 6, 4
_INFEASIBLE = np.iinfo(np.int64).max


class CapacityError(ValueError):
    """No rank has enough free capacity for ``item``."""

    def __init__(self, message: str, item: int) -> None:
        super().__init__(message)
        self.item = item


def plan(
    loads: IntArrayLike,
    num_ranks: int,
    *,
    owners: IntArrayLike | None = None,
    traffic: IntArrayLike | None = None,
    sizes: IntArrayLike | None = None,
    capacity: int | None = None,
    tolerance: float = 0.01,
) -> list[int]:
    """Assign every item to a rank such that the largest load is small and little data moves.

    Candidate plans, each of the later ones only if none so far is within the tolerance:

    1. Items stay with their owners up to the tolerated load, those with the most traffic for their
       load first. The others go to the least loaded rank, the heaviest first. Then items of ranks
       above the tolerated load are swapped with items of lightly loaded ranks.
    2. Longest processing time first (LPT): all items, the heaviest first, go to the least loaded
       rank. The largest load is at most 4/3 of the optimum (Graham, 1969).
    3. LPT, then swaps.
    4. MULTIFIT, then swaps, for few items per rank.

    The result is the plan that moves least among those whose largest load is within the tolerance,
    or within the tolerance of the smallest largest load found.

    Args:
        loads: cost of each item, such as its number of patches or
            :meth:`pretrain.encoder_process.cost.CostModel.loads`.
        num_ranks: at least 1.
        owners: rank that has each item's pixels. Default: moving an item is free.
        traffic: cost of encoding each item away from its owner, such as
            :func:`pretrain.encoder_process.cost.transfer_bytes`. Default: its load.
        sizes: memory of each item on the rank that encodes it, such as its number of patches.
        capacity: largest sum of sizes on a rank. A larger item gets a rank without other items.
        tolerance: a largest load up to 1 + tolerance times :func:`load_lower_bound` is accepted.

    Returns:
        Rank of each item. Ties go to the earlier item and the lower rank.

    Raises:
        ValueError: an argument is out of range.
        CapacityError: the items do not fit into the capacity.
    """
    problem = _Problem(loads, num_ranks, owners, traffic, sizes, capacity, tolerance)
    if not len(problem.loads):
        return []
    plans = _candidate_plans(problem)
    smallest = min(map(problem.largest_load, plans))
    accepted = max(problem.target, problem.tolerated(smallest))

    def price(ranks: IntArray) -> tuple[int, int, int]:
        load = problem.largest_load(ranks)
        return max(load, accepted), problem.moved(ranks), load

    encoders: list[int] = min(plans, key=price).tolist()
    return encoders


def balance(loads: IntArrayLike, ranks: IntArrayLike, num_ranks: int) -> float:
    """Largest load of a rank over the mean load: 1 is perfect. 1 if there is no load."""
    totals = _sums(np.asarray(loads, np.int64), np.asarray(ranks, np.int64), num_ranks)
    total = int(totals.sum())
    return int(totals.max()) * num_ranks / total if total else 1.0


def balance_lower_bound(loads: IntArrayLike, num_ranks: int) -> float:
    """Lower bound of :func:`balance`: above 1 if items are too few or one of them too heavy."""
    total = int(np.sum(loads, dtype=np.int64))
    return max(1.0, load_lower_bound(loads, num_ranks) * num_ranks / total) if total else 1.0


def load_lower_bound(loads: IntArrayLike, num_ranks: int) -> int:
    """Lower bound of a plan's largest load.

    The maximum of the mean load per rank and, for every k, of the k + 1 lightest of the
    k * num_ranks + 1 heaviest items: k + 1 of these share a rank, by the pigeonhole principle.
    """
    heaviest_first = -np.sort(-np.asarray(loads, np.int64))
    if not len(heaviest_first):
        return 0
    prefix_sums = np.concatenate([[0], np.cumsum(heaviest_first)])
    k = np.arange((len(heaviest_first) - 1) // num_ranks + 1)
    shared = prefix_sums[k * num_ranks + 1] - prefix_sums[k * (num_ranks - 1)]
    return max(-(-int(prefix_sums[-1]) // num_ranks), int(shared.max()))


def oversized(loads: IntArrayLike, num_ranks: int) -> list[int]:
    """Items above the mean load per rank.

    Other ranks wait while such an item is encoded. It cannot be divided, because the patches of all
    its frames attend to each other. A longer video is several items of up to
    :data:`pretrain.model.geometry.MAX_FRAMES` frames, which can go to different ranks.
    """
    loads = np.asarray(loads, np.int64)
    items: list[int] = np.flatnonzero(loads > int(loads.sum()) / num_ranks).tolist()
    return items


class _Problem:
    """Validated arguments of :func:`plan`; sizes are clipped to the capacity."""

    def __init__(
        self,
        loads: IntArrayLike,
        num_ranks: int,
        owners: IntArrayLike | None,
        traffic: IntArrayLike | None,
        sizes: IntArrayLike | None,
        capacity: int | None,
        tolerance: float,
    ) -> None:
        if num_ranks < 1:
            raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {tolerance}")
        if (sizes is None) != (capacity is None):
            raise ValueError("sizes and capacity go together: give both or none")
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        count = len(loads)
        self.loads = _checked("loads", loads, count)
        if self.loads.sum(dtype=np.float64) * num_ranks > 2**60:
            raise ValueError(
                f"loads add up to more than 2**60 / {num_ranks} ranks: use a larger unit"
            )
        self.num_ranks, self.tolerance, self.capacity = num_ranks, tolerance, capacity or 0
        self.owners = None if owners is None else _checked("owners", owners, count, num_ranks)
        self.traffic = self.loads if traffic is None else _checked("traffic", traffic, count)
        sizes = [0] * count if sizes is None else sizes
        self.sizes = _checked("sizes", sizes, count).clip(max=self.capacity)

    @property
    def target(self) -> int:
        """Largest load up to which a plan is good enough."""
        return self.tolerated(load_lower_bound(self.loads, self.num_ranks))

    def tolerated(self, load: int) -> int:
        return int(min(int(self.loads.sum()), load * (1 + self.tolerance)))

    def totals(self, ranks: IntArray) -> IntArray:
        return _sums(self.loads, ranks, self.num_ranks)

    def largest_load(self, ranks: IntArray) -> int:
        return int(self.totals(ranks).max())

    def free_capacity(self, ranks: IntArray) -> IntArray:
        return self.capacity - _sums(self.sizes, ranks, self.num_ranks)

    def moved(self, ranks: IntArray) -> int:
        return 0 if self.owners is None else int(self.traffic[ranks != self.owners].sum())


def _checked(name: str, values: IntArrayLike, count: int, below: int | None = None) -> IntArray:
    array = np.asarray(values)
    if array.ndim != 1 or len(array) != count:
        raise ValueError(f"{name} must be one integer for each of {count} items, got {array.shape}")
    if len(array) and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype}: round them first")
    invalid = (array < 0) | (array >= below) if below is not None else array < 0
    if invalid.any():
        item = int(invalid.argmax())
        limits = "at least 0" if below is None else f"in 0..{below - 1}"
        raise ValueError(f"{name} must be {limits}: item {item} has {array[item]}")
    return array.astype(np.int64)


def _sums(values: IntArray, ranks: IntArray, num_ranks: int) -> IntArray:
    sums = np.zeros(num_ranks, np.int64)
    np.add.at(sums, ranks, values)
    return sums


def _candidate_plans(problem: _Problem) -> list[IntArray]:
    target = problem.target
    few_items = len(problem.loads) <= _FEW_ITEMS * problem.num_ranks
    heaviest_first = np.argsort(-problem.loads, kind="stable")
    local = _mostly_local(problem, heaviest_first, target, by_traffic=not few_items)
    lpt = _list_schedule(problem, heaviest_first.tolist(), [-1] * len(problem.loads))
    plans = [ranks for ranks in (local, lpt) if ranks is not None] or [_fit_capacity(problem)]
    if min(map(problem.largest_load, plans)) > target:
        plans.append(_relabel_ranks(problem, _swap(problem, plans[-1], target)))
    smallest = min(map(problem.largest_load, plans))
    if smallest > target and few_items:
        packed = _multifit(problem, target, smallest)
        if packed is not None:
            plans.append(_relabel_ranks(problem, _swap(problem, packed, target)))
    return plans


def _mostly_local(
    problem: _Problem, heaviest_first: IntArray, target: int, *, by_traffic: bool
) -> IntArray | None:
    """Leave items with their owners up to the target load, and move the others.

    Items with the most traffic for their load stay first; of a few items, which fit badly, the
    heaviest. None if an item does not fit or there are no owners.
    """
    if problem.owners is None:
        return None
    order = heaviest_first
    if by_traffic:
        worth = problem.traffic[order] / problem.loads[order].clip(1)
        order = order[np.argsort(-worth, kind="stable")]
    loads, sizes = problem.loads.tolist(), problem.sizes.tolist()
    ranks: list[int] = problem.owners.tolist()
    left, free = [target] * problem.num_ranks, [problem.capacity] * problem.num_ranks
    for item in order.tolist():
        rank = ranks[item]
        if loads[item] <= left[rank] and sizes[item] <= free[rank]:
            left[rank] -= loads[item]
            free[rank] -= sizes[item]
        else:
            ranks[item] = -1
    moving = [item for item in heaviest_first.tolist() if ranks[item] < 0]
    scheduled = _list_schedule(problem, moving, ranks)
    return None if scheduled is None else _swap(problem, scheduled, target)


def _list_schedule(problem: _Problem, items: Iterable[int], ranks: list[int]) -> IntArray | None:
    """Assign items in order, each to the least loaded rank with enough free capacity.

    ``ranks`` is -1 for these items; it is modified. None if an item does not fit.
    """
    loads, sizes, num_ranks = problem.loads.tolist(), problem.sizes.tolist(), problem.num_ranks
    given = np.array(ranks)
    assigned = np.flatnonzero(given >= 0)
    totals = _sums(problem.loads[assigned], given[assigned], num_ranks).tolist()
    used = _sums(problem.sizes[assigned], given[assigned], num_ranks)
    free = (problem.capacity - used).tolist()
    # A load and its rank in one integer: the least loaded rank comes first, ties by rank.
    least_loaded = [load * num_ranks + rank for rank, load in enumerate(totals)]
    heapq.heapify(least_loaded)
    # Ranks without enough capacity for some item, the most capacity first: a smaller one may fit.
    crowded: list[tuple[int, int]] = []
    for item in items:
        size = sizes[item]
        while crowded and -crowded[0][0] >= size:
            heapq.heappush(least_loaded, heapq.heappop(crowded)[1])
        while least_loaded and free[least_loaded[0] % num_ranks] < size:
            entry = heapq.heappop(least_loaded)
            heapq.heappush(crowded, (-free[entry % num_ranks], entry))
        if not least_loaded:
            return None
        rank = least_loaded[0] % num_ranks
        heapq.heapreplace(least_loaded, least_loaded[0] + loads[item] * num_ranks)
        ranks[item] = rank
        free[rank] -= size
    return np.array(ranks)


def _fit_capacity(problem: _Problem) -> IntArray:
    """Plan by sizes alone."""
    ranks = _best_fit_decreasing(problem.sizes, problem.num_ranks, problem.capacity)
    if isinstance(ranks, int):
        size = int(problem.sizes[ranks])
        raise CapacityError(
            f"capacity leaves no room for item {ranks} of size "
            f"{'at least ' if size == problem.capacity else ''}{size}: all items have "
            f"{problem.sizes.sum()}, {problem.num_ranks} ranks of {problem.capacity} have room for "
            f"{problem.num_ranks * problem.capacity}; raise it, or give fewer items",
            ranks,
        )
    return ranks


def _best_fit_decreasing(values: IntArray, num_ranks: int, capacity: int) -> IntArray | int:
    """Bin packing: the largest values first, each where it leaves the least free capacity.

    Returns ranks, or the index of the first value that does not fit.
    """
    ranks = np.empty_like(values)
    # Free capacity and rank in one integer, sorted.
    free = [capacity * num_ranks + rank for rank in range(num_ranks)]
    known = values.tolist()
    for item in np.argsort(-values, kind="stable").tolist():
        index = bisect_left(free, known[item] * num_ranks)
        if index == num_ranks:
            return int(item)
        entry = free.pop(index)
        ranks[item] = entry % num_ranks
        insort(free, entry - known[item] * num_ranks)
    return ranks


def _multifit(problem: _Problem, low: int, high: int) -> IntArray | None:
    """Best-fit decreasing into the smallest load in low..high that bisection finds, if any.

    With two or three items per rank, the number of items on each rank decides, which swaps do not
    change. Source: Coffman, Garey, Johnson, "An application of bin-packing to multiprocessor
    scheduling", 1978.
    """
    best = None
    for _ in range(_BISECTIONS):
        middle = (low + high) // 2
        ranks = _best_fit_decreasing(problem.loads, problem.num_ranks, middle)
        if isinstance(ranks, int) or problem.free_capacity(ranks).min() < 0:
            low = middle
        else:
            best, high = ranks, middle
    return best


def _relabel_ranks(problem: _Problem, ranks: IntArray) -> IntArray:
    """Permute the ranks of a plan, which keeps its balance, to leave more items with their owners.

    Greedy matching of ranks and owners, pairs with the most traffic first.
    """
    if problem.owners is None:
        return ranks
    num_ranks = problem.num_ranks
    pairs, pair_of_item = np.unique(ranks * num_ranks + problem.owners, return_inverse=True)
    traffic = _sums(problem.traffic, pair_of_item, len(pairs))
    new_rank: dict[int, int] = {}
    unused = dict.fromkeys(range(num_ranks))
    for pair in np.argsort(-traffic, kind="stable").tolist():
        rank, owner = divmod(int(pairs[pair]), num_ranks)
        if rank not in new_rank and owner in unused:
            new_rank[rank] = owner
            del unused[owner]
    rest = iter(unused)
    permutation = [new_rank[rank] if rank in new_rank else next(rest) for rank in range(num_ranks)]
    return np.array(permutation)[ranks]


def _swap(problem: _Problem, ranks: IntArray, target: int) -> IntArray:
    """Improve a plan by swaps until its largest load is the target, or rounds hardly help."""
    search = _LocalSearch(problem, ranks, target)
    excess = _INFEASIBLE
    for _ in range(_ROUNDS):
        previous, excess = excess, int((search.totals - target).clip(0).sum())
        if not excess or excess > 0.9 * previous:
            break
        search.round()
    return search.ranks


class _LocalSearch:
    """Swaps between ranks above the target load (heavy) and the least loaded ranks (light).

    An item of load x on a heavy rank of load H is swapped with an item of load y on a light rank of
    load L; y may be the empty item, of load 0. The heavy rank reaches the target if
    y = x - (H - target), and both ranks become equal if 2y - L = 2x - H. Two binary searches
    therefore find the best partners among the items of all light ranks. Every swap lowers the
    larger load of its two ranks.
    """

    def __init__(self, problem: _Problem, ranks: IntArray, target: int) -> None:
        self.num_ranks, self.target = problem.num_ranks, target
        self.ranks = ranks.copy()
        self.totals, self.free = problem.totals(ranks), problem.free_capacity(ranks)
        self.empty_item = len(problem.loads)
        self.loads, self.sizes = np.append(problem.loads, 0), np.append(problem.sizes, 0)

    def round(self) -> None:
        """Apply swaps, at most one for each rank."""
        item, rank, partner, partner_rank = self._candidates()
        load = self._load_after(item, rank, partner, partner_rank)
        before = self.totals[rank]
        for _ in range(_CHOICES):
            choice = load.argmin(1)
            best = np.take_along_axis(load, choice[:, None], 1)[:, 0]
            rows = np.flatnonzero(best < before)
            if not len(rows):
                break
            # The heaviest rank chooses first.
            rows = rows[np.lexsort((best[rows], -before[rows]))]
            rows = rows[_first_occurrences(rank[rows])]
            rows = rows[_first_occurrences(partner_rank[rows, choice[rows]])]
            heavy, light = rank[rows], partner_rank[rows, choice[rows]]
            self._apply(item[rows], partner[rows, choice[rows]], heavy, light)
            used = np.zeros(self.num_ranks, bool)
            used[heavy] = used[light] = True
            load[used[rank]] = _INFEASIBLE
            load[used[partner_rank]] = _INFEASIBLE

    def _apply(self, item: IntArray, partner: IntArray, heavy: IntArray, light: IntArray) -> None:
        """Swap items of heavy ranks with partners of light ranks."""
        load = self.loads[item] - self.loads[partner]
        size = self.sizes[item] - self.sizes[partner]
        self.ranks[item] = light
        real = partner != self.empty_item
        self.ranks[partner[real]] = heavy[real]
        self.totals[heavy] -= load
        self.totals[light] += load
        self.free[heavy] += size
        self.free[light] -= size

    def _candidates(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Items [X] of heavy ranks, these ranks [X], partners [X, P] and their ranks [X, P]."""
        order = np.argsort(self.totals, kind="stable")
        num_heavy = int(np.count_nonzero(self.totals > self.target))
        light = order[:-num_heavy][: max(2 * num_heavy, 64)]
        # Secondary sort key of the searches below: each heavy rank starts at another light rank.
        key = np.full(self.num_ranks, -1)
        key[light] = np.arange(len(light))
        on_light = np.flatnonzero(key[self.ranks] >= 0)
        partner = np.concatenate([on_light, np.full(len(light), self.empty_item)])
        partner_rank = np.concatenate([self.ranks[on_light], light])
        key[order[-num_heavy:]] = np.arange(num_heavy) * len(light) // num_heavy
        item = np.flatnonzero(self.totals[self.ranks] > self.target)
        rank = self.ranks[item]

        x, y, total = self.loads[item], self.loads[partner], self.totals[rank]
        reach_target = _nearest(
            y * len(light) + key[partner_rank],
            (x - total + self.target) * len(light) + key[rank],
            range(-_NEIGHBOURS, 0),
        )
        become_equal = _nearest(
            (2 * y - self.totals[partner_rank]) * len(light) + key[partner_rank],
            (2 * x - total) * len(light) + key[rank],
            range(-_NEIGHBOURS // 2, _NEIGHBOURS // 2),
        )
        near = np.concatenate([reach_target, become_equal], 1)
        return item, rank, partner[near], partner_rank[near]

    def _load_after(
        self, item: IntArray, rank: IntArray, partner: IntArray, partner_rank: IntArray
    ) -> IntArray:
        """[X, P]: larger load of both ranks after a swap; swaps must respect the capacity."""
        load = self.loads[item, None] - self.loads[partner]
        after = np.maximum(self.totals[rank, None] - load, self.totals[partner_rank] + load)
        size = self.sizes[item, None] - self.sizes[partner]
        full = (self.free[rank, None] < -size) | (self.free[partner_rank] < size)
        # Without the lower limit every item would choose the lightest rank.
        limited: IntArray = np.where(full, _INFEASIBLE, after.clip(self.target))
        return limited


def _nearest(keys: IntArray, wanted: IntArray, offsets: range) -> IntArray:
    """int64 [len(wanted), len(offsets)]: keys at these offsets from each wanted one, if sorted."""
    order = np.argsort(keys, kind="stable")
    positions = np.searchsorted(keys[order], wanted, side="right")
    nearest: IntArray = order[(positions[:, None] + np.array(offsets)).clip(0, len(keys) - 1)]
    return nearest


def _first_occurrences(values: IntArray) -> IntArray:
    return np.sort(np.unique(values, return_index=True)[1])
