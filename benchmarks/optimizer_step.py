"""Time of one optimizer step: MuonClip, torch.optim.Muon, AdamW and other implementations."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from benchmarks.optimizers import (
    BASELINE,
    LR,
    WEIGHT_DECAY,
    Candidate,
    absence_note,
    add_selection,
    selected,
)
from benchmarks.runner import Result, interleave, markdown, matmul_peak, positive_int, summarize
from benchmarks.workloads import Workload, workloads
from muonclip import reference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDS = {"full": 10, "quick": 3, "tiny": 2}
# Steps with fewer FLOPs take milliseconds, and are timed in more rounds.
SHORT, ROUNDS_OF_SHORT = 1e9, 20
# Size of the square matrix product that measures the peak of the device.
PEAK_SIZE = {"full": 8192, "quick": 2048, "tiny": 64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    parser.add_argument("--baseline", default=BASELINE, help="optimizer to compare with")
    parser.add_argument(
        "--workloads", nargs="+", metavar="NAME", help="default: all workloads of the form"
    )
    parser.add_argument(
        "--rounds",
        type=positive_int,
        help="timed steps per optimizer (20 times as many of a small model); default: depends on "
        "the form",
    )


def run(options: argparse.Namespace) -> Result:
    # Some optimizers compile once per shape.
    torch._dynamo.config.recompile_limit = 256
    wanted = selected(options, options.baseline)
    loads = workloads(options.form)
    if options.workloads:
        known = [load.name for load in loads]
        if unknown := set(options.workloads) - set(known):
            raise SystemExit(f"--workloads: {', '.join(unknown)} not among {', '.join(known)}")
        loads = [load for load in loads if load.name in options.workloads]

    absent = {c.name: why for c in wanted if (why := c.missing(options.device))}
    present = [c for c in wanted if c.name not in absent]
    errors: dict[str, float] = {}
    for candidate in list(present):
        try:
            if candidate.coefficients:
                errors[candidate.name] = update_error(candidate, options.device, options.seed)
        except Exception as error:
            if candidate.module is None:  # our own optimizer: a bug
                raise
            absent[candidate.name] = f"fails: {type(error).__name__}: {error}".splitlines()[0][:200]
            present.remove(candidate)

    if options.baseline in absent:
        raise SystemExit(f"--baseline {options.baseline}: {absent[options.baseline]}")
    arithmetic = {load.name: _arithmetic(load, present, options.device) for load in loads}
    dtypes = {
        dtype for by_name in arithmetic.values() for found in by_name.values() for dtype in found
    }
    result: Result = {
        "baseline": options.baseline,
        "optimizers": {
            c.name: {
                "coefficients": c.coefficients,
                "version": c.version(),
                "update_error": errors.get(c.name),
            }
            for c in present
        },
        "not_run": absent,
        "matmul_peak_flops": {
            dtype: matmul_peak(
                getattr(torch, dtype), options.device, PEAK_SIZE[options.form], options.clock
            )
            for dtype in sorted(dtypes)
        },
        "workloads": {},
    }
    for load in loads:
        rounds = ROUNDS[options.form] if options.rounds is None else options.rounds
        if load.flops() < SHORT and options.form != "tiny":
            rounds *= ROUNDS_OF_SHORT
        # Optimizers without support for stacks are timed on the same experts as separate matrices.
        timed = [c for c in present if c.stacks or not load.stacked or c.name == options.baseline]
        times = summarize(_time(load, timed, rounds, options), options.baseline)
        for name, row in times.items():
            found = arithmetic[load.name][name]
            row["arithmetic"] = " and ".join(found)
            if found:
                row["flops_per_s"] = load.flops() / row["median_s"]
                peak = max(result["matmul_peak_flops"][dtype] for dtype in found)
                row["share_of_peak"] = row["flops_per_s"] / peak
        result["workloads"][load.name] = {
            "title": str(load), "newton_schulz_flops": load.flops(), "times": times
        }  # fmt: skip
        print(f"timed {load.name}: {rounds} rounds of {len(timed)} optimizers", flush=True)
    return result


def _arithmetic(
    load: Workload, present: Sequence[Candidate], device: torch.device
) -> dict[str, list[str]]:
    """Dtypes of each optimizer's Newton-Schulz for these matrices."""
    shapes = {(math.prod(stack), n, m) for *stack, n, m in load.matrices}
    return {candidate.name: candidate.arithmetic_on(device, shapes) for candidate in present}


