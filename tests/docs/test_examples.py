"""The examples run unchanged, learn, and resume exactly."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """The example with the name of the test."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(request.node.originalname.removeprefix("test_"))


def losses_in(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", output)]


def run(processes: int, script: str, *arguments: object) -> list[float]:
    """The losses that an example prints under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(ROOT / "tests" / "docs" / "run_example.py")]
    command += [str(EXAMPLES / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return losses_in(process.stdout)


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_plain_loop(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(tmp_path / "straight", 20)
    losses = losses_in(capsys.readouterr().out)
    assert losses[-1] < 0.8 * losses[0]
    example.main(tmp_path / "stopped", 10)
    example.main(tmp_path / "stopped", 20)
    assert losses_in(capsys.readouterr().out) == losses
    straight, stopped = (torch.load(tmp_path / name) for name in ("straight", "stopped"))
    assert all(map(torch.equal, straight["model"].values(), stopped["model"].values()))


def test_ddp_and_fsdp2_and_a_change_of_ranks(tmp_path: Path) -> None:
    """The same training with replicas, with shards, and with shards on fewer ranks from step 10."""
    losses = run(2, "ddp.py", 20)
    assert losses[-1] < 0.8 * losses[0]
    first, second = tmp_path / "first", tmp_path / "second"
    sharded = run(2, "fsdp2.py", 10, first) + run(1, "fsdp2.py", 20, second, first)
    assert sharded == pytest.approx(losses, abs=2e-3)


def test_hf_trainer(example: Any, tmp_path: Path) -> None:
    straight = example.main(str(tmp_path / "straight"))
    losses = [entry["loss"] for entry in straight.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    checkpoint = str(tmp_path / "straight" / "checkpoint-10")
    resumed = example.main(str(tmp_path / "resumed"), resume_from=checkpoint)
    assert same_weights(straight.model, resumed.model)


def test_accelerate_loop(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight = example.main(20, str(tmp_path / "straight"))
    losses = losses_in(capsys.readouterr().out)
    assert losses[-1] < 0.8 * losses[0]
    example.main(10, str(tmp_path / "stopped"))
    resumed = example.main(20, str(tmp_path / "resumed"), str(tmp_path / "stopped"))
    assert losses_in(capsys.readouterr().out) == losses
    assert same_weights(straight, resumed)


def test_lightning_module(example: Any, tmp_path: Path) -> None:
    straight = example.main(str(tmp_path / "straight"))
    checkpoint = str(tmp_path / "straight" / "epoch=0.ckpt")
    resumed = example.main(str(tmp_path / "resumed"), resume_from=checkpoint)
    assert same_weights(straight, resumed)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_lightning_module_can_be_fitted_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: Any
) -> None:
    """A second ``fit`` builds another optimizer and clip for the same model."""
    import lightning
    from torch.utils.data import DataLoader

    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("lightning_module")
    module = example.Module()
    for _ in range(2):
        trainer = lightning.Trainer(
            max_epochs=1, precision=precision, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, DataLoader(list(example.batch(0).chunk(2)), batch_size=None))
        assert module.trainer.callback_metrics["loss"].isfinite()
