"""Simulated DEP plans for 2 to 4,096 ranks: balance, bytes moved and planning time."""

import argparse
import heapq
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.runner import Result, interleave, markdown, positive_int, quartiles
from pretrain.config import VisionConfig
from pretrain.encoder_process import cost
from pretrain.encoder_process.plan import balance, balance_lower_bound, load_lower_bound, plan
from pretrain.model.geometry import MERGE
from pretrain.model.projector import VisionTower

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Integers = npt.NDArray[np.int64]

# Kimi K2.5: the encoder, the width of the language model, and bytes per element (bfloat16).
CONFIG, LANGUAGE_HIDDEN_SIZE, ITEMSIZE = VisionConfig(), 7168, 2
TOLERANCE = 0.01
RANKS = {"full": 4096, "quick": 4096, "tiny": 16}
DRAWS = {"full": 20, "quick": 3, "tiny": 1}
ROUNDS = {"full": 20, "quick": 7, "tiny": 1}
TIMED_RANKS = {"full": (64, 1024, 4096), "quick": (64, 1024, 4096), "tiny": (16,)}
TIMED_ITEMS = {"full": (1000, 3000, 10_000, 30_000), "quick": (1000, 3000, 10_000, 30_000),
               "tiny": (100, 300)}  # fmt: skip
PACKS = {"full": 40, "quick": 16, "tiny": 3}
MAIN, FEW = "images of all sizes, 10% clips, 25 a rank", "clips of similar size, 3 a rank"
# (items per rank, share of clips, standard deviation of the logarithm of the area)
MIXES = {MAIN: (25, 0.1, 0.8), FEW: (3, 1.0, 0.3)}
STRATEGIES = {
    "at home": "tab:red",
    "round-robin": "tab:orange",
    "longest first, patches": "tab:purple",
    "longest first, cost": "tab:green",
    "plan": "tab:blue",
}


def draw(mix: str, num_ranks: int, rng: np.random.Generator) -> tuple[torch.Tensor, Integers]:
    """Draw the grids and owners of the items of a step.

    Sizes are log-normal, and some ranks own more items than others. An image has a median of 28 x
    28 and at most 64 x 64 patches; each of the four frames of a clip has 16 x 16 and at most 32 x
    32.
    """
    per_rank, clips, spread = MIXES[mix]
    return draw_items(per_rank * num_ranks, num_ranks, clips, spread, rng)


def draw_items(
    number: int, num_ranks: int, clips: float, spread: float, rng: np.random.Generator
) -> tuple[torch.Tensor, Integers]:
    frames = np.where(rng.random(number) < clips, 4, 1)
    area = np.where(frames == 1, 28**2, 16**2) * np.exp(rng.normal(0, spread, number))
    aspect = np.exp(rng.normal(0, 0.25, number))
    sides = [np.sqrt(area * aspect), np.sqrt(area / aspect)]
    max_side = np.where(frames == 1, 32, 16)
    rows, columns = (
        MERGE * np.clip(np.rint(side / MERGE), 1, max_side).astype(int) for side in sides
    )
    share = rng.gamma(2.0, size=num_ranks)
    owners = np.sort(rng.choice(num_ranks, number, p=share / share.sum()))
    return torch.from_numpy(np.stack([frames, rows, columns], 1)), owners


def longest_first(loads: Integers, num_ranks: int) -> list[int]:
    """Assign items in descending order of load, each to the rank with the lowest load."""
    ranks = [0] * len(loads)
    heap = [(0, rank) for rank in range(num_ranks)]
    for item in np.argsort(-loads, kind="stable").tolist():
        load, rank = heap[0]
        ranks[item] = rank
        heapq.heapreplace(heap, (load + int(loads[item]), rank))
    return ranks


def min_bytes_moved(
    loads: Integers, sent: Integers, owners: Integers, num_ranks: int, limit: float
) -> float:
    """Lower bound on the bytes that a plan moves if no load exceeds the limit.

    Ranks above the limit give away the items with the most load per byte, the last one in part.
    """
    total = 0.0
    above = np.bincount(owners, loads, num_ranks) - limit
    for item in np.argsort(sent / loads, kind="stable").tolist():
        owner, load = owners[item], float(loads[item])
        if above[owner] > 0:
            total += float(sent[item]) * min(1.0, above[owner] / load)
            above[owner] -= load
    return total


# ---------------------------------------------------------------------- run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draws", type=positive_int, help="steps to draw of each mix; default: by the form"
    )


