"""Every benchmark runs, and its stored results can be read, plotted and printed as tables."""

import json
import math
import multiprocessing
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
from benchmarks import gpu, runner
from benchmarks.optimizer_step import update_error
from benchmarks.optimizers import BASELINE, Candidate, candidates
from benchmarks.workloads import Workload, workloads
from tests.distributed import launch

# Compiling implementations would take minutes; one model is enough.
ONLY = {
    "convergence": ["--models", "moe"],
    "optimizer_step": ["--only", "MuonClip", "textbook", "AdamW"],
    "optimizer_memory": ["--only", "bfloat16 momentum"],
}


def checkpoints_are_measured(result: dict[str, Any]) -> None:
    """Their cost is divided by the steps between checkpoints in benchmarks/trainer.yaml."""
    saved = result["checkpoint"]
    assert saved["every"] == 120
    assert saved["bytes"] > 8 * result["parameters"]  # weights and momentum
    assert saved["copy_s"] > 0 and saved["writer_s"] > 0
    parts = result["parts_s"]
    assert parts["writer"] == pytest.approx(saved["writer_s"] / 120)
    assert parts["copy"] == pytest.approx(saved["copy_s"] / 120)


def blocks_are_written_once(result: dict[str, Any]) -> None:
    """The checkpoint is the same whatever the number of ranks."""
    first, second = result["rows"]
    assert first["ranks"] < second["ranks"]
    assert first["written_bytes"] == second["written_bytes"]
    assert first["blocks"] == second["blocks"]


def kills_change_no_loss(result: dict[str, Any]) -> None:
    assert len(result["kills"]) == 1
    assert result["kills"][0]["after_step"] >= result["kills"][0]["resumed_from"]
    assert len(result["losses"]) == result["steps"] == 12
    assert result["losses"] == result["expected"]


