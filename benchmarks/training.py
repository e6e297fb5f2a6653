"""Small language models trained under any optimizer: same data, schedule, evaluation and budget.

What the benchmarks of convergence, stability, scaling and ablations share: a :class:`Job` says
what is trained and how, :func:`train_all` trains many of them in processes side by side.

Every model sees real text only (the Python standard library's manual and sources, as the trainer
reads it; whole files are held out) and sees hardly any of it twice.
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
from benchmarks.optimizers import WEIGHT_DECAY, candidates
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
MUONCLIP = "MuonClip"
# Of "vision", in training where nothing else is said and in what it is judged by.
VISION_SHARE = 0.1
# As the trainer's defaults: warm-up, then a cosine down to a tenth.
_WARMUP, _FINAL = 0.1, 0.1
_CLIP_GRAD_NORM = 1.0
_MOST_EXTENSIONS = 3
_PATCH = 14
# A run of so many tokens that is also in the training text counts as seen.
_OVERLAP_TOKENS = 32
MOST_OVERLAP = 0.05


@dataclass(frozen=True)
class Size:
    """Of a model and its batches; ``init_std`` is of its first matrices and tables."""

    hidden: int = 96
    layers: int = 4
    heads: int = 4
    sequence: int = 128
    sequences: int = 16
    vocabulary: int = 1024
    init_std: float = 0.02

    @property
    def tokens(self) -> int:
        """In a step."""
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
        lr: peak learning rate, of matrices and of everything else.
        threshold: QK-Clip's τ; None: logits are watched and never clipped. Under MuonClip it is
            the published 100 where nothing else is said.
        options: of ``MuonClip``, in place of what all Muons share here.
        layouts: "split": matrices that a parameter fuses are updated apart; "fused": as they are
            stored; "per_head": queries, keys and values of each head apart.
        watch: keep every head's largest logit of every step.
        overrides: of the trainer's configuration, for "moe" and "vision".
        label: for people, where several jobs differ in more than optimizer and rate.
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


class Model(Protocol):
    """What is trained: gives gradients for a step's batch, and held-out losses."""

    groups: Sequence[Mapping[str, Any]]
    """Parameter groups for ``MuonClip``, with ``algorithm`` and ``layout``."""
    clips: Sequence[QKClip]

    def gradients(self, step: int) -> float:
        """Leave the batch's mean gradient in ``.grad``; returns the mean loss in nats a token."""

    def look(self, step: int) -> None:
        """Show the clips the logits of the step's batch as the weights are now."""

    def held_out(self) -> dict[str, float]:
        """Mean losses in nats a token; ``loss`` is the one that is compared."""


# ---------------------------------------------------------------------- the models


