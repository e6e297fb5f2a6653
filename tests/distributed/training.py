"""A tiny configuration, and functions of a training run that other processes can run."""

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from muonclip.distributed import ShardedState
from pretrain import batches, cli, config, step
from pretrain.build import Run, build
from pretrain.checkpoint.run import local_shard
from pretrain.checkpoint.storage import LocalShard
from pretrain.config import Config
from pretrain.metrics import read
from pretrain.model.multimodal import MicroBatch
from pretrain.model.packed_documents import keys_per_query
from pretrain.plan.flops import flops_per_token
from pretrain.startup import set_up
from pretrain.train import train

TINY = """
steps: 20
global_batch_size: 8
micro_batch_size: 2
log_every: 5
peak_tflops: 1.0
language: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_heads: 2, q_lora_rank: 16,
  kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8, num_experts: 4,
  expert_ffn_hidden_size: 32, shared_expert_ffn_hidden_size: 32}
vision: {num_layers: 1, hidden_size: 16, num_heads: 2, ffn_hidden_size: 32, position_grid: 8}
data: {seq_length: 96, vocab_size: 400, max_corpus_mb: 1.0, vision_share: 0.2,
  images: {max_chars: 10}}
optimizer: {lr: 5.0e-3, ns_dtype: float32, warmup_steps: 5, decay_steps: 5}
checkpoint: {every: 5}
evaluation: {every: 10, sequences: 4, captions: 6, transcriptions: 2}
"""


def tiny_file(folder: Path, prepared: Path) -> Path:
    """Write the tiny configuration, next to a shared cache; once, before any rank reads
    it."""
    (folder / "cache").symlink_to(prepared)
    path = folder / "tiny.yaml"
    path.write_text(TINY)
    return path


def tiny(folder: str, *overrides: str) -> Config:
    """The tiny run of :func:`tiny_file`, with the cache next to it.

    The override :data:`EXACT` makes it compute in float64, which the trainer does not offer.
    """
    root = Path(folder)
    changes = [override for override in overrides if override != EXACT]
    settings = config.load(
        root / "tiny.yaml",
        [f"run_dir={root / 'run'}", f"data.cache_dir={root / 'cache'}", *changes],
    )
    if EXACT not in overrides:
        return settings
    optimizer = dataclasses.replace(settings.optimizer, ns_dtype="float64")  # type: ignore[arg-type]
    return dataclasses.replace(settings, precision="float64", optimizer=optimizer)  # type: ignore[arg-type]


# Layouts round differently, and so do processors; top-k routing turns a rounding error into another
# expert. In float64 neither is seen: what remains is what a layout does wrong.
EXACT = "precision=float64"

# Without the settings of TINY that are only for MLA, or only for experts.
_GQA = (
    "language.attention=gqa",
    *(f"language.{name}_lora_rank=null" for name in ("q", "kv")),
    *(f"language.{name}_head_dim=null" for name in ("qk_nope", "qk_rope", "v")),
)
_DENSE = (
    "language.num_layers=2", "language.dense_layers=2", "language.num_experts=null",
    "language.experts_per_token=null",
    "language.expert_ffn_hidden_size=null",
    "language.shared_expert_ffn_hidden_size=null",
)  # fmt: skip

# Shapes of published models, in addition to Kimi K2's, which is the default.
SHAPES = {
    # There are fewer tokens than rows.
    "queries without LoRA": ("language.q_lora_rank=null", "language.vocab_size=412"),
    "groups of experts": ("language.expert_groups=2",),
    "softmax router": (
        *("language.router_score=softmax", "language.normalize_expert_weights=false"),
        "language.load_balancing_loss=0.5",
    ),
    "normalized softmax, no shared expert": (
        *("language.router_score=softmax", "language.shared_expert_ffn_hidden_size=0"),
        *_GQA,
        "language.num_kv_heads=2",
        "language.num_heads=4",
        "language.qk_norm=true",
    ),
    "dense": (*_DENSE, *_GQA, "language.head_dim=10", "language.tie_embeddings=true"),
}
# Metrics that are not functions of configuration and seed.
_MACHINE_DEPENDENT = (
    *("memory_gib", "tokens_per_second", "mfu"),
    *("own_seconds", "slowest_ratio", "slowest_rank", "slowest_host"),
)


def comparable(metrics_file: Path) -> list[dict[str, Any]]:
    """The records of a run without metrics that depend on the speed of the machine."""
    return [
        {key: value for key, value in record.items() if key not in _MACHINE_DEPENDENT}
        for record in read(metrics_file)
    ]


def train_and_read(folder: str, *overrides: str) -> list[dict[str, Any]]:
    """Train and return the metrics of every step; no curves are drawn, which takes a second."""
    settings = tiny(folder, *overrides)
    with mock.patch("pretrain.train.save_curves"):
        train(settings)
    return comparable(Path(settings.run_dir) / "metrics.jsonl")


def train_and_prefetch(in_background: bool, folder: str, *overrides: str) -> list[dict[str, Any]]:
    """:func:`train_and_read`, whose batches a thread prepares, or the steps themselves."""
    with mock.patch("pretrain.train._prefetches_in_background", return_value=in_background):
        return train_and_read(folder, *overrides)