def run(options: argparse.Namespace) -> Result:
    rng = np.random.default_rng(options.seed)
    form = options.form
    model = cost.analytic_cost(CONFIG, LANGUAGE_HIDDEN_SIZE)
    draws = DRAWS[form] if options.draws is None else options.draws
    num_ranks = [2**power for power in range(1, RANKS[form].bit_length())]
    mixes = {
        mix: {n: [_balance_of_step(model, mix, n, rng) for _ in range(draws)] for n in num_ranks}
        for mix in MIXES
    }
    example_ranks = min(64, RANKS[form])
    return {
        "tolerance": TOLERANCE,
        "attention_equals_the_rest_at_patches": model.per_patch / model.per_pair,
        "mixes": mixes,
        "example": _example(model, example_ranks, rng),
        "planning": _planning_time(model, options, rng),
        "cost_models": _cost_models(options, rng),
    }


def _plans(
    loads: Integers, patches: Integers, sent: Integers, owners: Integers, num_ranks: int
) -> dict[str, Sequence[int]]:
    return {
        "at home": owners.tolist(),
        "round-robin": [item % num_ranks for item in range(len(loads))],
        "longest first, patches": longest_first(patches, num_ranks),
        "longest first, cost": longest_first(loads, num_ranks),
        "plan": plan(loads, num_ranks, owners=owners, traffic=sent, tolerance=TOLERANCE),
    }


def _balance_of_step(
    model: cost.CostModel, mix: str, num_ranks: int, rng: np.random.Generator
) -> dict[str, dict[str, float]]:
    """Balance (largest load over the mean) and share of bytes moved of one step, by strategy."""
    grids, owners = draw(mix, num_ranks, rng)
    loads, patches = model.loads(grids), grids.prod(1).numpy()
    sent = cost.transfer_bytes(grids, CONFIG, LANGUAGE_HIDDEN_SIZE, ITEMSIZE)
    rows = {}
    for name, ranks in _plans(loads, patches, sent, owners, num_ranks).items():
        rows[name] = {
            "balance": balance(loads, ranks, num_ranks),
            "moved": float(sent[np.asarray(ranks) != owners].sum() / sent.sum()),
        }
    limit = (1 + TOLERANCE) * load_lower_bound(loads, num_ranks)
    rows["least"] = {
        "balance": balance_lower_bound(loads, num_ranks),
        "moved": min_bytes_moved(loads, sent, owners, num_ranks, limit) / float(sent.sum()),
    }
    return rows


def _example(
    model: cost.CostModel, num_ranks: int, rng: np.random.Generator
) -> dict[str, list[float]]:
    """Loads of every rank over the mean in one step: of items it owns, keeps and receives."""
    grids, owners = draw(MAIN, num_ranks, rng)
    loads = model.loads(grids)
    sent = cost.transfer_bytes(grids, CONFIG, LANGUAGE_HIDDEN_SIZE, ITEMSIZE)
    ranks = np.array(plan(loads, num_ranks, owners=owners, traffic=sent, tolerance=TOLERANCE))
    mean = loads.sum() / num_ranks
    stays = ranks == owners

    def shares(selected: npt.NDArray[np.bool_], ranks: Integers) -> list[float]:
        sums: list[float] = (
            np.bincount(ranks[selected], loads[selected], num_ranks) / mean
        ).tolist()
        return sums

    all_items = np.ones_like(stays)
    return {
        "own": shares(all_items, owners),
        "kept": shares(stays, ranks),
        "taken": shares(~stays, ranks),
    }


def _planning_time(
    model: cost.CostModel, options: argparse.Namespace, rng: np.random.Generator
) -> list[Result]:
    sizes = list(itertools.product(TIMED_RANKS[options.form], TIMED_ITEMS[options.form]))
    steps: dict[str, Callable[[], object]] = {}
    for num_ranks, number in sizes:
        grids, owners = draw_items(number, num_ranks, *MIXES[MAIN][1:], rng)
        loads = model.loads(grids)
        sent = cost.transfer_bytes(grids, CONFIG, LANGUAGE_HIDDEN_SIZE, ITEMSIZE)

        def step(
            loads: Integers = loads, n: int = num_ranks, owners: Integers = owners,
            sent: Integers = sent,
        ) -> None:  # fmt: skip
            plan(loads, n, owners=owners, traffic=sent, tolerance=TOLERANCE)

        steps[f"{num_ranks}/{number}"] = step
    times = interleave(steps, rounds=ROUNDS[options.form], clock=options.clock)
    rows = []
    for num_ranks, number in sizes:
        low, median, high = quartiles(times[f"{num_ranks}/{number}"])
        rows.append({
            "ranks": num_ranks, "items": number, "median_s": median, "quartiles_s": [low, high]
        })  # fmt: skip
    return rows


