"""What measuring, logging and checkpoints add to the trainer's step, beside one with none of it.

The trainer of ``configs/laptop.yaml`` in one process takes each batch three times: bare; with all
that a run shows: measures gathered, the update's RMS sampled every ``log_every`` steps,
metrics.jsonl, TensorBoard and progress lines written; and with that and a checkpoint that begins as
the step does. The cost is told as the ratio to the bare step, which the machine's noise blurs, and
as the time within the calls that do it, of all steps.

A checkpoint is charged to the ``checkpoint.every`` steps of the configuration between two: the time
within the call that asks for it, which copies, and all processor time of the thread that then
writes, whether or not another core was free for it. Beside these stands how much longer the step
took during which it was written.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import runner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pretrain.build import Run

TARGET = 0.02
# Of configs/laptop.yaml; rounds, and batches that they go through.
_FORMS: dict[str, tuple[int, int, list[str]]] = {
    "tiny": (
        4,
        2,
        [
            "global_batch_size=2",
            "micro_batch_size=2",
            "log_every=2",
            "data.max_corpus_mb=1",
            "data.vocab_size=400",
        ],
    ),
    "quick": (40, 8, ["global_batch_size=16"]),
    "full": (
        100,
        8,
        [
            *("language.num_layers=12", "language.hidden_size=1024", "language.num_heads=16"),
            *("language.ffn_hidden_size=4096", "language.expert_ffn_hidden_size=512"),
            *("language.num_experts=32", "data.seq_length=1024", "precision=bfloat16"),
        ],
    ),
}
BARE, SHOWN, SAVED = "bare", "shown", "saved"
# Of the thread that asks, without what another thread does meanwhile.
_OWN_CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
_TITLES = {
    "routing": "copy the routers' counts",
    "before_update": "sample weights",
    "after_update": "the update's RMS",
    "gather": "gather measures from all ranks",
    "write": "write them",
    "copy": "copy a checkpoint, its share of a step",
    "writer": "write it, the same, in another thread",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=runner.positive_int, help="timed steps of each variant")


def run(options: argparse.Namespace) -> runner.Result:
    # In a process of its own: the trainer sets up its process group and fits torch to a CPU.
    with tempfile.TemporaryDirectory() as folder:
        worker = multiprocessing.get_context("spawn").Process(
            target=_measure,
            args=(options.form, options.rounds, options.clock, torch.get_num_threads(), folder),
        )
        worker.start()
        worker.join()
        if worker.exitcode:
            raise RuntimeError("the measuring process failed: its error is above")
        told: runner.Result = json.loads(Path(folder, "result.json").read_text())
    return told


def _measure(form: str, rounds: int | None, clock: str, threads: int, folder: str) -> None:
    from pretrain import batches, checkpoint, config, parallel
    from pretrain.build import build
    from pretrain.checkpoint import storage
    from pretrain.runtime.faults import Guard
    from pretrain.runtime.metrics_writer import MetricsWriter
    from pretrain.setup import set_up
    from pretrain.step import train_step
    from pretrain.step_metrics import StepMetrics

    class Blind(StepMetrics):
        """Shows nothing."""

        def __init__(self) -> None: ...

        def before_update(self, step: int) -> None: ...

        def after_update(self) -> Any: ...

        def gather(self, *_arguments: Any) -> dict[str, Any]:
            return {}

    torch.set_num_threads(threads)
    default_rounds, count, overrides = _FORMS[form]
    settings = config.load(
        runner.ROOT / "configs" / "laptop.yaml",
        [
            "parallel.expert=1",
            f"run_dir={folder}/run",
            f"data.cache_dir={folder}/cache",
            *overrides,
        ],
    )
    here, data = set_up(settings)
    trained = build(settings, here, data)
    out = MetricsWriter(Path(settings.run_dir), 10**6, 0, settings.log_every, enabled=True)
    made = [batches.for_step(settings, here, data, step) for step in range(1, count + 1)]
    runs = {BARE: replace(trained, step_metrics=Blind()), SHOWN: trained, SAVED: trained}

    now = runner.CLOCKS[clock]
    spent = dict.fromkeys(_TITLES, 0.0)

    def timed(
        name: str, call: Callable[..., Any], now: Callable[[], float] = now
    ) -> Callable[..., Any]:
        def within(*arguments: Any) -> Any:
            begun = now()
            result = call(*arguments)
            spent[name] += now() - begun
            return result

        return within

    step_metrics = trained.step_metrics
    for name in ("before_update", "after_update", "gather"):
        setattr(step_metrics, name, timed(name, getattr(step_metrics, name)))
    tokens = step_metrics.expert_tokens
    setattr(tokens, "record", timed("routing", tokens.record))  # noqa: B010 (for mypy)
    write = timed("write", out.write)
    guard = Guard(settings.faults)
    saver = checkpoint.saver(trained)
    save = timed("copy", checkpoint.save, _OWN_CLOCKS[clock])
    # What the saver's thread runs.
    setattr(storage, "save", timed("writer", storage.save, time.thread_time))  # noqa: B010 (for mypy)

    taken = dict.fromkeys(runs, 0)
    parts: list[dict[str, float]] = []
    saves: list[dict[str, float]] = []

    def step_of(name: str) -> Callable[[], None]:
        def step() -> None:
            number = taken[name] = taken[name] + 1
            spent.update(dict.fromkeys(spent, 0.0))
            begun = now()
            if name == SAVED:
                save(trained, saver, guard, number)
            metrics = train_step(runs[name], made[number % count], number)
            if name != BARE:
                seconds = now() - begun
                metrics["tokens_per_second"] = metrics["tokens"] / seconds
                metrics["mfu"] = metrics["model_flops"] / seconds / step_metrics.peak_flops
                write(metrics)
            if name == SHOWN:
                parts.append(dict(spent))

        return step

    def settle(_next: str) -> None:
        """What was begun in a step is written before another variant's is timed."""
        saver.wait()
        if spent["copy"]:
            saves.append(dict(spent))
            spent["copy"] = 0.0

    with contextlib.redirect_stdout(io.StringIO()), contextlib.closing(saver):
        seconds = runner.interleave(
            {name: step_of(name) for name in runs},
            rounds=rounds or default_rounds,
            warmup=1,
            before=settle,
            device=here.device,
            clock=clock,
        )
        settle("")
    out.close()
    newest = storage.path_of(checkpoint.folder(trained), taken[SAVED])
    size = sum(file.stat().st_size for file in newest.iterdir())
    parallel.stop()
    told = _result(trained, seconds, parts[1:], saves[1:], size)
    Path(folder, "result.json").write_text(json.dumps(told))


