"""Metrics are written completely, to metrics.jsonl and to TensorBoard."""

import math
import resource
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.metrics import read, scalars
from pretrain.runtime.metrics_writer import AppendedFile, MetricsWriter

STEP = {
    "loss": 3.5,
    "text_loss": 3.25,
    "caption_loss": None,
    "tokens_per_second": 1000.0,
    "mfu": 0.25,
    "max_logit": 7.5,
    "language_max_logits": [7.5, 2.5],
    "vision_max_logits": [None],
    "heads_clipped": 1,
    "heads": 6,
    "expert_load": 1.5,
    "encoder_balance": 1.0,
    "grad_norm": 0.5,
    "lr": 1e-3,
}


def test_tensorboard_has_all_scalars_and_values_by_layer(tmp_path: Path) -> None:
    out = MetricsWriter(tmp_path, steps=2, done=0, log_every=10, enabled=True)
    for step in (1, 2):
        out.write({"step": step, **STEP})
    out.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    expected = scalars(STEP)
    assert set(board.Tags()["scalars"]) == set(expected)
    assert expected["language_max_logits/1"] == 2.5
    assert not [name for name in expected if name.startswith(("caption", "vision"))]
    for name, value in expected.items():
        events = board.Scalars(name)
        assert [event.step for event in events] == [1, 2]
        assert all(math.isclose(event.value, value, rel_tol=1e-6) for event in events)


def test_records_refused_by_a_full_disk_are_written_once_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = AppendedFile(path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    file.append(b"one\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, unlimited[1]))
    try:
        file.append(b"two\n")  # there is room for two bytes
        file.append(b"three\n")
        assert path.read_bytes() == b"one\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    file.append(b"four\n")
    file.close()
    assert path.read_bytes() == b"one\ntwo\nthree\nfour\n"
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert "metrics.jsonl (File too large); training continues" in warnings[0]
    assert "metrics.jsonl is written again" in warnings[1]


def test_metrics_without_their_checkpoint_are_renamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of step 0 alone are replaced."""
    path = tmp_path / "metrics.jsonl"
    for last in (0, 7, 8, 0):
        out = MetricsWriter(tmp_path, steps=9, done=0, log_every=10, enabled=True)
        out.write({"step": 0})
        if last:
            out.write({"step": last, **STEP})
        out.close()
    assert [record["step"] for record in read(path)] == [0]
    assert [read(tmp_path / f"metrics.jsonl.{n}")[-1]["step"] for n in (1, 2)] == [7, 8]
    assert not (tmp_path / "metrics.jsonl.3").exists()
    first, second = (x for x in capsys.readouterr().err.splitlines() if "no checkpoint" in x)
    assert f"{path} has metrics up to step 7" in first and f"now in {path}.1" in first
    assert f"now in {path}.2" in second


@pytest.mark.parametrize("enabled", [True, False])
def test_a_deleted_run_folder_is_noticed_by_the_rank_that_writes(
    tmp_path: Path, enabled: bool
) -> None:
    run_dir = tmp_path / "run"
    out = MetricsWriter(run_dir, steps=2, done=0, log_every=10, enabled=enabled)
    out.write({"step": 1, **STEP})
    assert not out.deleted
    if enabled:
        shutil.rmtree(run_dir)
    (run_dir / "checkpoints").mkdir(parents=True)  # as a save does
    out.write({"step": 2, **STEP})
    assert out.deleted == enabled
    out.close()
