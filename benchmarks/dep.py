"""DEP: multimodal beside text-only throughput, encoder balance and memory; and its baselines."""

import argparse
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.runner import Result, cpu_bytes, markdown, positive_int

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pretrain.build import Run
    from pretrain.model.multimodal import MicroBatch

VOCABULARY = 320
TEXT = "text only"
_MEDIA_PAD = 4  # any id that no random token has
DEP = "DEP"
# The reference in the code, and the same exchange without a plan.
BASELINES = ("encoder on the first stage", "round-robin")


@dataclass(frozen=True)
class Setting:
    """A backbone and an encoder: its share of the FLOPs is several times what it is in Kimi K2.5
    (two FLOPs a weight: 0.4 patches a token x 0.4 billion, beside 32 billion), so that what it
    costs, and who pays, is more than the noise of a machine. Stages are alike, as one makes them
    for text: no dense layer in the first, and hardly a vocabulary to tell apart in the last."""

    processes: int
    layers: int
    hidden: int
    vision_layers: int
    vision_hidden: int
    sequence: int
    micro_batches: int
    rounds: int
    images: tuple[int, ...]  # in a step, for the memory


SETTINGS = {
    "full": Setting(2, 16, 1024, 4, 192, 2048, 16, 15, (8, 32, 128, 256)),
    "quick": Setting(2, 4, 192, 2, 72, 512, 16, 21, (8, 32, 128, 256)),
    "tiny": Setting(2, 2, 32, 1, 16, 128, 2, 2, (2, 4)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vision-share", type=float, default=0.1, help="of the tokens")
    parser.add_argument(
        "--spread", type=float, default=1.0, help="sigma of the log-normal image sides"
    )
    parser.add_argument("--rounds", type=positive_int, help="timed rounds; default: by form")


def run(options: argparse.Namespace) -> Result:
    if options.device.type != "cpu":
        raise SystemExit("--device: the pipeline's processes run on a CPU here (gloo)")
    setting = SETTINGS[options.form]
    if options.rounds is not None:
        setting = replace(setting, rounds=options.rounds)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (setting, options.vision_share, options.spread, options.seed, folder)
        workers = [
            context.Process(target=_rank, args=(rank, *arguments))
            for rank in range(setting.processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise RuntimeError("a rank of the benchmark failed: its error is above")
        told: Result = torch.load(Path(folder, "result"), weights_only=True)
    return told


# ---------------------------------------------------------------------- in every process


def _rank(rank: int, setting: Setting, share: float, spread: float, seed: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=setting.processes
    )
    runs, batches = _prepare(setting, share, spread, seed, Path(folder, "cost.json"))
    seconds, timelines, balances = _measure(setting, runs, batches)
    if rank == 0:
        result = _result(setting, share, runs[DEP], batches[DEP], seconds, timelines, balances)
        result["memory"] = {str(n): _peak_bytes(runs[DEP], n, seed) for n in setting.images}
        torch.save(result, Path(folder, "result"))
    dist.barrier()
    dist.destroy_process_group()


def _prepare(
    setting: Setting, share: float, spread: float, seed: int, cost_file: Path
) -> tuple[dict[str, "Run"], dict[str, list["MicroBatch"]]]:
    """One model under several encoders, and its batches: of text, and with images."""
    from pretrain import parallel
    from pretrain.build import build, make_encoder
    from pretrain.config import (
        Config,
        DataConfig,
        EncoderProcessConfig,
        LanguageConfig,
        ParallelConfig,
        VisionConfig,
    )

    hidden = setting.hidden
    config = Config(
        global_batch_size=setting.micro_batches,
        micro_batch_size=1,
        language=LanguageConfig(
            num_layers=setting.layers,
            dense_layers=0,
            hidden_size=hidden,
            ffn_hidden_size=3 * hidden,
            num_heads=4,
            q_lora_rank=hidden // 2,
            kv_lora_rank=hidden // 4,
            expert_ffn_hidden_size=hidden,
            shared_expert_ffn_hidden_size=hidden,
        ),
        vision=VisionConfig(
            num_layers=setting.vision_layers,
            hidden_size=setting.vision_hidden,
            num_heads=2,
            ffn_hidden_size=4 * setting.vision_hidden,
        ),
        data=DataConfig(seq_length=setting.sequence, vocab_size=VOCABULARY),
        parallel=ParallelConfig(pipeline=setting.processes),
    )
    here = parallel.start(config.parallel, seed)
    tokenizer = SimpleNamespace(vocab_size=config.data.vocab_size, media_pad=_MEDIA_PAD)
    data: Any = SimpleNamespace(tokenizer=tokenizer)
    run = build(config, here, data)
    # Encoders are small here: what an item costs however small it is, no count of FLOPs knows.
    kinds = {
        TEXT: EncoderProcessConfig(),
        DEP: EncoderProcessConfig(cost="measured"),
        BASELINES[0]: EncoderProcessConfig(enabled=False),
        BASELINES[1]: EncoderProcessConfig(spread="round_robin", cost="measured"),
    }
    runs = {
        name: replace(run, encoder=make_encoder(kind, run.tower, here, cost_file))
        for name, kind in kinds.items()
    }
    plain = _batches(setting, 0.0, spread, seed, here.first_stage)
    pictured = _batches(setting, share, spread, seed, here.first_stage)
    return runs, {name: plain if name == TEXT else pictured for name in runs}


def _sides(generator: torch.Generator, spread: float, most: int = 1024) -> tuple[int, int]:
    """Rows and columns of an image in patches: log-normal, 8 in the middle, even; halved until
    it has at most so many tokens."""
    drawn = torch.randn(2, generator=generator) * spread + math.log(8)
    rows, columns = (min(64, max(2, 2 * round(side / 2))) for side in drawn.exp().tolist())
    while rows * columns // 4 > most:
        rows, columns = min(rows, columns), max(rows, columns) // 4 * 2
    return rows, columns


def _batches(
    setting: Setting, share: float, spread: float, seed: int, first_stage: bool
) -> list["MicroBatch"]:
    """Micro-batches of one sequence: random tokens, with images for a share of them."""
    from pretrain.data import Category
    from pretrain.model.multimodal import MicroBatch

    generator = torch.Generator().manual_seed(seed)
    length, waiting, made = setting.sequence, 0.0, []
    # No image is more than half a sequence, nor more than a quarter of what the step has of them.
    most = min(length // 2, max(1, int(share * length * setting.micro_batches / 4)))
    rows, columns = _sides(generator, spread, most)
    for _ in range(setting.micro_batches):
        tokens = torch.randint(100, VOCABULARY, (1, length), generator=generator)
        grids, place = [], 1
        waiting += share * length  # tokens of images that are due
        while True:
            size = rows * columns // 4
            if size > waiting or place + size >= length:
                break
            tokens[0, place : place + size] = _MEDIA_PAD
            grids.append([1, rows, columns])
            waiting -= size
            place += size + 1
            rows, columns = _sides(generator, spread, most)
        shapes = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
        if not first_stage:
            shapes = shapes[:0]
        patches = int(shapes.prod(1).sum())
        made.append(
            MicroBatch(
                tokens=tokens,
                labels=torch.randint(100, VOCABULARY, (1, length), generator=generator),
                weights=torch.ones(1, length),
                categories=torch.full((1, length), Category.TEXT, dtype=torch.uint8),
                documents=torch.zeros(1, length, dtype=torch.int32),
                patches=torch.randint(256, (patches, 588), dtype=torch.uint8),
                grids=shapes,
            )
        )
    return made


def _step(run: "Run", batches: list["MicroBatch"], name: str) -> list[tuple[str, float, float]]:
    """Forward and backward of a step and the optimizer, as the trainer has them, with the clock.

    Returns:
        (what, from, to), in seconds from the step's beginning.
    """
    from pretrain.step import run_backbone

    marks: list[tuple[str, float, float]] = []
    dist.barrier()
    begun = time.perf_counter()

    def done(what: str) -> None:
        marks.append((what, marks[-1][2] if marks else 0.0, time.perf_counter() - begun))

    for chunk in run.language:
        chunk.zero_grad_buffer()
    if name == TEXT:
        features = [torch.zeros(0, run.config.language.hidden_size) for _ in batches]
    else:
        features = run.encoder.encode([(batch.patches, batch.grids) for batch in batches])
    done("encode")
    run_backbone(run, batches, features)
    done("backbone")
    if name != TEXT:
        run.encoder.backward()
        done("encode again, backwards")
        run.encoder.reduce_gradients()
    done("reduce")
    for chunk in run.language:
        for parameter in chunk.parameters():
            parameter.grad = parameter.main_grad
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    done("optimizer")
    return marks


def _measure(
    setting: Setting, runs: dict[str, "Run"], batches: dict[str, list["MicroBatch"]]
) -> tuple[dict[str, list[float]], Result, dict[str, float]]:
    """Seconds of each round, by the slowest rank; every rank's clock in the median round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    told: dict[str, list[Any]] = {name: [] for name in runs}
    names = list(runs)
    runs[DEP].train()
    for number in range(-1, setting.rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            marks = _step(runs[name], batches[name], name)
            everyones: list[Any] = [None] * setting.processes
            dist.all_gather_object(everyones, marks)
            if number >= 0:
                seconds[name].append(max(theirs[-1][2] for theirs in everyones))
                told[name].append(everyones)
    timelines = {}
    for name, times in seconds.items():
        middle = sorted(range(len(times)), key=times.__getitem__)[len(times) // 2]
        timelines[name] = told[name][middle]
    return seconds, timelines, {name: run.encoder.balance for name, run in runs.items()}


def _result(
    setting: Setting,
    share: float,
    run: "Run",
    batches: list["MicroBatch"],
    seconds: dict[str, list[float]],
    timelines: Result,
    balances: dict[str, float],
) -> Result:
    tokens = setting.micro_batches * setting.sequence
    vision = int(sum((batch.tokens == _MEDIA_PAD).sum() for batch in batches))
    grids = torch.cat([batch.grids for batch in batches])
    rows = {}
    for name, times in seconds.items():
        ratios = [text / mine for text, mine in zip(seconds[TEXT], times, strict=True)]
        rows[name] = {
            "tokens_per_second": tokens / statistics.median(times),
            "of_text_only": statistics.median(ratios),
            "seconds": times,
            "balance": None if name == TEXT else balances[name],
        }
    return {
        "processes": setting.processes,
        "parallel": f"pipeline {setting.processes}",
        "tokens": tokens,
        "vision_share": vision / tokens,
        "images": len(grids),
        "patches": int(grids.prod(1).sum()),
        "encoder_flops_of_backbone": _encoder_flops(run, grids) / _backbone_flops(run, tokens),
        "modes": rows,
        "timelines": timelines,
        "loads": _loads(run, grids, setting.processes),
    }


def _encoder_flops(run: "Run", grids: Tensor) -> float:
    """Of a forward through encoder and projector."""
    from pretrain.encoder_process.cost import analytic_cost

    model = analytic_cost(run.config.vision, run.config.language.hidden_size)
    return float(model.costs(grids).sum())


def _backbone_flops(run: "Run", tokens: int) -> float:
    """Of a forward: two for each weight that a token meets, attention left out."""
    language = run.config.language
    active = language.experts_per_token / language.num_experts
    total = 0.0
    for name, parameter in run.parameters():  # of the first stage
        if name.startswith("language.") and parameter.ndim == 2 and "embedding" not in name:
            total += parameter.numel() * (active if ".local_experts." in name else 1.0)
    return 2 * total * tokens * run.config.parallel.pipeline


def _loads(run: "Run", grids: Tensor, ranks: int) -> dict[str, list[float]]:
    """Each rank's share of the encoder's work as its cost is measured, by mode; all of it is 1."""
    from pretrain.encoder_process.plan import plan

    loads = run.encoder.cost.loads(grids)
    places = {
        DEP: plan(loads, ranks, owners=[0] * len(loads)),
        BASELINES[0]: [0] * len(loads),
        BASELINES[1]: [item % ranks for item in range(len(loads))],
    }
    total = float(loads.sum())
    return {
        name: [
            sum(float(load) for load, place in zip(loads, where, strict=True) if place == rank)
            / total
            for rank in range(ranks)
        ]
        for name, where in places.items()
    }


def _peak_bytes(run: "Run", images: int, seed: int) -> Result:
    """The most that encoding a number of images again, backwards, takes beside their pixels and
    their features' gradient: where DEP keeps activations."""
    from pretrain.config import EncoderProcessConfig
    from pretrain.encoder_process import EncoderProcess
    from pretrain.model.vision import num_features

    encoder = EncoderProcess(run.tower, None, EncoderProcessConfig(max_patches=1024))
    generator = torch.Generator().manual_seed(seed)
    # One image that fills a chunk by itself, whatever follows it.
    sides = [(32, 32), *(_sides(generator, 1.0, 256) for _ in range(images - 1))]
    grids = torch.tensor([[1, rows, columns] for rows, columns in sides])
    patches = torch.randint(256, (int(grids.prod(1).sum()), 588), dtype=torch.uint8)
    gradient = torch.ones(int(num_features(grids).sum()), run.config.language.hidden_size)
    for parameter in run.tower.parameters():
        parameter.grad = torch.zeros_like(parameter)
    _, peak = cpu_bytes(lambda: encoder.recompute(patches, grids, gradient))
    return {"peak_bytes": peak, "patches": len(patches)}


# ---------------------------------------------------------------------- for people


def plot(result: Result, figure: "Figure") -> None:
    figure.set_size_inches(12, 7)
    grid = figure.add_gridspec(2, 2, width_ratios=[2, 1])
    lines, loads, memory = (
        figure.add_subplot(grid[:, 0]),
        figure.add_subplot(grid[0, 1]),
        figure.add_subplot(grid[1, 1]),
    )
    colours = {
        "encode": "tab:orange",
        "backbone": "tab:blue",
        "encode again, backwards": "tab:red",
        "reduce": "tab:grey",
        "optimizer": "tab:green",
    }
    labels, height = [], 0
    for name, ranks in result["timelines"].items():
        for rank, marks in enumerate(ranks):
            for what, begin, end in marks:
                lines.barh(height, end - begin, left=begin, color=colours[what], height=0.8)
            labels.append(f"{name}, rank {rank}")
            height += 1
    lines.set_yticks(range(height), labels)
    lines.invert_yaxis()
    lines.set(title="One step, in the median round (waiting included)", xlabel="seconds")
    handles = [lines.barh(0, 0, color=colour, label=what) for what, colour in colours.items()]
    lines.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=5, fontsize=8
    )

    names = list(result["loads"])
    for rank in range(result["processes"]):
        left = [sum(result["loads"][name][:rank]) for name in names]
        width = [result["loads"][name][rank] for name in names]
        loads.barh(names, width, left=left, label=f"rank {rank}")
    loads.axvline(1 / result["processes"], color="black", linewidth=0.8)
    loads.set(title="The encoder's work, by rank", xlim=(0, 1))
    loads.legend(fontsize=8)

    counts = [int(count) for count in result["memory"]]
    peaks = [row["peak_bytes"] / 2**20 for row in result["memory"].values()]
    memory.plot(counts, peaks, "o-")
    memory.set(title="Peak memory of the encoder, MiB", xlabel="images in a step")
    memory.set_ylim(0, 1.5 * max(peaks))


def table(result: Result) -> str:
    rows = [
        [
            f"**{name}**" if name == DEP else name,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['of_text_only']:.1%}",
            "" if row["balance"] is None else f"{row['balance']:.3f}",
        ]
        for name, row in result["modes"].items()
    ]
    about = (
        f"{result['parallel']}; {result['tokens']:,} tokens a step, {result['vision_share']:.1%} "
        f"of them images: {result['images']} images of {result['patches']:,} patches; a forward "
        f"of the encoder is {result['encoder_flops_of_backbone']:.1%} of the backbone's FLOPs"
    )
    header = ["", "tokens/s", "of text only", "encoder load, max / mean"]
    dep = result["modes"][DEP]["seconds"]
    beside = [_beside(name, result["modes"][name]["seconds"], dep) for name in (TEXT, *BASELINES)]
    memory = [
        [count, f"{row['patches']:,}", f"{row['peak_bytes'] / 2**20:.1f}"]
        for count, row in result["memory"].items()
    ]
    memory_header = ["images in a step", "patches", "peak memory of the encoder, MiB"]
    compared = "\n".join(beside)
    return "\n\n".join([about, markdown(header, rows), compared, markdown(memory_header, memory)])


def _beside(name: str, theirs: Sequence[float], mine: Sequence[float]) -> str:
    """A line on how fast DEP is, with intervals of a bootstrap over rounds."""
    pairs = np.array([theirs, mine])
    drawn = np.random.default_rng(0).integers(pairs.shape[1], size=(10_000, pairs.shape[1]))

    def interval(statistic: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> str:
        low, high = np.quantile(statistic(pairs[:, drawn]), (0.025, 0.975))
        return f"{statistic(pairs):.3f} ({low:.3f} to {high:.3f})"

    wins = int((pairs[0] > pairs[1]).sum())
    return (
        f"- DEP beside {name}: {interval(lambda two: two[0].sum(-1) / two[1].sum(-1))} times the "
        f"speed over all rounds together, {interval(lambda two: np.median(two[0] / two[1], -1))} "
        f"in the median round; faster in {wins} of {pairs.shape[1]}."
    )
