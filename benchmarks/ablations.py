"""What each choice in MuonClip is worth: the held-out loss of variants against the default's.

Every variant changes one thing and trains with the seeds of the base, on the same batches; what is
shown is the difference seed by seed. A scale of updates has a learning rate of its own for the
matrices, found with one seed as the base's was, while the other parameters keep the base's rate and
the matrices the base's weight decay a step. Variants of the data and of DEP have a base of their
own, on text and images; all of them are judged by the same held-out sequences.
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

# Two-sided 95 % of Student's t, by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
CONTROL, SHARE, DEP = "control", "share of images", "DEP"
_LOSSES = {"loss": "all", "held_out_text_loss": "text", "held_out_caption_loss": "captions"}


@dataclass(frozen=True)
class Variant:
    """One thing done otherwise than in the base.

    Attributes:
        changes: fields of the ``Job``.
        tuned: a learning rate of the matrices is found for it.
        judged: by these of what the model measures.
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
    # What a difference is that means nothing: it grows from the last bits.
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
        # The base's own too: a rate of the matrices alone is an advantage in itself.
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
    """
    Attributes:
        rates: tried for the base of text; that on images is given the one found.
        times: the base's rate are tried for the variants that have a rate of their own.
        groups: of variants; empty: all.
    """

    sizes: dict[Kind, Size]
    steps: dict[Kind, int]
    rates: tuple[float, ...]
    times: tuple[float, ...]
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
    parser.add_argument("--seeds", type=positive_int, help="default: by the form")
    parser.add_argument(
        "--groups", nargs="+", metavar="NAME",
        help="variants whose groups contain these; default: all",
    )  # fmt: skip


def run(options: argparse.Namespace) -> Result:
    form = FORMS[options.form]
    seeds = options.seeds or form.seeds
    if not 2 <= seeds <= max(_STUDENT) + 1:
        raise ValueError(f"--seeds must be 2 to {max(_STUDENT) + 1}, got {seeds}")
    variants = chosen(options.groups or form.groups)
    base = {
        kind: Job(
            kind, MUONCLIP, 0.0, form.steps[kind], options.seed, form.sizes[kind], evaluations=1
        )
        for kind in form.sizes
    }
    (tried,) = training.tune([base["dense"]], [form.rates], [1], options)
    lr = training.best_rate(tried)
    base = {kind: replace(job, lr=lr) for kind, job in base.items()}

    scaled = [variant for variant in variants if variant.tuned]
    tuned = training.tune(
        [_job(base[variant.kind], variant) for variant in scaled],
        [[lr * factor for factor in form.times]] * len(scaled),
        [1] * len(scaled),
        options,
        at=_with_rate,
    )
    own_rates = {
        variant.name: training.best_rate(results)
        for variant, results in zip(scaled, tuned, strict=True)
    }
    used = [kind for kind in base if kind == "dense" or any(v.kind == kind for v in variants)]
    jobs = [
        *(base[kind] for kind in used),
        *(_with_rate(_job(base[v.kind], v), own_rates.get(v.name, lr)) for v in variants),
    ]
    told = training.train_all(
        [one for job in jobs for one in training.with_seeds(job, seeds)], options
    )
    runs = [told[place : place + seeds] for place in range(0, len(told), seeds)]
    bases = dict(zip(used, runs[: len(used)], strict=True))
    return {
        "seeds": seeds,
        "lr": lr,
        "tuning": sorted([one["lr"], one["final"]] for one in tried),
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
                    name: _ends(results, name)
                    for name in _LOSSES
                    if name in results[0]["evaluations"]
                },
            }
            for kind, results in bases.items()
        },
        "variants": [
            _told(variant, judged, results, bases[variant.kind], own_rates.get(variant.name))
            for variant, results in zip(variants, runs[len(used) :], strict=True)
            for judged in variant.judged
        ],
    }


def chosen(groups: Sequence[str]) -> list[Variant]:
    """Those whose group contains one of these; all, where there are none.

    Raises:
        ValueError: for a name that is in no group.
    """
    for name in groups:
        if not any(name in variant.group for variant in VARIANTS):
            known = "; ".join(dict.fromkeys(variant.group for variant in VARIANTS))
            raise ValueError(f"no group has {name!r} in its name; there are {known}")
    return [v for v in VARIANTS if not groups or any(name in v.group for name in groups)]


def _job(base: Job, variant: Variant) -> Job:
    return replace(base, label=f"{variant.group}: {variant.name}", **variant.changes)


def _with_rate(job: Job, lr: float) -> Job:
    """Another learning rate of the matrices, and nothing else: of the job's own, what else there
    is keeps the rate, and the matrices their decay a step."""
    if lr == job.lr:
        return job
    kept = {"adamw_lr": job.lr, "adamw_weight_decay": job.weight_decay}
    decay = job.weight_decay * job.lr / lr
    return replace(job, lr=lr, weight_decay=decay, options=(*job.options, *kept.items()))


def _ends(results: Sequence[Result], name: str) -> list[float | None]:
    return [one["evaluations"][name][-1] if one["final"] is not None else None for one in results]


