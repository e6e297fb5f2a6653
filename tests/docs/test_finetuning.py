"""The guide to finetuning: its examples run, and train what they should."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

GUIDE = Path(__file__).parents[2] / "docs" / "finetuning.md"


def test_the_examples_run() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    names: dict[str, Any] = {}
    full, lora, dora = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    exec(compile(full, str(GUIDE), "exec"), names)
    assert names["optimizer"].qk_clip.result is not None
    exec(compile(lora, str(GUIDE), "exec"), names)
    groups = names["optimizer"].param_groups
    algorithms = {n: g["algorithm"] for g in groups for n in g["param_names"]}
    assert {a for n, a in algorithms.items() if "lora_A" in n} == {"adamw"}
    assert {a for n, a in algorithms.items() if "lora_B" in n} == {"muon"}
    assert all("lora_" in name for name in algorithms)
    trained = [p for n, p in names["model"].named_parameters() if "lora_B" in n]
    assert all(torch.count_nonzero(p) for p in trained)
    exec(compile(dora, str(GUIDE), "exec"), names)
    bounds = names["optimizer"].qk_clip.result.upper_bounds
    assert len(bounds) == 2 and all(bound.isfinite().all() for bound in bounds.values())
