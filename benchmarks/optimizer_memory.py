"""Memory of one optimizer step: state and peak, compared with AdamW.

Weights are in float32; with master copies, in bfloat16.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.optimizers import (
    LR,
    WEIGHT_DECAY,
    WITH_MASTERS,
    Candidate,
    absence_note,
    add_selection,
    candidates,
    selected,
)
from benchmarks.runner import Result, cpu_bytes, markdown
from benchmarks.workloads import dense

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ADAMW = "AdamW"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)


def run(options: argparse.Namespace) -> Result:
    layers, hidden, feed_forward = {
        "full": (12, 2048, 5632), "quick": (12, 384, 1024), "tiny": (1, 32, 64),
    }[options.form]  # fmt: skip
    load = dense(layers, hidden, feed_forward, 1, "dense")
    shapes = list(load.matrices)
    absent: dict[str, str] = {}
    rows: dict[str, Result] = {}
    chosen = selected(options, ADAMW)
    if any(candidate.name == "MuonClip" for candidate in chosen):
        chosen += WITH_MASTERS
    for candidate in chosen:
        reason = candidate.missing(options.device)
        if reason is None:
            try:
                rows[candidate.name] = _in_fresh_process(candidate.name, shapes, options)
                print(f"measured {candidate.name}", flush=True)
                continue
            except RuntimeError as error:
                if candidate.module is None:  # our own optimizer: a bug
                    raise
                reason = f"fails: {error}".splitlines()[0][:200]
        absent[candidate.name] = reason
    parameters = 4 * sum(torch.Size(shape).numel() for shape in shapes)
    for row in rows.values():
        row["of_adamw"] = row["peak_bytes"] / rows[ADAMW]["peak_bytes"]
    return {
        "title": f"{load}, float32",
        "parameter_bytes": parameters,
        "largest_parameter_bytes": 4 * max(torch.Size(shape).numel() for shape in shapes),
        "optimizers": rows,
        "not_run": absent,
    }


def _in_fresh_process(
    name: str, shapes: list[tuple[int, ...]], options: argparse.Namespace
) -> Result:
    """Measure in a process without cached memory blocks or compiled kernels of other optimizers."""
    # Unlike a Pool, an executor raises an error if the process is killed.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(measure, name, shapes, str(options.device), options.seed).result()


def measure(name: str, shapes: list[tuple[int, ...]], device: str, seed: int) -> Result:
    """Bytes that the first two steps of an optimizer add to parameters and gradients.

    All allocations through torch's allocators count, so that CPU figures do not depend on the
    machine. Internal allocations of libraries (oneDNN's packed matrices) do not count.

    Returns:
        ``state_bytes``: bytes allocated after the steps; ``peak_bytes``: peak during the steps,
        including the state.
    """
    (candidate,) = (c for c in [*candidates(), *WITH_MASTERS] if c.name == name)
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if candidate in WITH_MASTERS else torch.float32
    params = [nn.Parameter((torch.randn(s, device=device) * 0.02).to(dtype)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    try:
        return _on_cuda(candidate, params) if device != "cpu" else _on_cpu(candidate, params)
    except Exception as error:
        # The exception classes of other packages may not be picklable.
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _steps(
    candidate: Candidate, params: list[nn.Parameter], count: int
) -> list[torch.optim.Optimizer]:
    built = candidate.build(params, [], LR, WEIGHT_DECAY)
    for _ in range(count):
        for optimizer in built:
            optimizer.step()
    return built


def _on_cuda(candidate: Candidate, params: list[nn.Parameter]) -> Result:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    kept = _steps(candidate, params, 2)
    peak = torch.cuda.max_memory_allocated() - start
    state = torch.cuda.memory_allocated() - start
    del kept
    return {"state_bytes": state, "peak_bytes": peak}


def _on_cpu(candidate: Candidate, params: list[nn.Parameter]) -> Result:
    if candidate.module is not None:  # exclude allocations of compilation
        _steps(candidate, [_copy(p) for p in params], 1)
    state, peak = cpu_bytes(lambda: _steps(candidate, params, 2))
    return {"state_bytes": state, "peak_bytes": peak}


def _copy(p: nn.Parameter) -> nn.Parameter:
    copy = nn.Parameter(p.detach().clone())
    copy.grad = p.grad.clone() if p.grad is not None else None
    return copy


def plot(result: Result, figure: "Figure") -> None:
    axes = figure.subplots()
    names = list(result["optimizers"])
    unit = result["parameter_bytes"]
    rows = result["optimizers"].values()
    state = [row["state_bytes"] / unit for row in rows]
    peak = [row["peak_bytes"] / unit for row in rows]
    axes.barh(names, peak, color="lightgrey", label="peak in a step")
    axes.barh(names, state, color="tab:blue", label="state")
    half = result["optimizers"][ADAMW]["peak_bytes"] / unit / 2
    axes.axvline(half, color="black", linewidth=0.8, label="half of AdamW's peak")
    axes.invert_yaxis()
    axes.set_xlabel("multiples of the parameters' memory")
    axes.set_title(result["title"])
    axes.legend()


def table(result: Result) -> str:
    unit = result["parameter_bytes"]
    rows = [
        [
            f"**{name}**" if name == "MuonClip" else name,
            f"{row['state_bytes'] / unit:.2f}",
            f"{row['peak_bytes'] / unit:.2f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{row['of_adamw']:.2f}",
        ]
        for name, row in result["optimizers"].items()
    ]
    header = ["", "state / parameters", "peak / parameters", "peak, MiB", "peak / AdamW's"]
    blocks = [f"**{result['title']}**", markdown(header, rows)]
    return "\n\n".join([*blocks, *absence_note("measured", result["not_run"])])
