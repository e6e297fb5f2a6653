"""Training of small language models with any optimizer, with equal data, schedule and budget.

Shared by the benchmarks of convergence, stability, scaling and ablations: a :class:`Job` describes
a training run, :func:`train_all` trains several of them in parallel processes.

The text is the Python standard library's manual and sources, as in the trainer; whole files are
held out. Models see hardly any text twice.
"""

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

import muonclip
from benchmarks.optimizers import WEIGHT_DECAY, MuonClipBuild, candidates
from benchmarks.runner import CLOCKS, ROOT, Result, positive_int
from muonclip import MuonClip, QKClip

if TYPE_CHECKING:
    from pretrain.build import Run
    from pretrain.data.builtin.dataset import BuiltIn
    from pretrain.model.multimodal import MicroBatch

Kind = Literal["dense", "moe", "vision"]
KINDS: dict[Kind, str] = {
    "dense": "dense transformer, text",
    "moe": "MLA and mixture of experts, text",
    "vision": "MLA and mixture of experts, text and images",
}
BASELINE, MUONCLIP = "AdamW (fused)", "MuonClip"
# Share of images in "vision": the default in training, and always in the evaluation.
VISION_SHARE = 0.1
# As in the trainer: share of the steps with warm-up, and final share of the peak rate.
_WARMUP, _FINAL = 0.1, 0.1
_CLIP_GRAD_NORM = 1.0
_MAX_EXTENSIONS = 3
_PATCH = 14
# Length of the n-grams of held-out text that are searched in the training text.
_NGRAM = 32
MAX_OVERLAP = 0.05


@dataclass(frozen=True)
class Size:
    """Sizes of a model and its batches; ``init_std`` is that of matrices and embeddings."""

    hidden: int = 96
    layers: int = 4
    heads: int = 4
    sequence: int = 128
    sequences: int = 16
    vocabulary: int = 1024
    init_std: float = 0.02

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequence * self.sequences

    @property
    def held_out(self) -> int:
        """Sequences of an evaluation."""
        return 8 * self.sequences


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        optimizer: a name of ``benchmarks.optimizers``.
        lr: peak learning rate of all parameters.
        threshold: QK-Clip's τ, which only MuonClip uses; None: logits are observed but not clipped.
        options: options of ``MuonClip`` that replace those shared by all implementations.
        layouts: "split": update the parts of a fused matrix separately; "fused": update matrices as
            stored; "per_head": update queries, keys and values of each head separately.
        watch: record the max logit of every head in every step.
        overrides: configuration overrides of the trainer, for "moe" and "vision".
        label: name for messages and results; default: the optimizer's.
    """

    kind: Kind
    optimizer: str
    lr: float
    steps: int
    seed: int = 0
    size: Size = Size()
    threshold: float | None = 100.0
    options: tuple[tuple[str, Any], ...] = ()
    layouts: Literal["split", "fused", "per_head"] = "split"
    weight_decay: float = WEIGHT_DECAY
    watch: bool = False
    evaluations: int = 10
    overrides: tuple[str, ...] = ()
    label: str = ""

    def __str__(self) -> str:
        name = self.label or self.optimizer
        return f"{self.kind}, {name}, lr {self.lr:g}, {self.steps} steps, seed {self.seed}"


def without_metrics(run: "Run") -> "Run":
    """The trainer's run with metrics that are neither measured nor gathered."""
    from pretrain.step_metrics import StepMetrics

    class NoMetrics(StepMetrics):
        def __init__(self) -> None: ...

        def before_update(self, step: int) -> None: ...

        def after_update(self) -> Any: ...

        def gather(self, *_arguments: Any) -> dict[str, Any]:
            return {}

    return replace(run, step_metrics=NoMetrics())


class Model(Protocol):
    """A model to train: computes gradients of a step's batch, and held-out losses."""

    groups: Sequence[Mapping[str, Any]]
    """Parameter groups for ``MuonClip``, with ``algorithm`` and ``layout``."""
    clips: Sequence[QKClip]

    def gradients(self, step: int) -> float:
        """Compute the mean gradient of the batch in ``.grad``; returns the mean loss in nats per
        token."""

    def observe_logits(self, step: int) -> None:
        """Run the step's batch forward with the current weights, for QK-Clip's observers."""

    def held_out(self) -> dict[str, float]:
        """Mean losses in nats per token; ``loss`` is the one to compare."""


# ---------------------------------------------------------------------- the models


