"""DEP: multimodal throughput relative to text only, encoder balance and memory, with baselines."""

import argparse
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import itemgetter
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
_MEDIA_PAD = 4  # below the ids of random tokens
DEP = "DEP"
# The encoder of the first stage alone, and the exchange of DEP without balancing.
BASELINES = ("encoder on the first stage", "round-robin")


@dataclass(frozen=True)
class Setting:
    """Sizes of a backbone and an encoder.

    The encoder's share of the FLOPs is several times that of Kimi K2.5 (at two FLOPs per weight:
    0.4 patches per token x 0.4 billion, compared with 32 billion), so that its cost exceeds the
    noise of a machine. Stages do equal work on text: no dense layer, and a small vocabulary.
    """

    processes: int
    layers: int
    hidden: int
    vision_layers: int
    vision_hidden: int
    sequence: int
    micro_batches: int
    rounds: int
    steps: int  # of a mode in a round, the fastest of which counts
    images: tuple[int, ...]  # number of images for the memory measurement
    activation_mib: int  # memory for activations in this measurement


SETTINGS = {
    "full": Setting(2, 16, 1024, 4, 192, 2048, 16, 15, 1, (8, 32, 128, 256), 256),
    "quick": Setting(2, 4, 192, 2, 72, 512, 16, 21, 6, (8, 32, 128, 256), 64),
    "tiny": Setting(2, 2, 32, 1, 16, 128, 2, 2, 2, (2, 4), 1),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vision-share", type=float, default=0.1, help="share of image tokens")
    parser.add_argument(
        "--spread", type=float, default=1.0, help="sigma of the log-normal image sides"
    )
    parser.add_argument("--rounds", type=positive_int, help="timed rounds; default: by the form")
    parser.add_argument(
        "--steps",
        type=positive_int,
        help="steps of a mode in a round, the fastest of which counts; default: by the form",
    )


def run(options: argparse.Namespace) -> Result:
    if options.device.type != "cpu":
        raise SystemExit("--device: this benchmark runs on a CPU (gloo); use --device cpu")
    setting = SETTINGS[options.form]
    if options.rounds is not None:
        setting = replace(setting, rounds=options.rounds)
    if options.steps is not None:
        setting = replace(setting, steps=options.steps)
    return measure(_rank, setting, options.vision_share, options.spread, options.seed)


def measure(rank: Callable[..., None], setting: Setting, *arguments: Any) -> Result:
    """The result of a measurement in processes that form a pipeline.

    Args:
        rank: called in each process with its rank, the setting, the arguments and a folder, in
            which rank 0 saves the result as ``result``.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=rank, args=(number, setting, *arguments, folder))
            for number in range(setting.processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise RuntimeError("a rank of the benchmark failed: its error is above")
        result: Result = torch.load(Path(folder, "result"), weights_only=True)
    return result


# ---------------------------------------------------------------------- measurement on each rank


def _rank(rank: int, setting: Setting, share: float, spread: float, seed: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=setting.processes
    )
    runs, batches = _prepare(setting, share, spread, seed, Path(folder, "cost.json"))
    seconds, timelines, balances = _measure(setting, runs, batches)
    alone = dist.new_group([0])
    if rank == 0:
        result = _result(setting, share, runs[DEP], batches[DEP], seconds, timelines, balances)
        result["memory"] = {
            # If a thread of the group is the last to release a tensor, the profiler misses it.
            str(n): min(
                (_memory(runs[DEP], alone, n, setting) for _ in range(3)), key=itemgetter("kept")
            )
            for n in setting.images
        }
        torch.save(result, Path(folder, "result"))
    dist.barrier()
    dist.destroy_process_group()


def _prepare(
    setting: Setting, share: float, spread: float, seed: int, cost_file: Path
) -> tuple[dict[str, "Run"], dict[str, list["MicroBatch"]]]:
    """Runs of one model with different encoder processes, and the batches of each run."""
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
    context = parallel.start(config.parallel, seed)
    tokenizer = SimpleNamespace(vocab_size=config.data.vocab_size, media_pad=_MEDIA_PAD)
    data: Any = SimpleNamespace(tokenizer=tokenizer)
    run = build(config, context, data)
    # These encoders are so small that the constant cost of an item matters: measure it.
    kinds = {
        TEXT: EncoderProcessConfig(),
        DEP: EncoderProcessConfig(cost="measured"),
        BASELINES[0]: EncoderProcessConfig(enabled=False),
        BASELINES[1]: EncoderProcessConfig(spread="round_robin", cost="measured"),
    }
    groups = parallel.image_groups(setting.processes, context, setting.processes)
    runs = {
        name: replace(run, encoder=make_encoder(kind, run.tower, context, cost_file, groups=groups))
        for name, kind in kinds.items()
    }
    text = _batches(setting, 0.0, spread, seed, context.first_stage)
    multimodal = _batches(setting, share, spread, seed, context.first_stage)
    return runs, {name: text if name == TEXT else multimodal for name in runs}


def _image_size(
    generator: torch.Generator, spread: float, max_tokens: int = 1024
) -> tuple[int, int]:
    """Rows and columns of an image in patches: even, log-normal with median 8, halved until the
    image has at most ``max_tokens`` tokens."""
    sides = torch.randn(2, generator=generator) * spread + math.log(8)
    rows, columns = (min(64, max(2, 2 * round(side / 2))) for side in sides.exp().tolist())
    while rows * columns // 4 > max_tokens:
        rows, columns = min(rows, columns), max(rows, columns) // 4 * 2
    return rows, columns


def _batches(
    setting: Setting, share: float, spread: float, seed: int, first_stage: bool
) -> list["MicroBatch"]:
    """Micro-batches of one sequence with random tokens, a share of which are images."""
    from pretrain.data import Category
    from pretrain.model.multimodal import MicroBatch

    generator = torch.Generator().manual_seed(seed)
    length, due, batches = setting.sequence, 0.0, []
    # An image has at most half of a sequence and a quarter of the step's image tokens.
    max_tokens = min(length // 2, max(1, int(share * length * setting.micro_batches / 4)))
    rows, columns = _image_size(generator, spread, max_tokens)
    for _ in range(setting.micro_batches):
        tokens = torch.randint(100, VOCABULARY, (1, length), generator=generator)
        grids, position = [], 1
        due += share * length  # image tokens to add so far
        while True:
            size = rows * columns // 4
            if size > due or position + size >= length:
                break
            tokens[0, position : position + size] = _MEDIA_PAD
            grids.append([1, rows, columns])
            due -= size
            position += size + 1
            rows, columns = _image_size(generator, spread, max_tokens)
        shapes = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
        if not first_stage:
            shapes = shapes[:0]
        patches = int(shapes.prod(1).sum())
        batches.append(
            MicroBatch(
                tokens=tokens,
                host_tokens=tokens,
                labels=torch.randint(100, VOCABULARY, (1, length), generator=generator),
                weights=torch.ones(1, length),
                categories=torch.full((1, length), Category.TEXT, dtype=torch.uint8),
                documents=torch.zeros(1, length, dtype=torch.int32),
                sources=torch.zeros(1, length, dtype=torch.int16),
                patches=torch.randint(256, (patches, 588), dtype=torch.uint8),
                grids=shapes,
            )
        )
    return batches


def _step(
    run: "Run",
    batches: list["MicroBatch"],
    name: str,
    planner: Executor | None = None,
    plans: dict[str, Any] | None = None,
) -> list[tuple[str, float, float]]:
    """Forward, backward and optimizer of a step, as in the trainer, with times.

    Args:
        planner: the thread that plans the images of the next step meanwhile, as in the trainer.
            Default: they are planned in the step.
        plans: the plan for the next step of each run.

    Returns:
        (phase, begin, end), in seconds since the beginning of the step.
    """
    from pretrain.step import encode_images, plan_images, run_backbone

    marks: list[tuple[str, float, float]] = []
    dist.barrier()
    start = time.perf_counter()
    plans = {} if plans is None else plans
    following = None
    if name != TEXT and planner is not None:
        following = planner.submit(plan_images, run, batches, ahead=True)

    def done(phase: str) -> None:
        marks.append((phase, marks[-1][2] if marks else 0.0, time.perf_counter() - start))

    for chunk in run.language:
        chunk.zero_grad_buffer()
    if name == TEXT:
        features = [torch.zeros(0, run.config.language.hidden_size) for _ in batches]
    else:
        features = encode_images(run, batches, plans.get(name))
    done("encode")
    run_backbone(run, batches, features)
    done("backbone")
    if name != TEXT:
        run.encoder.backward()
        done("encoder backward")
        run.encoder.reduce_gradients()
    done("reduce")
    for chunk in run.language:
        for parameter in chunk.parameters():
            parameter.grad = parameter.main_grad
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if following is not None:
        plans[name] = following.result()
    done("optimizer")
    return marks


def _measure(
    setting: Setting, runs: dict[str, "Run"], batches: dict[str, list["MicroBatch"]]
) -> tuple[dict[str, list[float]], Result, dict[str, float]]:
    """Seconds of each round's fastest step on its slowest rank, the timeline of each rank in the
    median round, and the encoder balance; by run."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    marks_by_round: dict[str, list[Any]] = {name: [] for name in runs}
    names = list(runs)
    plans: dict[str, Any] = {}
    planner = ThreadPoolExecutor(1)
    runs[DEP].train()
    for round_ in range(-1, setting.rounds):
        fastest: dict[str, tuple[float, Any]] = {}
        for step in range(setting.steps):
            start = (round_ + step) % len(names)
            for name in names[start:] + names[:start]:
                marks = _step(runs[name], batches[name], name, planner, plans)
                gathered: list[Any] = [None] * setting.processes
                dist.all_gather_object(gathered, marks)
                taken = max(of_rank[-1][2] for of_rank in gathered)
                if name not in fastest or taken < fastest[name][0]:
                    fastest[name] = taken, gathered
        if round_ >= 0:
            for name, (taken, gathered) in fastest.items():
                seconds[name].append(taken)
                marks_by_round[name].append(gathered)
    planner.shutdown()
    timelines = {}
    for name, times in seconds.items():
        middle = sorted(range(len(times)), key=times.__getitem__)[len(times) // 2]
        timelines[name] = marks_by_round[name][middle]
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
        ratios = [text / time_ for text, time_ in zip(seconds[TEXT], times, strict=True)]
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
        "activation_mib": setting.activation_mib,
        "steps_per_round": setting.steps,
    }


def _encoder_flops(run: "Run", grids: Tensor) -> float:
    """FLOPs of a forward pass through encoder and projector."""
    from pretrain.encoder_process.cost import analytic_cost

    model = analytic_cost(run.config.vision, run.config.language.hidden_size)
    return float(model.costs(grids).sum())


def _backbone_flops(run: "Run", tokens: int) -> float:
    """FLOPs of a forward pass of the language model."""
    from pretrain.plan.flops import flops_per_token

    config = run.config
    return tokens * flops_per_token(config.language, VOCABULARY, config.data.seq_length)


def _loads(run: "Run", grids: Tensor, ranks: int) -> dict[str, list[float]]:
    """Share of each rank in the encoder's work, by its measured cost, for each mode."""
    from pretrain.encoder_process.plan import plan

    loads = run.encoder.cost.loads(grids)
    plans = {
        DEP: plan(loads, ranks, owners=[0] * len(loads)),
        BASELINES[0]: [0] * len(loads),
        BASELINES[1]: [item % ranks for item in range(len(loads))],
    }
    total = float(loads.sum())
    return {
        name: [
            sum(float(load) for load, owner in zip(loads, owners, strict=True) if owner == rank)
            / total
            for rank in range(ranks)
        ]
        for name, owners in plans.items()
    }


def _memory(run: "Run", group: dist.ProcessGroup, images: int, setting: Setting) -> Result:
    """Memory of encoder and projector in a step on one rank, without pixels and features.

    Returns:
        Bytes of the activations that are kept during the backbone's passes, the most bytes in the
        forward and the backward pass, and the share of patches that were encoded again.
    """
    from pretrain.config import EncoderProcessConfig
    from pretrain.encoder_process import EncoderProcess
    from pretrain.model.vision import num_features

    limits = EncoderProcessConfig(
        max_patches=1024, activation_memory_gib=setting.activation_mib / 2**10
    )
    encoder = EncoderProcess(run.tower, group, limits)
    generator = torch.Generator().manual_seed(images)
    # The first image fills a chunk alone.
    sides = [(32, 32), *(_image_size(generator, 1.0, 256) for _ in range(images - 1))]
    grids = torch.tensor([[1, rows, columns] for rows, columns in sides])
    patches = torch.randint(256, (int(grids.prod(1).sum()), 588), dtype=torch.uint8)
    features = int(num_features(grids).sum()) * run.config.language.hidden_size * 4
    gradients = features  # each chunk's, summed by the backbone
    for parameter in run.tower.parameters():
        parameter.grad = torch.zeros_like(parameter)
    results: list[Tensor] = []
    kept, forward = cpu_bytes(lambda: results.extend(encoder.encode([(patches, grids)])))
    torch.autograd.backward(results[0].sum())
    _, backward = cpu_bytes(encoder.backward)
    return {
        "patches": len(patches),
        "kept": kept - patches.numel() - features,
        "forward": forward - patches.numel() - features,
        "backward": kept + backward - patches.numel() - features - gradients,
        "recomputed": encoder.recomputed,
    }


# ---------------------------------------------------------------------- table and plot


def plot(result: Result, figure: "Figure") -> None:
    figure.set_size_inches(12, 7)
    grid = figure.add_gridspec(2, 2, width_ratios=[2, 1])
    lines, loads, memory = (
        figure.add_subplot(grid[:, 0]),
        figure.add_subplot(grid[0, 1]),
        figure.add_subplot(grid[1, 1]),
    )
    colors = {
        "encode": "tab:orange",
        "backbone": "tab:blue",
        "encoder backward": "tab:red",
        "reduce": "tab:grey",
        "optimizer": "tab:green",
    }
    labels, height = [], 0
    for name, ranks in result["timelines"].items():
        for rank, marks in enumerate(ranks):
            for phase, begin, end in marks:
                lines.barh(height, end - begin, left=begin, color=colors[phase], height=0.8)
            labels.append(f"{name}, rank {rank}")
            height += 1
    lines.set_yticks(range(height), labels)
    lines.invert_yaxis()
    lines.set(title="One step of the median round (including waiting)", xlabel="seconds")
    handles = [lines.barh(0, 0, color=color, label=phase) for phase, color in colors.items()]
    lines.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=5, fontsize=8
    )

    names = list(result["loads"])
    for rank in range(result["processes"]):
        left = [sum(result["loads"][name][:rank]) for name in names]
        width = [result["loads"][name][rank] for name in names]
        loads.barh(names, width, left=left, label=f"rank {rank}")
    loads.axvline(1 / result["processes"], color="black", linewidth=0.8)
    loads.set(title="Encoder work by rank", xlim=(0, 1))
    loads.legend(fontsize=8)

    counts = [int(count) for count in result["memory"]]
    for name in ("kept", "backward"):
        sizes = [row[name] / 2**20 for row in result["memory"].values()]
        memory.plot(counts, sizes, "o-", label=name)
    memory.axhline(result["activation_mib"], color="black", linewidth=0.8)
    memory.set(title="Memory of the encoder, MiB", xlabel="images per step")
    memory.set_ylim(0)
    memory.legend(fontsize=8)


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
        f"{result['parallel']}; {result['tokens']:,} tokens per step, {result['vision_share']:.1%} "
        f"of them of images: {result['images']} images of {result['patches']:,} patches; a forward "
        f"pass of the encoder has {result['encoder_flops_of_backbone']:.1%} of the backbone's "
        f"FLOPs; the fastest of {result.get('steps_per_round', 1)} steps of each round counts"
    )
    header = ["", "tokens/s", "relative to text only", "encoder load, max / mean"]
    dep = result["modes"][DEP]["seconds"]
    speedups = [
        _speedup(name, result["modes"][name]["seconds"], dep) for name in (TEXT, *BASELINES)
    ]
    memory = [
        [
            count,
            f"{row['patches']:,}",
            *(f"{row[name] / 2**20:.1f}" for name in ("kept", "forward", "backward")),
            f"{row['recomputed']:.0%}",
        ]
        for count, row in result["memory"].items()
    ]
    memory_header = [
        "images per step",
        "patches",
        f"activations kept (limit {result['activation_mib']}), MiB",
        "peak of the forward",
        "peak of the backward",
        "encoded again",
    ]
    compared = "\n".join(speedups)
    return "\n\n".join([about, markdown(header, rows), compared, markdown(memory_header, memory)])


def _speedup(name: str, baseline: Sequence[float], dep: Sequence[float]) -> str:
    """A line on the speed of DEP, with bootstrap intervals of 95 % over rounds."""
    pairs = np.array([baseline, dep])
    drawn = np.random.default_rng(0).integers(pairs.shape[1], size=(10_000, pairs.shape[1]))

    def interval(statistic: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> str:
        low, high = np.quantile(statistic(pairs[:, drawn]), (0.025, 0.975))
        return f"{statistic(pairs):.3f} ({low:.3f} to {high:.3f})"

    wins = int((pairs[0] > pairs[1]).sum())
    return (
        f"- Speed of DEP relative to {name}: {interval(lambda p: p[0].sum(-1) / p[1].sum(-1))} "
        f"over all rounds, {interval(lambda p: np.median(p[0] / p[1], -1))} in the median round; "
        f"faster in {wins} of {pairs.shape[1]}."
    )
