"""The plan as a table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.errors import PretrainError


def format_plan(plan: Mapping[str, Any], memory_gib: float | None = None) -> str:
    """Return the table that ``python -m pretrain plan`` prints.

    Args:
        plan: the result of :func:`pretrain.plan.plan`.
        memory_gib: memory of a device in GiB, to say whether a rank fits.

    Raises:
        PretrainError: ``memory_gib`` is not a finite number above 0.
    """
    if memory_gib is not None:
        check_memory(memory_gib)
    sections = [
        [_layout_line(plan["layout"])],
        _parameter_lines(plan["parameters"]),
        _memory_lines(plan["memory"], memory_gib),
        _flops_lines(plan),
        _traffic_lines(plan["messages"]),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def check_memory(memory_gib: float) -> None:
    """Raise PretrainError if a device's memory is not a finite number above 0."""
    if not (math.isfinite(memory_gib) and memory_gib > 0):
        raise PretrainError(f"memory must be a finite number of GiB > 0, not {memory_gib:g}")


def format_fit(found: Mapping[str, Any], memory_gib: float) -> str:
    """Return the table that ``python -m pretrain plan --fit`` prints.

    Args:
        found: the result of :func:`pretrain.plan.fit`.
        memory_gib: memory of a device in GiB.
    """
    if found["fit"]:
        lines = [
            f"{len(found['fit'])} layouts of {found['processes']} processes fit in "
            f"{memory_gib:g} GiB; the fastest, by a rough estimate without overlap, are:"
        ]
        for layout in found["fit"][:8]:
            used = layout["memory"]["total"] / 2**30
            lines.append(
                f"{used:8.1f} GiB {layout['seconds']:8.1f} s  {' '.join(layout['settings'])}"
            )
        return "\n".join(lines)
    lines = [
        f"no layout of {found['processes']} processes fits in {memory_gib:g} GiB; the closest are:"
    ]
    for layout in found["not_fit"]:
        sizes = dict(layout["memory"])
        used = sizes.pop("total") / 2**30
        lines.append(
            f"{used:8.1f} GiB, {used - memory_gib:.1f} too many  {' '.join(layout['settings'])}"
        )
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:4]
        lines.append(
            "    most for " + ", ".join(f"{name} {sizes[name] / 2**30:.1f}" for name in largest)
        )
    lines.append(
        "try more --processes; a smaller global_batch_size, with fewer images a step; a smaller "
        "micro_batch_size"
    )
    return "\n".join(lines)


def _layout_line(layout: Mapping[str, Any]) -> str:
    return (
        f"{layout['processes']} processes: {layout['data']} data-parallel x {layout['tensor']} "
        f"tensor x {layout['context']} context x {layout['pipeline']} pipeline; experts over "
        f"{layout['expert']}; {layout['micro_batches']} micro-batches a step; layers of the "
        "stages: " + ", ".join(map(str, layout["layers_of_stages"]))
    )


def _parameter_lines(parameters: Mapping[str, Any]) -> list[str]:
    notes = {"active": "   (of the language model, without the embedding's table)"}
    lines = [
        f"{title:<24}{parameters[key]:>22,}   {_short(parameters[key])}{notes.get(key, '')}"
        for title, key in (
            ("parameters", "total"),
            ("  language model", "language"),
            ("  active per token", "active"),
            ("  vision", "vision"),
            ("  by Muon", "muon"),
        )
    ]
    return lines + [f"    {part:<20}{n:>22,}" for part, n in parameters["by_part"].items()]


def _memory_lines(stages: Sequence[Mapping[str, float]], memory_gib: float | None) -> list[str]:
    fullest, of_stage = _largest(stages)
    lines = [f"memory of a rank, GiB{of_stage}"]
    notes = {"optimizer step": "   (after activations and temporary tensors; the larger counts)"}
    lines += [
        f"  {name:<22}{size / 2**30:>12,.3f}{notes.get(name, '')}" for name, size in fullest.items()
    ]
    if memory_gib is not None:
        used = fullest["total"] / 2**30
        if used <= memory_gib:
            lines.append(f"  fits in {memory_gib:g} GiB: {used / memory_gib:.0%}")
        else:
            lines.append(
                f"  DOES NOT FIT in {memory_gib:g} GiB: {used - memory_gib:.1f} GiB too many; "
                f"--fit {memory_gib:g} tries other layouts"
            )
    return lines


def _flops_lines(plan: Mapping[str, Any]) -> list[str]:
    tokens, images = plan["tokens"], plan["images"]
    return [
        f"a step: {tokens:,} tokens, {images['features']:,.0f} of them of "
        f"{images['count']:,.0f} images of {images['patches_per_image']} patches",
        f"{'FLOPs':<24}{'a step':>12}{'a token':>12}",
        *(f"  {name:<22}{n:>12.3e}{n / tokens:>12.3e}" for name, n in plan["flops"].items()),
    ]


def _traffic_lines(stages: Sequence[Mapping[str, float]]) -> list[str]:
    busiest, of_stage = _largest(stages)
    lines = [f"  {name:<22}{size / 2**30:>12,.3f}" for name, size in busiest.items() if size]
    return [f"sent by a rank in a step, GiB{of_stage}", *(lines or ["  nothing"])]


def _largest(stages: Sequence[Mapping[str, float]]) -> tuple[Mapping[str, float], str]:
    """The pipeline stage with the largest total, and its number for people."""
    stage = max(range(len(stages)), key=lambda stage: stages[stage]["total"])
    number = f" (of stage {stage + 1} of {len(stages)}, which has most)" if len(stages) > 1 else ""
    return stages[stage], number


def _short(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:,.0f}"
