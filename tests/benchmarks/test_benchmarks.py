"""Every benchmark runs, and what it stores can be read back, drawn and tabulated."""

import json
import math
import os
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks import __main__ as command
from benchmarks import runner
from benchmarks.optimizer_step import update_error
from benchmarks.optimizers import BASELINE, Candidate, candidates
from benchmarks.workloads import Workload, workloads

# Peers that compile would take minutes; one model shows what all do.
ONLY = {
    "convergence": ["--models", "moe"],
    "optimizer_step": ["--only", "MuonClip", "textbook", "AdamW"],
    "optimizer_memory": ["--only", "bfloat16 momentum"],
}


def checkpoints_are_charged(result: dict[str, Any]) -> None:
    """To the steps between two, of configs/laptop.yaml; written whole, and by another thread."""
    saved = result["checkpoint"]
    assert saved["every"] == 120
    assert saved["bytes"] > 8 * result["parameters"]  # weights and momentum
    assert saved["copy_s"] > 0 and saved["writer_s"] > 0
    parts = result["parts_s"]
    assert parts["writer"] == pytest.approx(saved["writer_s"] / 120)
    assert parts["copy"] == pytest.approx(saved["copy_s"] / 120)


def a_kill_changed_nothing(result: dict[str, Any]) -> None:
    assert len(result["kills"]) == 1
    assert result["kills"][0]["after_step"] >= result["kills"][0]["resumed_from"]
    assert len(result["losses"]) == result["steps"] == 12
    assert result["losses"] == result["expected"]


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "crash": a_kill_changed_nothing,
    "overhead": checkpoints_are_charged,
}


def leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


