"""A scaling law in miniature: the compute that MuonClip needs for AdamW's held-out loss.

Models of several sizes see tokens in proportion to their parameters. At each size each optimizer is
given the same learning rates, with all seeds where that is cheap and with one elsewhere; where the
best lies at an end of them, one more is tried beyond it. At the best it trains with all seeds.

Compute is 6 N D: N parameters without the embedding, which multiplies nothing, and with the output
head; D tokens trained on. The optimizer's own work is not in it. A power law a·C^-b is fitted by
least squares of the logarithms; intervals are of a bootstrap that draws the seeds of each size
anew, the same for both optimizers, which see the same batches.
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
from benchmarks.training import MUONCLIP, Job, Size, mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "AdamW (fused)"
# Of AdamW's compute, with models from 0.4 to 1.5 billion parameters (arXiv 2502.16982).
MOONLIGHT = 0.52
# Reading a text up to four times is about as good as reading new text (arXiv 2305.16264).
MOST_PASSES = 4.0
_INTERVAL = (2.5, 97.5)
_RESAMPLES = 4000

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Form:
    """
    Attributes:
        tokens: trained on, for each parameter that counts.
        rates: tried by each optimizer at every size.
        tuning_seeds: at every rate, by size; no more than ``seeds``.
    """

    sizes: tuple[Size, ...]
    tokens: float
    rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    seeds: int


def _sizes(
    sequence: int, sequences: int, vocabulary: int, *shapes: tuple[int, int, int]
) -> tuple[Size, ...]:
    """Of (hidden, layers, heads) each, with first weights that suit the width: 0.02, which suits
    hundreds, has AdamW alone spend much of so short a training on growing narrow matrices."""
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
    parser.add_argument("--seeds", type=positive_int, help="default: by the form")
    parser.add_argument(
        "--tokens", type=positive_float, help="trained on, for each parameter; default: by the form"
    )


def run(options: argparse.Namespace) -> Result:
    form = FORMS[options.form]
    seeds = options.seeds or form.seeds
    tokens = options.tokens or form.tokens
    jobs, parameters = [], []
    for size in form.sizes:
        job = Job("dense", BASELINE, 0.0, 1, options.seed, size, evaluations=1)
        parameters.append(counted(job))
        steps = max(2, round(tokens * parameters[-1] / size.tokens))
        passes = steps * size.tokens / available(size)
        if passes > MOST_PASSES:
            raise ValueError(
                f"hidden {size.hidden} would read the text {passes:.1f} times (at most "
                f"{MOST_PASSES:g}): give a smaller --tokens than {tokens:g}"
            )
        jobs.append(replace(job, steps=steps))

    # The longest first: what ends last is short then, and no core waits long.
    cases = [
        (place, replace(jobs[place], optimizer=name))
        for place in reversed(range(len(jobs)))
        for name in (BASELINE, MUONCLIP)
    ]
    tuning_seeds = [min(seeds, form.tuning_seeds[place]) for place, _ in cases]
    tried = training.tune(
        [case for _, case in cases], [form.rates] * len(cases), tuning_seeds, options
    )
    rates = [training.best_rate(results) for results in tried]
    further = training.train_all(
        [
            other
            for (_, case), lr, done in zip(cases, rates, tuning_seeds, strict=True)
            for other in training.with_seeds(replace(case, lr=lr), seeds)[done:]
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
    for (place, case), results, lr in zip(cases, tried, rates, strict=True):
        mine = [one for one in results if one["lr"] == lr]
        mine, further = [*mine, *further[: seeds - len(mine)]], further[seeds - len(mine) :]
        if any(one["final"] is None for one in mine):
            raise RuntimeError(f"{case.optimizer} of hidden {case.size.hidden} diverged at {lr:g}")
        sizes[place]["optimizers"][case.optimizer] = {
            "lr": lr,
            "tuning": sorted([one["lr"], one["seed"], one["final"]] for one in results),
            "losses": [one["final"] for one in mine],
            "step_s": float(np.median([one["step_s"] for one in mine])),
            "optimizer_s": float(np.median([one["optimizer_s"] for one in mine])),
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
    """Tokens of training text."""
    return len(training.text(size.vocabulary).corpora["train"].tokens)


def counted(job: Job) -> int:
    """Parameters without the embedding, with the output head."""
    model = training.Dense(job, torch.device("cpu")).model
    embedding: Tensor = model.get_input_embeddings().weight
    return sum(p.numel() for p in model.parameters() if p is not embedding)


# ---------------------------------------------------------------------- the fit


def power_law(compute: Array, losses: Array) -> tuple[Array, Array]:
    """The power law a·C^-b nearest to losses, by least squares of the logarithms.

    Args:
        compute: [sizes].
        losses: [..., sizes].

    Returns:
        log a and b, [...] each.
    """
    x, y = np.log(compute), np.log(losses)
    off = x - x.mean()
    b = -(y * off).sum(-1) / (off * off).sum()
    return y.mean(-1) + b * x.mean(), b


def fits(sizes: Sequence[Any], seed: int) -> Result:
    """Each optimizer's power law, and the compute that MuonClip needs for AdamW's loss, over
    AdamW's, between the smallest size's compute and the largest's; with 95 % intervals.

    Each size but the smallest is given its ``share`` too, read between MuonClip's sizes in place of
    a fit; ``curve`` and ``band`` are the fitted losses, for the picture.
    """
    compute = np.array([size["compute"] for size in sizes])
    count = len(sizes[0]["optimizers"][BASELINE]["losses"])
    rng = np.random.default_rng(seed)
    # [resamples, sizes, seeds]; the first is the sample itself.
    drawn = rng.integers(count, size=(_RESAMPLES + 1, len(sizes), count))
    drawn[0] = np.arange(count)
    points = np.geomspace(compute.min(), compute.max(), 25)
    laws, fitted, logs = {}, {}, {}
    for name in (BASELINE, MUONCLIP):
        losses = np.array([size["optimizers"][name]["losses"] for size in sizes])
        # The geometric mean of a size's seeds: the fit to it is the fit to every run.
        sampled = np.log(losses)[np.arange(len(sizes))[:, None], drawn].mean(-1)
        logs[name] = sampled
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
    for place in range(1, len(sizes)):
        found = between(logs[MUONCLIP], logs[BASELINE][:, place], np.log(compute))
        found = np.exp(found - np.log(compute[place]))
        sizes[place]["share"] = float(found[0]) if np.isfinite(found[0]) else None
        sizes[place]["share_interval"] = _interval(found[1:]) if np.isfinite(found).all() else None
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
    """The compute with which one law has the loss that another has with compute ``at``, over that.

    Args:
        base, other: log a and b, [n] each.
        at: [points].

    Returns:
        [n, points]; NaN where the loss of ``other`` does not fall with compute.
    """
    (log_a, b), (other_log_a, other_b) = base, other
    x = np.log(at)
    falling = np.where(other_b > 0, other_b, np.nan)
    loss = log_a[:, None] - b[:, None] * x
    with np.errstate(over="ignore"):
        share: Array = np.exp((other_log_a[:, None] - loss) / falling[:, None] - x)
    return share


def between(logs: Array, goals: Array, x: Array) -> Array:
    """Where losses that fall from size to size are down at a goal, by straight lines.

    Args:
        logs: [n, sizes], of the losses.
        goals: [n], of the loss to reach.
        x: [sizes], of the compute, ascending.

    Returns:
        [n], of the compute; NaN where the goal is not among the losses, or these do not fall.
    """
    return np.array(
        [
            np.interp(-goal, -row, x, left=np.nan, right=np.nan)
            if (np.diff(row) < 0).all()
            else np.nan
            for row, goal in zip(logs, goals, strict=True)
        ]
    )


# ---------------------------------------------------------------------- for people


def table(result: Result) -> str:
    rows = []
    for size in result["sizes"]:
        base, own = (size["optimizers"][name] for name in (BASELINE, MUONCLIP))
        (mean, spread), (own_mean, own_spread) = (
            mean_and_spread(told["losses"]) for told in (base, own)
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
                " / ".join(f"{one['optimizer_s'] / one['step_s']:.0%}" for one in (base, own)),
            ]
        )
    header = (
        "layers x hidden", "N", "D", "6 N D", "AdamW's rate", "AdamW", "MuonClip's rate",
        "**MuonClip**", "difference",
        "of AdamW's compute, between sizes", "the optimizers' own part of a step",
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
    most = max(size["passes"] for size in result["sizes"])
    return "\n\n".join(
        [
            markdown(header, rows),
            markdown(["power law", "loss", "exponent, 95%", "largest residual"], laws),
            _said(result),
            f"Mean and standard deviation of {result['seeds']} seeds; losses in nats a token; "
            f"{result['tokens_per_parameter']:g} tokens for each parameter, in steps of "
            f"{result['tokens_per_step']:,}; the largest model reads the text {most:.2f} times. "
            f"{result['held_out_also_in_training']:.2%} of the held-out text's runs of 32 tokens "
            "are also in the training text.",
        ]
    )


def _share(size: Any) -> str:
    if size.get("share") is None:
        return ""
    if size["share_interval"] is None:
        return f"{size['share']:.2f}"
    low, high = size["share_interval"]
    return f"{size['share']:.2f} ({low:.2f} to {high:.2f})"


def _said(result: Result) -> str:
    """The answer, in a sentence."""
    if result["share"] is None:
        return f"{MUONCLIP}'s loss does not fall with compute: nothing can be said of its share."

    def at(place: int) -> str:
        share = f"{result['share'][place]:.2f}"
        if result["share_band"] is None:
            return f"{share} (no interval: in some resamples its loss does not fall)"
        low, high = (band[place] for band in result["share_band"])
        return f"{share} ({low:.2f} to {high:.2f})"

    return (
        f"By the power laws, for AdamW's loss with the largest compute **{MUONCLIP} needs "
        f"{at(-1)} of it**; in the middle of the range {at(len(result['points']) // 2)}, at its "
        f"lower end {at(0)}."
    )


def plot(result: Result, figure: "Figure") -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure.set_size_inches(13, 5)
    losses, shares = figure.subplots(1, 2)
    compute = [size["compute"] for size in result["sizes"]]
    for colour, (name, law) in zip(("C0", "C1"), result["fits"].items(), strict=True):
        runs = [size["optimizers"][name]["losses"] for size in result["sizes"]]
        for x, ys in zip(compute, runs, strict=True):
            losses.plot([x] * len(ys), ys, "o", color=colour, ms=4, alpha=0.7)
        label = f"{name}: {law['a']:.3g} · C$^{{-{law['b']:.4f}}}$"
        losses.plot(result["points"], law["curve"], color=colour, label=label)
        losses.fill_between(result["points"], *law["band"], color=colour, alpha=0.2, lw=0)
    losses.set(
        xscale="log", yscale="log", xlabel="compute C = 6 N D, FLOPs",
        ylabel="held-out loss, nats a token", title="every run, fit and 95% band",
    )  # fmt: skip
    # Less than a decade: powers of ten alone would leave the axis without numbers.
    losses.yaxis.set_major_locator(MaxNLocator(8))
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_locator(NullLocator())
    losses.legend(fontsize=8)
    if result["share"] is not None:
        shares.plot(
            result["points"], result["share"], color="C1", label=f"{MUONCLIP}, by the power laws"
        )
        if result["share_band"] is not None:
            shares.fill_between(
                result["points"], *result["share_band"], color="C1", alpha=0.2, lw=0
            )
    for size in result["sizes"]:
        if size.get("share") is not None:
            low, high = size["share_interval"] or (size["share"], size["share"])
            shares.plot([size["compute"]] * 2, [low, high], color="black", lw=1)
            shares.plot(size["compute"], size["share"], "ko", ms=4)
    shares.plot([], [], "ko-", ms=4, lw=1, label=f"{MUONCLIP}, between sizes, without a fit")
    shares.axhline(1, color="C0", label="AdamW")
    shares.axhline(
        MOONLIGHT, color="grey", ls="--", lw=0.9, label="Moonlight, from 0.4 B parameters on"
    )
    shares.set(
        xscale="log", xlabel="AdamW's compute, FLOPs", ylabel="share of it for the same loss",
        title="compute that MuonClip needs for AdamW's loss, 95% band",
    )  # fmt: skip
    shares.set_ylim(bottom=0)
    shares.legend(fontsize=8)
    for axis in (losses, shares):
        axis.grid(alpha=0.3)
