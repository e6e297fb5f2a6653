"""Who encodes what: pure, and the same on every rank.

Every rank plans for itself, so that nobody waits for a plan to arrive. Loads are integers: sums of
them do not depend on the order of adding, which differs from processor to processor.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

# Rounds of swaps at most; partners on either side that are weighed for each item in a round; how
# often those choose again whose partner another one took.
_ROUNDS, _NEIGHBOURS, _CHOICES = 12, 4, 4
# Multifit's; and the items per rank up to which it can beat swaps.
_BISECTIONS, _FEW = 6, 4
_NEVER = np.iinfo(np.int64).max


class CapacityError(ValueError):
    """The capacity leaves no room for ``item``."""

    def __init__(self, message: str, item: int) -> None:
        super().__init__(message)
        self.item = item


def plan(
    loads: Sequence[int] | Integers,
    num_ranks: int,
    *,
    owners: Sequence[int] | Integers | None = None,
    traffic: Sequence[int] | Integers | None = None,
    sizes: Sequence[int] | Integers | None = None,
    capacity: int | None = None,
    tolerance: float = 0.01,
) -> list[int]:
    """Give every item to a rank, such that the largest load of a rank is small and little moves.

    Several plans are made, the further ones where none so far keeps within the tolerance:

    - Items stay with their owners as long as that keeps within the tolerance, those first that are
      the most traffic for their load. The others go, the heaviest first, to the rank with the least
      load. Then items of ranks still above it are swapped for items of light ranks.
    - All items, the heaviest first, go to the rank with the least load (LPT): at most 4/3 of the
      least possible (Graham, 1969).
    - That, and swaps.
    - Bin packing (multifit), and swaps, where there are few items.

    The one with the least largest load is taken; of those that have hardly more, within the
    tolerance, the one that moves the least.

    Args:
        loads: cost of each item, such as its number of patches, or
            :meth:`pretrain.encoder_process.cost.CostModel.loads`.
        num_ranks: at least 1.
        owners: the rank that holds each item; None: all are equally far from everywhere.
        traffic: what it costs to encode each item away from its owner, such as
            :func:`pretrain.encoder_process.cost.transfer_bytes`; None: its load.
        sizes: memory that each item takes where it is encoded, such as its number of patches.
        capacity: the largest sum of sizes of a rank. An item larger than that has a rank to itself.
        tolerance: a largest load of up to 1 + tolerance times :func:`load_lower_bound`, or else
            times the least found, is as good as any.

    Returns:
        The rank of each item. Ties go to the earlier item and the lower rank.

    Raises:
        ValueError: an argument is out of its range.
        NoRoomError: the capacity leaves no room for an item.
    """
    work = _check(loads, num_ranks, owners, traffic, sizes, capacity, tolerance)
    if not len(work.loads):
        return []
    total = int(work.loads.sum())

    def as_good_as(load: int) -> int:
        return int(min(load * (1 + tolerance), total))

    target = as_good_as(load_lower_bound(work.loads, num_ranks))
    heaviest = np.argsort(-work.loads, kind="stable")
    heaviest_first: list[int] = heaviest.tolist()

    def largest(ranks: Integers) -> int:
        return int(work.totals(ranks).max())

    plans = []
    if work.owners is not None:
        stays_first = heaviest
        if len(heaviest) > _FEW * num_ranks:
            # The load that leaves should be few bytes. Few items fit so badly that light ones go.
            worth = work.traffic[heaviest] / work.loads[heaviest].clip(1)
            stays_first = heaviest[np.argsort(-worth, kind="stable")]
        stay = _stay(work, stays_first.tolist(), target)
        stayed = _least_loaded(work, [i for i in heaviest_first if stay[i] < 0], stay)
        if stayed is not None:
            plans.append(_swap(work, stayed, target))
    anywhere = _least_loaded(work, heaviest_first, [-1] * len(heaviest_first))
    if anywhere is not None:
        plans.append(anywhere)
    if not plans:
        plans.append(_scarce(work))
    if min(map(largest, plans)) > target:
        plans.append(_at_home(work, _swap(work, plans[-1], target)))
    if (least := min(map(largest, plans))) > target and len(work.loads) <= _FEW * num_ranks:
        packed = _multifit(work, target, least)
        if packed is not None:
            plans.append(_at_home(work, _swap(work, packed, target)))

    enough = max(target, as_good_as(min(map(largest, plans))))

    def price(ranks: Integers) -> tuple[int, int, int]:
        load = largest(ranks)
        moved = 0 if work.owners is None else int(work.traffic[ranks != work.owners].sum())
        return max(load, enough), moved, load

    encoders: list[int] = min(plans, key=price).tolist()
    return encoders


def balance(
    loads: Sequence[int] | Integers, ranks: Sequence[int] | Integers, num_ranks: int
) -> float:
    """The largest rank's load over the mean: 1 is perfect; 1 also where there is no load."""
    totals = _sums(np.asarray(loads, np.int64), np.asarray(ranks, np.int64), num_ranks)
    total = int(totals.sum())
    return int(totals.max()) * num_ranks / total if total else 1.0


