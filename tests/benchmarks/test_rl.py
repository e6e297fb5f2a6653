"""The benchmark of reinforcement learning reads complete runs, and its settings are valid."""

import argparse
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks import rl
from benchmarks.runner import ROOT
from posttrain.config import Config
from pretrain import config


def complete_run(folder: Path, errors: float) -> None:
    before = {"held_out_text_loss": 2.5, "character_error_rate": 0.5, "exact_match": 0.25}
    before |= {"changed_character_error_rate": 0.75, "changed_exact_match": 0.125}
    records = [
        {"step": 0, **before},
        {"step": 1, "reward": 0.5},
        {"step": 2, "reward": 0.75},
        {"step": 2, **before, "character_error_rate": errors, "thinking_accuracy": 0.5},
    ]
    (folder / "hf").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))


def test_complete_runs_are_not_repeated(tmp_path: Path) -> None:
    complete_run(tmp_path / "modes", 0.25)
    for seed in (0, 1):
        for number, variant in enumerate([*rl.READING.values(), *rl.SUMS.values()]):
            complete_run(tmp_path / f"{variant.folder}-{seed}", (number + 2 * seed) / 10)
    options = argparse.Namespace(
        form="quick", seeds=2, seed=0, model="none", pretraining="none", runs=tmp_path, only=None,
        optimizers=["MuonClip", "AdamW"],
    )  # fmt: skip
    result = rl.run(options)
    assert result["reading"]["AdamW"][1]["curves"]["reward"] == [[1, 0.5], [2, 0.75]]
    table = rl.table(result)
    changed = "75.0% ± 0.0% | 12.5% ± 0.0%"
    assert f"| before | {changed} | 50.0% ± 0.0% | 25.0% ± 0.0% | 2.500 ± 0.000 |" in table
    assert f"| AdamW | {changed} | 20.0% ± 14.1% |" in table
    assert "| after | 50.0% | - | 2.500 | 25.0% | 25.0% |" in table
    assert "| Toggle, MuonClip | 50.0% ± 0.0% | - | - | - | - | - | 2.500 ± 0.000 |" in table
    options.optimizers = ["MuonClip"]
    alone = rl.run(options)
    assert list(alone["reading"]) == ["MuonClip"]
    assert list(alone["sums"]) == [name for name in rl.SUMS if name.endswith("MuonClip")]
    figure = Figure()
    rl.plot(result, figure)
    assert len(figure.axes) == 1, "of the plotted metrics, the runs have rewards alone"


@pytest.mark.parametrize("variant", [*rl.READING.values(), *rl.SUMS.values()])
def test_settings_are_valid(variant: rl.Variant) -> None:
    file = f"configs/posttrain/{variant.config}.yaml"
    for changes, _ in rl.FORMS.values():
        loaded = config.load_as(Config, Path(ROOT, file), [*variant.changes, *changes])
        loaded.require_fit("rl")
