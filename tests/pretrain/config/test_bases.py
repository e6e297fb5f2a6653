"""Configurations that build on each other: ``base`` in a file, and merging."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain import config
from pretrain.config.loading import merge
from pretrain.errors import PretrainError


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def test_a_file_changes_its_base_and_overrides_change_the_file(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "models/first.yaml": "steps: 500\nseed: 1\noptimizer: {lr: 0.5, momentum: 0.9}",
            "second.yaml": "base: models/first.yaml\nseed: 2\noptimizer: {lr: 0.25}",
            "runs/third.yaml": "base: ../second.yaml\noptimizer: {weight_decay: 0}",
        },
    )
    loaded = config.load(tmp_path / "runs" / "third.yaml", ["optimizer.adamw_lr=1", "seed=3"])
    assert (loaded.steps, loaded.seed) == (500, 3)
    optimizer = loaded.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.25, 0.9, 0)
    assert optimizer.adamw_lr == 1


def test_lists_are_replaced_and_null_restores_the_default(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "base.yaml": "data: {seq_length: 512, sources: [{path: a}, {path: b}]}\n"
            "language: {rope_scaling: {factor: 4, original_max_position_embeddings: 128}}",
            "run.yaml": "base: base.yaml\ndata: {seq_length: null, sources: [{path: c}]}\n"
            "language: {rope_scaling: null}",
        },
    )
    loaded = config.load(tmp_path / "run.yaml")
    assert [source.path for source in loaded.data.sources] == ["c"]
    assert loaded.data.seq_length == config.DataConfig().seq_length
    assert loaded.language == config.LanguageConfig()
    loaded = config.load(tmp_path / "base.yaml", ["language.rope_scaling=null"])
    assert loaded.language == config.LanguageConfig()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"run.yaml": "base: run.yaml"}, "run.yaml: the base files form a cycle: "),
        ({"run.yaml": "base: b.yaml", "b.yaml": "base: run.yaml"}, "/run.yaml -> "),
        ({"run.yaml": "base: [a.yaml, b.yaml]"}, "base must be the path of one file, not ['a.yaml"),
        ({"run.yaml": r'base: "a\0b"'}, r"base must be the path of one file, not 'a\x00b'"),
        ({"run.yaml": "base: null"}, "base must be the path of one file, not None"),
        ({"run.yaml": "base: $NOWHERE/a.yaml"}, "run.yaml: base=$NOWHERE/a.yaml: the environment"),
        ({"run.yaml": "base: b.yaml"}, "b.yaml, the base of FOLDER/run.yaml: No such file"),
        ({"run.yaml": "base: b.yaml", "b.yaml": "- 1"}, "FOLDER/b.yaml must be a mapping"),
        (
            {"run.yaml": "base: b.yaml", "b.yaml": "optimiser: {lr: 1}"},
            "FOLDER/b.yaml: unknown configuration key 'optimiser'",
        ),
        (
            {"run.yaml": "base: b.yaml\noptimiser: null", "b.yaml": ""},
            "FOLDER/run.yaml: unknown configuration key 'optimiser'",
        ),
    ],
)
def test_a_wrong_base_is_one_line_that_names_the_file(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    write(tmp_path, files)
    with pytest.raises(PretrainError) as error:
        config.load(tmp_path / "run.yaml")
    assert message.replace("FOLDER", str(tmp_path)) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "changes", "overrides", "file"),
    [
        ("steps: 0", "seed: 1", [], "base.yaml"),
        ("steps: 0", "steps: 0", [], "run.yaml"),
        ("steps: 1000", "steps: 0", [], "run.yaml"),
        ("optimizer: {lr: -1}", "optimizer: {momentum: 0.5}", [], "base.yaml"),
        ("data: {sources: [{weight: -1}]}", "data: {seq_length: 128}", [], "base.yaml"),
        ("optimizer: {decay_steps: 2000}", "steps: 1500", [], "base.yaml"),
        ("run_dir: ~nobody-of-that-name/x", "seed: 1", [], "base.yaml"),
        ("steps: 1500", "optimizer: {decay_steps: 2000}", [], "run.yaml"),
        ("steps: 0", "seed: 1", ["steps=-1"], None),
        ("optimizer: {lr: -1}", "seed: 1", ["optimizer={lr: -2}"], None),
    ],
)
def test_an_error_names_the_file_that_sets_the_value(
    tmp_path: Path, base: str, changes: str, overrides: list[str], file: str | None
) -> None:
    write(tmp_path, {"base.yaml": base, "run.yaml": f"base: base.yaml\n{changes}"})
    with pytest.raises(PretrainError) as error:
        config.load(tmp_path / "run.yaml", overrides)
    start = str(error.value).split(": ")[0]
    assert start == str(tmp_path / file) if file else ".yaml" not in str(error.value)


def test_the_laptop_configurations_share_one_model() -> None:
    first, long, finetuned = (
        config.load(f"configs/{name}.yaml") for name in ("laptop", "laptop_long", "laptop_sft")
    )
    assert first.vision == long.vision == finetuned.vision
    assert long.language == finetuned.language
    plain = {**config.to_dict(long)["language"], "rope_scaling": None}
    assert config.from_dict({"language": plain}).language == first.language


NAMES = st.sampled_from("abc")
VALUES = st.none() | st.integers() | st.lists(st.integers(), max_size=2)
MAPPINGS = st.recursive(
    st.dictionaries(NAMES, VALUES, max_size=3),
    lambda inner: st.dictionaries(NAMES, VALUES | inner, max_size=3),
    max_leaves=6,
)


Key = tuple[str, ...]


def leaves(values: dict[str, Any], path: Key = ()) -> Iterator[tuple[Key, Any]]:
    """The path and the value of every entry that is not a mapping itself."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