def _told(
    variant: Variant, judged: str, runs: Sequence[Result], base: Sequence[Result], lr: float | None
) -> Result:
    """How a variant ended, against the base with the same seeds."""
    ends, base_ends = _ends(runs, judged), _ends(base, judged)
    told: Result = {
        "group": variant.group,
        "name": variant.name,
        "kind": variant.kind,
        "judged": judged,
        "lr": lr,
        "losses": ends,
        "differences": None,
    }
    if None in ends or None in base_ends:
        return told
    differences = np.subtract(ends, base_ends)  # type: ignore[arg-type]
    mean, spread = mean_and_spread(differences.tolist())
    half = _STUDENT[len(runs) - 1] * spread / math.sqrt(len(runs))
    told |= {"differences": differences.tolist(), "mean": mean, "half_interval": half}
    if variant.group.startswith((CONTROL, DEP)):
        steps = [
            np.abs(np.subtract(one["train"], other["train"]))
            for one, other in zip(runs, base, strict=True)
        ]
        told["step_differences"] = {
            "first": float(max(difference[0] for difference in steps)),
            "largest": float(np.max(steps)),
        }
    return told


def clear(told: Any) -> bool:
    """Whether the interval leaves out no difference."""
    return told["differences"] is not None and abs(told["mean"]) > told["half_interval"]


# ---------------------------------------------------------------------- for people


def table(result: Result) -> str:
    parts = []
    for kind, base in result["bases"].items():
        losses = ", ".join(
            " ".join([_LOSSES[name], "{:.3f} ± {:.3f}".format(*mean_and_spread(ends))]).strip()
            for name, ends in base["losses"].items()
        )
        rows = []
        for told in result["variants"]:
            if told["kind"] != kind:
                continue
            name = told["name"] + (f", {told['lr']:g}" if told["lr"] else "")
            found = ["diverged", "", ""]
            if told["differences"] is not None:
                found = [
                    f"{told['mean']:+.4f} ± {told['half_interval']:.4f}",
                    ("worse" if told["mean"] > 0 else "better") if clear(told) else "",
                    ", ".join(f"{difference:+.4f}" for difference in told["differences"]),
                ]
            rows.append([told["group"], name, _LOSSES[told["judged"]], *found])
        header = (
            "choice (the base's)", "variant", "judged by", "loss, against the base", "clear",
            "each seed",
        )  # fmt: skip
        parts.append(
            f"**{base['title'][0].upper()}{base['title'][1:]}**: {base['layers']} layers, "
            f"hidden {base['hidden']}, {base['parameters']:,} parameters, {base['steps']:,} steps "
            f"of {base['tokens_per_step']:,} tokens, rate {result['lr']:g}; held-out loss of the "
            f"base: {losses}\n\n" + markdown(header, rows)
        )
    parts += [
        f"{told['group']}, {told['name']}: of all steps and seeds the training loss "
        f"differs by {told['step_differences']['first']:.1g} in the first step and "
        f"{told['step_differences']['largest']:.1g} at most."
        for told in result["variants"]
        if "step_differences" in told
    ]
    parts.append(
        f"Mean difference of {result['seeds']} seeds in nats a token, below 0 is better, with its "
        "95% interval by Student's t; clear: the interval leaves out 0, which one in twenty "
        "variants that change nothing would do by chance too."
    )
    return "\n\n".join(parts)


def plot(result: Result, figure: "Figure") -> None:
    shown = [told for told in result["variants"] if told["differences"] is not None]
    figure.set_size_inches(11, 1.2 + 0.3 * (len(shown) + len({told["group"] for told in shown})))
    axis = figure.subplots()
    ticks: list[float] = []
    labels: list[str] = []
    place, group = 0.0, ""
    for told in shown:
        if told["group"] != group:
            group = told["group"]
            place += 1.3 if ticks else 0.0
            axis.text(
                0.005, place - 0.85, group.replace("`", ""), fontsize=8, fontweight="bold",
                transform=axis.get_yaxis_transform(), va="center",
            )  # fmt: skip
        judged = _LOSSES[told["judged"]]
        ticks.append(place)
        labels.append(
            told["name"].replace("`", "") + (f", loss of {judged}" if judged != "all" else "")
        )
        colour = ("C3" if told["mean"] > 0 else "C2") if clear(told) else "0.7"
        axis.barh(place, told["mean"], 0.7, color=colour)
        axis.errorbar(
            told["mean"], place, xerr=told["half_interval"], color="black", lw=1, capsize=2
        )
        axis.plot(told["differences"], [place] * result["seeds"], "k.", ms=3)
        place += 1
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.set_ylim(place, -1.5)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xscale("symlog", linthresh=0.02)
    axis.xaxis.set_major_formatter("{x:+.2g}")
    axis.set(
        xlabel="held-out loss against the base with the same seed, nats a token (linear within "
        "0.02)\nbars: mean; dots: seeds; lines: 95% interval; grey: it has 0 in it"
    )
    axis.grid(alpha=0.3, axis="x")
