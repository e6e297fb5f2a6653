"""Visual RL with MuonClip and AdamW, and RL of sums with Toggle, a permanent budget and none.

Visual RL starts from the exported model itself, RL of sums from its supervised finetuning on text,
which is the same for all seeds.
Runs are kept: those that are complete are not repeated, and interrupted ones resume.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import posttraining
from benchmarks.runner import Result, markdown
from posttrain import metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Variant(NamedTuple):
    """A run: the configuration, its changes, and the name of its folder."""

    config: str
    changes: tuple[str, ...]
    folder: str


_OPTIMIZERS = {
    "MuonClip": (),
    "AdamW": ("optimizer.name=adamw", "optimizer.qk_clip_threshold=null"),
}
READING = {
    name: Variant("read", changes, f"read-{name.lower()}") for name, changes in _OPTIMIZERS.items()
}
# The settings of a budget are those of the configuration, or else their defaults.
_WITHOUT_BUDGET = (
    "rl.tasks.sums.toggle.mode=off",
    *(f"rl.tasks.sums.toggle.{name}=null" for name in ("period", "accuracy", "percentile")),
)
_BUDGETS: dict[str, tuple[str, ...]] = {
    "no budget": _WITHOUT_BUDGET,
    "Toggle": (),
    "permanent budget": ("rl.tasks.sums.toggle.mode=permanent",),
}
SUMS = {
    f"{budget}, {name}": Variant(
        "toggle", (*changes, *optimizer), f"sums-{budget.split()[0].lower()}-{name.lower()}"
    )
    for name, optimizer in _OPTIMIZERS.items()
    for budget, changes in _BUDGETS.items()
}
_MODES = "modes"
_READING_COLUMNS = {
    "changed_character_error_rate": ("changed images: character errors", ".1%"),
    "changed_exact_match": ("read exactly", ".1%"),
    "character_error_rate": ("pretraining's images: character errors", ".1%"),
    "exact_match": ("read exactly", ".1%"),
    "held_out_text_loss": ("loss of text", ".3f"),
}
_MODES_COLUMNS = {
    "thinking_accuracy": ("sums solved, thinking", ".1%"),
    "instant_accuracy": ("at once", ".1%"),
    "held_out_text_loss": ("loss of text", ".3f"),
    "character_error_rate": ("character errors", ".1%"),
    "exact_match": ("read exactly", ".1%"),
}
_SUMS_COLUMNS = {
    "thinking_accuracy": ("sums solved", ".1%"),
    "thinking_tokens": ("tokens", ".1f"),
    "thinking_short_accuracy": ("shortest sums", ".1%"),
    "thinking_short_tokens": ("tokens", ".1f"),
    "thinking_long_accuracy": ("longest sums", ".1%"),
    "thinking_long_tokens": ("tokens", ".1f"),
    "held_out_text_loss": ("loss of text", ".3f"),
}
_PLOTTED = ("reward", "accuracy", "response_tokens")
# Changes of the configurations, and the number of seeds.
FORMS: dict[str, tuple[tuple[str, ...], int]] = {
    "full": ((), 3),
    "quick": ((), 3),
    "tiny": (("steps=2", "save_every=2", "evaluation.images=2", "evaluation.problems=2"), 1),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    posttraining.add_arguments(parser, Path("runs/rl"))
    parser.add_argument(
        "--only", choices=("reading", "sums"), help="leave the other table out; default: both"
    )
    parser.add_argument(
        "--optimizers",
        choices=_OPTIMIZERS,
        nargs="+",
        default=list(_OPTIMIZERS),
        help="of the runs",
    )


def run(options: argparse.Namespace) -> Result:
    settings, seeds = FORMS[options.form]
    shared = [f"pretraining={options.pretraining}", *settings]
    reading: dict[str, list[Result]] = {}
    sums: dict[str, list[Result]] = {}
    taught = options.runs / _MODES
    if options.only != "reading":
        seeded = [*shared, f"seed={options.seed}", f"model={options.model}"]
        posttraining.train("sft", _MODES, taught, seeded)
    for seed in range(options.seed, options.seed + (options.seeds or seeds)):
        seeded = [*shared, f"seed={seed}"]
        if options.only != "sums":
            variants = _of_optimizers(READING, options.optimizers)
            _train_all(variants, options.model, seed, seeded, options.runs, reading)
        if options.only != "reading":
            variants = _of_optimizers(SUMS, options.optimizers)
            _train_all(variants, str(taught / "hf"), seed, seeded, options.runs, sums)
    modes = {"after": [summary(taught)]} if sums else {}
    return {"reading": reading, "modes": modes, "sums": sums}


def _of_optimizers(variants: dict[str, Variant], names: Sequence[str]) -> dict[str, Variant]:
    return {name: one for name, one in variants.items() if name.endswith(tuple(names))}


def _train_all(
    variants: dict[str, Variant],
    model: str,
    seed: int,
    settings: Sequence[str],
    runs: Path,
    results: dict[str, list[Result]],
) -> None:
    for name, (config, changes, folder) in variants.items():
        out = runs / f"{folder}-{seed}"
        posttraining.train("rl", config, out, [*settings, f"model={model}", *changes])
        results.setdefault(name, []).append(summary(out))


def summary(folder: Path) -> Result:
    """The metrics of a run: some by step, and all of its evaluations at both ends."""
    records = metrics.read(folder / "metrics.jsonl")
    evaluations = [record for record in records if "held_out_text_loss" in record]
    return {
        "before": {name: evaluations[0].get(name) for name in metrics.HELD_OUT},
        "after": {name: evaluations[-1].get(name) for name in metrics.HELD_OUT},
        "curves": {
            name: [[r["step"], r[name]] for r in records if r.get(name) is not None]
            for name in _PLOTTED
        },
    }


# ---------------------------------------------------------------------- table and plot


def _table(variants: dict[str, list[Result]], columns: dict[str, tuple[str, str]]) -> str:
    def row(name: str, runs: Sequence[Result], when: str) -> list[str]:
        cells = [
            posttraining.mean_and_spread([run[when][key] for run in runs], form)
            for key, (_, form) in columns.items()
        ]
        return [name, *cells]

    first = next(iter(variants.values()))
    rows = [row("before", first, "before")]
    rows += [row(name, runs, "after") for name, runs in variants.items()]
    return markdown(["", *(title for title, _ in columns.values())], rows)


def table(result: Result) -> str:
    parts = [
        f"{title}\n\n{_table(result[key], columns)}"
        for key, title, columns in (
            ("reading", "Visual RL:", _READING_COLUMNS),
            ("modes", "Supervised finetuning on text alone:", _MODES_COLUMNS),
            ("sums", "RL of sums with reasoning:", _SUMS_COLUMNS),
        )
        if result.get(key)
    ]
    count = len(next(iter({**result["reading"], **result["sums"]}.values())))
    spread = " (mean ± standard deviation)" if count > 1 else ""
    return "\n\n".join([*parts, f"Held-out data, {count} seed{'s'[: count > 1]}{spread}."])


def plot(result: Result, figure: "Figure") -> None:
    variants = {**result["reading"], **result["sums"]}
    plotted = [
        name
        for name in _PLOTTED
        if any(run["curves"].get(name) for runs in variants.values() for run in runs)
    ]
    figure.set_size_inches(4.5 * len(plotted), 3.5)
    axes: Any = figure.subplots(1, len(plotted), squeeze=False)
    for axis, name in zip(axes.flat, plotted, strict=True):
        for number, (variant, runs) in enumerate(variants.items()):
            for index, run in enumerate(runs):
                if points := run["curves"].get(name):
                    steps, values = zip(*points, strict=True)
                    label = variant if index == 0 else None
                    axis.plot(steps, values, color=f"C{number}", lw=1, label=label)
        axis.set_title(metrics.METRICS[name].description, fontsize=9)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