class Dense:
    """Phi-3 from transformers: RMSNorm, rotary positions, SwiGLU, and fused matrices for query, key
    and value and for gate and up."""

    def __init__(self, job: Job, device: torch.device) -> None:
        from transformers import Phi3Config, Phi3ForCausalLM

        from muonclip.integrations import transformers

        size = job.size
        torch.manual_seed(job.seed)
        data = text(size.vocabulary)
        self.model = Phi3ForCausalLM(
            Phi3Config(
                vocab_size=data.tokenizer.vocab_size,
                hidden_size=size.hidden,
                intermediate_size=math.ceil(size.hidden * 8 / 3 / 32) * 32,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                num_key_value_heads=size.heads,
                initializer_range=size.init_std,
                max_position_embeddings=size.sequence,
                original_max_position_embeddings=size.sequence,
                pad_token_id=data.tokenizer.pad,
                bos_token_id=None,
                eos_token_id=data.tokenizer.eos,
                use_cache=False,
            )
        ).to(device)
        layouts = transformers.matrix_layouts(self.model, per_head=job.layouts == "per_head")
        if job.layouts == "fused":
            layouts = {}
        self.groups: Sequence[Mapping[str, Any]] = muonclip.param_groups(
            self.model, layouts=layouts
        )
        self.clips: Sequence[QKClip] = [transformers.qk_clip(self.model, exact=job.watch)]
        self._train, self._held_out = (
            torch.from_numpy(data.corpora[split].tokens.astype(np.int64)).to(device)
            for split in ("train", "held_out")
        )
        self._job, self._size, self._bos = job, size, data.tokenizer.bos

    def _windows(self, tokens: Tensor, starts: Iterable[int]) -> Tensor:
        """[sequences, length + 1]: inputs, and labels shifted by one; each row begins with BOS."""
        rows = [tokens[int(start) : int(start) + self._size.sequence] for start in starts]
        return nn.functional.pad(torch.stack(rows), (1, 0), value=self._bos)

    def _loss(self, windows: Tensor) -> Tensor:
        logits = self.model(windows[:, :-1]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def _forward_step(self, step: int) -> Tensor:
        rng = np.random.default_rng([self._job.seed, step])
        starts = rng.integers(len(self._train) - self._size.sequence, size=self._size.sequences)
        self.model.train()
        return self._loss(self._windows(self._train, starts))

    def gradients(self, step: int) -> float:
        loss = self._forward_step(step)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    @torch.no_grad()
    def observe_logits(self, step: int) -> None:
        self._forward_step(step)

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        self.model.eval()
        count = self._size.held_out
        starts = np.linspace(0, len(self._held_out) - self._size.sequence - 1, count).astype(int)
        total = 0.0
        for part in np.array_split(starts, math.ceil(count / self._size.sequences)):
            loss = self._loss(self._windows(self._held_out, part))
            total += loss.item() * len(part)
        return {"loss": total / count}


class PretrainModel:
    """The trainer's model in one process: ``benchmarks/trainer.yaml`` in another size."""

    def __init__(self, job: Job, device: torch.device) -> None:
        from pretrain.build import build
        from pretrain.data.builtin.dataset import BuiltIn

        context, data, config = _prepare(job)
        assert isinstance(data, BuiltIn)
        self.run: Run = build(config, context, data)
        if context.device.type != device.type:
            raise ValueError(
                f"the trainer runs on {context.device.type}, not on {device.type}: choose --device"
            )
        self.groups: Sequence[Mapping[str, Any]] = [
            {
                "params": list(zip(group["param_names"], group["params"], strict=True)),
                "algorithm": group["algorithm"],
                "layout": None if job.layouts == "fused" else group["layout"],
            }
            for group in self.run.optimizer.param_groups
        ]
        self.clips: Sequence[QKClip] = self.run.clips
        # The evaluation does not depend on the training data and the seed.
        share = VISION_SHARE if job.kind == "vision" else 0.0
        evaluated = replace(data, seed=0, config=replace(data.config, vision_share=share))
        self._evaluated = replace(self.run, data=evaluated)

    def _batches(self, step: int) -> "list[MicroBatch]":
        from pretrain import batches

        return batches.for_step(self.run.config, self.run.context, self.run.data, step)

    def gradients(self, step: int) -> float:
        from pretrain.objective import mean_losses
        from pretrain.step import forward_backward

        loss = mean_losses(forward_backward(self.run, self._batches(step)))["loss"]
        assert loss is not None
        return loss

    @torch.no_grad()
    def observe_logits(self, step: int) -> None:
        from pretrain.step import run_backbone

        self.run.train()
        micro_batches = self._batches(step)
        features = self.run.encoder.encode([(mb.patches, mb.grids) for mb in micro_batches])
        run_backbone(self.run, micro_batches, features, forward_only=True)

    def held_out(self) -> dict[str, float]:
        from pretrain.evaluate import held_out_losses

        losses = {
            name: loss
            for name, loss in held_out_losses(self._evaluated).items()
            if loss is not None
        }
        return {"loss": losses["held_out_loss"], **losses}


def make(job: Job, device: torch.device) -> Model:
    return Dense(job, device) if job.kind == "dense" else PretrainModel(job, device)


# ---------------------------------------------------------------------- the data


@cache
def text(vocabulary: int) -> "BuiltIn":
    """The built-in data, prepared unless it is in the cache."""
    from pretrain.config import DataConfig
    from pretrain.data import open_data
    from pretrain.data.builtin.dataset import BuiltIn

    cache_dir = str(ROOT / ".cache" / "pretrain")
    data = open_data(DataConfig(vocab_size=vocabulary, cache_dir=cache_dir), _PATCH, seed=0)
    assert isinstance(data, BuiltIn)
    return data


def overlap(size: Size) -> float:
    """Share of the 32-grams of the held-out text that also occur in the training text.

    Raises:
        RuntimeError: the share is above 5%, so that losses would partly measure memorization.
    """
    share = _shared(size.vocabulary)
    if share > MAX_OVERLAP:
        raise RuntimeError(
            f"{share:.1%} of the held-out text also occurs in the training text (limit: "
            f"{MAX_OVERLAP:.0%}), so that losses would measure memorization"
        )
    return share


@cache
def _shared(vocabulary: int) -> float:
    corpora = text(vocabulary).corpora
    train, held_out = (_ngram_hashes(corpora[split].tokens) for split in ("train", "held_out"))
    return float(np.isin(held_out, train).mean())


def _ngram_hashes(tokens: Any) -> Any:
    """Polynomial hash of each n-gram, modulo 2^64."""
    factor = np.uint64(0x9E3779B97F4A7C15)
    hashes = np.zeros(len(tokens) - _NGRAM + 1, np.uint64)
    for offset in range(_NGRAM):
        tokens_at_offset = tokens[offset : offset + len(hashes)].astype(np.uint64)
        hashes = hashes * factor + tokens_at_offset + np.uint64(1)
    return hashes


@cache
def _context() -> Any:
    # Import first: on a CPU the trainer replaces classes of CUDA by functions, which breaks
    # annotations in transformers.
    import transformers.models.phi3.modeling_phi3  # noqa: F401

    from pretrain import parallel
    from pretrain.config import ParallelConfig

    return parallel.start(ParallelConfig(), 0)


def leave() -> None:
    """Destroy the process groups that models of the trainer have created in this process."""
    from pretrain import parallel

    parallel.stop()
    _context.cache_clear()


def _prepare(job: Job) -> tuple[Any, Any, Any]:
    """Context, data and configuration of the trainer."""
    from pretrain import config
    from pretrain.startup import prepare_data

    size = job.size
    settings = config.load(
        ROOT / "benchmarks" / "trainer.yaml",
        [
            "parallel.expert=1",
            f"steps={job.steps}",
            f"seed={job.seed}",
            f"global_batch_size={size.sequences}",
            f"micro_batch_size={size.sequences}",
            f"language.num_layers={size.layers}",
            f"language.hidden_size={size.hidden}",
            f"language.num_heads={size.heads}",
            f"language.ffn_hidden_size={3 * size.hidden}",
            f"language.expert_ffn_hidden_size={size.hidden}",
            f"language.shared_expert_ffn_hidden_size={size.hidden}",
            f"language.q_lora_rank={size.hidden // 2}",
            f"language.kv_lora_rank={size.hidden // 2}",
            f"language.init_std={size.init_std}",
            f"data.seq_length={size.sequence}",
            f"data.vocab_size={size.vocabulary}",
            f"data.vision_share={VISION_SHARE if job.kind == 'vision' else 0.0}",
            f"data.cache_dir={ROOT / '.cache' / 'pretrain'}",
            f"evaluation.sequences={size.held_out}",
            f"evaluation.captions={size.held_out if job.kind == 'vision' else 2}",
            # This module has its own schedule.
            "optimizer.decay_steps=0",
            "optimizer.warmup_steps=0",
            *job.overrides,
        ],
    )
    context = _context()
    return context, prepare_data(settings, context), settings


# ---------------------------------------------------------------------- training


def optimizers(job: Job, groups: Sequence[Mapping[str, Any]]) -> list[Optimizer]:
    """The optimizers of a job, with the same learning rate for all parameters.

    MuonClip uses the layouts of the groups; other implementations update matrices as stored.
    """
    (candidate,) = (c for c in candidates() if c.name == job.optimizer)
    if isinstance(candidate.build, MuonClipBuild):
        options = {"weight_decay": job.weight_decay, **candidate.build.options, **dict(job.options)}
        return [MuonClip([dict(group) for group in groups], lr=job.lr, **options)]
    by_kind: dict[str, list[nn.Parameter]] = {"muon": [], "adamw": []}
    for group in groups:
        by_kind[group["algorithm"]] += [parameter for _, parameter in group["params"]]
    return candidate.build(by_kind["muon"], by_kind["adamw"], job.lr, job.weight_decay)


def rate(step: int, steps: int) -> float:
    """Learning rate of update ``step`` of 1..``steps``, relative to the peak: linear warm-up over
    the first tenth, then a cosine down to a tenth."""
    warmup = max(1, round(_WARMUP * steps))
    if step <= warmup:
        return step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return _FINAL + (1 - _FINAL) * (1 + math.cos(math.pi * done)) / 2


def train(job: Job, device: torch.device, clock: str = "cpu") -> Result:
    """Train a model.

    Args:
        job: the training run.
        device: the device.
        clock: clock on a CPU; "cpu" is the time of this process, independent of other processes.

    Returns:
        ``evaluations``: ``steps``, ``tokens``, ``seconds`` and held-out losses; ``final``: the last
        held-out loss, or None if training ended early because a loss was not finite; ``train``: the
        loss of every step; ``step_s`` and ``optimizer_s``: median times, without evaluations. With
        ``watch``: ``max_logits`` [steps][heads] of the forward pass; ``after``: the max logit of
        the same batch after update and clipping; ``clipped``: number of clipped heads per step.
    """
    model = make(job, device)
    built = optimizers(job, model.groups)
    groups = [group for optimizer in built for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    parameters = [p for group in groups for p in group["params"]]
    clips = job.optimizer.startswith(MUONCLIP) and job.threshold is not None
    for clip in model.clips:
        clip.threshold = job.threshold or clip.threshold
    due = {round(job.steps * (i + 1) / job.evaluations) for i in range(job.evaluations)}
    now = CLOCKS[clock]
    evaluations: dict[str, list[float]] = {}
    losses: list[float] = []
    step_s: list[float] = []
    optimizer_s: list[float] = []
    max_logits: list[list[float]] = []
    after: list[float] = []
    clipped: list[int] = []
    final = None
    for step in range(1, job.steps + 1):
        start = now()
        losses.append(model.gradients(step))
        if not math.isfinite(losses[-1]):
            losses.pop()
            break
        nn.utils.clip_grad_norm_(parameters, _CLIP_GRAD_NORM)
        update_start = now()
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate(step, job.steps)
        for optimizer in built:
            optimizer.step()
        results = [clip.step(clip=clips) for clip in model.clips]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end = now()
        for optimizer in built:
            optimizer.zero_grad(set_to_none=True)
        step_s.append(end - start)
        optimizer_s.append(end - update_start)
        if job.watch:
            heads = [layer for result in results for layer in result.max_logits.values()]
            max_logits.append([round(value, 3) for value in torch.cat(heads).tolist()])
            clipped.append(sum(int(result.num_clipped) for result in results))
            model.observe_logits(step)
            results = [clip.step(clip=False) for clip in model.clips]
            heads = [layer for result in results for layer in result.max_logits.values()]
            after.append(round(float(torch.cat(heads).max()), 3))
        if step in due:
            held_out = model.held_out()
            for name, value in {
                "steps": step,
                "tokens": step * job.size.tokens,
                "seconds": sum(step_s),
                **held_out,
            }.items():
                evaluations.setdefault(name, []).append(value)
            if step == job.steps and math.isfinite(held_out["loss"]):
                final = held_out["loss"]
    return {
        "label": job.label or job.optimizer,
        "kind": job.kind,
        "optimizer": job.optimizer,
        "lr": job.lr,
        "seed": job.seed,
        "parameters": sum(p.numel() for p in parameters),
        "final": final,
        "evaluations": evaluations,
        "train": [round(loss, 7) for loss in losses],
        "step_s": float(np.median(step_s)) if step_s else None,
        "optimizer_s": float(np.median(optimizer_s)) if optimizer_s else None,
        **({"max_logits": max_logits, "after": after, "clipped": clipped} if job.watch else {}),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=positive_int,
        help="parallel runs; default: the number of cores, 1 on a GPU",
    )


def train_all(jobs: Sequence[Job], options: argparse.Namespace) -> list[Result]:
    """Train all jobs in parallel processes and print a line when a job has finished.

    Returns:
        The result of :func:`train` for each job, in their order.
    """
    device: torch.device = options.device
    workers = options.workers or (1 if device.type == "cuda" else os.cpu_count() or 1)
    for vocabulary in {job.size.vocabulary for job in jobs}:
        text(vocabulary)  # prepare the data before the processes need it
    clock = "wall" if device.type == "cuda" else "cpu"
    results: dict[int, Result] = {}
    start = time.monotonic()
    pool = _pool(workers)
    running = {pool.submit(train, job, device, clock): number for number, job in enumerate(jobs)}
    try:
        for future in as_completed(running):
            number = running[future]
            results[number] = future.result()
            elapsed = time.monotonic() - start
            left = elapsed / len(results) * (len(jobs) - len(results))
            loss = results[number]["final"]
            outcome = "diverged" if loss is None else f"held-out loss {loss:.3f}"
            print(
                f"[{len(results)}/{len(jobs)}] {jobs[number]}: {outcome} "
                f"({elapsed:.0f} s, about {left:.0f} s left)",
                flush=True,
            )
    except BaseException:
        pool.shutdown(cancel_futures=True)
        _pool.cache_clear()
        raise
    return [results[number] for number in range(len(jobs))]


@cache
def _pool(workers: int) -> ProcessPoolExecutor:
    """Processes kept for later jobs, because imports take seconds in each of them."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread)


def _one_thread() -> None:
    torch.set_num_threads(1)


def best_rate(results: Iterable[Result]) -> float:
    """The learning rate with the lowest final held-out loss, averaged over its seeds.

    Raises:
        RuntimeError: a seed diverged at every rate.
    """
    finals: dict[float, list[float]] = {}
    for result in results:
        final = math.inf if result["final"] is None else result["final"]
        finals.setdefault(result["lr"], []).append(final)
    means = {lr: float(np.mean(losses)) for lr, losses in finals.items()}
    best = min(means, key=means.__getitem__)
    if math.isinf(means[best]):
        raise RuntimeError("a seed diverged at every learning rate: try lower ones")
    return best


def tune(
    jobs: Sequence[Job],
    rates: Sequence[Sequence[float]],
    seeds: Sequence[int],
    options: argparse.Namespace,
    at: Callable[[Job, float], Job] = lambda job, lr: replace(job, lr=lr),
) -> list[list[Result]]:
    """Train every job at several learning rates, and at further ones while the best rate is the
    lowest or the highest. A single rate is not extended.

    Args:
        jobs: the training runs.
        rates: learning rates of each job.
        seeds: number of seeds of each job per rate, starting with its own.
        options: options of :func:`add_arguments`.
        at: returns a job with a learning rate.

    Returns:
        The results of :func:`train` of each job at all rates and seeds.
    """
    results: list[list[Result]] = [[] for _ in jobs]
    pending = [list(initial) for initial in rates]
    for _ in range(_MAX_EXTENSIONS + 1):
        numbers, batch = [], []
        for number, new_rates in enumerate(pending):
            for lr in new_rates:
                numbers += [number] * seeds[number]
                batch += with_seeds(at(jobs[number], lr), seeds[number])
        if not batch:
            break
        for number, result in zip(numbers, train_all(batch, options), strict=True):
            results[number].append(result)
        pending = [
            further_rates(of_job) if len(initial) > 1 else []
            for of_job, initial in zip(results, rates, strict=True)
        ]
    return results


def further_rates(results: Sequence[Result]) -> list[float]:
    """The next learning rate to try if the best one is the lowest or the highest."""
    tried = sorted({result["lr"] for result in results})
    best = best_rate(results)
    if best == tried[0]:
        return [best / 2]
    return [best * 2] if best == tried[-1] else []


def with_seeds(job: Job, seeds: int) -> list[Job]:
    """The job with consecutive seeds, starting with its own."""
    return [replace(job, seed=job.seed + number) for number in range(seeds)]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; 0 for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
