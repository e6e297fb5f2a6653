"""Metrics are read back as those of one run."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_names_of_layers_sort_in_order() -> None:
    """TensorBoard sorts them as text."""
    names = list(scalars({"expert_loads": [1.0] * 61}))
    assert names == sorted(names)
