"""The trainer on one GPU: speed, utilization and memory by kernels; shares of Muon and QK-Clip.

Trains ``configs/h200.yaml`` with each setting of ``kernels`` at 4,096 and at 32,768 tokens per
sequence, with the same number of tokens in a step. Steps with QK-Clip and steps without it, whose
attention does not observe its logits, run in turn. A model too large for the GPU gets fewer layers.
A setting that cannot run is listed with the reason.
"""

import argparse
import json
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from benchmarks import runner, training
from pretrain.errors import first_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pretrain.build import Run
    from pretrain.config import Config

CONFIG = "configs/h200.yaml"
KERNELS = ("torch", "transformer_engine")
WITH, WITHOUT = "with QK-Clip", "without"
# Share of a GPU's memory that the planned memory may be: the allocator fragments the rest.
_FILLED = 0.9
_TINY = (
    *("language.num_layers=2", "language.hidden_size=32", "language.ffn_hidden_size=64"),
    *("language.num_heads=2", "language.q_lora_rank=16", "language.kv_lora_rank=16"),
    *("language.qk_nope_head_dim=8", "language.qk_rope_head_dim=8", "language.v_head_dim=8"),
    *("language.num_experts=4", "language.experts_per_token=2"),
    *("language.expert_ffn_hidden_size=32", "language.shared_expert_ffn_hidden_size=32"),
    *("vision.num_layers=1", "vision.hidden_size=16", "vision.num_heads=2"),
    *("vision.ffn_hidden_size=32", "vision.position_grid=8", "precision=float32"),
    *("data.vocab_size=400", "data.max_corpus_mb=1", "data.images.max_chars=10", "peak_tflops=1"),
)
# Tokens per step, lengths of sequences, rounds, and overrides of the configuration.
_FORMS: dict[str, tuple[int, tuple[int, ...], int, tuple[str, ...]]] = {
    "full": (2**18, (4096, 32768), 7, ()),
    "quick": (2**15, (4096, 32768), 3, ("language.num_layers=4", "vision.num_layers=4")),
    "tiny": (256, (128,), 2, _TINY),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=runner.positive_int, help="timed steps of each variant")


def run(options: argparse.Namespace) -> runner.Result:
    if options.device.type == "cpu" and options.form != "tiny":
        raise SystemExit("this benchmark needs an NVIDIA GPU; --tiny rehearses it on a CPU")
    tokens, lengths, rounds, _ = _FORMS[options.form]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for length in lengths:
            for kernels in KERNELS:
                row = {"kernels": kernels, "seq_length": length}
                row |= _in_process(options.form, kernels, length, options.rounds or rounds, folder)
                rows.append(row)
                print(f"measured {kernels}, {length:,} tokens: {_outcome(row)}", flush=True)
    return {"config": CONFIG, "tokens": tokens, "rows": rows}


def _in_process(form: str, kernels: str, length: int, rounds: int, folder: str) -> runner.Result:
    """Measure in a separate process, whose memory is then free again."""
    file = Path(folder, f"{kernels}-{length}.json")
    worker = multiprocessing.get_context("spawn").Process(
        target=_measure, args=(form, kernels, length, rounds, folder, str(file))
    )
    worker.start()
    worker.join()
    if worker.exitcode:
        return {"error": f"its process ended with status {worker.exitcode}"}
    result: runner.Result = json.loads(file.read_text())
    return result


