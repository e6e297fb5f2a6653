"""Loss over tokens and time of MuonClip, AdamW and other Muons, each at its best learning rate.

Every optimizer tries the same learning rates on each model with the full budget and the same seeds,
and further rates while the best is the lowest or the highest. The best rate has the lowest mean
loss. Each optimizer then trains with further seeds at its best rate, and all but AdamW also with
fewer steps and a shorter schedule.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from benchmarks import training
from benchmarks.optimizers import absence_note, add_selection, selected
from benchmarks.runner import Result, markdown, positive_int
from benchmarks.training import BASELINE, KINDS, Job, Kind, Size, mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Share of the baseline's steps in which MuonClip should reach its loss.
TARGET = 0.6


@dataclass(frozen=True)
class Form:
    steps: dict[Kind, int]
    sizes: dict[Kind, Size]
    rates: tuple[float, ...]
    seeds: int
    tuning_seeds: int
    optimizers: tuple[str, ...]


# Initialization for narrow models: with 0.02, which suits widths of hundreds, AdamW would spend
# much of a short training on growing the matrices.
_NARROW = 0.3 / 8

FORMS = {
    "full": Form(
        {"dense": 4000, "moe": 4000, "vision": 4000},
        {
            "dense": Size(512, 8, 8, 1024, 32, 8192),
            "moe": Size(512, 8, 8, 1024, 32, 8192),
            "vision": Size(512, 8, 8, 1024, 32, 8192),
        },
        (1e-3, 2e-3, 4e-3),
        3,
        3,
        (BASELINE, "torch.optim.Muon", "MuonClip", "MuonClip, NorMuon", "MuonClip, int8 momentum"),
    ),
    "quick": Form(
        {"dense": 120, "moe": 100, "vision": 70},
        {
            "dense": Size(64, 3, 4, 128, 32, 512, _NARROW),
            "moe": Size(64, 3, 4, 128, 16, 512, _NARROW),
            "vision": Size(64, 3, 4, 128, 16, 512, _NARROW),
        },
        (8e-3, 16e-3, 32e-3),
        3,
        1,
        (BASELINE, "MuonClip", "MuonClip, NorMuon", "MuonClip, int8 momentum"),
    ),
    "tiny": Form(
        {"dense": 5, "moe": 5, "vision": 5},
        {
            "dense": Size(32, 1, 2, 64, 2, 400),
            "moe": Size(32, 2, 2, 64, 2, 400),
            "vision": Size(32, 2, 2, 64, 2, 400),
        },
        (4e-3,),
        2,
        1,
        (BASELINE, "MuonClip"),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    training.add_arguments(parser)
    parser.add_argument(
        "--models", nargs="+", choices=list(KINDS), help="default: all; " + "; ".join(
            f"{kind}: {title}" for kind, title in KINDS.items()
        ),
    )  # fmt: skip
    add_selection(parser)
    parser.add_argument(
        "--steps", type=positive_int, help="steps of every model; default: by the form"
    )
    parser.add_argument("--seeds", type=positive_int, help="seeds at the best rate; default: 3")
    parser.add_argument(
        "--tuning-seeds",
        type=positive_int,
        help="seeds at every rate; default: 1 with --quick, otherwise 3",
    )


def run(options: argparse.Namespace) -> Result:
    form = FORMS[options.form]
    wanted = [c for c in selected(options, BASELINE) if options.only or c.name in form.optimizers]
    absent = {c.name: reason for c in wanted if (reason := c.missing(options.device)) is not None}
    names = [BASELINE, *(c.name for c in wanted if c.name not in (*absent, BASELINE))]
    kinds: Sequence[Kind] = options.models or list(KINDS)
    jobs = {
        kind: Job(
            kind,
            BASELINE,
            0.0,
            options.steps or form.steps[kind],
            options.seed,
            form.sizes[kind],
        )
        for kind in kinds
    }
    seeds = options.seeds or form.seeds
    overlap = {kind: training.overlap(job.size) for kind, job in jobs.items()}

    tuning_seeds = min(seeds, options.tuning_seeds or form.tuning_seeds)
    tuning = _tune(jobs, names, form.rates, tuning_seeds, options)
    best_rates = {key: training.best_rate(results) for key, results in tuning.items()}
    further = []
    for (kind, name), lr in best_rates.items():
        job = replace(jobs[kind], optimizer=name, lr=lr)
        further += training.with_seeds(job, seeds)[tuning_seeds:]
        steps = round(TARGET * job.steps)
        if name != BASELINE:
            job = replace(job, steps=steps, label=f"{name}, {steps} steps")
            further += training.with_seeds(job, seeds)
    further_results = training.train_all(further, options)
    result: Result = {"target": TARGET, "seeds": seeds, "not_run": absent, "models": {}}
    for kind, job in jobs.items():
        result["models"][kind] = {
            "title": KINDS[kind],
            "steps": job.steps,
            "tokens_per_step": job.size.tokens,
            "hidden": job.size.hidden,
            "layers": job.size.layers,
            "held_out_also_in_training": overlap[kind],
            "optimizers": {},
        }
        for name in names:
            results, lr = tuning[kind, name], best_rates[kind, name]
            own = [r for r in further_results if (r["kind"], r["optimizer"]) == (kind, name)]
            result["models"][kind]["parameters"] = results[0]["parameters"]
            result["models"][kind]["optimizers"][name] = {
                "lr": lr,
                "tuning": sorted([r["lr"], r["seed"], r["final"]] for r in results),
                "runs": [
                    *(r for r in results if r["lr"] == lr),
                    *(r for r in own if r["label"] == name),
                ],
                "short": [r for r in own if r["label"] != name],
            }
        _compare(result["models"][kind]["optimizers"])
    return result


def _tune(
    jobs: dict[Kind, Job],
    names: Sequence[str],
    rates: Sequence[float],
    seeds: int,
    options: argparse.Namespace,
) -> dict[tuple[Kind, str], list[Result]]:
    """Results at all learning rates by model and optimizer."""
    cases = {
        (kind, name): replace(job, optimizer=name) for kind, job in jobs.items() for name in names
    }
    results = training.tune(
        list(cases.values()), [rates] * len(cases), [seeds] * len(cases), options
    )
    return dict(zip(cases, results, strict=True))


def _compare(optimizers: dict[str, Any]) -> None:
    """Add to each optimizer when it reached the baseline's final loss, by seed."""
    finals = {run["seed"]: run["final"] for run in optimizers[BASELINE]["runs"]}
    for optimizer in optimizers.values():
        optimizer["share_of_steps"] = [
            reached(run["evaluations"]["steps"], run["evaluations"]["loss"], finals[run["seed"]])
            for run in optimizer["runs"]
        ]


