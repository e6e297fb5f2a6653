"""Attention logits of every head under plain Muon, which lets them run away, and under MuonClip.

The same runs at a high learning rate with heads of few dimensions: once with QK-Clip reading alone,
once at a threshold τ, and once at each of some others. Logits are told twice: of the forward passes
in training, and of the same batch again once the step has updated and clipped. Between a clip and
the next there is an update, and another batch: both may bring a logit above τ, the more the higher
the rate, the shorter the run and the smaller its batches.

What is no matrix has a lower rate of its own: at the matrices' rate AdamW would move the gains and
embeddings that queries and keys are made of by more in a step than any clip can foresee.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import training
from benchmarks.runner import Result, markdown, positive_float, positive_int
from benchmarks.training import MUONCLIP, Job, Size, mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN = "Muon, no clip"
# Plain Muon should pass 3 τ, and MuonClip stay within 1.05 τ.
RUNAWAY, HELD = 3.0, 1.05


@dataclass(frozen=True)
class Form:
    size: Size
    steps: int
    lr: float
    adamw_lr: float  # of tables and gains, which are no matrices
    threshold: float
    sweep: tuple[float, ...]  # other thresholds, over the first
    seeds: int


FORMS = {
    "full": Form(Size(512, 8, 16, 1024, 32, 8192), 8000, 8e-3, 1e-3, 100.0, (0.3, 0.5, 2.0), 3),
    "quick": Form(Size(64, 2, 4, 128, 16, 300), 400, 9e-2, 1e-2, 400.0, (0.1, 0.5), 3),
    "tiny": Form(Size(32, 1, 2, 64, 2, 400), 6, 32e-3, 1e-2, 2.0, (0.5,), 2),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    training.add_arguments(parser)
    parser.add_argument(
        "--lr", type=positive_float, help="peak learning rate; default: by the form"
    )
    parser.add_argument(
        "--adamw-lr",
        type=positive_float,
        help="the same of what is no matrix; default: by the form",
    )
    parser.add_argument("--steps", type=positive_int, help="default: by the form")
    parser.add_argument(
        "--weight-decay", type=float, default=0.0, help="default: none, as it holds logits back too"
    )
    parser.add_argument("--threshold", type=positive_float, help="τ; default: by the form")
    parser.add_argument(
        "--sweep", type=positive_float, nargs="*", metavar="FACTOR",
        help="other thresholds, over τ; default: by the form; without a value: none",
    )  # fmt: skip
    parser.add_argument("--seeds", type=positive_int, help="default: 3")
    parser.add_argument("--layers", type=positive_int, help="default: by the form")
    parser.add_argument(
        "--vocabulary", type=positive_int, help="of the tokenizer; default: by the form"
    )
    parser.add_argument("--sequences", type=positive_int, help="of a step; default: by the form")


def run(options: argparse.Namespace) -> Result:
    form = FORMS[options.form]
    size = replace(
        form.size,
        layers=options.layers or form.size.layers,
        vocabulary=options.vocabulary or form.size.vocabulary,
        sequences=options.sequences or form.size.sequences,
    )
    threshold = options.threshold or form.threshold
    adamw_lr = options.adamw_lr or form.adamw_lr
    count = options.seeds or form.seeds
    job = Job(
        "dense",
        MUONCLIP,
        options.lr or form.lr,
        options.steps or form.steps,
        options.seed,
        size=size,
        options=(("adamw_lr", adamw_lr),),
        weight_decay=options.weight_decay,
        watch=True,
    )
    plain = training.with_seeds(replace(job, threshold=None, label=PLAIN), count)
    held = training.with_seeds(replace(job, threshold=threshold), count)
    sweep = form.sweep if options.sweep is None else options.sweep
    others = [factor * threshold for factor in sweep]
    swept = [replace(job, threshold=other, label=f"{MUONCLIP}, τ {other:g}") for other in others]
    overlap = training.overlap(job.size)
    told = training.train_all([*plain, *held, *swept], options)
    return {
        "threshold": threshold,
        "lr": job.lr,
        "adamw_lr": adamw_lr,
        "steps": job.steps,
        "tokens_per_step": job.size.tokens,
        "hidden": job.size.hidden,
        "layers": job.size.layers,
        "heads": job.size.heads,
        "vocabulary": job.size.vocabulary,
        "held_out_also_in_training": overlap,
        "plain": told[:count],
        "held": told[count : 2 * count],
        "sweep": [
            {"threshold": other, **result}
            for other, result in zip(others, told[2 * count :], strict=True)
        ],
    }


def _highest(run: Any) -> float:
    """The largest logit of any head in any step."""
    return float(np.max(run["max_logits"]))


def _row(name: str, runs: Sequence[Any], threshold: float, over: float) -> list[str]:
    """One kind of run: its highest logits, over the threshold ``over`` where it has none."""
    finals = [run["final"] for run in runs]
    highest = [_highest(run) for run in runs]
    steps = np.concatenate([np.max(run["max_logits"], axis=1) for run in runs])
    after = np.concatenate([run["after"] for run in runs])
    heads = np.shape(runs[0]["max_logits"])[1]
    clipped = np.mean([np.mean(run["clipped"]) / heads for run in runs])
    loss = "diverged"
    if None not in finals:
        mean, spread = mean_and_spread(finals)
        loss = f"{mean:.3f}" + (f" ± {spread:.3f}" if len(runs) > 1 else "")
    return [
        name,
        f"{threshold:g}" if np.isfinite(threshold) else "none",
        str(len(runs)),
        f"{max(highest):.1f}",
        f"{max(highest) / over:.2f}",
        f"{np.mean(steps > HELD * over):.1%}",
        f"{after.max() / over:.2f}",
        f"{clipped:.1%}",
        loss,
    ]


def table(result: Result) -> str:
    tau = result["threshold"]
    rows = [
        _row(PLAIN, result["plain"], np.inf, tau),
        _row(f"**{MUONCLIP}**", result["held"], tau, tau),
        *(_row(MUONCLIP, [run], run["threshold"], run["threshold"]) for run in result["sweep"]),
    ]
    header = (
        "", "τ", "runs", "largest logit", "over τ", f"steps above {HELD:g} τ",
        "after its step, over τ", "heads clipped, mean of steps", "held-out loss",
    )  # fmt: skip
    differences = [
        held["final"] - plain["final"]
        for held, plain in zip(result["held"], result["plain"], strict=True)
        if held["final"] is not None and plain["final"] is not None
    ]
    _, spread = mean_and_spread([run["final"] for run in result["plain"] if run["final"]])
    each = [
        f"{name} {', '.join(f'{_highest(run) / tau:.2f}' for run in result[runs])}"
        for name, runs in ((PLAIN, "plain"), (MUONCLIP, "held"))
    ]
    told = f"\n\nLargest logit of each seed over τ: {'; '.join(each)}."
    if differences:
        told += (
            f"\n\nLoss of {MUONCLIP} against {PLAIN} with the same seed: "
            f"{np.mean(differences):+.4f} on average "
            f"({', '.join(f'{difference:+.4f}' for difference in differences)}); seeds of {PLAIN} "
            f"differ by a standard deviation of {spread:.4f}."
        )
    layers = f"{result['layers']} layer{'s' * (result['layers'] > 1)}"
    return (
        f"Hidden {result['hidden']}, {layers} of {result['heads']} heads, "
        f"{result['steps']:,} steps of {result['tokens_per_step']:,} tokens, peak rate "
        f"{result['lr']:g}, of what is no matrix {result['adamw_lr']:g}; {PLAIN}'s logits over "
        f"τ = {tau:g}\n\n" + markdown(header, rows) + told
    )


def plot(result: Result, figure: "Figure") -> None:
    figure.set_size_inches(13, 7)
    (plain, held), (swept, clipped) = figure.subplots(2, 2)
    tau = result["threshold"]
    for axis, runs, title in (
        (plain, result["plain"], PLAIN),
        (held, result["held"], f"{MUONCLIP}, τ = {tau:g}"),
    ):
        for head in np.transpose(runs[0]["max_logits"]):
            axis.plot(range(1, len(head) + 1), head, lw=0.8)
        axis.axhline(tau, color="black", ls="--", lw=0.8)
        axis.set(title=f"{title}: every head", xlabel="step", ylabel="largest logit")
    held.set_ylim(0, 2 * tau)
    for number, (label, run) in enumerate(
        [(PLAIN, result["plain"][0]), (f"τ = {tau:g}", result["held"][0])]
        + [(f"τ = {run['threshold']:g}", run) for run in result["sweep"]]
    ):
        largest = np.max(run["max_logits"], axis=1)
        swept.plot(range(1, len(largest) + 1), largest, color=f"C{number}", label=label, lw=0.9)
        share = np.array(run["clipped"]) / np.shape(run["max_logits"])[1]
        window = max(1, len(share) // 20)
        smooth = np.convolve(share, np.full(window, 1 / window), mode="valid")
        if label != PLAIN:
            clipped.plot(
                range(window, window + len(smooth)), 100 * smooth, color=f"C{number}", label=label
            )
    swept.set(title="largest logit of all heads", xlabel="step", yscale="log")
    clipped.set(title="heads clipped, mean of the steps before", xlabel="step", ylabel="% of heads")
    for axis in (plain, held, swept, clipped):
        axis.grid(alpha=0.3)
    swept.legend(fontsize=8)
    clipped.legend(fontsize=8)
