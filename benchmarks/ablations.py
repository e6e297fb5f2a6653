"""Effect of each design choice of MuonClip: held-out losses of variants compared with the default.

Every variant changes one choice and trains with the seeds and batches of the base; results are
differences per seed. Variants of the update scale tune the learning rate of the matrices with one
seed, like the base; other parameters keep the base's rate, and matrices keep the base's weight
decay per step. Variants of the data and of DEP have another base, trained on text and images. All
are evaluated on the same held-out sequences.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks import training
from benchmarks.runner import Result, markdown, positive_int
from benchmarks.training import KINDS, MUONCLIP, Job, Kind, Size, mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Two-sided 95% quantiles of Student's t, by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
CONTROL, SHARE, DEP = "control", "share of images", "DEP"
_LOSSES = {"loss": "all", "held_out_text_loss": "text", "held_out_caption_loss": "captions"}


@dataclass(frozen=True)
class Variant:
    """A single change of the base.

    Attributes:
        group: the choice, with the base's value in parentheses.
        name: the value of this variant.
        changes: changed fields of the ``Job``.
        kind: model of the base.
        tuned: whether the learning rate of the matrices is tuned.
        judged: names of the held-out losses to compare.
    """

    group: str
    name: str
    changes: Mapping[str, Any]
    kind: Kind = "dense"
    tuned: bool = False
    judged: tuple[str, ...] = ("loss",)


def _options(**options: Any) -> dict[str, Any]:
    return {"options": tuple(options.items())}


VARIANTS = [
    # Rounding differences: the size of a meaningless effect.
    Variant(CONTROL, "Newton-Schulz in float64", _options(ns_dtype=torch.float64)),
    *(
        Variant("coefficients (`quintic`, 5 steps)", f"`{name}`, {steps} steps",
                _options(ns_coefficients=name, ns_steps=steps))
        for name, steps in (("you", 5), ("polar_express", 5), ("cans", 5), ("cubic", 5),
                            ("deepseek_v4", 10))
    ),
    *(
        Variant("Newton-Schulz steps (5)", f"{steps}", _options(ns_steps=steps))
        for steps in (1, 3, 7, 10)
    ),
    *(
        # Includes the base's scale: a separate rate of the matrices is an advantage by itself.
        Variant("scale of updates (AdamW's RMS)", f"`{name}`, its own rate",
                _options(adjust_lr=name), tuned=True)
        for name in ("match_rms_adamw", "original", "spectral")
    ),
    Variant("weight decay (decoupled 0.1)", "none", {"weight_decay": 0.0}),
    Variant("weight decay (decoupled 0.1)", "cautious", _options(weight_decay_mode="cautious")),
    Variant("momentum (Nesterov)", "without look-ahead", _options(nesterov=False)),
    Variant("matrices (fused ones apart)", "fused as stored", {"layouts": "fused"}),
    Variant("matrices (fused ones apart)", "each head apart", {"layouts": "per_head"}),
    *(
        Variant(f"{SHARE} (10%)", f"{share:.0%}", {"overrides": (f"data.vision_share={share}",)},
                kind="vision", judged=("held_out_text_loss", "held_out_caption_loss"))
        for share in (0.05, 0.2, 0.3)
    ),
    Variant(f"{DEP} (on)", "encoder on the first stage",
            {"overrides": ("encoder_process.enabled=false",)}, kind="vision"),
]  # fmt: skip


@dataclass(frozen=True)
class Form:
    """Sizes of the benchmark.

    Attributes:
        sizes: model size by kind.
        steps: training steps by kind.
        rates: learning rates to try for the base on text; the base on images uses the best one.
        factors: multiples of that rate to try for variants with a tuned rate.
        seeds: number of seeds.
        groups: parts of the names of the groups to run; empty: all.
    """

    sizes: dict[Kind, Size]
    steps: dict[Kind, int]
    rates: tuple[float, ...]
    factors: tuple[float, ...]
    seeds: int
    groups: tuple[str, ...] = ()


FORMS = {
    "full": Form(
        {"dense": Size(128, 6, 8, 256, 16, 2048), "vision": Size(128, 6, 8, 256, 16, 2048)},
        {"dense": 1500, "vision": 1500},
        (4e-3, 8e-3, 16e-3),
        (0.5, 1.0, 2.0),
        5,
    ),
    "quick": Form(
        {"dense": Size(48, 3, 3, 128, 8, 512), "vision": Size(48, 2, 3, 128, 4, 512)},
        {"dense": 140, "vision": 100},
        (8e-3, 16e-3, 32e-3),
        (0.5, 1.0, 2.0),
        3,
    ),
    "tiny": Form(
        {"dense": Size(16, 1, 2, 64, 2, 400), "vision": Size(32, 2, 2, 64, 2, 400)},
        {"dense": 3, "vision": 2},
        (8e-3,),
        (2.0,),
        2,
        (CONTROL, "scale", "matrices", DEP),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    training.add_arguments(parser)
    parser.add_argument("--seeds", type=positive_int, help="number of seeds; default: by the form")
    parser.add_argument(
        "--groups", nargs="+", metavar="NAME",
        help="parts of the names of groups to run; default: all",
    )  # fmt: skip


def run(options: argparse.Namespace) -> Result:
    form = FORMS[options.form]
    seeds = options.seeds or form.seeds
    if not 2 <= seeds <= max(_STUDENT) + 1:
        raise ValueError(f"--seeds must be 2 to {max(_STUDENT) + 1}, got {seeds}")
    variants = select(options.groups or form.groups)
    base = {
        kind: Job(
            kind, MUONCLIP, 0.0, form.steps[kind], options.seed, form.sizes[kind], evaluations=1
        )
        for kind in form.sizes
    }
    (tuning,) = training.tune([base["dense"]], [form.rates], [1], options)
    lr = training.best_rate(tuning)
    base = {kind: replace(job, lr=lr) for kind, job in base.items()}

    tuned = [variant for variant in variants if variant.tuned]
    tuning_results = training.tune(
        [_job(base[variant.kind], variant) for variant in tuned],
        [[lr * factor for factor in form.factors]] * len(tuned),
        [1] * len(tuned),
        options,
        at=_with_rate,
    )
    tuned_rates = {
        variant.name: training.best_rate(results)
        for variant, results in zip(tuned, tuning_results, strict=True)
    }
    kinds = [kind for kind in base if kind == "dense" or any(v.kind == kind for v in variants)]
    jobs = [
        *(base[kind] for kind in kinds),
        *(_with_rate(_job(base[v.kind], v), tuned_rates.get(v.name, lr)) for v in variants),
    ]
    results = training.train_all(
        [seeded for job in jobs for seeded in training.with_seeds(job, seeds)], options
    )
    runs = [results[start : start + seeds] for start in range(0, len(results), seeds)]
    bases = dict(zip(kinds, runs[: len(kinds)], strict=True))
    return {
        "seeds": seeds,
        "lr": lr,
        "tuning": sorted([result["lr"], result["final"]] for result in tuning),
        "held_out_also_in_training": training.overlap(form.sizes["dense"]),
        "bases": {
            kind: {
                "title": KINDS[kind],
                "parameters": results[0]["parameters"],
                "hidden": form.sizes[kind].hidden,
                "layers": form.sizes[kind].layers,
                "steps": form.steps[kind],
                "tokens_per_step": form.sizes[kind].tokens,
                "losses": {
                    name: _final_losses(results, name)
                    for name in _LOSSES
                    if name in results[0]["evaluations"]
                },
            }
            for kind, results in bases.items()
        },
        "variants": [
            _comparison(
                variant, judged, results, bases[variant.kind], tuned_rates.get(variant.name)
            )
            for variant, results in zip(variants, runs[len(kinds) :], strict=True)
            for judged in variant.judged
        ],
    }


def select(groups: Sequence[str]) -> list[Variant]:
    """The variants whose group contains one of the names; all if there are no names.

    Raises:
        ValueError: a name occurs in no group.
    """
    for name in groups:
        if not any(name in variant.group for variant in VARIANTS):
            known = "; ".join(dict.fromkeys(variant.group for variant in VARIANTS))
            raise ValueError(f"no group has {name!r} in its name; there are {known}")
    return [v for v in VARIANTS if not groups or any(name in v.group for name in groups)]


def _job(base: Job, variant: Variant) -> Job:
    return replace(base, label=f"{variant.group}: {variant.name}", **variant.changes)


def _with_rate(job: Job, lr: float) -> Job:
    """Change the learning rate of the matrices only, with the same weight decay per step."""
    if lr == job.lr:
        return job
    adamw = {"adamw_lr": job.lr, "adamw_weight_decay": job.weight_decay}
    decay = job.weight_decay * job.lr / lr
    return replace(job, lr=lr, weight_decay=decay, options=(*job.options, *adamw.items()))


def _final_losses(results: Sequence[Result], name: str) -> list[float | None]:
    return [r["evaluations"][name][-1] if r["final"] is not None else None for r in results]


def _comparison(
    variant: Variant, judged: str, runs: Sequence[Result], base: Sequence[Result], lr: float | None
) -> Result:
    """Final losses of a variant compared with the base for the same seeds."""
    losses, base_losses = _final_losses(runs, judged), _final_losses(base, judged)
    comparison: Result = {
        "group": variant.group,
        "name": variant.name,
        "kind": variant.kind,
        "judged": judged,
        "lr": lr,
        "losses": losses,
        "differences": None,
    }
    if None in losses or None in base_losses:
        return comparison
    differences = np.subtract(losses, base_losses)  # type: ignore[arg-type]
    mean, spread = mean_and_spread(differences.tolist())
    half = _STUDENT[len(runs) - 1] * spread / math.sqrt(len(runs))
    comparison |= {"differences": differences.tolist(), "mean": mean, "half_interval": half}
    if variant.group.startswith((CONTROL, DEP)):
        steps = [
            np.abs(np.subtract(run["train"], base_run["train"]))
            for run, base_run in zip(runs, base, strict=True)
        ]
        comparison["step_differences"] = {
            "first": float(max(difference[0] for difference in steps)),
            "largest": float(np.max(steps)),
        }
    return comparison


def is_clear(variant: Result) -> bool:
    """Whether the confidence interval excludes 0."""
    return variant["differences"] is not None and abs(variant["mean"]) > variant["half_interval"]


# ---------------------------------------------------------------------- table and plot


def table(result: Result) -> str:
    parts = []
    for kind, base in result["bases"].items():
        losses = ", ".join(
            " ".join([_LOSSES[name], "{:.3f} ± {:.3f}".format(*mean_and_spread(losses))]).strip()
            for name, losses in base["losses"].items()
        )
        rows = []
        for variant in result["variants"]:
            if variant["kind"] != kind:
                continue
            name = variant["name"] + (f", {variant['lr']:g}" if variant["lr"] else "")
            cells = ["diverged", "", ""]
            if variant["differences"] is not None:
                cells = [
                    f"{variant['mean']:+.4f} ± {variant['half_interval']:.4f}",
                    ("worse" if variant["mean"] > 0 else "better") if is_clear(variant) else "",
                    ", ".join(f"{difference:+.4f}" for difference in variant["differences"]),
                ]
            rows.append([variant["group"], name, _LOSSES[variant["judged"]], *cells])
        header = (
            "choice (base)", "variant", "loss of", "difference from the base", "clear",
            "by seed",
        )  # fmt: skip
        parts.append(
            f"**{base['title'][0].upper()}{base['title'][1:]}**: {base['layers']} layers, "
            f"hidden {base['hidden']}, {base['parameters']:,} parameters, {base['steps']:,} steps "
            f"of {base['tokens_per_step']:,} tokens, rate {result['lr']:g}; held-out loss of the "
            f"base: {losses}\n\n" + markdown(header, rows)
        )
    parts += [
        f"{variant['group']}, {variant['name']}: over all steps and seeds, the training loss "
        f"differs by {variant['step_differences']['first']:.1g} in the first step and "
        f"{variant['step_differences']['largest']:.1g} at most."
        for variant in result["variants"]
        if "step_differences" in variant
    ]
    parts.append(
        f"Mean difference over {result['seeds']} seeds in nats per token (negative is better) with "
        "its 95% interval by Student's t. Clear: the interval excludes 0, as it would by chance "
        "for one in twenty variants without effect."
    )
    return "\n\n".join(parts)


def plot(result: Result, figure: "Figure") -> None:
    shown = [variant for variant in result["variants"] if variant["differences"] is not None]
    figure.set_size_inches(
        11, 1.2 + 0.3 * (len(shown) + len({variant["group"] for variant in shown}))
    )
    axis = figure.subplots()
    ticks: list[float] = []
    labels: list[str] = []
    y, group = 0.0, ""
    for variant in shown:
        if variant["group"] != group:
            group = variant["group"]
            y += 1.3 if ticks else 0.0
            axis.text(
                0.005, y - 0.85, group.replace("`", ""), fontsize=8, fontweight="bold",
                transform=axis.get_yaxis_transform(), va="center",
            )  # fmt: skip
        judged = _LOSSES[variant["judged"]]
        ticks.append(y)
        labels.append(
            variant["name"].replace("`", "") + (f", loss of {judged}" if judged != "all" else "")
        )
        color = ("C3" if variant["mean"] > 0 else "C2") if is_clear(variant) else "0.7"
        axis.barh(y, variant["mean"], 0.7, color=color)
        axis.errorbar(
            variant["mean"], y, xerr=variant["half_interval"], color="black", lw=1, capsize=2
        )
        axis.plot(variant["differences"], [y] * result["seeds"], "k.", ms=3)
        y += 1
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.set_ylim(y, -1.5)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xscale("symlog", linthresh=0.02)
    axis.xaxis.set_major_formatter("{x:+.2g}")
    axis.set(
        xlabel="difference of the held-out loss from the base with the same seed, nats per token "
        "(linear within 0.02)\nbars: mean; dots: seeds; lines: 95% interval; grey: includes 0"
    )
    axis.grid(alpha=0.3, axis="x")