def _cost_models(options: argparse.Namespace, rng: np.random.Generator) -> Result:
    """Errors of three cost models for the time of packs drawn like the main mix, but smaller."""
    config, hidden, dtype = CONFIG, LANGUAGE_HIDDEN_SIZE, torch.bfloat16
    if options.device.type == "cpu":
        config = VisionConfig(num_layers=2, hidden_size=64, num_heads=4, ffn_hidden_size=256)
        hidden, dtype = 128, torch.float32
    with torch.device(options.device):
        tower = VisionTower(config, hidden).to(dtype)
    torch.nn.init.normal_(tower.encoder.pos_embed, std=0.02)
    counted = cost.analytic_cost(config, hidden)
    budget = {"full": 4.0, "quick": 2.0, "tiny": 0.01}[options.form]
    samples = cost.time_packs(tower, seconds=budget, max_patches=4096)
    models = {
        "patches": cost.CostModel(1.0, 0.0, 0.0),
        "counted": counted,
        "measured": cost.fit_cost(counted, samples),
    }
    packs = []
    for _ in range(PACKS[options.form]):
        grids, _ = draw_items(int(rng.integers(1, 12)), 1, 0.1, 0.8, rng)
        if options.device.type == "cpu":
            # Half of each side, for a CPU.
            grids[:, 1:] = (grids[:, 1:] // (2 * MERGE) * MERGE).clip(min=MERGE)
        packs.append(grids)
    shapes = [[tuple(grid) for grid in grids.tolist()] for grids in packs]
    seconds = [min(cost.step_seconds(tower, pack) for _ in range(3)) for pack in shapes]
    errors_by_model = {}
    for name, model in models.items():
        costs = np.array([model.costs(grids).sum() for grids in packs])
        # Fit a constant per pass and seconds per unit of cost to each model.
        design = np.stack([np.ones_like(costs), costs], 1) / np.array(seconds)[:, None]
        fixed, unit = np.linalg.lstsq(design, np.ones_like(costs), rcond=None)[0]
        predicted = (fixed + unit * costs).tolist()
        errors = [abs(p / s - 1) for p, s in zip(predicted, seconds, strict=True)]
        errors_by_model[name] = {
            "predicted_s": predicted,
            "mean_error": statistics.mean(errors),
            "largest_error": max(errors),
        }
    encoder = f"{config.num_layers} layers of {config.hidden_size}"
    return {"encoder": encoder, "measured_s": seconds, "models": errors_by_model}


# ---------------------------------------------------------------------- table and plot


def _median(draws: Sequence[dict[str, dict[str, float]]], name: str, quantity: str) -> float:
    return statistics.median(step[name][quantity] for step in draws)


def plot(result: Result, figure: "Figure") -> None:
    figure.set_size_inches(14, 8.4)
    panels = figure.subplots(2, 3)
    for axes, (mix, by_ranks) in zip(panels[0], result["mixes"].items(), strict=False):
        _plot_balance(axes, mix, by_ranks)
    _plot_example(panels[0][2], result["example"])
    _plot_moved(panels[1][0], result["mixes"][MAIN])
    _plot_planning(panels[1][1], result["planning"])
    _plot_cost_models(panels[1][2], result["cost_models"])


def _rank_axis(axes: "Axes", ranks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks[:: 2 if len(ranks) > 6 else 1])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("ranks")
    axes.grid(alpha=0.3)


def _plot_balance(axes: "Axes", mix: str, by_ranks: Result) -> None:
    ranks = [int(n) for n in by_ranks]
    for name, color in STRATEGIES.items():
        ratios = [_median(draws, name, "balance") for draws in by_ranks.values()]
        width = 3 if name == "plan" else 1.3
        axes.plot(ranks, ratios, color=color, linewidth=width, label=name)
    bound = [_median(draws, "least", "balance") for draws in by_ranks.values()]
    axes.plot(ranks, bound, color="black", linestyle=":", label="lower bound")
    _rank_axis(axes, ranks)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.97)
    axes.set_yticks([t for t in (1, 1.1, 1.2, 1.5, 2, 3, 4, 6, 8) if t <= axes.get_ylim()[1]])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_ylabel("load of the slowest rank / mean")
    axes.set_title(mix, fontsize=10)
    axes.legend(fontsize=8, loc="upper left")


def _plot_example(axes: "Axes", example: dict[str, list[float]]) -> None:
    order = np.argsort(example["own"])[::-1]
    own, kept, taken = (np.array(example[key])[order] for key in ("own", "kept", "taken"))
    x = np.arange(len(own))
    axes.bar(x, kept, width=1, color="tab:blue", label="plan: own items")
    axes.bar(
        x, taken, width=1, bottom=kept, color="lightskyblue", label="plan: items of other ranks"
    )
    axes.step([-0.5, *(x + 0.5)], [own[0], *own], color="tab:red", linewidth=1.3, label="at home")
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_xlim(-0.5, len(own) - 0.5)
    axes.set_xlabel(f"{len(own)} ranks, by the load they own")
    axes.set_ylabel("load / mean")
    axes.set_title("one step, before and after planning", fontsize=10)
    axes.legend(fontsize=8)


