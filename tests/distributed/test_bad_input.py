"""A user's mistake is one line, all ranks end, and checkpoints are unchanged.

Everything goes through the command line, as a user would, with two processes.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.checkpoint import storage
from tests.distributed import training
from tests.distributed.launch import launch


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A run of ten steps that saved at five and ten."""
    assert error_line(folder, "steps=10", f"run_dir={folder}/trained") == ""
    return folder / "trained"


def error_line(folder: Path, *overrides: str, command: str = "train", world_size: int = 2) -> str:
    """The line that rank 0 prints; every rank must exit with status 1, or 0 and no line."""
    config = str(folder / "tiny.yaml")
    outcomes = launch(
        training.command,
        world_size,
        *(command, config, f"data.cache_dir={folder}/cache", "parallel.expert=2", *overrides),
    )
    lines = [line for _, line in outcomes if line]
    assert len(lines) <= 1, "more than one rank printed a line"
    assert {status for status, _ in outcomes} == {1 if lines else 0}
    return lines[0] if lines else ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lrate=1"], "unknown configuration key 'optimizer.lrate'"),
        (["steps=ten"], "steps must be int, not 'ten'"),
        (["parallel.expert=3"], "parallel.expert=3 does not divide language.num_experts=4"),
        (["language.vocab_size=300"], "language.vocab_size=300 is less than the 400 tokens of"),
        (["parallel.expert=4"], "2 processes cannot be divided by parallel.expert=4"),
        (["global_batch_size=6"], "global_batch_size=6 is not a multiple of 2 data-parallel"),
    ],
)
def test_an_unsuitable_configuration_is_refused(
    folder: Path, overrides: list[str], message: str
) -> None:
    assert message in error_line(folder, *overrides)


def test_a_non_finite_gradient_is_named_and_checkpoints_remain(folder: Path) -> None:
    run_dir = f"run_dir={folder}/explodes"
    steady = ["steps=20", "optimizer.warmup_steps=0"]
    assert error_line(folder, run_dir, *steady, "steps=5") == ""
    line = error_line(folder, run_dir, *steady, "optimizer.lr=1e30")
    assert "the gradient of " in line
    assert "is not finite at step 7" in line
    assert "nothing was updated. Lower optimizer.lr" in line
    assert storage.steps(folder / "explodes" / "checkpoints") == [5]
    assert error_line(folder, run_dir, *steady, "steps=6", "optimizer.decay_steps=0") == ""


def test_a_damaged_checkpoint_is_refused_and_the_previous_one_resumes(
    folder: Path, trained: Path
) -> None:
    newest = storage.path_of(trained / "checkpoints", 10)
    data = next(newest.glob("*.safetensors"))
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    run_dir = f"run_dir={trained}"
    line = error_line(folder, run_dir, "steps=10")
    # Its checksum differs, which one rank finds, and it cannot be read, which others may find.
    assert f"the checkpoint {newest} is damaged: {data.name} " in line
    assert storage.steps(trained / "checkpoints") == [5, 10]
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    assert error_line(folder, run_dir, "steps=10") == ""
    assert storage.steps(trained / "checkpoints") == [5, 10]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("language.hidden_size=64", "was made with language.hidden_size=32, not 64"),
        ("seed=1", "was made with seed=0, not 1"),
        ("vision.num_layers=2", "was made with vision.num_layers=1, not 2"),
        ("data.vision_share=0.1", "was made with data.vision_share=0.2, not 0.1"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    folder: Path, trained: Path, override: str, message: str
) -> None:
    line = error_line(folder, f"run_dir={trained}", "steps=10", override)
    assert message in line
    assert "choose another run_dir" in line


def test_a_folder_without_a_checkpoint_is_refused(folder: Path) -> None:
    stray = folder / "foreign" / "checkpoints" / "step-00000003"
    stray.mkdir(parents=True)
    (stray / "weights.bin").write_bytes(b"not ours")
    line = error_line(folder, f"run_dir={folder}/foreign")
    assert f"{stray} is not a checkpoint of this program" in line
    assert (stray / "weights.bin").read_bytes() == b"not ours"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: path.symlink_to(path.parent / "unmounted"),
            "checkpoints is a link to nothing",
        ),
        (Path.touch, "checkpoints is not a folder"),
    ],
    ids=["link", "file"],
)
def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(
    folder: Path, request: pytest.FixtureRequest, make: Callable[[Path], None], message: str
) -> None:
    """The run neither starts over nor changes its metrics."""
    run_dir = folder / request.node.callspec.id
    run_dir.mkdir()
    make(run_dir / "checkpoints")
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text('{"step": 5}\n')
    assert message in error_line(folder, f"run_dir={run_dir}")
    assert message in error_line(folder, f"run_dir={run_dir}", command="eval")
    assert metrics.read_text() == '{"step": 5}\n'


def test_evaluating_an_untrained_run_is_refused(folder: Path) -> None:
    line = error_line(folder, f"run_dir={folder}/nothing", command="eval")
    assert "nothing has no checkpoint to evaluate: train first" in line


def test_evaluation_prints_losses_and_transcriptions(folder: Path, trained: Path) -> None:
    assert error_line(folder, f"run_dir={trained}", "steps=10", command="eval") == ""


def run_module(*arguments: str, timeout: int) -> subprocess.CompletedProcess[str]:
    """``python -m`` with these arguments, one thread a process."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_torchrun_prints_the_error_and_exits_with_a_status(folder: Path) -> None:
    """With processes of the launcher, which ends all of them when one ends."""
    ended = run_module(
        *("torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *("-m", "pretrain", "train", str(folder / "tiny.yaml"), "optimizer.lr=fast"),
        timeout=120,
    )
    assert ended.returncode != 0
    assert ended.stderr.count("error: optimizer.lr must be float, not 'fast'\n") == 1
    assert 'File "' not in ended.stderr.split("error: ")[0]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("parallel.expert=4", "2 processes cannot be divided by parallel.expert=4"),  # early
        ("data.tokenizer=/nowhere.json", "/nowhere.json"),  # only the ranks read the data
    ],
)
def test_our_launcher_prints_one_line(folder: Path, override: str, line: str) -> None:
    ended = run_module(
        *("pretrain", "train", str(folder / "tiny.yaml")),
        *("--processes", "2", f"data.cache_dir={folder}/cache", override),
        timeout=300,
    )
    errors = [text for text in ended.stderr.splitlines() if "CUDA_HOME" not in text]
    assert ended.returncode == 1 and len(errors) == 1, ended.stderr
    assert errors[0].startswith("error: ") and line in errors[0]


def _train_with_different_learning_rates(folder: str) -> tuple[int, str]:
    """One rank has a different learning rate."""
    override = f"optimizer.lr={1e-3 * (1 + int(os.environ['RANK']))}"
    return training.command("train", f"{folder}/tiny.yaml", override)


def test_ranks_with_different_configurations_are_refused(folder: Path) -> None:
    (status, line), (other_status, other_line) = launch(
        _train_with_different_learning_rates, 2, str(folder)
    )
    assert (status, other_status, other_line) == (1, 1, "")
    assert "the configuration is not the same on all ranks: 1 of 2 differ from rank 0" in line
