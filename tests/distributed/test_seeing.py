"""Traces and Weights & Biases, where the configuration asks for them."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from pretrain.config import WandbConfig
from pretrain.errors import PretrainError
from pretrain.metrics import read
from pretrain.runtime.wandb_run import open_run
from tests.distributed import training
from tests.distributed.launch import launch

SHORT = ("optimizer.warmup_steps=2", "optimizer.decay_steps=0", "evaluation.every=100")


def test_every_rank_traces_the_steps_and_wandb_has_the_numbers(
    tmp_path: Path, prepared: Path
) -> None:
    training.tiny_file(tmp_path, prepared)
    asked = ("profile.steps=[2, 3]", "wandb.enabled=true", "peak_tflops=null")
    launch(training.train_and_read, 2, str(tmp_path), "steps=4", *SHORT, *asked)
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "traces").iterdir()) == [
        f"steps-2-3-rank-{rank}.json.gz" for rank in (0, 1)
    ]
    for path in (run / "traces").iterdir():
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = [event.get("name") for event in events]
        for part in ("encode", "backbone", "encode again, backwards", "optimizer", "QK-Clip"):
            assert names.count(part) == 2, part
        assert "aten::mm" in names
    assert all(record["mfu"] > 0 for record in read(run / "metrics.jsonl")[1:])
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    assert (run / "wandb_id.txt").read_text() in file.name
    stored = file.read_bytes()
    for name in (b"text_loss", b"language_max_logits/1", b"expert_loads/0", b"mfu"):
        assert name in stored


def test_without_wandb_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PretrainError, match=r"pip install 'muonclip\[wandb\]'"):
        open_run(WandbConfig(enabled=True), tmp_path, {})


def test_a_run_dir_that_cannot_be_is_told_by_all_ranks(tmp_path: Path, prepared: Path) -> None:
    training.tiny_file(tmp_path, prepared)
    (tmp_path / "file").write_text("")
    outcomes = launch(
        training.command,
        2,
        *("train", str(tmp_path / "tiny.yaml"), f"run_dir={tmp_path}/file/run"),
        f"data.cache_dir={tmp_path}/cache",
    )
    (status, told), other = outcomes
    assert status == 1 and other == (1, "")
    assert told.startswith("error: cannot write") and told.count("\n") == 0
    assert f"{tmp_path}/file/run" in told and "Not a directory" in told