def _plot_moved(axes: "Axes", by_ranks: Result) -> None:
    ranks = [int(n) for n in by_ranks]
    for name in ("longest first, cost", "plan"):
        shares = [100 * _median(draws, name, "moved") for draws in by_ranks.values()]
        width = 2.5 if name == "plan" else 1.3
        axes.plot(ranks, shares, color=STRATEGIES[name], linewidth=width, label=name)
    bound = [100 * _median(draws, "least", "moved") for draws in by_ranks.values()]
    axes.plot(ranks, bound, color="black", linestyle=":", label="lower bound of the same balance")
    _rank_axis(axes, ranks)
    axes.set_ylim(0, 102)
    axes.set_ylabel("bytes sent to other ranks, %")
    axes.set_title(MAIN, fontsize=10)
    axes.legend(fontsize=8, loc="center right")


def _plot_planning(axes: "Axes", rows: Sequence[Result]) -> None:
    shades = ["lightskyblue", "tab:blue", "navy"]
    for color, num_ranks in zip(shades, dict.fromkeys(r["ranks"] for r in rows), strict=False):
        of_ranks = [row for row in rows if row["ranks"] == num_ranks]
        items = [row["items"] for row in of_ranks]
        low, high = zip(*(row["quartiles_s"] for row in of_ranks), strict=True)
        axes.plot(
            items, [1e3 * row["median_s"] for row in of_ranks],
            marker="o", color=color, label=f"{num_ranks:,} ranks",
        )  # fmt: skip
        axes.fill_between(
            items, [1e3 * s for s in low], [1e3 * s for s in high], color=color, alpha=0.2
        )
    axes.axhline(50, color="black", linestyle=":", linewidth=1, label="50 ms")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["items"] for row in rows}))
    axes.set_yticks([1, 2, 5, 10, 20, 50, 100])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.minorticks_off()
    axes.set_xlabel("items")
    axes.set_ylabel("planning, ms")
    axes.set_title("planning time, on every rank", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _plot_cost_models(axes: "Axes", models: Result) -> None:
    seconds = np.array(models["measured_s"])
    colors = {"patches": "tab:purple", "counted": "tab:green", "measured": "tab:blue"}
    for name, model in models["models"].items():
        error = 100 * model["mean_error"]
        axes.plot(
            1e3 * seconds, 100 * (np.array(model["predicted_s"]) / seconds - 1), "o", markersize=5,
            color=colors[name], label=f"{name}: mean error {error:.1f}%",
        )  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlabel("measured time of a pack of images and clips, ms")
    axes.set_ylabel("error of the predicted time, %")
    axes.set_title(f"cost models, encoder of {models['encoder']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")


def table(result: Result) -> str:
    blocks = []
    for mix, by_ranks in result["mixes"].items():
        header = ["ranks", "lower bound", *STRATEGIES, "moved: longest first, cost", "plan",
                  "lower bound"]  # fmt: skip
        rows = []
        for ranks, draws in by_ranks.items():
            rows.append([
                f"{int(ranks):,}",
                f"{_median(draws, 'least', 'balance'):.3f}",
                *(f"{_median(draws, name, 'balance'):.3f}" for name in STRATEGIES),
                *(f"{100 * _median(draws, name, 'moved'):.1f}%"
                  for name in ("longest first, cost", "plan", "least")),
            ])  # fmt: skip
        title = f"**{mix}: load of the slowest rank over the mean; bytes moved**"
        blocks.append(f"{title}\n\n{markdown(header, rows)}")
    rows = []
    for row in result["planning"]:
        low, high = row["quartiles_s"]
        rows.append([
            f"{row['ranks']:,}", f"{row['items']:,}", f"{1e3 * row['median_s']:.1f}",
            f"{1e3 * low:.1f} to {1e3 * high:.1f}",
        ])  # fmt: skip
    blocks.append(markdown(["ranks", "items", "planning, ms", "quartiles"], rows))
    models = result["cost_models"]
    rows = [
        [name, f"{100 * model['mean_error']:.1f}%", f"{100 * model['largest_error']:.1f}%"]
        for name, model in models["models"].items()
    ]
    header = ["cost model", "mean error", "largest error"]
    blocks.append(f"Encoder of {models['encoder']}:\n\n{markdown(header, rows)}")
    equal = result["attention_equals_the_rest_at_patches"]
    blocks.append(
        f"Kimi K2.5's encoder: attention costs as much as everything else at {equal:,.0f} patches."
    )
    return "\n\n".join(blocks)