def reached(steps: Sequence[float], losses: Sequence[float], goal: float) -> float | None:
    """Share of the steps after which the loss reaches the goal, interpolated linearly between
    evaluations; None if it never does."""
    if losses[0] <= goal:
        return steps[0] / steps[-1]
    for (before, above), (after, below) in pairwise(zip(steps, losses, strict=True)):
        if below <= goal:
            return (before + (after - before) * (above - goal) / (above - below)) / steps[-1]
    return None


# ---------------------------------------------------------------------- table and plot


def table(result: Result) -> str:
    parts = []
    for model in result["models"].values():
        base = [run["final"] for run in model["optimizers"][BASELINE]["runs"]]
        rows = []
        for name, optimizer in model["optimizers"].items():
            finals = [run["final"] for run in optimizer["runs"]]
            shares = optimizer["share_of_steps"]
            mean = "never" if None in shares else f"{np.mean(cast(list[float], shares)):.0%}"
            short = [run["final"] for run in optimizer["short"]]
            seconds = np.median([run["step_s"] for run in optimizer["runs"]])
            own_seconds = np.median([run["optimizer_s"] for run in optimizer["runs"]])
            rows.append(
                [
                    f"**{name}**" if name == training.MUONCLIP else name,
                    f"{optimizer['lr']:g}",
                    _with_spread(finals),
                    f"{_difference(finals, base)}" if name != BASELINE else "",
                    mean if name != BASELINE else "",
                    f"{_with_spread(short)}" if short else "",
                    f"{_difference(short, base)}" if short else "",
                    f"{seconds * 1e3:.0f}",
                    f"{own_seconds / seconds:.0%}",
                ]
            )
        target = f"{result['target']:.0%}"
        header = (
            "", "best rate", "held-out loss", "vs. AdamW", "AdamW's loss after",
            f"with {target} of the steps", "vs. AdamW", "step, ms", "optimizer's share",
        )  # fmt: skip
        parts.append(
            f"**{model['title'][0].upper()}{model['title'][1:]}**: "
            f"{model['parameters']:,} parameters, {model['steps']:,} steps of "
            f"{model['tokens_per_step']:,} tokens\n\n"
            + markdown(header, rows)
            + f"\n\n{model['held_out_also_in_training']:.2%} of the held-out text's 32-grams also "
            "occur in the training text."
        )
    parts.append(
        f"Mean and standard deviation of {result['seeds']} seeds; losses in nats per token; step "
        "times are processor times on a CPU."
    )
    return "\n\n".join([*parts, *absence_note("run", result["not_run"])])