class Dense:
    """Phi-3's architecture as transformers has it: RMSNorm, rotary positions, SwiGLU, and one
    matrix each for query, key and value and for gate and up."""

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
        """[sequences, length + 1]: inputs and, one further, labels; each begins with BOS."""
        rows = [tokens[int(start) : int(start) + self._size.sequence] for start in starts]
        return nn.functional.pad(torch.stack(rows), (1, 0), value=self._bos)

    def _loss(self, windows: Tensor) -> Tensor:
        logits = self.model(windows[:, :-1]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def _of_step(self, step: int) -> Tensor:
        rng = np.random.default_rng([self._job.seed, step])
        starts = rng.integers(len(self._train) - self._size.sequence, size=self._size.sequences)
        self.model.train()
        return self._loss(self._windows(self._train, starts))

    def gradients(self, step: int) -> float:
        loss = self._of_step(step)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    @torch.no_grad()
    def look(self, step: int) -> None:
        self._of_step(step)

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


class Trained:
    """The trainer's own model in one process: ``configs/laptop.yaml`` at another size."""

    def __init__(self, job: Job, device: torch.device) -> None:
        from pretrain.build import build
        from pretrain.data.builtin.dataset import BuiltIn

        here, data, config = _prepared(job)
        assert isinstance(data, BuiltIn)
        self.run: Run = build(config, here, data)
        if here.device.type != device.type:
            raise ValueError(f"the trainer runs on {here.device.type} here, not {device.type}")
        self.groups: Sequence[Mapping[str, Any]] = [
            {
                "params": list(zip(group["param_names"], group["params"], strict=True)),
                "algorithm": group["algorithm"],
                "layout": None if job.layouts == "fused" else group["layout"],
            }
            for group in self.run.optimizer.param_groups
        ]
        self.clips: Sequence[QKClip] = self.run.clips
        # All are judged by the same sequences, whatever they were trained with.
        share = VISION_SHARE if job.kind == "vision" else 0.0
        judged = replace(data, seed=0, config=replace(data.config, vision_share=share))
        self._judged = replace(self.run, data=judged)

    def _of_step(self, step: int) -> "list[MicroBatch]":
        from pretrain import batches

        return batches.for_step(self.run.config, self.run.context, self.run.data, step)

    def gradients(self, step: int) -> float:
        from pretrain.objective import mean_losses
        from pretrain.step import forward_backward

        loss = mean_losses(forward_backward(self.run, self._of_step(step)))["loss"]
        assert loss is not None
        return loss

    @torch.no_grad()
    def look(self, step: int) -> None:
        from pretrain.step import run_backbone

        self.run.train()
        batch = self._of_step(step)
        features = self.run.encoder.encode([(one.patches, one.grids) for one in batch])
        run_backbone(self.run, batch, features, forward_only=True)

    def held_out(self) -> dict[str, float]:
        from pretrain.evaluate import held_out_losses

        found = {
            name: loss for name, loss in held_out_losses(self._judged).items() if loss is not None
        }
        return {"loss": found["held_out_loss"], **found}


def make(job: Job, device: torch.device) -> Model:
    return Dense(job, device) if job.kind == "dense" else Trained(job, device)


# ---------------------------------------------------------------------- the data


@cache
def text(vocabulary: int) -> "BuiltIn":
    """The built-in data, from the cache or made now; its splits as tokens are what counts here."""
    from pretrain.config import DataConfig
    from pretrain.data import open_data
    from pretrain.data.builtin.dataset import BuiltIn

    cache_dir = str(ROOT / ".cache" / "pretrain")
    data = open_data(DataConfig(vocab_size=vocabulary, cache_dir=cache_dir), _PATCH, seed=0)
    assert isinstance(data, BuiltIn)
    return data


def overlap(size: Size) -> float:
    """Share of the held-out text that stands in the training text word for word: of its runs of
    32 tokens, those that are also there.

    Raises:
        RuntimeError: it is more than 5 %: what is measured would partly be memory.
    """
    share = _shared(size.vocabulary)
    if share > MOST_OVERLAP:
        raise RuntimeError(
            f"{share:.1%} of the held-out text is also in the training text (at most "
            f"{MOST_OVERLAP:.0%}): losses on it would measure memory"
        )
    return share


@cache
def _shared(vocabulary: int) -> float:
    corpora = text(vocabulary).corpora
    train, held_out = (_runs(corpora[split].tokens) for split in ("train", "held_out"))
    return float(np.isin(held_out, train).mean())


def _runs(tokens: Any) -> Any:
    """A hash of each run of tokens, uint64: a polynomial that wraps around."""
    factor = np.uint64(0x9E3779B97F4A7C15)
    hashed = np.zeros(len(tokens) - _OVERLAP_TOKENS + 1, np.uint64)
    for place in range(_OVERLAP_TOKENS):
        hashed = (
            hashed * factor + tokens[place : place + len(hashed)].astype(np.uint64) + np.uint64(1)
        )
    return hashed


@cache
def _here() -> Any:
    # First: on a CPU the trainer puts functions in place of CUDA's classes, which the annotations
    # of transformers' modules do not bear.
    import transformers.models.phi3.modeling_phi3  # noqa: F401

    from pretrain import parallel
    from pretrain.config import ParallelConfig

    return parallel.start(ParallelConfig(), 0)


def _prepared(job: Job) -> tuple[Any, Any, Any]:
    """Process group, data and configuration of the trainer."""
    from pretrain import config
    from pretrain.setup import prepare_data

    size = job.size
    settings = config.load(
        ROOT / "configs" / "laptop.yaml",
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
            # The schedule is this module's own.
            "optimizer.decay_steps=0",
            "optimizer.warmup_steps=0",
            *job.overrides,
        ],
    )
    here = _here()
    return here, prepare_data(settings, here), settings


