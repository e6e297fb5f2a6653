"""Metrics are read back as those of one run."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import cli
from pretrain.metrics import read, scalars


@settings(deadline=None)  # it writes files, whose speed depends on the machine's load
@given(
    attempts=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20), st.booleans()), max_size=6)
)
def test_repeated_steps_replace_the_earlier_records(
    attempts: list[tuple[int, int, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each attempt has a first step, a number of steps, and whether its last line is incomplete."""
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    expected: dict[int, int] = {}
    with path.open("w") as file:
        for attempt, (start, count, cut) in enumerate(attempts):
            expected = {step: a for step, a in expected.items() if step < start}
            for step in range(start, start + count):
                file.write(json.dumps({"step": step, "attempt": attempt}) + "\n")
                expected[step] = attempt
            if cut:
                file.write('{"step": 21, "att\n')
    assert [(record["step"], record["attempt"]) for record in read(path)] == sorted(
        expected.items()
    )


def test_missing_files_and_other_lines_give_no_records(tmp_path: Path) -> None:
    assert read(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n[1]\n3\n{}\nnull\n")
    assert read(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
    "value",
    ['"loss": "low"', '"loss": [1.0]', '"heads_clipped": 1.5', '"expert_loads": 2', '"lr": {}',
     '"source_losses": [1.0, "low"]'],
)  # fmt: skip
def test_a_metric_of_another_type_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    """Before, reports and plots ended with a traceback."""
    path = tmp_path / "metrics.jsonl"
    line = '{"step": 1, "grad_norm": 1, "loss": null, "expert_loads": [1, null], "other": "x"}'
    path.write_text(line + '\n{"step": 2, "grad_norm": 1.0, ' + value + "}\n")
    name = value.split('"')[1]
    for command in (["report"], ["compare", "--out", str(tmp_path / "curves.png")]):
        assert cli.main([*command, str(tmp_path)]) == 1
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith(f"error: {path}, line 2: {name} cannot be ")
        assert error.endswith(": correct the line, or remove it")
    path.write_text(line)
    assert len(read(path)) == 1


def test_names_of_layers_sort_in_order() -> None:
    """TensorBoard sorts them as text."""
    names = list(scalars({"expert_loads": [1.0] * 61}))
    assert names == sorted(names)
