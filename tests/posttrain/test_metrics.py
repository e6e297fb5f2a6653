"""Metrics of post-training are read back as those of one run."""

from pathlib import Path

import pytest

from posttrain.metrics import read
from pretrain.errors import PretrainError


def test_a_metric_of_another_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "other": "x"}\n{"step": 2, "reward": "high"}\n')
    with pytest.raises(PretrainError, match=f"{path}, line 2: reward cannot be 'high'"):
        read(path)