def _result(
    run: "Run",
    seconds: dict[str, list[float]],
    parts: list[dict[str, float]],
    saves: list[dict[str, float]],
    size: int,
) -> runner.Result:
    ratios = [shown / bare - 1 for bare, shown in zip(seconds[BARE], seconds[SHOWN], strict=True)]
    slower = [saved - shown for shown, saved in zip(seconds[SHOWN], seconds[SAVED], strict=True)]
    every = run.config.checkpoint.every
    mean = {name: statistics.fmean(part[name] for part in parts) for name in _TITLES}
    save = {name: statistics.fmean(one[name] for one in saves) for name in ("copy", "writer")}
    shares = {name: cost / every for name, cost in save.items()}
    step = statistics.fmean(seconds[SHOWN])
    return {
        "parameters": sum(parameter.numel() for _, parameter in run.parameters()),
        "tokens": run.config.global_batch_size * run.config.data.seq_length,
        "log_every": run.config.log_every,
        "variants": runner.summarise(seconds, BARE),
        "overhead": runner.quartiles(ratios),
        "of_totals": sum(seconds[SHOWN]) / sum(seconds[BARE]) - 1,
        "within": sum(mean.values()) / step,
        "parts_s": mean | shares,
        "checkpoint": {
            "every": every,
            "bytes": size,
            "copy_s": save["copy"],
            "writer_s": save["writer"],
            "slower_s": runner.quartiles(slower),
            "within": sum(shares.values()) / step,
        },
        "target": TARGET,
    }


def table(result: runner.Result) -> str:
    low, middle, high = result["overhead"]
    header = (
        "", "step, ms", "against bare, median of rounds", "of all rounds together",
        "within the calls, of the step", "wanted",
    )  # fmt: skip
    rows = [
        [
            "nothing shown",
            f"{result['variants'][BARE]['median_s'] * 1e3:.1f}",
            *[""] * 4,
        ],
        [
            "**measured and logged**",
            f"{result['variants'][SHOWN]['median_s'] * 1e3:.1f}",
            f"{middle:+.2%} ({low:+.2%} to {high:+.2%})",
            f"{result['of_totals']:+.2%}",
            f"{result['within']:.2%}",
            f"≤ {result['target']:.0%}",
        ],
    ]
    saved = result["checkpoint"]
    low, middle, high = saved["slower_s"]
    rows.append(
        [
            f"**and a checkpoint every {saved['every']} steps**",
            *[""] * 3,
            f"{result['within'] + saved['within']:.2%}",
            f"≤ {result['target']:.0%}",
        ]
    )
    about_saves = (
        f"A checkpoint of {saved['bytes'] / 2**20:.1f} MiB: {saved['copy_s'] * 1e3:.1f} ms "
        f"within the step, {saved['writer_s'] * 1e3:.1f} ms of the writing thread's processor "
        f"time; the step beside it took {middle * 1e3:+.1f} ms (median of rounds; quartiles "
        f"{low * 1e3:+.1f} and {high * 1e3:+.1f})."
    )
    about = (
        f"{result['parameters']:,} parameters, {result['tokens']:,} tokens a step, "
        f"{result['variants'][SHOWN]['rounds']} rounds, log_every {result['log_every']}"
    )
    parts = [[_TITLES[name], f"{part * 1e3:.3f}"] for name, part in result["parts_s"].items()]
    return "\n\n".join(
        [
            about,
            runner.markdown(header, rows),
            about_saves,
            runner.markdown(("", "ms a step, mean"), parts),
        ]
    )


def plot(result: runner.Result, figure: "Figure") -> None:
    axes = figure.subplots()
    step = result["variants"][SHOWN]["median_s"]
    left = 0.0
    for name, part in result["parts_s"].items():
        axes.barh(0, 100 * part / step, left=left, label=_TITLES[name])
        left += 100 * part / step
    axes.axvline(100 * result["target"], color="black", linestyle="--", linewidth=1)
    axes.set(
        title="What measuring, logging and saving take of a step (dashed: what they may)",
        xlabel="of a training step, %",
        yticks=[],
        xlim=(0, 110 * max(result["target"], left / 100)),
        ylim=(-1, 1.5),
    )
    axes.legend()