def local_tensors(run: Run) -> dict[str, Tensor]:
    """Every tensor of the model and the optimizer's state on this rank, without copies.

    Of a tensor of state that is stored in parts, the parts on this rank.
    """
    state = run.optimizer.named_state(run.parameters())
    parts = {
        f"{name}.{key}.{number}": part
        for name, entries in state.items()
        for key, value in entries.items()
        for number, part in enumerate(value.parts if isinstance(value, ShardedState) else [value])
    }
    return {name: tensor.detach() for name, tensor in run.named_tensors.items()} | parts


def all_gradients(folder: str, *overrides: str) -> dict[str, LocalShard]:
    """This rank's shard of every gradient of the first step, by name in the whole model."""
    return gradients_of_each(folder, [()], *overrides)[0]


def gradients_of_each(
    folder: str, every: Sequence[tuple[str, ...]], *overrides: str
) -> list[dict[str, LocalShard]]:
    """:func:`all_gradients` with each of some settings, which leave processes and data alone."""
    outcomes = []
    here, data = set_up(tiny(folder, *overrides))
    for more in every:
        settings = tiny(folder, *overrides, *more)
        run = build(settings, here, data)
        step.forward_backward(run, batches.for_step(settings, here, data, 1))
        found = {name: p.grad.clone() for name, p in run.parameters() if p.grad is not None}
        assert found.keys() == dict(run.parameters()).keys()
        outcomes.append({name: local_shard(run, name, grad) for name, grad in found.items()})
    return outcomes


def max_logits_before_and_after_a_clip(
    folder: str, *overrides: str
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Max logits, and whether heads were clipped, in two tiny steps on one batch."""
    settings = tiny(folder, "optimizer.lr=1e-30", *overrides)
    here, data = set_up(settings)
    run = build(settings, here, data)
    micro_batches = batches.for_step(settings, here, data, 1)
    outcomes = []
    for number in (1, 2):
        step.train_step(run, micro_batches, number)
        results = [clip.result for clip in run.clips if clip.result is not None]
        max_logits = {
            name: value for result in results for name, value in result.max_logits.items()
        }
        outcomes.append((max_logits, sum(result.num_clipped for result in results)))
    return outcomes


def first_step(folder: str, *overrides: str) -> dict[str, Any]:
    """Metrics of a first step, and in ``seen`` this rank's independent measurements of it."""
    settings = tiny(folder, *overrides)
    here, data = set_up(settings)
    run = build(settings, here, data)
    routed: dict[int, Tensor] = {}

    def count(router: Any, _inputs: Any, outputs: Any) -> None:
        if torch.is_grad_enabled():
            tokens = outputs[1].sum(0)
            routed[router.layer_number] = routed.get(router.layer_number, 0) + tokens

    for chunk in run.language:
        for module in chunk.modules():
            if hasattr(module, "expert_bias"):
                module.register_forward_hook(count)
    before = {p: p.detach().clone() for _, p in run.parameters()}
    metrics = step.train_step(run, batches.for_step(settings, here, data, 1), 1)
    seen: dict[str, Any] = {
        "max_logits": [
            float(logits.max())
            for clip in run.clips
            if clip.result is not None
            for logits in clip.result.max_logits.values()
        ],
        "routed": [tokens.tolist() for _, tokens in sorted(routed.items())],
    }
    for group in run.optimizer.param_groups:
        decay = 1 - group["lr"] * group["weight_decay"]
        moved = [(before[p] * decay - p.detach()) / group["lr"] for p in group["params"]]
        seen.setdefault(group["algorithm"], []).extend(moved)
    for algorithm in ("muon", "adamw"):
        moved = torch.cat([m.flatten() for m in seen[algorithm]])
        seen[algorithm] = float(moved.square().mean().sqrt())
    return {"metrics": metrics, "seen": seen}


def one_document_each(micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches with every sequence as one document, and a weight of every label, as the
    plan counts them."""
    return [
        dataclasses.replace(
            batch,
            documents=torch.zeros_like(batch.documents),
            weights=torch.ones_like(batch.weights),
        )
        for batch in micro_batches
    ]


def _grouped_flops(a: Sequence[int], b: Sequence[int], *_others: Any, **_options: Any) -> int:
    return 2 * a[0] * a[1] * b[-1]


# Operations that torch's counter of FLOPs lacks.
GROUPED = {torch.ops.aten._grouped_mm: _grouped_flops}


def counted_flops(folder: str, *overrides: str) -> tuple[float, float]:
    """FLOPs of a forward of the language model, counted by torch and by the trainer."""
    settings = tiny(folder, "data.vision_share=0", *overrides)
    here, data = set_up(settings)
    run = build(settings, here, data)
    micro_batches = one_document_each(batches.for_step(settings, here, data, 1))
    features = run.encoder.encode([(batch.patches, batch.grids) for batch in micro_batches])
    with FlopCounterMode(display=False, custom_mapping=GROUPED) as counter, torch.no_grad():
        step.run_backbone(run, micro_batches, features, forward_only=True)
    length = settings.data.seq_length
    as_causal = 2 * keys_per_query(length) - 1  # attention computes whole blocks
    per_token = flops_per_token(settings.language, data.tokenizer.vocab_size, as_causal)
    return counter.get_total_flops(), per_token * settings.global_batch_size * length


def command(*arguments: str) -> tuple[int, str]:
    """Run the command line in this process; its exit status and stderr."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        status = cli.main(arguments)
    errors = [line for line in stderr.getvalue().splitlines() if line.startswith("error:")]
    return status, "\n".join(errors)
