"""Agent swarm: PARL, without its auxiliary rewards (λ = 0), and with rewards that never end.

All variants start from the same supervised model, frozen copies of which are their sub-agents, and
train on the same tasks. Runs are kept: those that are complete are not repeated, and interrupted
ones resume.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import posttraining
from benchmarks.runner import Result, markdown
from posttrain import metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIANTS = {
    "PARL": (),
    "λ = 0": ("swarm.parallel_weight=0.0", "swarm.finish_weight=0.0"),
    "λ not annealed": ("swarm.anneal_until=0.0",),
}
_NAMES = {"PARL": "parl", "λ = 0": "zero", "λ not annealed": "constant"}
_COLUMNS = {
    "wide_performance": "right, wide",
    "deep_performance": "right, deep",
    "critical_steps": "critical steps, wide",
    "parallelism": "parallelism, wide",
    "wide_sub_agents": "sub-agents, wide",
    "deep_sub_agents": "sub-agents, deep",
}
_NUMBER_FORMAT = {"critical_steps": ".1f"}
# Changes of the configuration, and the number of seeds.
FORMS: dict[str, tuple[tuple[str, ...], int]] = {
    "full": ((), 5),
    "quick": ((), 3),
    "tiny": (
        ("steps=2", "rl.prompts=2", "rl.group_size=2", "swarm.start_steps=2",
         "swarm.evaluation_tasks=2", "swarm.reply_tokens=8", "evaluation.text_sequences=1"),
        1,
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    posttraining.add_arguments(parser, Path("runs/swarm"))


def run(options: argparse.Namespace) -> Result:
    settings, seeds = FORMS[options.form]
    shared = [f"model={options.model}", f"pretraining={options.pretraining}", *settings]
    runs: dict[str, list[Result]] = {name: [] for name in VARIANTS}
    for seed in range(options.seed, options.seed + (options.seeds or seeds)):
        started: Path | None = None
        for name, changes in VARIANTS.items():
            folder = options.runs / f"{_NAMES[name]}-{seed}"
            if started and not (folder / "start").is_dir():
                shutil.copytree(started / "start", folder / "start")
            posttraining.train("swarm", "swarm", folder, [*shared, f"seed={seed}", *changes])
            started = started or folder
            runs[name].append(summary(folder))
    return {"variants": runs}


def summary(folder: Path) -> Result:
    """The metrics of a run: those of its rollouts by step, and of held-out tasks at its ends."""
    records = metrics.read(folder / "metrics.jsonl")
    held_out = [r for r in records if any(f"held_out_{name}" in r for name in _COLUMNS)]
    rollouts = [r for r in records if any(name in r for name in _COLUMNS)]
    return {
        "steps": [record["step"] for record in rollouts],
        "rollouts": {name: [record.get(name) for record in rollouts] for name in _COLUMNS},
        "before": {name: held_out[0].get(f"held_out_{name}") for name in _COLUMNS},
        "after": {name: held_out[-1].get(f"held_out_{name}") for name in _COLUMNS},
    }


# ---------------------------------------------------------------------- table and plot


def _row(label: str, runs: Sequence[Result], when: str) -> list[str]:
    cells = [
        posttraining.mean_and_spread(
            [run[when][name] for run in runs], _NUMBER_FORMAT.get(name, ".2f")
        )
        for name in _COLUMNS
    ]
    return [label, *cells]


def table(result: Result) -> str:
    variants: dict[str, list[Result]] = result["variants"]
    first = next(iter(variants.values()))
    rows = [_row("supervised start", first, "before")]
    rows += [_row(variant, runs, "after") for variant, runs in variants.items()]
    seeds = len(first)
    return (
        markdown(["", *_COLUMNS.values()], rows)
        + f"\n\nHeld-out tasks, {seeds} seed{'s'[: seeds > 1]}"
        + (" (mean ± standard deviation)." if seeds > 1 else ".")
        + " Sub-agents of deep tasks are spurious."
    )


def plot(result: Result, figure: "Figure") -> None:
    figure.set_size_inches(12, 6)
    axes: Any = figure.subplots(2, 3, sharex=True)
    for axis, (name, title) in zip(axes.flat, _COLUMNS.items(), strict=True):
        for number, (variant, runs) in enumerate(result["variants"].items()):
            for index, run in enumerate(runs):
                label = variant if index == 0 else None
                values = np.array(run["rollouts"][name], dtype=float)  # gaps: no such task
                axis.plot(run["steps"], values, color=f"C{number}", lw=1, label=label)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[0, 0].legend(fontsize=8)
