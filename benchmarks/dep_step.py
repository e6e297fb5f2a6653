"""Simulated steps of 8 to 4,096 ranks with DEP and its baselines, compared with a real step.

The simulation executes megatron-core's pipeline schedule, for each replica of the pipeline, with
the costs of every image and every token, and assigns images by the planner of the trainer. It does
not know messages between pipeline stages, the waiting of expert-parallel replicas for each other
(which makes the encoder on the first stage slower still) and planning (see ``dep_plan``).
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from benchmarks import dep
from benchmarks.dep import BASELINES, DEP, TEXT
from benchmarks.runner import ROOT, Result, markdown, positive_int
from pretrain import step
from pretrain.encoder_process import cost
from pretrain.encoder_process.plan import plan
from pretrain.model.geometry import MERGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

FIRST_STAGE, ROUND_ROBIN = BASELINES
RECOMPUTING = "DEP, recomputing"
COLORS = {FIRST_STAGE: "tab:red", ROUND_ROBIN: "tab:orange", RECOMPUTING: "lightskyblue",
          DEP: "tab:blue"}  # fmt: skip
RANKS = {"full": 4096, "quick": 4096, "tiny": 16}
DRAWS = {"full": 10, "quick": 3, "tiny": 1}
SHARE, SPREAD = 0.1, 1.0  # share of image tokens, and spread of their sizes, in the real steps
ROUNDS = {"full": 41, "quick": 11, "tiny": 2}
_REPEATS = 3  # of each step whose processor time is measured
# Bytes per second that a rank sends and receives, and FLOPs per second: of an H100.
BANDWIDTH, RATE = 45e9, 0.4 * 445e12
# Mean share of a sequence's tokens that are images, and the shape of its gamma distribution:
# infinite if all sequences are alike; with 0.25, a tenth of the sequences has half of the images.
MIXES = {"alike": (0.1, np.inf), "skewed": (0.1, 0.25), "skewed, half images": (0.5, 0.25)}


@dataclass(frozen=True)
class Workload:
    """A model and its batches, in seconds on one rank.

    Attributes:
        image: cost of an image: a forward pass, its recomputation and its backward pass.
        encoder_pass: constant cost of these passes of the encoder.
        token: forward pass of the whole language model for a token; a backward takes twice as long.
        rest: everything else in a step: reduction of the gradients and optimizer.
        median_patches, spread: of the log-normal numbers of patches of an image.
        stages, interleave: of the pipeline.
        bytes_per_patch: sent for an image that another rank encodes.
    """

    name: str
    image: cost.CostModel
    encoder_pass: float
    token: float
    rest: float
    sequence: int
    micro_batches: int
    median_patches: int
    spread: float
    stages: int
    interleave: int = 1
    bytes_per_patch: float = 0.0


# ---------------------------------------------------------------------- simulation


def schedule(stages: int, interleave: int, micro_batches: int) -> list[list[tuple[bool, int, int]]]:
    """Order of the passes of each stage in megatron-core's 1F1B schedule.

    Returns:
        For each stage (is a forward pass, model chunk, micro-batch).
    """
    from megatron.core.pipeline_parallel.schedules import (
        get_pp_rank_microbatches,
        get_schedule_table,
    )

    table = get_schedule_table(micro_batches, interleave, stages)
    orders = []
    for stage in range(stages):
        communicator = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage),
            virtual_pipeline_model_parallel_size=interleave if interleave > 1 else None,
        )
        total, _, warmup, _ = get_pp_rank_microbatches(
            micro_batches, interleave, stages, p2p_communicator=communicator
        )
        forward = [(True, chunk, batch) for batch, chunk in table]
        backward = [(False, interleave - 1 - chunk, batch) for batch, chunk in table]
        order = forward[:warmup]
        for index in range(total - warmup):
            order += [forward[warmup + index], backward[index]]
        orders.append(order + backward[total - warmup :])
    return orders


def run_pipeline(
    orders: Sequence[Sequence[tuple[bool, int, int]]],
    interleave: int,
    seconds: float,
    start: Floats,
    extra_backward: Floats,
) -> Floats:
    """End of each stage's last pass.

    Args:
        orders: from :func:`schedule`.
        seconds: of the forward pass of a model chunk; its backward takes twice as long.
        start: [stages, replicas], when each rank can begin.
        extra_backward: [micro-batches, replicas], added to the backward passes of the first chunk.

    Returns:
        [stages, replicas].
    """
    stages = len(orders)
    chunks = stages * interleave
    free = list(start)
    done: dict[tuple[bool, int, int], Floats] = {}  # by (forward, chunk of the model, micro-batch)
    positions = [0] * stages
    while any(positions[s] < len(orders[s]) for s in range(stages)):
        progress = False
        for stage, order in enumerate(orders):
            while positions[stage] < len(order):
                forward, chunk, batch = order[positions[stage]]
                place = chunk * stages + stage
                last = place == chunks - 1
                before = (True, place - 1, batch) if forward else (False, place + 1, batch)
                if not forward and last:
                    before = (True, place, batch)
                ready = 0.0 if forward and place == 0 else done.get(before)
                if ready is None:
                    break
                duration: Any = seconds if forward else 2 * seconds
                if not forward and place == 0:
                    duration = duration + extra_backward[batch]
                free[stage] = np.maximum(free[stage], ready) + duration
                done[forward, place, batch] = free[stage]
                positions[stage] += 1
                progress = True
        if not progress:
            raise RuntimeError("the schedule waits for itself")
    return np.stack(free)


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a step.

    Attributes:
        grids: int64 [n, 3].
        replicas, batches: int64 [n], the pipeline replica and the micro-batch of each image.
    """

    grids: torch.Tensor
    replicas: Integers
    batches: Integers


