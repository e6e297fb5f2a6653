"""Runs on a GPU follow the same run on a CPU in float64."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import generate, parallel
from tests.gpu.devices import DEVICES
from tests.gpu.training import SIZES, prepare, run

Records = list[dict[str, Any]]
# Largest difference of losses, in nats per token, in the first step and in all.
TOLERANCES = {"float32": (1e-4, 0.02), "bfloat16": (0.02, 0.1)}


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, prepared: Path
) -> Callable[[str], tuple[Path, Records]]:
    """The folder and the records of the float64 run with a device's sizes."""
    runs: dict[str, tuple[Path, Records]] = {}

    def of(device: str) -> tuple[Path, Records]:
        if device not in runs:
            folder = prepare(tmp_path_factory.mktemp(device), prepared)
            runs[device] = folder, run(folder, "reference", "reference", *SIZES[device])
        return runs[device]

    return of


@pytest.fixture(scope="module")
def in_float32(
    reference: Callable[[str], tuple[Path, Records]],
) -> Callable[[str], tuple[Path, Records]]:
    """The folder and the records of the run in float32 with torch's kernels."""
    runs: dict[str, tuple[Path, Records]] = {}

    def of(device: str) -> tuple[Path, Records]:
        if device not in runs:
            folder, _ = reference(device)
            options = ("kernels=torch", "precision=float32", *SIZES[device])
            runs[device] = folder / "float32", run(folder, device, "float32", *options)
        return runs[device]

    return of


def require_close(records: Records, expected: Records, precision: str) -> None:
    first, every = TOLERANCES[precision]
    steps = [(a, b) for a, b in zip(records, expected, strict=True) if "loss" in a]
    assert len(steps) == 10
    assert abs(steps[0][0]["loss"] - steps[0][1]["loss"]) < first
    for actual, exact in steps:
        assert abs(actual["loss"] - exact["loss"]) < every, f"step {actual['step']}"
    for name in ("grad_norm", "max_logit", "update_rms_muon", "update_rms_adamw"):
        expected_value = pytest.approx(steps[0][1][name], rel=10 * first, abs=first)
        assert steps[0][0][name] == expected_value, name


@DEVICES
def test_losses_follow_those_of_a_cpu_in_float64(
    device: str,
    reference: Callable[[str], tuple[Path, Records]],
    in_float32: Callable[[str], tuple[Path, Records]],
) -> None:
    require_close(in_float32(device)[1], reference(device)[1], "float32")


@DEVICES
@pytest.mark.parametrize("kernels", ["torch", "transformer_engine"])
def test_losses_in_bfloat16_follow_those_of_a_cpu_in_float64(
    device: str, kernels: str, reference: Callable[[str], tuple[Path, Records]]
) -> None:
    if kernels == "transformer_engine":
        if device == "cpu":
            pytest.skip("Transformer Engine needs a GPU")
        if importlib.util.find_spec("transformer_engine") is None:
            pytest.skip("Transformer Engine is not installed")
    folder, expected = reference(device)
    options = (f"kernels={kernels}", "precision=bfloat16", *SIZES[device])
    require_close(run(folder, device, kernels, *options), expected, "bfloat16")


@pytest.mark.parametrize(
    ("device", "layout"),
    [
        *(
            pytest.param("cuda", layout, marks=pytest.mark.gpu)
            for layout in ("expert", "tensor", "pipeline", "context")
        ),
        ("cpu", "pipeline"),
    ],
)
def test_two_gpus_follow_one_cpu(
    device: str, layout: str, reference: Callable[[str], tuple[Path, Records]]
) -> None:
    """Over NCCL."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder, expected = reference(device)
    options = (f"parallel.{layout}=2", "kernels=torch", *SIZES[device])
    records = run(folder, device, layout, *options, processes=2)
    require_close(records, expected, "float32")


@DEVICES
def test_a_run_is_resumed_and_sampled(
    device: str,
    reference: Callable[[str], tuple[Path, Records]],
    in_float32: Callable[[str], tuple[Path, Records]],
) -> None:
    """Resuming loads weights and optimizer state to the device."""
    folder, expected = reference(device)
    options = ("kernels=torch", "precision=float32", *SIZES[device])
    shutil.copytree(in_float32(device)[0], folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / "step-00000010")
    require_close(run(folder, device, "resumed", *options), expected, "float32")
    try:
        model = generate.load(folder / "resumed")
        assert isinstance("".join(generate.sample(model, "def", max_tokens=4)), str)
    finally:
        parallel.stop()