# ---------------------------------------------------------------------- training


def optimizers(job: Job, groups: Sequence[Mapping[str, Any]]) -> list[Optimizer]:
    """Those that step a model, each with one rate for everything.

    MuonClip takes the groups with their layouts; peers take each matrix as it is stored.
    """
    if job.optimizer == MUONCLIP:
        options: dict[str, Any] = {"weight_decay": job.weight_decay} | dict(job.options)
        return [MuonClip([dict(group) for group in groups], lr=job.lr, **options)]
    by_kind: dict[str, list[nn.Parameter]] = {"muon": [], "adamw": []}
    for group in groups:
        by_kind[group["algorithm"]] += [parameter for _, parameter in group["params"]]
    (candidate,) = (one for one in candidates() if one.name == job.optimizer)
    return candidate.build(by_kind["muon"], by_kind["adamw"], job.lr, job.weight_decay)


def rate(step: int, steps: int) -> float:
    """The factor on the peak rate at update ``step`` of 1..``steps``: a linear warm-up over the
    first tenth, then a cosine down to a tenth."""
    warmup = max(1, round(_WARMUP * steps))
    if step <= warmup:
        return step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return _FINAL + (1 - _FINAL) * (1 + math.cos(math.pi * done)) / 2


def train(job: Job, device: torch.device, clock: str = "cpu") -> Result:
    """Train, and tell how it went.

    Args:
        clock: of a CPU; "cpu": of this process alone, so that what runs beside does not count.

    Returns:
        ``steps``, ``tokens``, ``seconds`` and ``loss`` (held out) at each evaluation, with what
        else the model measures; ``final``, the last held-out loss, or None where the loss was not
        finite and training ended; ``train`` and ``step_s``/``optimizer_s``, loss and time of every
        step; with ``watch`` also ``max_logits`` [steps][heads] in the step's forward pass,
        ``after`` the step, the largest of all heads on the same batch once updated and clipped, and
        ``clipped``, heads a step. Evaluations and looking again are in no time.
    """
    model = make(job, device)
    stepped = optimizers(job, model.groups)
    peaks = [[group["lr"] for group in one.param_groups] for one in stepped]
    parameters = [p for one in stepped for group in one.param_groups for p in group["params"]]
    clips = job.optimizer == MUONCLIP and job.threshold is not None
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
        begun = now()
        losses.append(model.gradients(step))
        if not math.isfinite(losses[-1]):
            losses.pop()
            break
        nn.utils.clip_grad_norm_(parameters, _CLIP_GRAD_NORM)
        passed = now()
        for one, rates in zip(stepped, peaks, strict=True):
            for group, peak in zip(one.param_groups, rates, strict=True):
                group["lr"] = peak * rate(step, job.steps)
            one.step()
        results = [clip.step(clip=clips) for clip in model.clips]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done = now()
        for one in stepped:
            one.zero_grad(set_to_none=True)
        step_s.append(done - begun)
        optimizer_s.append(done - passed)
        if job.watch:
            heads = [layer for result in results for layer in result.max_logits.values()]
            max_logits.append([round(value, 3) for value in torch.cat(heads).tolist()])
            clipped.append(sum(int(result.num_clipped) for result in results))
            model.look(step)
            results = [clip.step(clip=False) for clip in model.clips]
            heads = [layer for result in results for layer in result.max_logits.values()]
            after.append(round(float(torch.cat(heads).max()), 3))
        if step in due:
            told = model.held_out()
            for name, value in {
                "steps": step,
                "tokens": step * job.size.tokens,
                "seconds": sum(step_s),
                **told,
            }.items():
                evaluations.setdefault(name, []).append(value)
            if step == job.steps and math.isfinite(told["loss"]):
                final = told["loss"]
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
        help="runs side by side; default: as many as cores, 1 on a GPU",
    )


