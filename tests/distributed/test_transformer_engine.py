"""With Transformer Engine's layers, a run is the same as with ``kernels: torch``.

A stand-in takes the place of Transformer Engine (``tests/stand_in``), so that the layers can be
built and trained on a CPU, in float64. It must be found before megatron-core is imported:
another process starts the ranks.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from pretrain.metrics import training_records
from tests.distributed import training
from tests.distributed.launch import launch
from tests.distributed.test_training import _merged
from tests.distributed.training import EXACT

ROOT = Path(__file__).parents[2]
ENGINE = (
    "kernels=transformer_engine",
    # They run on GPUs only.
    "megatron.apply_rope_fusion=false",
    "megatron.moe_permute_fusion=false",
    # Its gradient is rounded to bfloat16.
    "megatron.cross_entropy_loss_fusion=false",
)
# megatron-core 0.19 can fuse the down-projections.
FUSED = [
    (f"megatron.{name}=true",)
    for name in ("mla_down_proj_fusion",)
    if hasattr(MLATransformerConfig, name)
]
YARN = (
    "language.rope_scaling.factor=4",
    "language.rope_scaling.original_max_position_embeddings=64",
)
RECOMPUTED = (
    ("recompute.granularity=full",),
    (
        "recompute.granularity=selective",
        "megatron.recompute_modules=[mla_up_proj, moe_act, core_attn]",
    ),
)
LAYOUTS = (
    ("parallel.tensor=2",),
    ("parallel.tensor=2", "parallel.expert=2", "ddp.overlap_grad_reduce=true"),
    ("parallel.pipeline=2",),
)
# World size, function of ``training``, its settings, and those of the kernels.
Call = tuple[int, Callable[..., Any], tuple[Any, ...], tuple[str, ...]]
GRADIENTS = (EXACT, *YARN, "language.load_balancing_loss=0.1")
CLIPPED = (EXACT, "optimizer.qk_clip_threshold=0.002")
TRAINED = (EXACT, "optimizer.warmup_steps=2", "optimizer.decay_steps=0", "evaluation.every=100",
           "checkpoint.every=100")  # fmt: skip


@pytest.fixture(scope="module")
def engine(folder: Path) -> dict[str, list[Any]]:
    """Results of all launches with the stand-in: of each rank, by name.

    One process starts them all, because imports take seconds.
    """
    every, clip = training.gradients_of_each, training.max_logits_before_and_after_a_clip
    train, run = training.train_and_read, (*TRAINED, f"run_dir={folder}/continued")
    calls: dict[str, Call] = {
        "alone": (1, every, ([(), *RECOMPUTED, *FUSED], *GRADIENTS), ENGINE),
        **{
            " ".join(layout): (2, training.all_gradients, (*GRADIENTS, *layout), ENGINE)
            for layout in LAYOUTS
        },
        "clip": (1, clip, CLIPPED, ENGINE),
        "two steps": (2, train, (*run, "steps=2", "parallel.tensor=2"), ENGINE),
        "four steps": (1, train, (*run, "steps=4"), ("kernels=torch",)),
        "six steps": (2, train, (*run, "steps=6", "parallel.expert=2"), ENGINE),
    }
    with tempfile.TemporaryDirectory() as exchange:
        Path(exchange, "calls").write_bytes(pickle.dumps((str(folder), list(calls.values()))))
        path = os.pathsep.join([str(ROOT / "tests/stand_in"), str(ROOT)])
        done = subprocess.run(
            [sys.executable, "-m", "tests.distributed.test_transformer_engine", exchange],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        results: list[list[Any]] = pickle.loads(Path(exchange, "results").read_bytes())
        return dict(zip(calls, results, strict=True))


def with_kernels(
    function: Callable[..., Any], folder: str, settings: Sequence[Any], kernels: Sequence[str]
) -> Any:
    """Call a function of ``training`` in a rank; the stand-in needs no GPU and no 16 bits."""
    from pretrain.model import kernels as module

    module.transformer_engine_problem = lambda _config: None
    return function(folder, *settings, *kernels)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # Positions start at 0 in every document, and the table of rotary angles is float32.
        difference = (actual[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)
        assert difference < 1e-6, (name, float(difference))


def test_gradients_are_those_of_torch(folder: Path, engine: dict[str, list[Any]]) -> None:
    """Norms, experts and shards have the same names, and every layout the same gradients.

    Load is balanced in each sequence, of which a micro-batch has two.
    """
    expected = _merged(launch(training.all_gradients, 1, str(folder), *GRADIENTS))
    (alone,) = engine["alone"]
    layouts = [engine[" ".join(layout)] for layout in LAYOUTS]
    for ranks in [*([gradients] for gradients in alone), *layouts]:
        assert_equal(_merged(ranks), expected)


def test_heads_are_clipped_by_the_max_logits_of_the_engine(
    folder: Path, engine: dict[str, list[Any]]
) -> None:
    function = training.max_logits_before_and_after_a_clip
    (expected,) = launch(function, 1, str(folder), *CLIPPED)
    [((before, clipped), after)] = engine["clip"]
    assert_equal(before, expected[0][0])
    assert_equal(after[0], expected[1][0])
    assert clipped == expected[0][1] > 0


def test_a_run_continues_with_other_kernels(folder: Path, engine: dict[str, list[Any]]) -> None:
    """Checkpoints, the optimizer's state and Muon's matrices are the same."""
    (expected,) = launch(training.train_and_read, 1, str(folder), *TRAINED, "steps=6")
    parts = [engine[f"{number} steps"][0] for number in ("two", "four", "six")]
    assert [records[-1]["step"] for records in parts] == [2, 4, 6]
    losses = [[r["loss"] for r in training_records(found)] for found in (expected, parts[-1])]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-7)


if __name__ == "__main__":
    exchange = Path(sys.argv[1])
    run_folder, calls = pickle.loads((exchange / "calls").read_bytes())
    results = [
        launch(with_kernels, size, function, run_folder, settings, kernels)
        for size, function, settings, kernels in calls
    ]
    (exchange / "results").write_bytes(pickle.dumps(results))
