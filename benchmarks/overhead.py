"""Overhead of metrics, logging and checkpoints in the trainer's step.

The trainer of ``benchmarks/trainer.yaml`` in one process trains on each batch in three variants:
bare; with all metrics (gathered, with the update RMS sampled every ``log_every`` steps, and written
to metrics.jsonl, TensorBoard and progress lines); and with metrics and a checkpoint at the
beginning of the step. Overhead is reported as the ratio of step times, which is noisy, and as the
time within the calls that cause it.

The cost of a checkpoint is divided by the ``checkpoint.every`` steps of the configuration: the time
of the call, which copies the state, and the processor time of the thread that writes it, even if
another core is free. The slowdown of the step during which it is written is reported separately.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import runner, training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pretrain.build import Run

TARGET = 0.02
# Rounds, number of different batches, and overrides of benchmarks/trainer.yaml.
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
# Clocks of the calling thread only.
_OWN_CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
_TITLES = {
    "routing": "copy the token counts of the routers",
    "before_update": "sample weights",
    "after_update": "update RMS",
    "gather": "gather metrics from all ranks",
    "write": "write metrics",
    "copy": "copy a checkpoint, per step",
    "writer": "write a checkpoint in another thread, per step",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=runner.positive_int, help="timed steps of each variant")


def run(options: argparse.Namespace) -> runner.Result:
    # In a separate process, because the trainer creates process groups and patches torch on a CPU.
    with tempfile.TemporaryDirectory() as folder:
        worker = multiprocessing.get_context("spawn").Process(
            target=_measure,
            args=(options.form, options.rounds, options.clock, torch.get_num_threads(), folder),
        )
        worker.start()
        worker.join()
        if worker.exitcode:
            raise RuntimeError("the measuring process failed: its error is above")
        result: runner.Result = json.loads(Path(folder, "result.json").read_text())
    return result


def _measure(form: str, rounds: int | None, clock: str, threads: int, folder: str) -> None:
    from pretrain import batches, checkpoint, config, parallel
    from pretrain.build import build
    from pretrain.checkpoint import storage
    from pretrain.runtime.faults import Guard
    from pretrain.runtime.metrics_writer import MetricsWriter
    from pretrain.startup import set_up
    from pretrain.step import train_step

    torch.set_num_threads(threads)
    default_rounds, count, overrides = _FORMS[form]
    settings = config.load(
        runner.ROOT / "benchmarks" / "trainer.yaml",
        [
            "parallel.expert=1",
            f"run_dir={folder}/run",
            f"data.cache_dir={folder}/cache",
            *overrides,
        ],
    )
    context, data = set_up(settings)
    trained = build(settings, context, data)
    out = MetricsWriter(Path(settings.run_dir), 10**6, 0, settings.log_every, enabled=True)
    micro_batches = [batches.for_step(settings, context, data, i) for i in range(1, count + 1)]
    runs = {BARE: training.without_metrics(trained), SHOWN: trained, SAVED: trained}

    now = runner.CLOCKS[clock]
    spent = dict.fromkeys(_TITLES, 0.0)

    def timed(
        name: str, call: Callable[..., Any], now: Callable[[], float] = now
    ) -> Callable[..., Any]:
        def within(*arguments: Any) -> Any:
            start = now()
            result = call(*arguments)
            spent[name] += now() - start
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
    # The saver's thread calls it.
    setattr(storage, "write", timed("writer", storage.write, time.thread_time))  # noqa: B010 (for mypy)

    steps_done = dict.fromkeys(runs, 0)
    parts: list[dict[str, float]] = []
    saves: list[dict[str, float]] = []

    def step_of(name: str) -> Callable[[], None]:
        def step() -> None:
            number = steps_done[name] = steps_done[name] + 1
            spent.update(dict.fromkeys(spent, 0.0))
            start = now()
            if name == SAVED:
                save(trained, saver, guard, number)
            metrics = train_step(runs[name], micro_batches[number % count], number)
            if name != BARE:
                seconds = now() - start
                metrics["tokens_per_second"] = metrics["tokens"] / seconds
                metrics["mfu"] = metrics["model_flops"] / seconds / step_metrics.peak_flops
                write(metrics)
            if name == SHOWN:
                parts.append(dict(spent))

        return step

    def finish_save(_next: str) -> None:
        """Wait for the checkpoint of the previous step before the next variant is timed."""
        saver.wait()
        if spent["copy"]:
            saves.append(dict(spent))
            spent["copy"] = 0.0

    with contextlib.redirect_stdout(io.StringIO()), saver:
        seconds = runner.interleave(
            {name: step_of(name) for name in runs},
            rounds=rounds or default_rounds,
            warmup=1,
            before=finish_save,
            device=context.device,
            clock=clock,
        )
        finish_save("")
    out.close()
    newest = storage.path_of(checkpoint.folder(trained), steps_done[SAVED])
    size = sum(file.stat().st_size for file in newest.iterdir())
    parallel.stop()
    result = _result(trained, seconds, parts[1:], saves[1:], size)
    Path(folder, "result.json").write_text(json.dumps(result))


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
    save = {name: statistics.fmean(saved[name] for saved in saves) for name in ("copy", "writer")}
    shares = {name: cost / every for name, cost in save.items()}
    step = statistics.fmean(seconds[SHOWN])
    return {
        "parameters": sum(parameter.numel() for _, parameter in run.parameters()),
        "tokens": run.config.global_batch_size * run.config.data.seq_length,
        "log_every": run.config.log_every,
        "variants": runner.summarize(seconds, BARE),
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
        "", "step, ms", "overhead, median of rounds", "overhead, all rounds",
        "time within the calls / step", "target",
    )  # fmt: skip
    rows = [
        [
            "bare",
            f"{result['variants'][BARE]['median_s'] * 1e3:.1f}",
            *[""] * 4,
        ],
        [
            "**with metrics**",
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
            f"**with metrics and a checkpoint every {saved['every']} steps**",
            *[""] * 3,
            f"{result['within'] + saved['within']:.2%}",
            f"≤ {result['target']:.0%}",
        ]
    )
    about_saves = (
        f"A checkpoint of {saved['bytes'] / 2**20:.1f} MiB: {saved['copy_s'] * 1e3:.1f} ms "
        f"within the step, {saved['writer_s'] * 1e3:.1f} ms of processor time of the writing "
        f"thread; step time during the writing: {middle * 1e3:+.1f} ms (median of rounds; "
        f"quartiles {low * 1e3:+.1f} and {high * 1e3:+.1f})."
    )
    about = (
        f"{result['parameters']:,} parameters, {result['tokens']:,} tokens per step, "
        f"{result['variants'][SHOWN]['rounds']} rounds, log_every {result['log_every']}"
    )
    parts = [[_TITLES[name], f"{part * 1e3:.3f}"] for name, part in result["parts_s"].items()]
    return "\n\n".join(
        [
            about,
            runner.markdown(header, rows),
            about_saves,
            runner.markdown(("", "ms per step, mean"), parts),
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
        title="Overhead of metrics and checkpoints (dashed: target)",
        xlabel="share of a training step, %",
        yticks=[],
        xlim=(0, 110 * max(result["target"], left / 100)),
        ylim=(-1, 1.5),
    )
    axes.legend()