def _with_spread(values: Sequence[float | None]) -> str:
    if None in values:
        return "diverged"
    mean, spread = mean_and_spread(cast(Sequence[float], values))
    return f"{mean:.3f} ± {spread:.3f}"


def _difference(values: Sequence[float | None], base: Sequence[float]) -> str:
    """Mean difference over seeds."""
    if None in values:
        return ""
    return f"{np.mean(np.subtract(cast(Sequence[float], values), base)):+.3f}"


def plot(result: Result, figure: "Figure") -> None:
    models = result["models"]
    figure.set_size_inches(13, 3.6 * len(models))
    axes = figure.subplots(len(models), 3, squeeze=False)
    for row, model in zip(axes, models.values(), strict=True):
        tokens, seconds, rates = row
        base = np.mean([run["final"] for run in model["optimizers"][BASELINE]["runs"]])
        for number, (name, optimizer) in enumerate(model["optimizers"].items()):
            color = f"C{number}"
            for against, axis in (("tokens", tokens), ("seconds", seconds)):
                xs = np.mean([run["evaluations"][against] for run in optimizer["runs"]], axis=0)
                ys = np.array([run["evaluations"]["loss"] for run in optimizer["runs"]])
                axis.plot(xs, ys.mean(0), color=color, label=name)
                axis.fill_between(xs, ys.min(0), ys.max(0), color=color, alpha=0.2, lw=0)
                if optimizer["short"]:
                    xs = np.mean(
                        [run["evaluations"][against] for run in optimizer["short"]], axis=0
                    )
                    ys = np.array([run["evaluations"]["loss"] for run in optimizer["short"]])
                    axis.plot(xs, ys.mean(0), color=color, ls=":")
            finals = [(lr, final) for lr, _, final in optimizer["tuning"] if final is not None]
            rates.plot(*zip(*finals, strict=True), "o", color=color, ms=3)
            means = {lr: np.mean([final for at, final in finals if at == lr]) for lr, _ in finals}
            rates.plot(*zip(*means.items(), strict=True), "-", color=color, label=name)
        for axis, label in (
            (tokens, "tokens"),
            (seconds, "seconds of training"),
            (rates, "peak learning rate"),
        ):
            axis.set(xlabel=label, ylabel="held-out loss, nats per token")
            axis.grid(alpha=0.3)
        for axis in (tokens, seconds):
            axis.axhline(base, color="grey", lw=0.8, ls="--")
        rates.set_xscale("log", base=2)
        rates.xaxis.set_major_formatter("{x:.2g}")
        tokens.xaxis.set_major_formatter(lambda count, _: f"{count / 1e3:,.0f}k")
        tokens.set_title(model["title"], fontsize=10)
        seconds.set_title(
            f"dotted: {result['target']:.0%} of the steps; dashed: AdamW's final loss", fontsize=9
        )
        rates.set_title("tuning: seeds and their mean", fontsize=9)
        tokens.legend(fontsize=8)
