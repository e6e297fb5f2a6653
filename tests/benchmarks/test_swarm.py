"""The benchmark of swarms reads complete runs, and shows before and after."""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import swarm


def complete_run(folder: Path, parallelism: float) -> None:
    names = list(swarm._COLUMNS)
    records = [
        {"step": 0, **{f"held_out_{name}": 1.0 for name in names}},
        {"step": 1, **dict.fromkeys(names, 0.5)},
        {"step": 2, "loss": 0.0},  # the second step of a rollout
        {"step": 3, **dict.fromkeys(names, 0.75)},
        {"step": 4, **{f"held_out_{name}": parallelism for name in names}},
    ]
    (folder / "hf").mkdir(parents=True)
    (folder / "start").mkdir()
    lines = (json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_complete_runs_are_not_repeated(tmp_path: Path) -> None:
    for number, name in enumerate(swarm._NAMES.values()):
        for seed in (0, 1):
            complete_run(tmp_path / f"{name}-{seed}", parallelism=number + seed)
    options = argparse.Namespace(
        form="quick", seeds=2, seed=0, model="none", pretraining="none", runs=tmp_path
    )
    result = swarm.run(options)
    first = result["variants"]["λ = 0"][0]
    assert first["steps"] == [1, 3]
    assert first["rollouts"]["parallelism"] == [0.5, 0.75]
    assert (first["before"]["parallelism"], first["after"]["parallelism"]) == (1.0, 1.0)
    table = swarm.table(result)
    assert "| supervised start | 1.00 ± 0.00 |" in table
    assert "| λ = 0 | 1.50 ± 0.71 |" in table
    figure = Figure()
    swarm.plot(result, figure)
    assert len(figure.axes) == 6
