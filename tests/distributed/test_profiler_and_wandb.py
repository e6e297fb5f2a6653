"""Traces and Weights & Biases, if the configuration enables them."""

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


def test_every_rank_writes_traces_and_wandb_receives_the_metrics(
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
        for part in ("encode", "backbone", "encoder backward", "optimizer", "QK-Clip"):
            assert names.count(part) == 2, part
        assert "aten::mm" in names
    assert all(record["mfu"] > 0 for record in read(run / "metrics.jsonl")[1:])
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    assert (run / "wandb_id.txt").read_text() in file.name
    stored = file.read_bytes()
    for name in (b"text_loss", b"language_max_logits/1", b"expert_loads/0", b"mfu"):
        assert name in stored


def test_a_missing_wandb_is_reported_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PretrainError, match=r"pip install 'muonclip\[wandb\]'"):
        open_run(WandbConfig(enabled=True), tmp_path, {})


def test_all_ranks_report_an_impossible_run_dir(tmp_path: Path, prepared: Path) -> None:
    training.tiny_file(tmp_path, prepared)
    (tmp_path / "file").write_text("")
    outcomes = launch(
        training.command,
        2,
        *("train", str(tmp_path / "tiny.yaml"), f"run_dir={tmp_path}/file/run"),
        f"data.cache_dir={tmp_path}/cache",
    )
    (status, message), other = outcomes
    assert status == 1 and other == (1, "")
    assert message.startswith("error: cannot write") and message.count("\n") == 0
    assert f"{tmp_path}/file/run" in message and "Not a directory" in message
