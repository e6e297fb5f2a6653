"""Shared parts of all benchmarks: command line, interleaved timing, results, tables and plots.

A benchmark is a module of this package with the functions of :class:`Benchmark`; the first line of
its docstring says what it measures.
"""

import argparse
import gc
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pretrain.runtime.machine import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Benchmark(Protocol):
    """Functions of a benchmark module."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add options to the shared ones."""

    def run(self, options: argparse.Namespace) -> Result:
        """Measure.

        Args:
            options: the shared options (see :func:`parse`) and those of :meth:`add_arguments`.

        Returns:
            A result that can be stored as JSON.
        """

    def plot(self, result: Result, figure: "Figure") -> None:
        """Draw a result of :meth:`run`."""

    def table(self, result: Result) -> str:
        """A result of :meth:`run` as Markdown."""


# ---------------------------------------------------------------------- command line


def positive_int(text: str) -> int:
    """Option type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def positive_float(text: str) -> float:
    """Option type: a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return number


def parse(name: str, benchmark: Benchmark, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the shared options and those of the benchmark; make the folder of the results, and set
    the threads and the seed."""
    parser = argparse.ArgumentParser(f"python -m benchmarks run {name}", allow_abbrev=False)
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--quick", dest="form", action="store_const", const="quick",
        help="sizes for two CPU cores; default: full sizes, for a GPU",
    )  # fmt: skip
    form.add_argument(
        "--tiny", dest="form", action="store_const", const="tiny",
        help="smoke test of a few seconds; its figures have no meaning",
    )  # fmt: skip
    parser.set_defaults(form="full")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive_int, help="CPU threads; default: torch's choice")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall",
        help="cpu: processor time, for a busy machine; needs --threads 1",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the JSON file and the plot"
    )
    parser.add_argument(
        "--tag", default="", help="suffix of the file names, to keep another result"
    )
    benchmark.add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU on this machine; use --device cpu")
    if options.clock == "cpu" and (options.device.type != "cpu" or options.threads != 1):
        parser.error("--clock cpu needs --device cpu and --threads 1")
    # Before the measurement, which may take hours: it could not be stored at its end.
    if not re.fullmatch(r"[\w.-]*", options.tag):
        parser.error(f"--tag is part of a file's name: use letters and digits, not {options.tag}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot make the folder {options.out}: {error.strerror}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    return options


def run(name: str, benchmark: Benchmark, arguments: Sequence[str]) -> Path:
    """Run a benchmark, store its result and plot, and print its table.

    Returns:
        The path of the JSON file.
    """
    options = parse(name, benchmark, arguments)
    result = benchmark.run(options)
    stored = {
        "benchmark": name,
        "command": _command(name, arguments),
        "form": options.form,
        "device": options.device.type,
        "seed": options.seed,
        "clock": options.clock,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        **commit(),
        "versions": {**versions(("numpy", "matplotlib")), "torch": torch.__version__},
        "machine": machine(options.device),
        "result": result,
    }
    tag = f"-{options.tag}" if options.tag else ""
    file: Path = options.out / f"{name}-{options.form}-{options.device.type}{tag}.json"
    file.write_text(dumps(stored))
    draw(benchmark, result, file.with_suffix(".png"))
    print(table(benchmark, file))
    return file


def dumps(stored: Result) -> str:
    """JSON with each list of numbers on one line, so that diffs are readable."""
    # JSON strings contain no line breaks, so that the pattern does not match within strings.
    numbers = re.compile(r"\[\n([^\[\]{}\"]*)\n *\]")
    return (
        numbers.sub(lambda match: f"[{' '.join(match[1].split())}]", json.dumps(stored, indent=1))
        + "\n"
    )


def _command(name: str, arguments: Sequence[str]) -> str:
    """The command line without ``--out``."""
    typed = re.sub(r" --out(=| )\S+", "", " ".join(["", *map(shlex.quote, arguments)]))
    return f"python -m benchmarks run {name}{typed}"


# ---------------------------------------------------------------------- timing


def interleave(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    before: Callable[[str], object] = lambda name: None,
    device: torch.device | str = "cpu",
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Time several functions against each other in one process.

    Each round calls every function once and starts with a different one, so that other load and the
    temperature of the machine affect all of them equally.

    Args:
        steps: functions by name.
        rounds: number of timed rounds.
        warmup: number of untimed rounds before them.
        before: called with the name before each call, outside of the timed interval.
        device: on ``"cuda"``, CUDA events measure the time.
        clock: clock on a CPU; a name in ``CLOCKS``.

    Returns:
        Seconds of each round, by name.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-warmup, rounds):
        start = round_ % len(names)
        for name in names[start:] + names[:start]:
            before(name)
            elapsed = stopwatch(steps[name], device, clock)
            if round_ >= 0:
                seconds[name].append(elapsed)
    return seconds


def stopwatch(
    step: Callable[[], object], device: torch.device | str = "cpu", clock: str = "wall"
) -> float:
    """Seconds of one call, including its work on the device."""
    if torch.device(device).type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / 1e3
    now = CLOCKS[clock]
    start = now()
    step()
    return now() - start


def summarize(seconds: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Result]:
    """Median and quartiles of each function, and its speedup over the baseline.

    ``speedup`` is the median over rounds of the ratio of times within a round, because noise of
    the machine affects measurements close in time equally.
    """
    summary = {}
    for name, times in seconds.items():
        ratios = [b / t for b, t in zip(seconds[baseline], times, strict=True)]
        low, median, high = quartiles(times)
        slow, middle, fast = quartiles(ratios)
        summary[name] = {
            "median_s": median,
            "quartiles_s": [low, high],
            "speedup": middle,
            "speedup_quartiles": [slow, fast],
            "rounds": len(times),
        }
    return summary


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def cpu_bytes(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that remain allocated after a call, including its result, and their peak during the
    call; allocations through torch's CPU allocator only."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # what earlier calls left would be freed at any time
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = work()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return live, peak


def matmul_peak(
    dtype: torch.dtype, device: torch.device | str, size: int, clock: str = "wall"
) -> float:
    """Peak FLOP/s of a square matrix product of this size, the best of five."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(stopwatch(lambda: torch.mm(a, b), device, clock) for _ in range(5))


# ---------------------------------------------------------------------- provenance


def commit() -> dict[str, Any]:
    """The commit, and whether files that affect results have uncommitted changes."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--", "muonclip", "pretrain", "benchmarks/*.py")
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
    }


def machine(device: torch.device | str) -> Result:
    """Processor, cores, load and the GPU, if one is used; not the name of the host."""
    described: Result = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        if model := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            described["cpu"] = model[1]
        if flags := re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE):
            known = set(flags[1].split())
            described["vectors"] = "AVX-512" if "avx512f" in known else "AVX2 or less"
            described["bfloat16_instructions"] = bool(known & {"amx_bf16", "avx512_bf16"})
    if hasattr(os, "getloadavg"):
        described["load_average"] = round(os.getloadavg()[0], 1)
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = properties.name
        described["gpu_memory_gib"] = round(properties.total_memory / 2**30)
        described["cuda"] = torch.version.cuda
    return described


# ---------------------------------------------------------------------- tables and plots


def table(benchmark: Benchmark, file: Path) -> str:
    """A stored result as Markdown, with its command, machine, versions and commit."""
    stored = json.loads(file.read_text())
    machine = stored["machine"]
    commit = (stored["commit"] or "no commit")[:10]
    if stored["uncommitted_changes"]:
        commit += " with uncommitted changes"
    provenance = [
        f"`{stored['command']}`",
        machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores",
        *(["processor time, not wall clock"] if stored["clock"] == "cpu" else []),
        ", ".join(f"{name} {version}" for name, version in stored["versions"].items()),
        f"commit {commit}",
    ]
    return f"{benchmark.table(stored['result'])}\n\n<sub>{'; '.join(provenance)}</sub>\n"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with the first column left-aligned and the others right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def draw(benchmark: Benchmark, result: Result, file: Path) -> None:
    """Write the plot of a result as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(9, 5), layout="constrained")
    benchmark.plot(result, figure)
    # Without matplotlib's version, the file changes only with the result.
    figure.savefig(file, dpi=110, metadata={"Software": None})
