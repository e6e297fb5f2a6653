"""Attention logits of every head with plain Muon, where they grow without bound, and with MuonClip.

Runs at a high learning rate with small heads: without clipping, with QK-Clip at a threshold τ, and
with other thresholds. Logits are reported for the forward passes in training, and for the same
batch after update and clipping. Between two clips, an update and another batch may raise a logit
above τ, especially at high rates, in short runs and with small batches.

Other parameters have a lower learning rate: with the rate of the matrices, AdamW would change the
gains and embeddings, on which queries and keys depend, too much between two clips.
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
# MuonClip should keep logits within this multiple of τ.
MAX_OVER_TAU = 1.05


@dataclass(frozen=True)
class Form:
    size: Size
    steps: int
    lr: float
    adamw_lr: float  # of embeddings and gains
    threshold: float
    sweep: tuple[float, ...]  # other thresholds, relative to the first
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
        help="peak learning rate of other parameters; default: by the form",
    )
    parser.add_argument("--steps", type=positive_int, help="training steps; default: by the form")
    parser.add_argument(
        "--weight-decay",
        type=float,
        default=0.0,
        help="default: 0, because weight decay also limits logits",
    )
    parser.add_argument("--threshold", type=positive_float, help="τ; default: by the form")
    parser.add_argument(
        "--sweep", type=positive_float, nargs="*", metavar="FACTOR",
        help="other thresholds, relative to τ; default: by the form; without a value: none",
    )  # fmt: skip
    parser.add_argument("--seeds", type=positive_int, help="number of seeds; default: by the form")
    parser.add_argument("--layers", type=positive_int, help="layers; default: by the form")
    parser.add_argument(
        "--vocabulary", type=positive_int, help="size of the tokenizer; default: by the form"
    )
    parser.add_argument(
        "--sequences", type=positive_int, help="sequences per step; default: by the form"
    )


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
    clipped = training.with_seeds(replace(job, threshold=threshold), count)
    sweep = form.sweep if options.sweep is None else options.sweep
    others = [factor * threshold for factor in sweep]
    swept = [replace(job, threshold=other, label=f"{MUONCLIP}, τ {other:g}") for other in others]
    overlap = training.overlap(job.size)
    results = training.train_all([*plain, *clipped, *swept], options)
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
        "plain": results[:count],
        "held": results[count : 2 * count],
        "sweep": [
            {"threshold": other, **result}
            for other, result in zip(others, results[2 * count :], strict=True)
        ],
    }


def _max_logit(run: Any) -> float:
    """The max logit of all heads and steps."""
    return float(np.max(run["max_logits"]))


def _row(name: str, runs: Sequence[Any], threshold: float, over: float) -> list[str]:
    """A table row about runs of one kind, with logits relative to the threshold ``over``."""
    finals = [run["final"] for run in runs]
    max_logits = [_max_logit(run) for run in runs]
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
        f"{max(max_logits):.1f}",
        f"{max(max_logits) / over:.2f}",
        f"{np.mean(steps > MAX_OVER_TAU * over):.1%}",
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
        "", "τ", "runs", "max logit", "/ τ", f"steps above {MAX_OVER_TAU:g} τ",
        "after its step, / τ", "heads clipped, mean of steps", "held-out loss",
    )  # fmt: skip
    differences = [
        clipped["final"] - plain["final"]
        for clipped, plain in zip(result["held"], result["plain"], strict=True)
        if clipped["final"] is not None and plain["final"] is not None
    ]
    _, spread = mean_and_spread([run["final"] for run in result["plain"] if run["final"]])
    each = [
        f"{name} {', '.join(f'{_max_logit(run) / tau:.2f}' for run in result[runs])}"
        for name, runs in ((PLAIN, "plain"), (MUONCLIP, "held"))
    ]
    notes = f"\n\nMax logit of each seed / τ: {'; '.join(each)}."
    if differences:
        notes += (
            f"\n\nLoss of {MUONCLIP} minus that of {PLAIN} with the same seed: "
            f"{np.mean(differences):+.4f} on average "
            f"({', '.join(f'{difference:+.4f}' for difference in differences)}); seeds of {PLAIN} "
            f"differ by a standard deviation of {spread:.4f}."
        )
    layers = f"{result['layers']} layer{'s' * (result['layers'] > 1)}"
    return (
        f"Hidden {result['hidden']}, {layers} of {result['heads']} heads, "
        f"{result['steps']:,} steps of {result['tokens_per_step']:,} tokens, peak rate "
        f"{result['lr']:g}, of other parameters {result['adamw_lr']:g}; logits of {PLAIN} "
        f"relative to τ = {tau:g}\n\n" + markdown(header, rows) + notes
    )


def plot(result: Result, figure: "Figure") -> None:
    figure.set_size_inches(13, 7)
    (plain, clipped), (swept, heads) = figure.subplots(2, 2)
    tau = result["threshold"]
    for axis, runs, title in (
        (plain, result["plain"], PLAIN),
        (clipped, result["held"], f"{MUONCLIP}, τ = {tau:g}"),
    ):
        for head in np.transpose(runs[0]["max_logits"]):
            axis.plot(range(1, len(head) + 1), head, lw=0.8)
        axis.axhline(tau, color="black", ls="--", lw=0.8)
        axis.set(title=f"{title}: all heads", xlabel="step", ylabel="max logit")
    clipped.set_ylim(0, 2 * tau)
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
            heads.plot(
                range(window, window + len(smooth)), 100 * smooth, color=f"C{number}", label=label
            )
    swept.set(title="max logit of all heads", xlabel="step", yscale="log")
    heads.set(title="heads clipped, moving average", xlabel="step", ylabel="% of heads")
    for axis in (plain, clipped, swept, heads):
        axis.grid(alpha=0.3)
    swept.legend(fontsize=8)
    heads.legend(fontsize=8)