def train_all(jobs: Sequence[Job], options: argparse.Namespace) -> list[Result]:
    """Train every job, several side by side, with a line on each that ends.

    Returns:
        What :func:`train` tells, in the jobs' order.
    """
    device: torch.device = options.device
    workers = options.workers or (1 if device.type == "cuda" else os.cpu_count() or 1)
    for vocabulary in {job.size.vocabulary for job in jobs}:
        text(vocabulary)  # before several would make it at once
    clock = "wall" if device.type == "cuda" else "cpu"
    told: dict[int, Result] = {}
    begun = time.monotonic()
    pool = _pool(workers)
    running = {pool.submit(train, job, device, clock): number for number, job in enumerate(jobs)}
    try:
        for ended in as_completed(running):
            number = running[ended]
            told[number] = ended.result()
            passed = time.monotonic() - begun
            left = passed / len(told) * (len(jobs) - len(told))
            loss = told[number]["final"]
            shown = "diverged" if loss is None else f"held-out loss {loss:.3f}"
            print(
                f"[{len(told)}/{len(jobs)}] {jobs[number]}: {shown} "
                f"({passed:.0f} s, about {left:.0f} s to go)",
                flush=True,
            )
    except BaseException:
        pool.shutdown(cancel_futures=True)
        _pool.cache_clear()
        raise
    return [told[number] for number in range(len(jobs))]


@cache
def _pool(workers: int) -> ProcessPoolExecutor:
    """Processes that stay for the next jobs: each needs seconds to import what it trains with."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread)


def _one_thread() -> None:
    torch.set_num_threads(1)


def best_rate(results: Iterable[Result]) -> float:
    """The learning rate with the least held-out loss at the end, the mean over its seeds.

    Raises:
        RuntimeError: at every rate a seed diverged.
    """
    ends: dict[float, list[float]] = {}
    for result in results:
        end = math.inf if result["final"] is None else result["final"]
        ends.setdefault(result["lr"], []).append(end)
    means = {lr: float(np.mean(losses)) for lr, losses in ends.items()}
    best = min(means, key=means.__getitem__)
    if math.isinf(means[best]):
        raise RuntimeError("every learning rate diverged: try lower ones")
    return best


def tune(
    jobs: Sequence[Job],
    rates: Sequence[Sequence[float]],
    seeds: Sequence[int],
    options: argparse.Namespace,
    at: Callable[[Job, float], Job] = lambda job, lr: replace(job, lr=lr),
) -> list[list[Result]]:
    """Train every job at its learning rates; where the best lies at an end of them, one more is
    tried beyond it. A single rate is taken as it is.

    Args:
        rates: of each job.
        seeds: of each job, how many at every rate: its own and those that follow.
        at: makes the job with a rate.

    Returns:
        What :func:`train` tells, of each job at all rates and seeds.
    """
    told: list[list[Result]] = [[] for _ in jobs]
    wanted = [list(tried) for tried in rates]
    for _ in range(_MOST_EXTENSIONS + 1):
        numbers, batch = [], []
        for number, missing in enumerate(wanted):
            for lr in missing:
                numbers += [number] * seeds[number]
                batch += with_seeds(at(jobs[number], lr), seeds[number])
        if not batch:
            break
        for number, result in zip(numbers, train_all(batch, options), strict=True):
            told[number].append(result)
        wanted = [
            _beyond(results) if len(first) > 1 else []
            for results, first in zip(told, rates, strict=True)
        ]
    return told


def _beyond(results: Sequence[Result]) -> list[float]:
    """One rate more, where the best of those tried is the least or the largest."""
    tried = sorted({result["lr"] for result in results})
    best = best_rate(results)
    if best == tried[0]:
        return [best / 2]
    return [best * 2] if best == tried[-1] else []


def with_seeds(job: Job, seeds: int) -> list[Job]:
    """The job with its own seed and those that follow."""
    return [replace(job, seed=job.seed + number) for number in range(seeds)]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; 0 of one)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
