"""Tokens per second in training with AdamW and with MuonClip, and the optimizer's share of a step.

Two copies of a model in one process train on the same batches in turn. The cost of Newton-Schulz
does not depend on the batch size, so its share falls with it: several sizes are measured.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from benchmarks import training
from benchmarks.runner import Result, interleave, markdown, positive_int, quartiles, stopwatch
from benchmarks.training import BASELINE, KINDS, MUONCLIP, Job, Kind, Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Form:
    size: Size
    sequences: tuple[int, ...]
    rounds: int


FORMS = {
    "full": Form(Size(1024, 16, 16, 2048, 8, 8192), (2, 8, 32), 15),
    "quick": Form(Size(128, 3, 4, 128, 8, 2048), (4, 16, 64), 7),
    "tiny": Form(Size(32, 2, 2, 64, 2, 400), (1, 2), 2),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", choices=list(KINDS), default=list(KINDS), help="default: all"
    )
    parser.add_argument(
        "--rounds", type=positive_int, help="timed steps per optimizer; default: by the form"
    )


def run(options: argparse.Namespace) -> Result:
    form = FORMS[options.form]
    rows = []
    try:
        for kind in options.models:
            for sequences in form.sequences:
                size = replace(form.size, sequences=sequences)
                rows.append(_measure(kind, size, options.rounds or form.rounds, options))
                print(f"timed {kind}, {size.tokens:,} tokens per step", flush=True)
    finally:
        training.leave()
    return {"hidden": form.size.hidden, "layers": form.size.layers, "rows": rows}


def _measure(kind: Kind, size: Size, rounds: int, options: argparse.Namespace) -> Result:
    steps: dict[str, Callable[[], None]] = {}
    optimizer_s: dict[str, list[float]] = {}
    parameters = 0
    for name in (BASELINE, MUONCLIP):
        job = Job(kind, name, 1e-3, 1000, options.seed, size)
        model = training.make(job, options.device)
        optimizers = training.optimizers(job, model.groups)
        trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        parameters = sum(p.numel() for p in trained)
        optimizer_s[name] = []
        steps[name] = _step(model, optimizers, trained, name, optimizer_s[name], options)
    seconds = interleave(steps, rounds=rounds, warmup=2, device=options.device, clock=options.clock)
    result: Result = {"kind": kind, "tokens": size.tokens, "parameters": parameters}
    slower = np.divide(seconds[MUONCLIP], seconds[BASELINE])
    result["slower"] = quartiles(slower.tolist())
    for name, times in seconds.items():
        own_times = optimizer_s[name][-rounds:]
        result[name] = {
            "tokens_per_second": size.tokens / float(np.median(times)),
            "step_s": float(np.median(times)),
            "optimizer_s": float(np.median(own_times)),
            "optimizer_share": float(np.median(np.divide(own_times, times))),
        }
    return result


def _step(
    model: training.Model,
    optimizers: list[torch.optim.Optimizer],
    trained: list[nn.Parameter],
    name: str,
    optimizer_s: list[float],
    options: argparse.Namespace,
) -> Callable[[], None]:
    """A training step that appends the time of its optimizer and clip to ``optimizer_s``."""
    number = 0

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()
        if name == MUONCLIP:
            for clip in model.clips:
                clip.step()

    def step() -> None:
        nonlocal number
        number += 1
        model.gradients(number)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer_s.append(stopwatch(update, options.device, options.clock))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    return step


# ---------------------------------------------------------------------- table and plot


def table(result: Result) -> str:
    header = (
        "model", "tokens per step", "AdamW, tokens/s", "MuonClip, tokens/s",
        "step time, MuonClip / AdamW", "AdamW, share of its step", "MuonClip, share of its step",
    )  # fmt: skip
    rows = [
        [
            KINDS[row["kind"]],
            f"{row['tokens']:,}",
            f"{row[BASELINE]['tokens_per_second']:,.0f}",
            f"{row[MUONCLIP]['tokens_per_second']:,.0f}",
            f"{row['slower'][1]:.3f} ({row['slower'][0]:.3f} to {row['slower'][2]:.3f})",
            f"{row[BASELINE]['optimizer_share']:.1%}",
            f"{row[MUONCLIP]['optimizer_share']:.1%}",
        ]
        for row in result["rows"]
    ]
    return f"Hidden {result['hidden']}, {result['layers']} layers\n\n" + markdown(header, rows)


def plot(result: Result, figure: "Figure") -> None:
    figure.set_size_inches(9, 4)
    shares, slower = figure.subplots(1, 2)
    for number, kind in enumerate(dict.fromkeys(row["kind"] for row in result["rows"])):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        tokens = [row["tokens"] for row in rows]
        for name, style in ((MUONCLIP, "o-"), (BASELINE, "o:")):
            shares.plot(
                tokens, [100 * row[name]["optimizer_share"] for row in rows], style,
                color=f"C{number}", ms=4, label=f"{kind}, {name}",
            )  # fmt: skip
        middle = np.array([row["slower"] for row in rows])
        slower.errorbar(
            tokens, middle[:, 1], np.abs(middle[:, [0, 2]].T - middle[:, 1]), fmt="o-",
            color=f"C{number}", ms=4, capsize=3, label=kind,
        )  # fmt: skip
    shares.set(ylabel="optimizer, % of a step", yscale="log")
    slower.set(ylabel="step time, MuonClip / AdamW")
    slower.axhline(1, color="grey", lw=0.8, ls="--")
    for axis in (shares, slower):
        axis.set(xlabel="tokens per step", xscale="log")
        axis.set_xticks(tokens, [f"{count:,}" for count in tokens])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