@pytest.mark.parametrize(
    "name",
    [
        "ablations",
        "coefficients",
        "convergence",
        "crash",
        "dep",
        "dep_plan",
        "optimizer_memory",
        "optimizer_step",
        "overhead",
        "scaling",
        "stability",
        "training_speed",
    ],
)
def test_a_benchmark_stores_its_result_and_picture(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(
        ["run", name, "--tiny", "--device", "cpu", "--out", str(tmp_path), *ONLY.get(name, [])]
    )
    printed = capsys.readouterr().out
    text = (tmp_path / f"{name}-tiny-cpu.json").read_text()
    stored = json.loads(text)
    numbers = [leaf for leaf in leaves(stored["result"]) if isinstance(leaf, float)]
    assert numbers and all(map(math.isfinite, numbers))
    CHECKS.get(name, lambda result: None)(stored["result"])
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["machine"]["cores"] == os.cpu_count()
    # Results are published: nothing in them tells whose machine it was.
    assert str(tmp_path) not in text and str(runner.ROOT) not in text
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)

    png = (tmp_path / f"{name}-tiny-cpu.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width > 300 and height > 150

    table = runner.table(command.benchmark(name), tmp_path / f"{name}-tiny-cpu.json")
    assert table in printed
    command.main(["table", name, str(tmp_path / f"{name}-tiny-cpu.json")])
    assert capsys.readouterr().out.strip() == table.strip()


def test_the_tables_of_the_readme_are_those_of_the_stored_results() -> None:
    text = command.README.read_text()
    assert "<!-- table " in text
    assert command.with_tables(text) == text, "run: python -m benchmarks readme"


def test_every_picture_and_result_that_the_readme_names_is_there() -> None:
    for path in re.findall(r"results/[\w.-]+", command.README.read_text()):
        assert (command.README.parent / path).exists(), path


def test_each_benchmark_is_listed_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    command.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == command.names()
    assert all(len(line.split()) > 4 for line in lines)


def test_timing_is_interleaved_and_every_round_starts_with_another() -> None:
    called: list[str] = []
    steps = {name: (lambda name=name: called.append(name)) for name in "abc"}
    prepared: list[str] = []
    seconds = runner.interleave(steps, rounds=3, warmup=1, before=prepared.append)
    assert called == prepared
    rounds = ["".join(called[start : start + 3]) for start in range(0, 12, 3)]
    assert rounds[1:] == ["abc", "bca", "cab"]
    assert sorted(rounds[0]) == ["a", "b", "c"]
    assert [len(times) for times in seconds.values()] == [3, 3, 3]


def test_speedup_pairs_the_times_of_a_round() -> None:
    """A machine that slows down twofold in the middle of it does not change who is faster."""
    seconds = {"base": [2.0, 4.0, 4.0], "fast": [1.0, 2.0, 2.0]}
    summary = runner.summarise(seconds, "base")
    assert summary["fast"]["speedup"] == 2
    assert summary["fast"]["speedup_quartiles"] == [2, 2]
    assert summary["base"]["median_s"] == 4
    assert summary["fast"]["quartiles_s"] == [1.5, 2]


@pytest.mark.parametrize(
    "candidate",
    [c for c in candidates() if c.module is None and c.coefficients],
    ids=lambda candidate: candidate.name,
)
def test_what_is_compared_is_the_same_optimizer(candidate: Candidate) -> None:
    """Momentum, look-ahead, coefficients and steps are those of the definition."""
    error = update_error(candidate, torch.device("cpu"))
    assert error < (0.1 if "bfloat16" in candidate.name + candidate.arithmetic else 1e-5)


def test_the_comparison_would_notice_another_optimizer() -> None:
    def build(
        matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float, decay: float
    ) -> list[torch.optim.Optimizer]:
        return [torch.optim.Muon(matrices, lr=lr, weight_decay=decay, nesterov=False)]

    without_nesterov = Candidate("no look-ahead", build)  # type: ignore[arg-type]
    assert update_error(without_nesterov, torch.device("cpu")) > 0.1


def test_a_peer_that_is_not_there_is_said_so_and_a_namesake_is_not_taken_for_it() -> None:
    cpu = torch.device("cpu")
    peer = Candidate("peer", lambda *_: [], module=("no_such_package_anywhere", "Muon"))
    assert peer.missing(cpu) == "not installed"
    namesake = Candidate("peer", lambda *_: [], module=("json", "Muon"))
    assert namesake.missing(cpu) == "another package is called 'json' here"
    elsewhere = Candidate("peer", lambda *_: [], devices=("cuda",))
    assert elsewhere.missing(cpu) == "compared on cuda only"


def test_candidates_by_name_keep_the_baseline() -> None:
    assert [c.name for c in candidates(["textbook"])] == [BASELINE, "textbook loop, float32"]
    with pytest.raises(ValueError, match="no optimizer has 'nosuch' in its name"):
        candidates(["nosuch"])
    with pytest.raises(ValueError, match="no optimizer is called 'nosuch'"):
        candidates(without=["nosuch"])
    with pytest.raises(ValueError, match="cannot be left out"):
        candidates(without=[BASELINE])
    left = [c.name for c in candidates(["MuonClip"], without=["MuonClip, bfloat16"])]
    assert left == [BASELINE, "MuonClip", "MuonClip, bfloat16 momentum"]


def test_flops_of_newton_schulz() -> None:
    """Per step xxᵀ, its square, and the product with x: 2n²m + 2n³ + 2n²m."""
    one = 5 * (2 * 3 * 3 * 7 + 2 * 3**3 + 2 * 3 * 3 * 7)
    assert Workload("", "", [(3, 7)], []).flops() == one
    assert Workload("", "", [(7, 3), (4, 3, 7)], [(9, 9)]).flops() == 5 * one


def test_stacked_and_separate_experts_are_the_same_matrices() -> None:
    for form in ("full", "quick", "tiny"):
        by_name = {load.name: load for load in workloads(form)}
        assert by_name["moe_stacked"].flops() == by_name["moe"].flops()


STORED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(result=st.dictionaries(st.text(), STORED))
def test_what_is_stored_is_what_was_measured(result: dict[str, Any]) -> None:
    assert json.loads(runner.dumps(result)) == result


def test_a_list_of_numbers_is_stored_on_a_line() -> None:
    stored = runner.dumps({"losses": [[1.5, 2.0], []], "text": "[\n 1]"})
    assert "  [1.5, 2.0],\n" in stored
    assert json.loads(stored)["text"] == "[\n 1]"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "much"])
def test_a_rate_that_is_none_is_refused_and_not_taken_for_the_default(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["run", "stability", "--tiny", "--lr", value])
    assert "--lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads: must be at least 1, got 0"),
        (["--rounds", "0"], "--rounds: must be at least 1, got 0"),
        (
            ["--clock", "cpu", "--threads", "2"],
            "--clock cpu goes with --device cpu and --threads 1",
        ),
        (["--quick", "--tiny"], "not allowed with"),
        (["--only", "nosuch", "--tiny"], "nosuch"),
        (["--workloads", "nosuch", "--tiny"], "nosuch not among dense, moe, moe_stacked"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as stopped:
        command.main(["run", "optimizer_step", "--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err + str(stopped.value)
    assert not list(tmp_path.iterdir())
    assert torch.get_num_threads() == threads