def balance_lower_bound(loads: Sequence[int] | Integers, num_ranks: int) -> float:
    """The :func:`balance` that no plan can be better than: above 1 where items are too few or one
    of them too heavy."""
    total = int(np.sum(loads, dtype=np.int64))
    return max(1.0, load_lower_bound(loads, num_ranks) * num_ranks / total) if total else 1.0


def load_lower_bound(loads: Sequence[int] | Integers, num_ranks: int) -> int:
    """The largest load of a rank in any plan is at least this.

    It is the mean; or the heaviest item; or, since of the heaviest k * num_ranks + 1 items some
    k + 1 meet on one rank, the k + 1 lightest of these.
    """
    ordered = -np.sort(-np.asarray(loads, np.int64))
    if not len(ordered):
        return 0
    before = np.concatenate([[0], np.cumsum(ordered)])
    k = np.arange((len(ordered) - 1) // num_ranks + 1)
    meeting = before[k * num_ranks + 1] - before[k * (num_ranks - 1)]
    return max(-(-int(before[-1]) // num_ranks), int(meeting.max()))


def oversized(loads: Sequence[int] | Integers, num_ranks: int) -> list[tuple[int, float]]:
    """The items that are more than a fair share of the work: (item, its load over the mean).

    While one is encoded, other ranks wait. It cannot be divided: the patches of all its frames
    attend to each other, and a longer video comes as several items already, of up to
    :data:`pretrain.model.geometry.MAX_FRAMES` frames, which go to different ranks.
    """
    loads = np.asarray(loads, np.int64)
    total = int(loads.sum())
    items: list[int] = np.flatnonzero(loads > total / num_ranks).tolist()
    return [(item, int(loads[item]) * num_ranks / total) for item in items]


@dataclass(frozen=True)
class _Work:
    """The checked arguments of :func:`plan`; sizes are cut to the capacity."""

    loads: Integers
    num_ranks: int
    owners: Integers | None
    traffic: Integers
    sizes: Integers
    capacity: int

    def totals(self, ranks: Integers) -> Integers:
        return _sums(self.loads, ranks, self.num_ranks)

    def rooms(self, ranks: Integers) -> Integers:
        return self.capacity - _sums(self.sizes, ranks, self.num_ranks)


def _sums(values: Integers, ranks: Integers, num_ranks: int) -> Integers:
    sums = np.zeros(num_ranks, np.int64)
    np.add.at(sums, ranks, values)
    return sums


def _check(
    loads: Sequence[int] | Integers,
    num_ranks: int,
    owners: Sequence[int] | Integers | None,
    traffic: Sequence[int] | Integers | None,
    sizes: Sequence[int] | Integers | None,
    capacity: int | None,
    tolerance: float,
) -> _Work:
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    if (sizes is None) != (capacity is None):
        raise ValueError("sizes and capacity go together: give both or none")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")

    def checked(name: str, values: Sequence[int] | Integers, below: int | None = None) -> Integers:
        array = np.asarray(values)
        if array.ndim != 1 or len(array) != len(loads):
            raise ValueError(
                f"{name} must be one integer for each of {len(loads)} items, got {array.shape}"
            )
        if len(array) and array.dtype.kind not in "iu":
            raise ValueError(f"{name} must be integers, got {array.dtype}: round them first")
        wrong = (array < 0) | (array >= below) if below is not None else array < 0
        if wrong.any():
            item = int(wrong.argmax())
            limits = "at least 0" if below is None else f"in 0..{below - 1}"
            raise ValueError(f"{name} must be {limits}: item {item} has {array[item]}")
        return array.astype(np.int64)

    known = checked("loads", loads)
    if known.sum(dtype=np.float64) * num_ranks > 2**60:
        raise ValueError(f"loads add up to more than 2**60 / {num_ranks} ranks: take a larger unit")
    nothing = np.zeros_like(known)
    return _Work(
        loads=known,
        num_ranks=num_ranks,
        owners=None if owners is None else checked("owners", owners, num_ranks),
        traffic=known if traffic is None else checked("traffic", traffic),
        sizes=nothing if sizes is None else np.minimum(checked("sizes", sizes), capacity or 0),
        capacity=capacity or 0,
    )


def _least_loaded(work: _Work, items: Iterable[int], ranks: list[int]) -> Integers | None:
    """Place items in turn, each on the rank with the least load of those that have room.

    Args:
        items: what to place.
        ranks: where all the others are; -1 for the items to place. It is written to.

    Returns:
        All ranks, or None where some item found no room.
    """
    loads, sizes, num_ranks = work.loads.tolist(), work.sizes.tolist(), work.num_ranks
    placed = np.array(ranks)
    there = np.flatnonzero(placed >= 0)
    totals = _sums(work.loads[there], placed[there], num_ranks).tolist()
    rooms = (work.capacity - _sums(work.sizes[there], placed[there], num_ranks)).tolist()
    # A rank and its load in one integer: the least load is in front, and of equals the lower rank.
    waiting = [load * num_ranks + rank for rank, load in enumerate(totals)]
    heapq.heapify(waiting)
    # Ranks that had no room for an item, the most room in front: a smaller item may come.
    crowded: list[tuple[int, int]] = []
    for item in items:
        size = sizes[item]
        while crowded and -crowded[0][0] >= size:
            heapq.heappush(waiting, heapq.heappop(crowded)[1])
        while waiting and rooms[waiting[0] % num_ranks] < size:
            least = heapq.heappop(waiting)
            heapq.heappush(crowded, (-rooms[least % num_ranks], least))
        if not waiting:
            return None
        rank = waiting[0] % num_ranks
        heapq.heapreplace(waiting, waiting[0] + loads[item] * num_ranks)
        ranks[item] = rank
        rooms[rank] -= size
    return np.array(ranks)


def _stay(work: _Work, items: Iterable[int], target: int) -> list[int]:
    """Let items stay at home, in turn, while load and size of their rank allow.

    Returns:
        The rank of each item, -1 for those that leave.
    """
    assert work.owners is not None
    loads, sizes = work.loads.tolist(), work.sizes.tolist()
    ranks: list[int] = work.owners.tolist()
    left, rooms = [target] * work.num_ranks, [work.capacity] * work.num_ranks
    for item in items:
        rank = ranks[item]
        if loads[item] <= left[rank] and sizes[item] <= rooms[rank]:
            left[rank] -= loads[item]
            rooms[rank] -= sizes[item]
        else:
            ranks[item] = -1
    return ranks


def _scarce(work: _Work) -> Integers:
    """A plan for a capacity that leaves little room.

    Raises:
        NoRoomError: none is found.
    """
    ranks = _tightest_fit(work.sizes, work.num_ranks, work.capacity)
    if isinstance(ranks, int):
        size = int(work.sizes[ranks])
        raise CapacityError(
            f"capacity leaves no room for item {ranks} of size "
            f"{'at least ' if size == work.capacity else ''}{size}: all items have "
            f"{work.sizes.sum()}, {work.num_ranks} ranks of {work.capacity} have room for "
            f"{work.num_ranks * work.capacity}; raise it, or give fewer items",
            ranks,
        )
    return ranks


def _tightest_fit(values: Integers, num_ranks: int, room: int) -> Integers | int:
    """The largest values first, each where it leaves the least of the room that every rank has.

    Returns:
        The rank of each, or the index of one that finds no room.
    """
    ranks = np.empty_like(values)
    # Room and rank in one integer, sorted.
    rooms = [room * num_ranks + rank for rank in range(num_ranks)]
    known = values.tolist()
    for item in np.argsort(-values, kind="stable").tolist():
        place = bisect_left(rooms, known[item] * num_ranks)
        if place == num_ranks:
            return int(item)
        tightest = rooms.pop(place)
        ranks[item] = tightest % num_ranks
        insort(rooms, tightest - known[item] * num_ranks)
    return ranks


def _multifit(work: _Work, least: int, largest: int) -> Integers | None:
    """The tightest fit into a largest load that bisection makes small, or None if none is smaller.

    Where ranks have but two or three items, how many each gets decides, and swaps do not change it.
    Source: Coffman, Garey, Johnson, "An application of bin-packing to multiprocessor scheduling",
    1978.
    """
    found = None
    for _ in range(_BISECTIONS):
        middle = (least + largest) // 2
        ranks = _tightest_fit(work.loads, work.num_ranks, middle)
        if isinstance(ranks, int) or work.rooms(ranks).min() < 0:
            least = middle
        else:
            found, largest = ranks, middle
    return found


def _at_home(work: _Work, ranks: Integers) -> Integers:
    """Rename the ranks, whose loads do not change so, such that many items are at home."""
    if work.owners is None:
        return ranks
    both, which = np.unique(ranks * work.num_ranks + work.owners, return_inverse=True)
    names: dict[int, int] = {}
    unused = dict.fromkeys(range(work.num_ranks))
    for place in np.argsort(-_sums(work.traffic, which, len(both)), kind="stable").tolist():
        rank, owner = divmod(int(both[place]), work.num_ranks)
        if rank not in names and owner in unused:
            names[rank] = owner
            del unused[owner]
    rest = iter(unused)
    renamed = [names[rank] if rank in names else next(rest) for rank in range(work.num_ranks)]
    return np.array(renamed)[ranks]


def _swap(work: _Work, ranks: Integers, target: int) -> Integers:
    """Swap items of ranks above the target for items of light ranks, while that helps.

    An item x of a rank with load H for an item y of a rank with load L; y may be none, of load 0.
    The first rank is down at the target where y = x - (H - target), and both are alike where
    2y - L = 2x - H. So one bisection each finds x's best partners among the items of all light
    ranks. Every swap lowers the larger load of its two ranks.
    """
    ranks = ranks.copy()
    totals = work.totals(ranks)
    rooms = work.rooms(ranks)
    # The last "item" is none.
    loads, sizes = np.append(work.loads, 0), np.append(work.sizes, 0)
    none = len(work.loads)
    excess = _NEVER
    for _ in range(_ROUNDS):
        # Rounds that hardly help are not worth their time.
        before, excess = excess, int((totals - target).clip(0).sum())
        if not excess or excess > 0.9 * before:
            break
        order = np.argsort(totals, kind="stable")
        above = int(np.count_nonzero(totals > target))
        light = order[:-above][: max(2 * above, 64)]
        # Where loads are alike, each heavy rank begins to look at another light one.
        turn = np.full(work.num_ranks, -1)
        turn[light] = np.arange(len(light))
        y = np.concatenate([np.flatnonzero(turn[ranks] >= 0), np.full(len(light), none)])
        y_rank = np.concatenate([ranks[y[: -len(light)]], light])
        turn[order[-above:]] = np.arange(above) * len(light) // above
        x = np.flatnonzero(totals[ranks] > target)
        x_rank = ranks[x]
        x_total = totals[x_rank]

        # y that just bring x's rank down to the target, and y that make both ranks alike.
        enough = _around(
            loads[y] * len(light) + turn[y_rank],
            (loads[x] - x_total + target) * len(light) + turn[x_rank],
            range(-_NEIGHBOURS, 0),
        )
        equal = _around(
            (2 * loads[y] - totals[y_rank]) * len(light) + turn[y_rank],
            (2 * loads[x] - x_total) * len(light) + turn[x_rank],
            range(-_NEIGHBOURS // 2, _NEIGHBOURS // 2),
        )
        near = np.concatenate([enough, equal], 1)
        less = loads[x, None] - loads[y[near]]
        # Below the target all are equal, or everybody would choose the lightest rank.
        after = np.maximum(x_total[:, None] - less, totals[y_rank[near]] + less).clip(target)
        smaller = sizes[x, None] - sizes[y[near]]
        full = (rooms[x_rank, None] < -smaller) | (rooms[y_rank[near]] < smaller)
        after[full] = _NEVER

        for _ in range(_CHOICES):
            choice = after.argmin(1)
            best = np.take_along_axis(after, choice[:, None], 1)[:, 0]
            helps = np.flatnonzero(best < x_total)
            if not len(helps):
                break
            # The heaviest rank chooses first. A rank takes part in one swap of a round.
            helps = helps[np.lexsort((best[helps], -x_total[helps]))]
            helps = helps[_firsts(x_rank[helps])]
            helps = helps[_firsts(y_rank[near[helps, choice[helps]]])]
            mine, theirs = x[helps], near[helps, choice[helps]]
            heavy, other = x_rank[helps], y_rank[theirs]
            less_load = loads[mine] - loads[y[theirs]]
            less_size = sizes[mine] - sizes[y[theirs]]
            ranks[mine] = other
            real = y[theirs] != none
            ranks[y[theirs][real]] = heavy[real]
            totals[heavy] -= less_load
            totals[other] += less_load
            rooms[heavy] += less_size
            rooms[other] -= less_size
            busy = np.zeros(work.num_ranks, bool)
            busy[heavy] = busy[other] = True
            after[busy[x_rank]] = _NEVER
            after[busy[y_rank[near]]] = _NEVER
    return ranks


def _around(keys: Integers, wanted: Integers, steps: range) -> Integers:
    """[len(wanted), len(steps)] indices of keys: those so many steps, in the keys' order, from
    where each wanted one belongs."""
    order = np.argsort(keys, kind="stable")
    places = np.searchsorted(keys[order], wanted, side="right")
    around: Integers = order[(places[:, None] + np.array(steps)).clip(0, len(keys) - 1)]
    return around


def _firsts(values: Integers) -> Integers:
    """Where each value occurs for the first time, in order."""
    return np.sort(np.unique(values, return_index=True)[1])
