"""Metrics are read back as those of one run, from metrics.jsonl and in TensorBoard."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.metrics import read, scalars
from pretrain.runtime.metrics_writer import MetricsWriter

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


def test_names_of_layers_sort_in_order() -> None:
    """TensorBoard sorts them as text."""
    names = list(scalars({"expert_loads": [1.0] * 61}))
    assert names == sorted(names)