def _time(
    load: Workload, timed: Sequence[Candidate], rounds: int, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each step; all optimizers update the same weights with the same gradients."""
    generator = torch.Generator(options.device).manual_seed(options.seed)

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=generator, device=options.device)

    shapes = [*load.matrices, *load.others]
    weights = [normal(shape) * 0.02 for shape in shapes]
    gradients = [torch.empty_like(weight) for weight in weights]
    # Copied before each step, because some optimizers write into the gradients.
    sources = [[normal(shape) for shape in shapes] for _ in range(2)]
    steps: dict[str, Callable[[], object]] = {}
    params: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}
    for candidate in timed:
        pairs = [
            (nn.Parameter(weight), gradient)
            for weight, gradient in zip(weights, gradients, strict=True)
        ]
        count = len(load.matrices)
        matrices = [
            matrix for pair in pairs[:count] for matrix in (
                [pair] if candidate.stacks else _unstack(*pair)
            )
        ]  # fmt: skip
        others = pairs[count:]
        params[candidate.name] = [*matrices, *others]
        optimizers = candidate.build(
            [p for p, _ in matrices], [p for p, _ in others], LR, WEIGHT_DECAY
        )
        steps[candidate.name] = _stepper(optimizers)
    calls = 0

    def before(name: str) -> None:
        nonlocal calls
        calls += 1
        torch._foreach_copy_(gradients, sources[calls // len(timed) % 2])
        for p, gradient in params[name]:
            p.grad = gradient

    return interleave(
        steps, rounds=rounds, before=before, device=options.device, clock=options.clock
    )


def _unstack(p: nn.Parameter, gradient: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """The matrices of a stack as parameters that share its storage."""
    if p.ndim == 2:
        return [(p, gradient)]
    return [(nn.Parameter(w), g) for w, g in zip(p.detach(), gradient, strict=True)]


def _stepper(optimizers: Sequence[Optimizer]) -> Callable[[], None]:
    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step


def update_error(candidate: Candidate, device: torch.device, seed: int = 0) -> float:
    """Relative error of an optimizer's second step compared with the definition of Muon.

    The reference is computed in float64 with the optimizer's coefficients, for a wide and a tall
    matrix that are not so small that MuonClip chooses float32. Updates are normalized, since
    conventions for their scale differ.

    Returns:
        The larger relative Frobenius distance: about 1e-6 in float32, 1e-3 in float16 and 1e-2 in
        bfloat16. An error above 0.1 means a different algorithm.
    """
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for shape in ((96, 256), (256, 96)):
        gradients = [torch.randn(shape, generator=generator) for _ in range(2)]
        p = nn.Parameter(torch.zeros(shape, device=device))
        optimizers = candidate.build([p], [], LR, 0.0)
        weight, buffer = torch.zeros(shape).double(), torch.zeros(shape).double()
        for gradient in gradients:
            before, p.grad = p.detach().clone(), gradient.to(device, copy=True)
            _stepper(optimizers)()
            exact, buffer = reference.muon_step(
                weight, gradient, buffer, lr=LR, weight_decay=0.0,
                coefficients=candidate.coefficients or "quintic",
            )  # fmt: skip
            update, expected = (p.detach() - before).cpu().double(), exact - weight
            weight = exact
        difference = update / update.norm() - expected / expected.norm()
        worst = max(worst, difference.norm().item())
    return worst


def plot(result: Result, figure: "Figure") -> None:
    loads = result["workloads"]
    figure.set_size_inches(3.2 + 3.1 * len(loads), 1.5 + 0.3 * len(result["optimizers"]))
    names = list(result["optimizers"])
    panels = figure.subplots(1, len(loads), sharey=True, squeeze=False)[0]
    for axes, load in zip(panels, loads.values(), strict=True):
        for row_number, name in enumerate(names):
            row = load["times"].get(name)
            if row is None:
                continue
            low, high = row["speedup_quartiles"]
            ours = name.startswith("MuonClip")
            axes.barh(row_number, row["speedup"], color="tab:blue" if ours else "lightgrey")
            axes.plot([low, high], [row_number, row_number], color="black", linewidth=1)
            axes.text(high, row_number, f" {row['speedup']:.2f}x", va="center", fontsize=8)
        axes.axvline(1, color="black", linewidth=0.5)
        axes.set_xscale("log")
        axes.margins(x=0.2)
        axes.set_title(load["title"], fontsize=8, wrap=True)
        axes.set_xlabel(f"speedup over {result['baseline']}", fontsize=8)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].invert_yaxis()


def table(result: Result) -> str:
    blocks = []
    for load in result["workloads"].values():
        rows = []
        for name, row in load["times"].items():
            about: dict[str, Any] = result["optimizers"][name]
            low, high = row["quartiles_s"]
            share = row.get("share_of_peak")
            error = about["update_error"]
            rows.append([
                f"**{name}**" if name == "MuonClip" else name,
                about["version"] or "",
                row["arithmetic"],
                _milliseconds(row["median_s"]),
                f"{_milliseconds(low)} to {_milliseconds(high)}",
                f"{row['speedup']:.2f}",
                "" if share is None else f"{100 * share:.0f}%",
                "" if error is None else f"{error:.0e}",
            ])  # fmt: skip
        header = ["", "version", "arithmetic", "step, ms", "quartiles", "speedup",
                  "share of peak", "update error"]  # fmt: skip
        blocks.append(f"**{load['title']}**\n\n{markdown(header, rows)}")
    peaks = ", ".join(
        f"{dtype} {peak / 1e9:.3g}" for dtype, peak in result["matmul_peak_flops"].items()
    )
    blocks.append(f"Peak of matrix products on this machine, GFLOP/s: {peaks}.")
    return "\n\n".join([*blocks, *absence_note("timed", result["not_run"])])


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 1 else f"{1e3 * seconds:.4g}"