def step_seconds(workload: Workload, mode: str, images: Images, replicas: int) -> float:
    """Duration of a step on ``replicas`` pipelines.

    DEP's ranks wait for each other in its three exchanges: of pixels, features and gradients.
    """
    stages, interleave, batches = workload.stages, workload.interleave, workload.micro_batches
    chunk = workload.token * workload.sequence / (stages * interleave)
    orders = schedule(stages, interleave, batches)
    start, extra = np.zeros((stages, replicas)), np.zeros((batches, replicas))
    if mode == TEXT:
        return float(run_pipeline(orders, interleave, chunk, start, extra).max()) + workload.rest
    if mode == FIRST_STAGE:
        encoded = first_stage_seconds(workload, images, replicas)
        start[0] = encoded.sum(0)
        extra = 2 * encoded
        return float(run_pipeline(orders, interleave, chunk, start, extra).max()) + workload.rest
    ranks = stages * replicas
    encoders = _encoders(workload, images, ranks, balanced=mode != ROUND_ROBIN)
    slowest = float(spread_seconds(workload, images, encoders, ranks).max())
    patches = images.grids.prod(1).numpy()
    away = np.where(encoders == images.replicas, 0, patches * workload.bytes_per_patch)
    sent = float(np.bincount(images.replicas, away, ranks).max()) / BANDWIDTH
    start += slowest + sent / 2
    backbone = float(run_pipeline(orders, interleave, chunk, start, extra).max())
    again = 3.0 if mode == RECOMPUTING else 2.0
    return backbone + sent / 2 + again * slowest + workload.rest


def first_stage_seconds(workload: Workload, images: Images, replicas: int) -> Floats:
    """[micro-batches, replicas]: forward passes of the encoder, one for each micro-batch."""
    seconds = np.zeros((workload.micro_batches, replicas))
    seconds[images.batches, images.replicas] = workload.encoder_pass / 4
    costs = workload.image.costs(images.grids) / 4
    np.add.at(seconds, (images.batches, images.replicas), costs)
    return seconds


def spread_seconds(workload: Workload, images: Images, encoders: Integers, ranks: int) -> Floats:
    """[ranks]: forward pass of the encoder on the ranks to which the images are assigned."""
    costs = workload.image.costs(images.grids) / 4
    totals: Floats = np.bincount(encoders, costs, ranks).astype(np.float64)
    return totals + np.where(totals > 0, workload.encoder_pass / 4, 0.0)


@lru_cache(maxsize=1)
def _encoders(workload: Workload, images: Images, ranks: int, *, balanced: bool) -> Integers:
    """The rank that encodes each image; megatron-core's first ranks are the first stage's."""
    if not balanced:
        return np.arange(len(images.grids)) % ranks
    loads = workload.image.loads(images.grids)
    return np.array(plan(loads, ranks, owners=images.replicas), dtype=np.int64)


def draw(workload: Workload, mix: str, replicas: int, rng: np.random.Generator) -> Images:
    """Draw the images of a step."""
    share, shape = MIXES[mix]
    sequences = replicas * workload.micro_batches
    shares = np.full(sequences, share)
    if np.isfinite(shape):
        shares = np.minimum(rng.gamma(shape, share / shape, sequences), 0.95)
        shares *= share / shares.mean()
    mean_tokens = workload.median_patches * np.exp(workload.spread**2 / 2) / MERGE**2
    counts = rng.poisson(shares * workload.sequence / mean_tokens)
    number = int(counts.sum())
    area = workload.median_patches * np.exp(rng.normal(0, workload.spread, number))
    aspect = np.exp(rng.normal(0, 0.25, number))
    rows, columns = (
        MERGE * np.clip(np.rint(np.sqrt(value) / MERGE), 1, 32).astype(int)
        for value in (area * aspect, area / aspect)
    )
    of_image = np.repeat(np.arange(sequences), counts)
    grids = torch.from_numpy(np.stack([np.ones(number, int), rows, columns], 1))
    return Images(grids, of_image // workload.micro_batches, of_image % workload.micro_batches)


# ---------------------------------------------------------------------- run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=positive_int, help="timed rounds of the real steps; default: by the form"
    )