@given(MAPPINGS, MAPPINGS)
def test_merging_takes_every_changed_value_and_keeps_the_others(
    values: dict[str, Any], changes: dict[str, Any]
) -> None:
    before = deepcopy((values, changes))
    merged = merge(values, changes)
    assert (values, changes) == before, "arguments are not modified"
    found, changed = dict(leaves(merged)), dict(leaves(changes))
    for path, value in changed.items():
        if value != {}:  # an empty mapping changes nothing in a mapping
            assert found[path] == value
    for path, value in leaves(values):
        related = [c for c in changed if c[: len(path)] == path or path[: len(c)] == c]
        if not related:
            assert found[path] == value


@given(MAPPINGS, MAPPINGS)
def test_merging_is_idempotent_and_an_empty_change_is_neutral(
    values: dict[str, Any], changes: dict[str, Any]
) -> None:
    merged = merge(values, changes)
    assert merge(merged, changes) == merged
    assert merge(values, {}) == values
    assert merge({}, changes) == changes
    assert merge(values, values) == values


OVERRIDES = st.lists(
    st.tuples(
        st.sampled_from(["seed", "log_every", "data.images.max_words", "optimizer.lr"]),
        st.integers(1, 9),
    ),
    max_size=4,
)


@given(first=OVERRIDES, second=OVERRIDES, third=OVERRIDES)
def test_a_chain_of_files_equals_one_sequence_of_overrides(
    first: list[tuple[str, int]],
    second: list[tuple[str, int]],
    third: list[tuple[str, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    (folder / "empty.yaml").write_text("")
    texts = [f"{key}={value}" for key, value in (*first, *second, *third)]
    for name, base, changes in (("a", "empty", first), ("b", "a", second)):
        values = config.with_overrides({"base": f"{base}.yaml"}, [f"{k}={v}" for k, v in changes])
        (folder / f"{name}.yaml").write_text(json.dumps(values))
    loaded = config.load(folder / "b.yaml", [f"{key}={value}" for key, value in third])
    assert loaded == config.load(folder / "empty.yaml", texts)