def kernels_without_a_gpu_are_listed_with_the_reason(result: dict[str, Any]) -> None:
    assert [row["kernels"] for row in result["rows"]] == ["torch", "transformer_engine"]
    for row in result["rows"]:
        if row["kernels"] == "torch":
            assert row["tokens_per_second"] > 0 and 0 < row["optimizer_share"] < 1
        else:
            assert "needs a GPU" in row["error"]


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "crash": kills_change_no_loss,
    "gpu": kernels_without_a_gpu_are_listed_with_the_reason,
    "overhead": checkpoints_are_measured,
    "save_plan": blocks_are_written_once,
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
        "attention",
        "coefficients",
        "convergence",
        "crash",
        "data",
        "dep",
        "dep_plan",
        "dep_step",
        "gpu",
        "optimizer_memory",
        "optimizer_step",
        "overhead",
        "revisions",
        "save_plan",
        "scaling",
        "stability",
        "tokenize",
        "training_speed",
    ],
)
def test_benchmarks_store_their_result_and_plot(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Processes of the fork server start faster than those that a benchmark would spawn.
    contexts = {"spawn": launch._context, "fork": multiprocessing.get_context("fork")}
    monkeypatch.setattr(multiprocessing, "get_context", contexts.__getitem__)
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
    # Results are published: they must not identify the machine.
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


def test_the_benchmark_of_a_gpu_trains_as_many_layers_as_fit_its_memory() -> None:
    layers = [gpu.layers_that_fit("full", gib * 2**30) for gib in (1, 79, 139)]
    assert layers[0] == 2  # one dense layer, one with experts
    assert layers[0] < layers[1] < layers[2] == 16


def test_tables_in_the_readme_are_those_of_the_stored_results() -> None:
    text = command.README.read_text()
    assert "<!-- table " in text
    assert command.with_tables(text) == text, "run: python -m benchmarks readme"


def test_files_named_in_the_readme_exist() -> None:
    for path in re.findall(r"results/[\w.-]+", command.README.read_text()):
        assert (command.README.parent / path).exists(), path


def test_each_benchmark_is_listed_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    command.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == command.names()
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize("content", [None, "no JSON", "[]", '{"benchmark": "dep"}'])
def test_tables_of_other_files_are_refused(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit):
        command.main(["table", "stability", str(file)])
    assert f"{file} is not a stored result of stability" in capsys.readouterr().err


def test_timing_is_interleaved_and_rounds_rotate_the_order() -> None:
    called: list[str] = []
    steps = {name: (lambda name=name: called.append(name)) for name in "abc"}
    prepared: list[str] = []
    seconds = runner.interleave(steps, rounds=3, warmup=1, before=prepared.append)
    assert called == prepared
    rounds = ["".join(called[start : start + 3]) for start in range(0, 12, 3)]
    assert rounds[1:] == ["abc", "bca", "cab"]
    assert sorted(rounds[0]) == ["a", "b", "c"]
    assert [len(times) for times in seconds.values()] == [3, 3, 3]


def test_speedup_compares_times_within_a_round() -> None:
    """A machine that becomes twice as slow does not change the speedup."""
    seconds = {"base": [2.0, 4.0, 4.0], "fast": [1.0, 2.0, 2.0]}
    summary = runner.summarize(seconds, "base")
    assert summary["fast"]["speedup"] == 2
    assert summary["fast"]["speedup_quartiles"] == [2, 2]
    assert summary["base"]["median_s"] == 4
    assert summary["fast"]["quartiles_s"] == [1.5, 2]


@pytest.mark.parametrize(
    "candidate",
    [c for c in candidates() if c.module is None and c.coefficients],
    ids=lambda candidate: candidate.name,
)
def test_candidates_implement_muon(candidate: Candidate) -> None:
    """Momentum, Nesterov, coefficients and steps are those of the definition."""
    error = update_error(candidate, torch.device("cpu"))
    words = candidate.name + candidate.arithmetic
    assert error < (0.1 if "bfloat16" in words or "int8" in words else 1e-5)


def test_update_error_detects_a_different_optimizer() -> None:
    def build(
        matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float, decay: float
    ) -> list[torch.optim.Optimizer]:
        return [torch.optim.Muon(matrices, lr=lr, weight_decay=decay, nesterov=False)]

    without_nesterov = Candidate("no Nesterov", build)  # type: ignore[arg-type]
    assert update_error(without_nesterov, torch.device("cpu")) > 0.1


def test_missing_packages_and_different_packages_of_the_same_name_are_reported() -> None:
    cpu = torch.device("cpu")
    absent = Candidate("absent", lambda *_: [], module=("no_such_package_anywhere", "Muon"))
    assert absent.missing(cpu) == "not installed"
    namesake = Candidate("namesake", lambda *_: [], module=("json", "Muon"))
    assert namesake.missing(cpu) == "the installed package 'json' is a different one"
    cuda_only = Candidate("cuda only", lambda *_: [], devices=("cuda",))
    assert cuda_only.missing(cpu) == "compared on cuda only"


def test_selection_by_name_keeps_the_baseline() -> None:
    assert [c.name for c in candidates(["textbook"])] == [BASELINE, "textbook loop, float32"]
    with pytest.raises(ValueError, match="no optimizer has 'nosuch' in its name"):
        candidates(["nosuch"])
    with pytest.raises(ValueError, match="no optimizer is called 'nosuch'"):
        candidates(without=["nosuch"])
    with pytest.raises(ValueError, match="cannot be excluded"):
        candidates(without=[BASELINE])
    remaining = [c.name for c in candidates(["MuonClip"], without=["MuonClip, bfloat16"])]
    others = ["MuonClip", "MuonClip, float32", "MuonClip, bfloat16 momentum"]
    others += ["MuonClip, NorMuon", "MuonClip, int8 momentum"]
    assert remaining == [BASELINE, *others]


def test_flops_of_newton_schulz() -> None:
    """Per step xxᵀ, its square, and the product with x: 2n²m + 2n³ + 2n²m."""
    expected = 5 * (2 * 3 * 3 * 7 + 2 * 3**3 + 2 * 3 * 3 * 7)
    assert Workload("", "", [(3, 7)], []).flops() == expected
    assert Workload("", "", [(7, 3), (4, 3, 7)], [(9, 9)]).flops() == 5 * expected


def test_stacked_and_separate_experts_are_the_same_matrices() -> None:
    for form in ("full", "quick", "tiny"):
        by_name = {load.name: load for load in workloads(form)}
        assert by_name["moe_stacked"].flops() == by_name["moe"].flops()


STORED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(result=st.dictionaries(st.text(), STORED))
def test_stored_results_equal_the_measured_ones(result: dict[str, Any]) -> None:
    assert json.loads(runner.dumps(result)) == result


def test_lists_of_numbers_are_stored_on_one_line() -> None:
    stored = runner.dumps({"losses": [[1.5, 2.0], []], "text": "[\n 1]"})
    assert "  [1.5, 2.0],\n" in stored
    assert json.loads(stored)["text"] == "[\n 1]"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "much"])
def test_invalid_rates_are_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
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
            "--clock cpu needs --device cpu and --threads 1",
        ),
        (["--quick", "--tiny"], "not allowed with"),
        (["--tag", "a/b"], "--tag is part of a file's name: use letters and digits, not a/b"),
        (["--out", __file__], f"cannot make the folder {__file__}: File exists"),
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
