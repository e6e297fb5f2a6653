"""Loss against tokens and time, MuonClip beside AdamW and other Muons, each at its best rate.

On each model every optimizer tries the same learning rates with the whole budget and the same
seeds; where the best lies at an end of them, one more is tried beyond it. The best has the least
mean loss. There each trains with further seeds, and all but AdamW once more with a part of the
steps, the schedule shortened to them.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from benchmarks import training
from benchmarks.optimizers import add_selection, selected
from benchmarks.runner import Result, markdown, positive_int
from benchmarks.training import KINDS, Job, Kind, Size, mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "AdamW (fused)"
# Of the baseline's steps, in which MuonClip should reach its loss.
TARGET = 0.6


@dataclass(frozen=True)
class Form:
    steps: dict[Kind, int]
    sizes: dict[Kind, Size]
    rates: tuple[float, ...]
    seeds: int
    tuning_seeds: int
    optimizers: tuple[str, ...]


# First weights that suit the width: 0.02, which suits hundreds, has AdamW alone spend much of so
# short a training on growing narrow matrices.
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
        (BASELINE, "torch.optim.Muon", "MuonClip"),
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
        (BASELINE, "MuonClip"),
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
    parser.add_argument("--steps", type=positive_int, help="of every model; default: by the form")
    parser.add_argument("--seeds", type=positive_int, help="at the best rate; default: 3")
    parser.add_argument(
        "--tuning-seeds",
        type=positive_int,
        help="at every rate; default: 1 in the quick form, else 3",
    )


def run(options: argparse.Namespace) -> Result:
    form = FORMS[options.form]
    wanted = [
        one for one in selected(options, BASELINE) if options.only or one.name in form.optimizers
    ]
    absent = {
        one.name: reason for one in wanted if (reason := one.missing(options.device)) is not None
    }
    names = [BASELINE, *(one.name for one in wanted if one.name not in (*absent, BASELINE))]
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
    tuned = _tune(jobs, names, form.rates, tuning_seeds, options)
    chosen = {key: training.best_rate(results) for key, results in tuned.items()}
    further = []
    for (kind, name), lr in chosen.items():
        job = replace(jobs[kind], optimizer=name, lr=lr)
        further += training.with_seeds(job, seeds)[tuning_seeds:]
        steps = round(TARGET * job.steps)
        if name != BASELINE:
            job = replace(job, steps=steps, label=f"{name}, {steps} steps")
            further += training.with_seeds(job, seeds)
    done = training.train_all(further, options)
    told: Result = {"target": TARGET, "seeds": seeds, "not_run": absent, "models": {}}
    for kind, job in jobs.items():
        told["models"][kind] = {
            "title": KINDS[kind],
            "steps": job.steps,
            "tokens_per_step": job.size.tokens,
            "hidden": job.size.hidden,
            "layers": job.size.layers,
            "held_out_also_in_training": overlap[kind],
            "optimizers": {},
        }
        for name in names:
            results, lr = tuned[kind, name], chosen[kind, name]
            mine = [r for r in done if (r["kind"], r["optimizer"]) == (kind, name)]
            told["models"][kind]["parameters"] = results[0]["parameters"]
            told["models"][kind]["optimizers"][name] = {
                "lr": lr,
                "tuning": sorted([r["lr"], r["seed"], r["final"]] for r in results),
                "runs": [
                    *(r for r in results if r["lr"] == lr),
                    *(r for r in mine if r["label"] == name),
                ],
                "short": [r for r in mine if r["label"] != name],
            }
        _compare(told["models"][kind]["optimizers"])
    return told


def _tune(
    jobs: dict[Kind, Job],
    names: Sequence[str],
    rates: Sequence[float],
    seeds: int,
    options: argparse.Namespace,
) -> dict[tuple[Kind, str], list[Result]]:
    """Runs at all rates, by model and optimizer; rates are added where the best is at an end."""
    cases = {
        (kind, name): replace(job, optimizer=name) for kind, job in jobs.items() for name in names
    }
    told = training.tune(list(cases.values()), [rates] * len(cases), [seeds] * len(cases), options)
    return dict(zip(cases, told, strict=True))


def _compare(optimizers: dict[str, Any]) -> None:
    """Add to each when it reached the baseline's final loss, seed by seed."""
    finals = {run["seed"]: run["final"] for run in optimizers[BASELINE]["runs"]}
    for told in optimizers.values():
        told["share_of_steps"] = [
            reached(run["evaluations"]["steps"], run["evaluations"]["loss"], finals[run["seed"]])
            for run in told["runs"]
        ]