def run(options: argparse.Namespace) -> Result:
    rng = np.random.default_rng(options.seed)
    measured, validation = _validate(options)
    workloads = [measured, *_kimi_k25()]
    if options.form == "tiny":
        workloads = [measured]
    sizes = [2**power for power in range(3, RANKS[options.form].bit_length())]
    return {
        "validation": validation,
        "workloads": {
            workload.name: {
                mix: {
                    ranks: [_ratios(workload, mix, ranks, rng) for _ in range(DRAWS[options.form])]
                    for ranks in sizes
                }
                for mix in MIXES
            }
            for workload in workloads
        },
    }


def _ratios(workload: Workload, mix: str, ranks: int, rng: np.random.Generator) -> dict[str, float]:
    """Throughput relative to text only, by mode."""
    workload = replace(workload, stages=min(workload.stages, ranks))
    replicas = ranks // workload.stages
    images = draw(workload, mix, replicas, rng)
    text = step_seconds(workload, TEXT, images, replicas)
    return {mode: text / step_seconds(workload, mode, images, replicas) for mode in COLORS}


def _kimi_k25() -> list[Workload]:
    """Kimi K2.5 with its FLOPs at one rate, in a plain and an interleaved pipeline."""
    from pretrain import config
    from pretrain.plan.flops import flops_per_token

    settings = config.load(str(ROOT / "configs" / "kimi_k25.yaml"), [])
    language, vision, length = settings.language, settings.vision, settings.data.seq_length
    flops = cost.analytic_cost(vision, language.hidden_size)
    seconds = cost.CostModel(*(4 * f / RATE for f in (flops.per_patch, flops.per_feature,
                                                     flops.per_pair)))  # fmt: skip
    one = torch.tensor([[1, 28, 28]])
    sent = float(cost.transfer_bytes(one, vision, language.hidden_size, 2).sum()) / 28**2
    plain = Workload(
        "Kimi K2.5 (FLOPs at one rate)", seconds, 0.0,
        flops_per_token(language, language.vocab_rows(settings.data.vocab_size), length) / RATE,
        0.0, length, 64, 28**2, 0.8, settings.parallel.pipeline, 1, sent,
    )  # fmt: skip
    return [plain, replace(plain, name="Kimi K2.5, interleaved by 2", interleave=2)]


def _validate(options: argparse.Namespace) -> tuple[Workload, Result]:
    """Measure the costs of the model of ``dep``, and compare its simulated with its real steps.

    Costs are processor time, which other processes do not change; those of a token are from a step
    of text only.
    """
    setting = dep.SETTINGS[options.form]
    setting = replace(setting, rounds=options.rounds or ROUNDS[options.form])
    measured = dep.measure(_rank, setting, options.seed)
    workload = Workload(
        "the model of dep (measured)",
        cost.CostModel(**measured["image"]),
        measured["encoder_pass"],
        measured["backbone"] / (3 * setting.micro_batches * setting.sequence) * setting.processes,
        measured["rest"],
        setting.sequence,
        setting.micro_batches,
        64,
        1.0,
        setting.processes,
    )
    batches = dep._batches(setting, SHARE, SPREAD, options.seed, first_stage=True)
    counts = [len(batch.grids) for batch in batches]
    images = Images(
        torch.cat([batch.grids for batch in batches]),
        np.zeros(sum(counts), np.int64),
        np.repeat(np.arange(len(batches)), counts),
    )
    text = step_seconds(workload, TEXT, images, 1)
    rows = {}
    for mode in (DEP, FIRST_STAGE, ROUND_ROBIN):
        pairs = zip(measured["seconds"][TEXT], measured["seconds"][mode], strict=True)
        ratios = [without / with_images for without, with_images in pairs]
        if mode == FIRST_STAGE:
            encoder = 3 * float(first_stage_seconds(workload, images, 1).sum())
        else:
            balanced = mode == DEP
            encoders = _encoders(workload, images, setting.processes, balanced=balanced)
            by_rank = spread_seconds(workload, images, encoders, setting.processes)
            encoder = 3 * float(by_rank.max())
        rows[mode] = {
            "predicted": text / step_seconds(workload, mode, images, 1),
            "measured": statistics.median(ratios),
            "rounds": ratios,
            "encoder_predicted_s": encoder,
            "encoder_measured_s": max(measured["processor"][mode]),
        }
    costs = {name: measured[name] for name in ("image", "encoder_pass", "backbone", "rest")}
    return workload, {"processes": setting.processes, "images": sum(counts), "modes": rows, **costs}


