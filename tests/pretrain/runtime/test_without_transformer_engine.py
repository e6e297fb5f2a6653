"""The trainer runs on any combination of a missing GPU and a missing Transformer Engine."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.extensions import transformer_engine
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils

from pretrain import generate
from pretrain.runtime import without_cuda, without_transformer_engine
from pretrain.train import train
from tests.distributed.launch import launch
from tests.distributed.training import comparable, tiny, tiny_file
from tests.pretrain.runtime.cuda_on_cpu import cuda_on_cpu

ROOT = Path(__file__).parents[3]
STEPS = ("steps=3", "optimizer.warmup_steps=1", "optimizer.decay_steps=1", "evaluation.every=3")
MODULES: tuple[ModuleType, ...] = (multi_latent_attention, moe_utils)


def trained(folder: str, cuda: bool) -> tuple[list[dict[str, Any]], str]:
    """Metrics and a sample of a run that was resumed once."""
    dist.destroy_process_group()  # joining is tested, too
    settings = tiny(folder, f"run_dir={folder}/{cuda}", "checkpoint.every=2", *STEPS)
    if cuda:
        with cuda_on_cpu():
            return train_and_sample(settings)
    return train_and_sample(settings)


def train_and_sample(settings: Any) -> tuple[list[dict[str, Any]], str]:
    train(settings)
    folder = Path(settings.run_dir)
    newest = folder / "checkpoints" / "step-00000003"
    assert newest.is_dir(), sorted(path.name for path in newest.parent.iterdir())
    model = generate.load(folder)
    text = "".join(generate.sample(model, "def", max_tokens=4, temperature=0.0))
    return comparable(folder / "metrics.jsonl"), text


@pytest.mark.skipif(transformer_engine.HAVE_TE, reason="Transformer Engine is not missing")
@pytest.mark.skipif(without_cuda.USE_CUDA, reason="tests/gpu do this")
def test_cuda_without_transformer_engine_trains_as_a_cpu_does(
    tmp_path: Path, prepared: Path
) -> None:
    """Joining, building, training, evaluating, saving and sampling, all as on a GPU machine."""
    tiny_file(tmp_path, prepared)
    (cpu,) = launch(trained, 1, str(tmp_path), False)
    (cuda,) = launch(trained, 1, str(tmp_path), True)
    assert cuda == cpu


def repairs() -> list[Any]:
    defaults = tensor_parallel.CheckpointWithoutOutput.__init__.__defaults__
    return [*(dict(vars(module)) for module in MODULES), defaults]


@pytest.mark.skipif(transformer_engine.HAVE_TE, reason="Transformer Engine is not missing")
def test_repairs_are_made_where_needed_and_reverted() -> None:
    before = repairs()
    without_transformer_engine.enable()
    without_transformer_engine.enable()
    try:
        assert not multi_latent_attention.HAVE_TE
        assert moe_utils.te_general_gemm is None
        assert not tensor_parallel.CheckpointWithoutOutput().fp8
    finally:
        without_transformer_engine.disable()
    without_transformer_engine.disable()
    assert before == repairs()


@pytest.mark.parametrize(
    ("device", "error"),
    [
        ("gpu", "ImportError('no libcudart.so')"),
        ("gpu", "RuntimeError('no libcudart.so')"),
        ("gpu", "OSError(2)"),
        ("cpu", "SystemExit('was imported, and calls CUDA')"),
    ],
)
def test_an_unusable_transformer_engine_is_like_a_missing_one(
    tmp_path: Path, device: str, error: str
) -> None:
    """Importing megatron-core would end in a traceback, whichever kernels are chosen."""
    package = tmp_path / "transformer_engine"
    for name in ("__init__.py", "pytorch/__init__.py"):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(f"raise {error}" if "pytorch" in name else "")
    program = """
import sys
from pretrain.runtime import without_cuda, without_transformer_engine
without_cuda.USE_CUDA = sys.argv[1] == "gpu"
without_transformer_engine.hide_if_unusable()
without_transformer_engine.hide_if_unusable()
from pretrain.config import Config
from pretrain.model.kernels import choose_kernels, transformer_engine_problem
assert choose_kernels(Config()) == "torch"
print(transformer_engine_problem(Config()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, device],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reason = "2" if "OSError" in error else "no libcudart.so"
    expected = f"it cannot be imported ({reason})" if device == "gpu" else "it needs a GPU"
    assert expected in done.stdout


def test_nothing_is_repaired_with_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    monkeypatch.setattr(multi_latent_attention, "HAVE_TE", True)
    before = repairs()
    without_transformer_engine.enable()
    assert before == repairs()