def reached(steps: Sequence[float], losses: Sequence[float], goal: float) -> float | None:
    """The share of the steps after which the loss is down at the goal, between two evaluations by
    a straight line; None if it never is."""
    if losses[0] <= goal:
        return steps[0] / steps[-1]
    for (before, above), (after, below) in pairwise(zip(steps, losses, strict=True)):
        if below <= goal:
            return (before + (after - before) * (above - goal) / (above - below)) / steps[-1]
    return None


# ---------------------------------------------------------------------- for people


def table(result: Result) -> str:
    parts = []
    for model in result["models"].values():
        base = [run["final"] for run in model["optimizers"][BASELINE]["runs"]]
        rows = []
        for name, told in model["optimizers"].items():
            finals = [run["final"] for run in told["runs"]]
            shares = told["share_of_steps"]
            mean = "never" if None in shares else f"{np.mean(cast(list[float], shares)):.0%}"
            short = [run["final"] for run in told["short"]]
            seconds = np.median([run["step_s"] for run in told["runs"]])
            own = np.median([run["optimizer_s"] for run in told["runs"]])
            rows.append(
                [
                    f"**{name}**" if name == training.MUONCLIP else name,
                    f"{told['lr']:g}",
                    _with_spread(finals),
                    f"{_difference(finals, base)}" if name != BASELINE else "",
                    mean if name != BASELINE else "",
                    f"{_with_spread(short)}" if short else "",
                    f"{_difference(short, base)}" if short else "",
                    f"{seconds * 1e3:.0f}",
                    f"{own / seconds:.0%}",
                ]
            )
        part = f"{result['target']:.0%}"
        header = (
            "", "best rate", "held-out loss", "to AdamW's", "AdamW's loss after",
            f"with {part} of the steps", "to AdamW's", "step, ms", "of it the optimizer",
        )  # fmt: skip
        parts.append(
            f"**{model['title'][0].upper()}{model['title'][1:]}**: "
            f"{model['parameters']:,} parameters, {model['steps']:,} steps of "
            f"{model['tokens_per_step']:,} tokens\n\n"
            + markdown(header, rows)
            + f"\n\n{model['held_out_also_in_training']:.2%} of the held-out text's runs of 32 "
            "tokens are also in the training text."
        )
    parts.append(
        f"Mean and standard deviation of {result['seeds']} seeds; losses in nats a token; a step's "
        "time is the process's own."
    )
    if result["not_run"]:
        said = "; ".join(f"{name}: {why}" for name, why in result["not_run"].items())
        parts.append(f"Not run: {said}.")
    return "\n\n".join(parts)


def _with_spread(values: Sequence[float | None]) -> str:
    if None in values:
        return "diverged"
    mean, spread = mean_and_spread(cast(Sequence[float], values))
    return f"{mean:.3f} ± {spread:.3f}"


def _difference(values: Sequence[float | None], base: Sequence[float]) -> str:
    """Mean over seeds of the difference."""
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
        for number, (name, told) in enumerate(model["optimizers"].items()):
            colour = f"C{number}"
            for against, axis in (("tokens", tokens), ("seconds", seconds)):
                xs = np.mean([run["evaluations"][against] for run in told["runs"]], axis=0)
                ys = np.array([run["evaluations"]["loss"] for run in told["runs"]])
                axis.plot(xs, ys.mean(0), color=colour, label=name)
                axis.fill_between(xs, ys.min(0), ys.max(0), color=colour, alpha=0.2, lw=0)
                if told["short"]:
                    xs = np.mean([run["evaluations"][against] for run in told["short"]], axis=0)
                    ys = np.array([run["evaluations"]["loss"] for run in told["short"]])
                    axis.plot(xs, ys.mean(0), color=colour, ls=":")
            ends = [(lr, final) for lr, _, final in told["tuning"] if final is not None]
            rates.plot(*zip(*ends, strict=True), "o", color=colour, ms=3)
            means = {lr: np.mean([end for at, end in ends if at == lr]) for lr, _ in ends}
            rates.plot(*zip(*means.items(), strict=True), "-", color=colour, label=name)
        for axis, what in (
            (tokens, "tokens"),
            (seconds, "seconds of training"),
            (rates, "peak learning rate"),
        ):
            axis.set(xlabel=what, ylabel="held-out loss, nats a token")
            axis.grid(alpha=0.3)
        for axis in (tokens, seconds):
            axis.axhline(base, color="grey", lw=0.8, ls="--")
        rates.set_xscale("log", base=2)
        rates.xaxis.set_major_formatter("{x:.2g}")
        tokens.xaxis.set_major_formatter(lambda count, _: f"{count / 1e3:,.0f}k")
        tokens.set_title(model["title"], fontsize=10)
        seconds.set_title(
            f"dotted: {result['target']:.0%} of the steps; dashed: AdamW's end", fontsize=9
        )
        rates.set_title("tuning: every seed, and their mean", fontsize=9)
        tokens.legend(fontsize=8)