def settings_of(form: str, length: int, *overrides: str) -> "Config":
    """The configuration with sequences of this length."""
    from pretrain import config

    tokens, _, _, sizes = _FORMS[form]
    sequences = max(tokens // length, 1)
    batch = f"global_batch_size={sequences}", f"micro_batch_size={min(2, sequences)}"
    return config.load(
        runner.ROOT / CONFIG, [f"data.seq_length={length}", *batch, *sizes, *overrides]
    )


def layers_that_fit(form: str, device_bytes: float) -> int:
    """Layers of the language model, at most the configuration's, that fit with all lengths."""
    from pretrain.plan.memory import fullest_memory
    from pretrain.plan.ranks import ranks_of
    from pretrain.plan.workload import images_per_step

    def planned(length: int, layers: int) -> float:
        settings = settings_of(form, length, f"language.num_layers={layers}")
        images = images_per_step(settings, None)
        return fullest_memory(settings, ranks_of(settings, 1), images)["total"]

    lengths = _FORMS[form][1]
    language = settings_of(form, lengths[0]).language
    layers = language.num_layers
    while layers > language.dense_layers + 1 and any(
        planned(length, layers) > _FILLED * device_bytes for length in lengths
    ):
        layers -= 1
    return layers


def _measure(form: str, kernels: str, length: int, rounds: int, folder: str, file: str) -> None:
    from pretrain.runtime import without_transformer_engine

    without_transformer_engine.hide_if_unusable()
    from pretrain import batches, parallel
    from pretrain.build import build
    from pretrain.runtime.machine import peak_memory_gib
    from pretrain.startup import set_up
    from pretrain.step import train_step

    def measured() -> runner.Result:
        overrides = [f"run_dir={folder}/run", f"data.cache_dir={folder}/cache"]
        if torch.cuda.is_available():
            device_bytes = torch.cuda.get_device_properties(0).total_memory
            overrides.append(f"language.num_layers={layers_that_fit(form, device_bytes)}")
        settings = settings_of(form, length, f"kernels={kernels}", *overrides)
        print(f"{kernels}, {length:,} tokens: reading the data", flush=True)
        context, data = set_up(settings)
        micro_batches = [batches.for_step(settings, context, data, step) for step in (1, 2)]
        print(f"building {settings.language.num_layers} layers", flush=True)
        trained = build(settings, context, data)
        run = training.without_metrics(trained)
        observed = _observers(run)
        variants = {WITH: run, WITHOUT: replace(run, clips=[])}
        optimizer_s: list[float] = []
        steps_done = 0

        def step_of(name: str) -> Callable[[], None]:
            def step() -> None:
                nonlocal steps_done
                steps_done += 1
                train_step(variants[name], micro_batches[steps_done % 2], steps_done)

            return step

        def observe(name: str) -> None:
            for module, observer in observed:
                module.observer = observer if name == WITH else None

        steps = {name: step_of(name) for name in variants}
        print("compiling, and timing steps", flush=True)
        seconds = runner.interleave(
            steps, rounds=rounds, warmup=2, before=observe, device=context.device
        )
        memory = peak_memory_gib(context.device)
        # Timed on their own: to time a part of a step, the device has to finish the rest of it.
        update = run.optimizer.step

        def timed() -> None:
            optimizer_s.append(runner.stopwatch(update, context.device))

        setattr(run.optimizer, "step", timed)  # noqa: B010 (for mypy)
        observe(WITH)
        for _ in range(rounds):
            steps[WITH]()
        step_s = float(np.median(seconds[WITH]))
        ratios = np.divide(seconds[WITH], seconds[WITHOUT]) - 1
        batch_tokens = settings.global_batch_size * length
        return {
            "layers": settings.language.num_layers,
            "parameters": sum(parameter.numel() for _, parameter in run.parameters()),
            "step_s": step_s,
            "tokens_per_second": batch_tokens / step_s,
            "mfu": _flops(trained, batch_tokens) / step_s / trained.step_metrics.peak_flops,
            "memory_gib": memory,
            "optimizer_share": float(np.median(optimizer_s)) / step_s,
            "qk_clip": runner.quartiles(ratios.tolist()),
            "rounds": rounds,
        }

    try:
        result = measured()
    except Exception as error:  # so that the other settings are still measured
        traceback.print_exc()
        result = {"error": first_line(error)}
    parallel.stop()
    Path(file).write_text(json.dumps(result))


def _observers(run: "Run") -> list[tuple[Any, Any]]:
    """The attention modules that observe their logits, and their observers."""
    parts: list[nn.Module] = [*run.language, run.tower]
    modules: list[Any] = [module for part in parts for module in part.modules()]
    return [(m, m.observer) for m in modules if getattr(m, "observer", None) is not None]


def _flops(run: "Run", tokens: int) -> float:
    """FLOPs of the language model in a step; those of the encoder depend on its images."""
    from pretrain.plan.flops import FORWARD_AND_BACKWARD, flops_per_token

    config = run.config
    vocab_size = config.language.vocab_rows(run.data.tokenizer.vocab_size)
    forward = flops_per_token(config.language, vocab_size, config.data.seq_length)
    return FORWARD_AND_BACKWARD * forward * tokens


def _outcome(row: runner.Result) -> str:
    return row.get("error") or f"{row['tokens_per_second']:,.0f} tokens/s"


# ---------------------------------------------------------------------- table and plot


def table(result: runner.Result) -> str:
    header = (
        "kernels", "tokens per sequence", "layers", "tokens/s", "MFU", "memory, GiB", "step, s",
        "MuonClip, share of the step", "QK-Clip, time added to the step",
    )  # fmt: skip
    rows = []
    for row in result["rows"]:
        cells = [row["kernels"], f"{row['seq_length']:,}"]
        if "error" in row:
            rows.append([*cells, f"not measured: {row['error']}", *[""] * 6])
            continue
        low, middle, high = row["qk_clip"]
        rows.append(
            [
                *cells,
                row["layers"],
                f"{row['tokens_per_second']:,.0f}",
                f"{row['mfu']:.1%}",
                f"{row['memory_gib']:.1f}",
                f"{row['step_s']:.3f}",
                f"{row['optimizer_share']:.1%}",
                f"{middle:+.1%} ({low:+.1%} to {high:+.1%})",
            ]
        )
    return f"`{result['config']}`, {result['tokens']:,} tokens per step\n\n" + runner.markdown(
        header, rows
    )


def plot(result: runner.Result, figure: "Figure") -> None:
    rows = [row for row in result["rows"] if "error" not in row]
    names = [f"{row['kernels']}\n{row['seq_length']:,} tokens" for row in rows]
    speed, shares = figure.subplots(1, 2)
    speed.bar(names, [row["tokens_per_second"] for row in rows])
    speed.set(title="Speed", ylabel="tokens/s")
    positions = np.arange(len(rows))
    for offset, label, values in (
        (-0.2, "MuonClip", [row["optimizer_share"] for row in rows]),
        (0.2, "QK-Clip", [row["qk_clip"][1] for row in rows]),
    ):
        shares.bar(positions + offset, [100 * value for value in values], 0.4, label=label)
    shares.set_xticks(positions, names)
    shares.set(title="Cost of the optimizer", ylabel="% of a step")
    shares.legend()