def _rank(rank: int, setting: dep.Setting, seed: int, folder: str) -> None:
    """Real steps on one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=setting.processes
    )
    runs, batches = dep._prepare(setting, SHARE, SPREAD, seed, Path(folder, "cost.json"))
    seconds, _, _ = dep._measure(setting, runs, batches)
    times = {
        mode: torch.tensor(
            [_processor_seconds(run, batches[mode], mode) for _ in range(_REPEATS)],
            dtype=torch.float64,
        ).median(0).values
        for mode, run in runs.items()
    }  # fmt: skip
    # Stages differ in the embedding and the output layer.
    means = times[TEXT] / setting.processes
    dist.all_reduce(means)
    more: dict[str, list[Any]] = {}
    for mode in runs:
        more[mode] = [None] * setting.processes
        dist.all_gather_object(more[mode], float(times[mode][1] - times[TEXT][1]))
    if rank == 0:
        backbone, step_ = means.tolist()
        encoder = runs[DEP].encoder
        small = [(1, MERGE, MERGE)]
        passes = [cost.step_seconds(encoder.tower, small) for _ in range(9)]
        one = float(encoder.cost.costs(torch.tensor(small))[0])
        result = {
            "seconds": seconds,
            "processor": more,
            "backbone": backbone,
            "rest": step_ - backbone,
            "image": dataclasses.asdict(encoder.cost),
            "encoder_pass": max(0.0, statistics.median(passes) - one),
        }
        torch.save(result, Path(folder, "result"))
    dist.barrier()
    dist.destroy_process_group()


def _processor_seconds(run: Any, batches: Any, mode: str) -> tuple[float, float]:
    """Processor time of the backbone's passes and of a whole step."""
    begin = time.process_time()
    marks: list[float] = []
    run_backbone = step.run_backbone

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.process_time()
        result = run_backbone(*arguments, **options)
        marks.append(time.process_time() - start)
        return result

    step.run_backbone = timed
    try:
        dep._step(run, batches, mode)
    finally:
        step.run_backbone = run_backbone
    return marks[0], time.process_time() - begin


# ---------------------------------------------------------------------- table and plot


def _median(draws: Sequence[Mapping[str, float]], mode: str) -> float:
    return statistics.median(step[mode] for step in draws)


def plot(result: Result, figure: "Figure") -> None:
    workloads = result["workloads"]
    figure.set_size_inches(4.6 * len(MIXES), 3.6 * len(workloads))
    panels = figure.subplots(len(workloads), len(MIXES), squeeze=False, sharey="row")
    for row, (name, mixes) in zip(panels, workloads.items(), strict=True):
        for axes, (mix, by_ranks) in zip(row, mixes.items(), strict=True):
            ranks = [int(number) for number in by_ranks]
            for mode, color in COLORS.items():
                ratios = [100 * _median(draws, mode) for draws in by_ranks.values()]
                axes.plot(
                    ranks, ratios, color=color, label=mode, linewidth=3 if mode == DEP else 1.5
                )
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.set_ylim(40, 102)
            axes.set_xlabel("ranks")
            axes.set_title(f"{name}: {mix}", fontsize=9)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("throughput, % of text only")
    panels[0][0].legend(fontsize=8, loc="lower left")


def table(result: Result) -> str:
    blocks = []
    for name, mixes in result["workloads"].items():
        rows = []
        for mix, by_ranks in mixes.items():
            for ranks, draws in by_ranks.items():
                if int(ranks) not in (8, 64, 512, 4096):
                    continue
                percent = [f"{100 * _median(draws, mode):.1f}%" for mode in COLORS]
                gains = [
                    statistics.median(step[DEP] / step[mode] for step in draws)
                    for mode in (FIRST_STAGE, ROUND_ROBIN)
                ]
                rows.append([mix, f"{int(ranks):,}", *percent, *(f"{gain:.2f}" for gain in gains)])
        header = ["images", "ranks", *COLORS, "DEP / first stage", "DEP / round-robin"]
        title = f"**{name}: simulated throughput, % of text only**"
        blocks.append(f"{title}\n\n{markdown(header, rows)}")
    validation = result["validation"]
    rows = [
        [mode, f"{100 * row['predicted']:.1f}%", f"{100 * row['measured']:.1f}%",
         f"{1e3 * row['encoder_predicted_s']:.0f}", f"{1e3 * row['encoder_measured_s']:.0f}"]
        for mode, row in validation["modes"].items()
    ]  # fmt: skip
    header = ["", "simulated, % of text only", "measured, % of text only",
              "simulated encoder, ms", "measured encoder, ms"]  # fmt: skip
    title = (
        f"Real steps of {validation['processes']} processes: throughput, and processor time that "
        "images add on the busiest rank"
    )
    blocks.append(f"{title}:\n\n{markdown(header, rows)}")
    return "\n\n".join(blocks)
