"""Scaling law of small models: the compute that MuonClip needs for AdamW's held-out loss.

The number of training tokens is proportional to the number of parameters. At each size, both
optimizers try the same learning rates, with all seeds at small sizes and with one at large sizes,
and further rates while the best is the lowest or the highest. They train with all seeds at the best
rate.

Compute is 6 N D: N is the number of parameters without the embedding, which needs no products, and
with the output head; D is the number of training tokens. The work of the optimizer does not count.
A power law a·C^-b is fitted by least squares of the logarithms. Intervals are bootstrap intervals
that resample the seeds of each size, jointly for both optimizers, which see the same batches.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks import training
from benchmarks.runner import Result, markdown, positive_float, positive_int
from benchmarks.training import BASELINE, MUONCLIP, Job, Size, mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Share of AdamW's compute for models of 0.4 to 1.5 billion parameters (arXiv 2502.16982).
MOONLIGHT = 0.52
# Up to four passes over a text are about as good as new text (arXiv 2305.16264).
MAX_PASSES = 4.0
_INTERVAL = (2.5, 97.5)
_RESAMPLES = 4000

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Form:
    """Sizes of the benchmark.

    Attributes:
        sizes: model sizes.
        tokens: training tokens per counted parameter.
        rates: learning rates to try at every size.
        tuning_seeds: number of seeds at every rate, by size; at most ``seeds``.
        seeds: number of seeds at the best rate.
    """

    sizes: tuple[Size, ...]
    tokens: float
    rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    seeds: int


def _sizes(
    sequence: int, sequences: int, vocabulary: int, *shapes: tuple[int, int, int]
) -> tuple[Size, ...]:
    """A size for each (hidden, layers, heads), initialized by its width: with a standard deviation
    of 0.02, AdamW would spend much of a short training on growing narrow matrices."""
    return tuple(
        Size(hidden, layers, heads, sequence, sequences, vocabulary, 0.3 / math.sqrt(hidden))
        for hidden, layers, heads in shapes
    )


FORMS = {
    "full": Form(
        _sizes(256, 16, 2048, (48, 3, 3), (64, 4, 4), (96, 5, 6), (128, 6, 8)),
        6.0,
        (4e-3, 8e-3, 16e-3),
        (5, 5, 5, 1),
        5,
    ),
    "quick": Form(
        _sizes(128, 8, 512, (24, 2, 2), (32, 3, 2), (48, 3, 3), (64, 4, 4)),
        2.2,
        (8e-3, 16e-3, 32e-3),
        (3, 3, 1, 1),
        3,
    ),
    "tiny": Form(
        _sizes(64, 2, 400, (16, 1, 2), (24, 1, 2), (32, 1, 2), (32, 2, 2)),
        0.1,
        (16e-3,),
        (2, 1, 1, 1),
        2,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    training.add_arguments(parser)
    parser.add_argument("--seeds", type=positive_int, help="number of seeds; default: by the form")
    parser.add_argument(
        "--tokens", type=positive_float, help="training tokens per parameter; default: by the form"
    )


def run(options: argparse.Namespace) -> Result:
    form = FORMS[options.form]
    seeds = options.seeds or form.seeds
    tokens = options.tokens or form.tokens
    jobs, parameters = [], []
    for size in form.sizes:
        job = Job("dense", BASELINE, 0.0, 1, options.seed, size, evaluations=1)
        parameters.append(num_parameters(job))
        steps = max(2, round(tokens * parameters[-1] / size.tokens))
        passes = steps * size.tokens / available(size)
        if passes > MAX_PASSES:
            raise ValueError(
                f"hidden {size.hidden} would read the text {passes:.1f} times (limit: "
                f"{MAX_PASSES:g}): reduce --tokens, which is {tokens:g}"
            )
        jobs.append(replace(job, steps=steps))

    # Longest jobs first, so that all cores finish at about the same time.
    cases = [
        (index, replace(jobs[index], optimizer=name))
        for index in reversed(range(len(jobs)))
        for name in (BASELINE, MUONCLIP)
    ]
    tuning_seeds = [min(seeds, form.tuning_seeds[index]) for index, _ in cases]
    tuning = training.tune(
        [case for _, case in cases], [form.rates] * len(cases), tuning_seeds, options
    )
    rates = [training.best_rate(results) for results in tuning]
    further = training.train_all(
        [
            seeded
            for (_, case), lr, done in zip(cases, rates, tuning_seeds, strict=True)
            for seeded in training.with_seeds(replace(case, lr=lr), seeds)[done:]
        ],
        options,
    )
    sizes: list[Result] = [
        {
            "hidden": job.size.hidden,
            "layers": job.size.layers,
            "heads": job.size.heads,
            "parameters": count,
            "steps": job.steps,
            "tokens": job.steps * job.size.tokens,
            "compute": 6.0 * count * job.steps * job.size.tokens,
            "passes": job.steps * job.size.tokens / available(job.size),
            "optimizers": {},
        }
        for job, count in zip(jobs, parameters, strict=True)
    ]
    for (index, case), results, lr in zip(cases, tuning, rates, strict=True):
        runs = [run for run in results if run["lr"] == lr]
        missing = seeds - len(runs)
        runs, further = [*runs, *further[:missing]], further[missing:]
        if any(run["final"] is None for run in runs):
            raise RuntimeError(f"{case.optimizer} of hidden {case.size.hidden} diverged at {lr:g}")
        sizes[index]["optimizers"][case.optimizer] = {
            "lr": lr,
            "tuning": sorted([run["lr"], run["seed"], run["final"]] for run in results),
            "losses": [run["final"] for run in runs],
            "step_s": float(np.median([run["step_s"] for run in runs])),
            "optimizer_s": float(np.median([run["optimizer_s"] for run in runs])),
        }
    return {
        "seeds": seeds,
        "tokens_per_parameter": tokens,
        "tokens_per_step": jobs[0].size.tokens,
        "rates": list(form.rates),
        "held_out_also_in_training": training.overlap(jobs[0].size),
        "sizes": sizes,
        **fits(sizes, options.seed),
    }


def available(size: Size) -> int:
    """Number of tokens of the training text."""
    return len(training.text(size.vocabulary).corpora["train"].tokens)


def num_parameters(job: Job) -> int:
    """Number of parameters without the embedding and with the output head."""
    model = training.Dense(job, torch.device("cpu")).model
    embedding: Tensor = model.get_input_embeddings().weight
    return sum(p.numel() for p in model.parameters() if p is not embedding)


# ---------------------------------------------------------------------- the fit


def power_law(compute: Array, losses: Array) -> tuple[Array, Array]:
    """Fit the power law a·C^-b by least squares of the logarithms.

    Args:
        compute: [sizes].
        losses: [..., sizes].

    Returns:
        log a and b, [...] each.
    """
    x, y = np.log(compute), np.log(losses)
    centered = x - x.mean()
    b = -(y * centered).sum(-1) / (centered * centered).sum()
    return y.mean(-1) + b * x.mean(), b


def fits(sizes: Sequence[Any], seed: int) -> Result:
    """Power law of each optimizer, and MuonClip's share of AdamW's compute for the same loss.

    The shares cover the range from the smallest to the largest compute, with 95% intervals. Each
    size but the smallest also gets a ``share`` that is interpolated between MuonClip's sizes
    instead of fitted. ``curve`` and ``band`` are the fitted losses, for the plot.
    """
    compute = np.array([size["compute"] for size in sizes])
    count = len(sizes[0]["optimizers"][BASELINE]["losses"])
    rng = np.random.default_rng(seed)
    # [resamples, sizes, seeds]; the first is the sample itself.
    resampled = rng.integers(count, size=(_RESAMPLES + 1, len(sizes), count))
    resampled[0] = np.arange(count)
    points = np.geomspace(compute.min(), compute.max(), 25)
    laws, fitted, log_losses = {}, {}, {}
    for name in (BASELINE, MUONCLIP):
        losses = np.array([size["optimizers"][name]["losses"] for size in sizes])
        # Fitting the geometric mean over seeds is equivalent to fitting all runs.
        sampled = np.log(losses)[np.arange(len(sizes))[:, None], resampled].mean(-1)
        log_losses[name] = sampled
        log_a, b = laws[name] = power_law(compute, np.exp(sampled))
        curves = np.exp(log_a[:, None] - b[:, None] * np.log(points))
        at_sizes = log_a[0] - b[0] * np.log(compute)
        fitted[name] = {
            "a": float(np.exp(log_a[0])),
            "b": float(b[0]),
            "b_interval": _interval(b[1:]),
            "largest_residual": float(np.abs(np.expm1(sampled[0] - at_sizes)).max()),
            "curve": curves[0].tolist(),
            "band": np.percentile(curves[1:], _INTERVAL, axis=0).tolist(),
        }
    for size, size_compute, goals in zip(
        sizes[1:], compute[1:], log_losses[BASELINE].T[1:], strict=True
    ):
        needed = interpolate(log_losses[MUONCLIP], goals, np.log(compute))
        share = np.exp(needed - np.log(size_compute))
        size["share"] = float(share[0]) if np.isfinite(share[0]) else None
        size["share_interval"] = _interval(share[1:]) if np.isfinite(share).all() else None
    shares = share_of_compute(laws[BASELINE], laws[MUONCLIP], points)
    return {
        "points": points.tolist(),
        "fits": fitted,
        "share": shares[0].tolist() if np.isfinite(shares[0]).all() else None,
        "share_band": np.percentile(shares[1:], _INTERVAL, axis=0).tolist()
        if np.isfinite(shares).all()
        else None,
    }


def _interval(values: Array) -> list[float]:
    low, high = np.percentile(values, _INTERVAL)
    return [float(low), float(high)]


def share_of_compute(base: tuple[Array, Array], other: tuple[Array, Array], at: Array) -> Array:
    """Compute with which ``other`` reaches the loss of ``base`` with compute ``at``, over ``at``.

    Args:
        base, other: log a and b, [n] each.
        at: [points].

    Returns:
        [n, points]; NaN if the loss of ``other`` does not decrease with compute.
    """
    (log_a, b), (other_log_a, other_b) = base, other
    x = np.log(at)
    exponent = np.where(other_b > 0, other_b, np.nan)
    loss = log_a[:, None] - b[:, None] * x
    with np.errstate(over="ignore"):
        share: Array = np.exp((other_log_a[:, None] - loss) / exponent[:, None] - x)
    return share


def interpolate(log_losses: Array, goals: Array, x: Array) -> Array:
    """Log compute at which losses reach a goal, by linear interpolation between sizes.

    Args:
        log_losses: [n, sizes].
        goals: [n], logarithms of the losses to reach.
        x: [sizes], logarithms of the compute, ascending.

    Returns:
        [n]; NaN if the goal is out of range or the losses do not decrease.
    """
    return np.array(
        [
            np.interp(-goal, -row, x, left=np.nan, right=np.nan)
            if (np.diff(row) < 0).all()
            else np.nan
            for row, goal in zip(log_losses, goals, strict=True)
        ]
    )


# ---------------------------------------------------------------------- table and plot


def table(result: Result) -> str:
    rows = []
    for size in result["sizes"]:
        base, own = (size["optimizers"][name] for name in (BASELINE, MUONCLIP))
        (mean, spread), (own_mean, own_spread) = (
            mean_and_spread(optimizer["losses"]) for optimizer in (base, own)
        )
        differences = np.subtract(own["losses"], base["losses"])
        rows.append(
            [
                f"{size['layers']} x {size['hidden']}",
                f"{size['parameters']:,}",
                f"{size['tokens']:,}",
                f"{size['compute']:.2g}",
                f"{base['lr']:g}",
                f"{mean:.3f} ± {spread:.3f}",
                f"{own['lr']:g}",
                f"{own_mean:.3f} ± {own_spread:.3f}",
                f"{differences.mean():+.3f}",
                _share(size),
                " / ".join(f"{o['optimizer_s'] / o['step_s']:.0%}" for o in (base, own)),
            ]
        )
    header = (
        "layers x hidden", "N", "D", "6 N D", "AdamW's rate", "AdamW", "MuonClip's rate",
        "**MuonClip**", "difference",
        "share of AdamW's compute, interpolated", "optimizer's share of a step",
    )  # fmt: skip
    laws = [
        [
            name,
            f"{law['a']:.3g} · C^-{law['b']:.4f}",
            "{:.4f} to {:.4f}".format(*law["b_interval"]),
            f"{law['largest_residual']:.1%}",
        ]
        for name, law in result["fits"].items()
    ]
    passes = max(size["passes"] for size in result["sizes"])
    return "\n\n".join(
        [
            markdown(header, rows),
            markdown(["power law", "loss", "exponent, 95%", "largest residual"], laws),
            _conclusion(result),
            f"Mean and standard deviation of {result['seeds']} seeds; losses in nats per token; "
            f"{result['tokens_per_parameter']:g} tokens per parameter, in steps of "
            f"{result['tokens_per_step']:,}; the largest model reads the text {passes:.2f} times. "
            f"{result['held_out_also_in_training']:.2%} of the held-out text's 32-grams also "
            "occur in the training text.",
        ]
    )


def _share(size: Any) -> str:
    if size.get("share") is None:
        return ""
    if size["share_interval"] is None:
        return f"{size['share']:.2f}"
    low, high = size["share_interval"]
    return f"{size['share']:.2f} ({low:.2f} to {high:.2f})"


def _conclusion(result: Result) -> str:
    """The result in one sentence."""
    if result["share"] is None:
        return f"{MUONCLIP}'s loss does not decrease with compute, so that its share is undefined."

    def at(point: int) -> str:
        share = f"{result['share'][point]:.2f}"
        if result["share_band"] is None:
            return f"{share} (no interval: in some resamples its loss does not decrease)"
        low, high = (band[point] for band in result["share_band"])
        return f"{share} ({low:.2f} to {high:.2f})"

    return (
        f"According to the power laws, **{MUONCLIP} needs {at(-1)} of AdamW's compute** for the "
        f"same loss at the largest compute, {at(len(result['points']) // 2)} in the middle of the "
        f"range and {at(0)} at its lower end."
    )


def plot(result: Result, figure: "Figure") -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure.set_size_inches(13, 5)
    losses, shares = figure.subplots(1, 2)
    compute = [size["compute"] for size in result["sizes"]]
    for color, (name, law) in zip(("C0", "C1"), result["fits"].items(), strict=True):
        runs = [size["optimizers"][name]["losses"] for size in result["sizes"]]
        for x, ys in zip(compute, runs, strict=True):
            losses.plot([x] * len(ys), ys, "o", color=color, ms=4, alpha=0.7)
        label = f"{name}: {law['a']:.3g} · C$^{{-{law['b']:.4f}}}$"
        losses.plot(result["points"], law["curve"], color=color, label=label)
        losses.fill_between(result["points"], *law["band"], color=color, alpha=0.2, lw=0)
    losses.set(
        xscale="log", yscale="log", xlabel="compute C = 6 N D, FLOPs",
        ylabel="held-out loss, nats per token", title="all runs, fit and 95% band",
    )  # fmt: skip
    # The range is less than a decade: powers of ten would leave the axis without labels.
    losses.yaxis.set_major_locator(MaxNLocator(8))
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_locator(NullLocator())
    losses.legend(fontsize=8)
    if result["share"] is not None:
        shares.plot(result["points"], result["share"], color="C1", label=f"{MUONCLIP}, power laws")
        if result["share_band"] is not None:
            shares.fill_between(
                result["points"], *result["share_band"], color="C1", alpha=0.2, lw=0
            )
    for size in result["sizes"]:
        if size.get("share") is not None:
            low, high = size["share_interval"] or (size["share"], size["share"])
            shares.plot([size["compute"]] * 2, [low, high], color="black", lw=1)
            shares.plot(size["compute"], size["share"], "ko", ms=4)
    shares.plot([], [], "ko-", ms=4, lw=1, label=f"{MUONCLIP}, interpolated between sizes")
    shares.axhline(1, color="C0", label="AdamW")
    shares.axhline(
        MOONLIGHT, color="grey", ls="--", lw=0.9, label="Moonlight, 0.4 B parameters or more"
    )
    shares.set(
        xscale="log", xlabel="AdamW's compute, FLOPs", ylabel="share for the same loss",
        title="compute that MuonClip needs for AdamW's loss, 95% band",
    )  # fmt: skip
    shares.set_ylim(bottom=0)
    shares.legend(fontsize=8)
    for axis in (losses, shares):
        axis.grid(alpha=0.3)
