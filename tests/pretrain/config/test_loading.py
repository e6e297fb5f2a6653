"""A configuration is what was written, or one line says what is wrong with it."""

import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pretrain import config
from pretrain.config import rules, yaml_core
from pretrain.config.rules import In, PathRule, Settings
from pretrain.config.schema import Config
from pretrain.errors import PretrainError
from pretrain.plan import budget

YARN = (
    "language.rope_scaling.factor=2",
    "language.rope_scaling.original_max_position_embeddings=256",
)
CONFIGS = sorted(Path("configs").glob("*.yaml"))


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    config.load(path)


def test_an_override_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 300\noptimizer: {lr: 1e-3, momentum: 0.9}\n")
    loaded = config.load(path, ["optimizer.lr=5e-4", "parallel.expert=2"])
    assert (loaded.steps, loaded.optimizer.lr, loaded.optimizer.momentum) == (300, 5e-4, 0.9)
    assert loaded.parallel.expert == 2
    assert loaded.optimizer.weight_decay == config.OptimizerConfig().weight_decay


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimiser.lr=1"], "unknown configuration key 'optimiser': did you mean 'optimizer'?"),
        (["optimizer.lrr=1"], "unknown configuration key 'optimizer.lrr': did you mean 'lr'?"),
        (["steps=many"], "steps must be int, not 'many'"),
        (["steps=1.5"], "steps must be int, not 1.5"),
        (["steps=true"], "steps must be int, not True"),
        (["encoder_process.enabled=1"], "encoder_process.enabled must be bool, not 1"),
        (
            ["optimizer.ns_dtype=int8"],
            "must be one of 'auto', 'bfloat16', 'float16', 'float32', not 'int8'",
        ),
        (["optimizer=3"], "optimizer must be a mapping, not 3"),
        (["optimizer.lr=-1"], "optimizer.lr must be in [1e-30, 1e30], not -1.0"),
        (["language.dense_layers=9"], "language.dense_layers must leave a layer of experts"),
        (["language.experts_per_token=99"], "experts_per_token is 99 of only 8 experts"),
        (["steps=10"], "is more than steps = 10"),
        (["start_from=runs/default"], "start_from=runs/default is the run_dir itself"),
        (["language.rope_scaling.factor=0.5"], "rope_scaling.factor must be in [1, 1e6], not 0.5"),
        (
            ["language.rope_scaling.factor=4"],
            "rope_scaling.original_max_position_embeddings must be given with factor=4",
        ),
        ([*YARN, "data.seq_length=1024"], "data.seq_length=1024 is more than language.rope_scal"),
        ([*YARN, "language.rope_scaling.beta_fast=0.5"], "beta_fast=0.5 must be >= beta_slow=1"),
        (
            [*YARN, "language.rope_scaling.mscale=2", "language.rope_scaling.mscale_all_dim=0"],
            "mscale_all_dim must be > 0, or 0 with mscale=1, not 0.0 with mscale=2.0",
        ),
        (["profile.steps=[3, 2]"], "profile.steps must be [first, last], 1 <= first <= last"),
        (["profile.steps=[3]"], "profile.steps must be a list [int, int] or null, not [3]"),
        (["profile.steps=[1, 2000]"], "profile.steps ends after steps = 1000"),
        (["wandb.mode=on"], "wandb.mode must be one of 'offline', 'online'"),
        (["peak_tflops=0"], "peak_tflops must be in [1e-6, 1e9] or null, not 0.0"),
        (["steps"], "cannot read the override 'steps': write key=value"),
        (["steps=[1"], "cannot read the value of the override 'steps=[1'"),
        (["checkpoint.asynchronous=no"], "must be bool, not 'no': write true or false"),
        (["optimizer.lr='1e-3'"], "optimizer.lr must be float, not '1e-3'"),
        (["steps=1_000"], "steps must be int, not '1_000'"),
        (["steps=12:30"], "steps must be int, not '12:30'"),
        (["steps=1e3"], "steps must be int, not 1000.0"),
        (["run_dir=a #b"], "'#b' would be ignored: put it in quotes"),
        (["run_dir="], "run_dir must be str, not None"),
        (["run_dir=' '"], "run_dir must be a path, not ' '"),
        (['start_from="a\\0b"'], "start_from must be a path or null, not 'a\\x00b'"),
        (["wandb.project=''"], "wandb.project must be text that is not empty, not ''"),
        (["peak_tflops=1" + "0" * 400], "peak_tflops must be float or null, not 1000"),
        (["seed=1" + "0" * 5000], "the number has 5001 digits"),
        (["data.sources=" + "[" * 10000], "it is nested too deeply"),
        (["optimizer=&x {lr: 1}"], "anchors and aliases are not supported"),
        (["run_dir=!!python/object/apply:os.getcwd []"], "tags are not supported"),
        (["steps=500", "steps.x=1"], "goes into 'steps', which is a value"),
    ],
)
def test_what_is_wrong_is_named(empty: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(PretrainError) as error:
        config.load(empty, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(PretrainError, match=r"missing\.yaml: No such file"):
        config.load(tmp_path / "missing.yaml")
    path = tmp_path / "run.yaml"
    path.write_text("a: [1")
    with pytest.raises(PretrainError, match=r"run\.yaml is not valid YAML"):
        config.load(path)
    path.write_bytes(b"run_dir: \xff")
    with pytest.raises(PretrainError, match=r"run\.yaml is not UTF-8 text"):
        config.load(path)
    path.write_text("- 1")
    with pytest.raises(PretrainError, match=r"run\.yaml must be a mapping"):
        config.load(path)


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["parallel.expert=3"], 3, "parallel.expert=3 does not divide language.num_experts=8"),
        (["parallel.expert=2"], 3, "3 processes cannot be divided by parallel.expert=2"),
        (["global_batch_size=12"], 2, "global_batch_size=12 is no multiple of 2 data-parallel"),
        (["parallel.tensor=3"], 3, "parallel.tensor=3 does not divide language.num_heads=4"),
        (["parallel.pipeline=5"], 5, "pipeline=5 x parallel.interleave=1 is more than"),
        (
            ["recompute.granularity=full", "recompute.num_layers=3"],
            1,
            "recompute.num_layers=3 does not divide the 4 layers",
        ),
        (["parallel.pipeline=4"], 2, "2 processes cannot be divided by parallel.pipeline=4"),
        (
            ["parallel.pipeline=2", "parallel.interleave=2", "global_batch_size=8"],
            2,
            "a multiple of parallel.pipeline=2 micro-batches on each rank, not 1",
        ),
    ],
)
def test_a_world_that_does_not_fit_is_refused(
    empty: Path, overrides: list[str], world_size: int, message: str
) -> None:
    with pytest.raises(PretrainError, match=message):
        config.load(empty, overrides).check_world_size(world_size)


@given(layers=st.integers(1, 200), stages=st.integers(1, 16), interleave=st.integers(1, 4))
def test_layers_are_spread_over_stages_as_evenly_as_can_be(
    layers: int, stages: int, interleave: int
) -> None:
    interleave = interleave if stages > 1 else 1
    counts = config.ParallelConfig(pipeline=stages, interleave=interleave).layers(layers)
    assert len(counts) == stages * interleave and sum(counts) == layers
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == min(counts)  # which has the output head, too


@given(lr=st.floats(1e-8, 10), steps=st.integers(1000, 10**9), enabled=st.booleans())
def test_values_survive_the_way_through_yaml_to_the_bit(
    lr: float, steps: int, enabled: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(f"optimizer: {{lr: {lr!r}}}\n")
    loaded = config.load(
        path, [f"steps={steps}", f"encoder_process.enabled={str(enabled).lower()}"]
    )
    assert loaded.optimizer.lr == lr
    assert (loaded.steps, loaded.encoder_process.enabled) == (steps, enabled)


def test_every_setting_is_described() -> None:
    text = config.describe()
    assert "optimizer.lr=0.002  Peak learning rate of the matrices (Muon)." in text
    assert "language.num_experts=8" in text


def test_a_section_given_as_an_override_changes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {lr: 0.5, momentum: 0.9}")
    loaded = config.load(path, ["optimizer={lr: 0.25}", "optimizer.adamw_lr=1", "steps=1000"])
    assert (loaded.optimizer.lr, loaded.optimizer.momentum, loaded.optimizer.adamw_lr) == (
        0.25, 0.9, 1.0
    )  # fmt: skip


# ---------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-010", -10), ("0o17", 15), ("0x1F", 31), ("1e-3", 1e-3), ("1E3", 1000.0),
        (".5", 0.5), ("5.", 5.0), ("-.inf", -math.inf), ("1_000", "1_000"), ("12:30", "12:30"),
        ("off", "off"), ("yes", "yes"), ("True", True), ("~", None), ("~/x", "~/x"),
        ("2024-01-01", "2024-01-01"), ("0b1", "0b1"), ("'1'", "1"), ("<<", "<<"),
    ],
)  # fmt: skip
def test_scalars_are_what_they_look_like(text: str, value: Any) -> None:
    found = yaml_core.read(f"a: {text}")["a"]
    assert (type(found), found) == (type(value), value)
    assert math.isnan(yaml_core.read(".nan"))


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.from_regex(r"[-+0-9.:_eoxinfyon~]{1,6}", fullmatch=True)
)


@given(
    st.recursive(
        _SCALARS,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1", max_size=2), inner)
        ),
        max_leaves=8,
    )
)
@example({"text that YAML 1.1 or 1.2 reads as something else": ["010", "1e-3", "off", "1:30", ""]})
def test_values_survive_being_written_and_read(value: Any) -> None:
    assert yaml_core.read(yaml_core.dump(value)) == value


@given(st.data())
def test_a_key_that_is_given_twice_is_refused_at_any_depth(data: st.DataObject) -> None:
    path = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=4))
    flow = data.draw(st.booleans())
    *parents, name = path
    if flow:
        text = "".join(f"{{{parent}: " for parent in parents) + f"{{{name}: 1, d: 2, '{name}': 1}}"
        text += "}" * len(parents)
    else:
        text = "".join(f"{'  ' * depth}{parent}:\n" for depth, parent in enumerate(parents))
        indent = "  " * len(parents)
        text += f"{indent}{name}: 1\n{indent}d: 2\n{indent}{name}: 1\n"
    with pytest.raises(yaml_core.yaml.YAMLError) as error:
        yaml_core.read(text)
    assert f"{name!r} is given twice" in yaml_core.explain(error.value)


def test_a_second_section_of_a_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {lr: 1}\nsteps: 300\noptimizer: {momentum: 0.5}\n")
    with pytest.raises(PretrainError, match="line 3: 'optimizer' is given twice: merge the two"):
        config.load(path)


# ---------------------------------------------------------------------- allowed values


def settings(cls: type[Settings], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The key and type of every setting."""
    for name, hint in rules.field_types(cls).items():
        element = next(iter(typing.get_args(hint)), None)
        if isinstance(hint, type) and issubclass(hint, Settings):
            yield from settings(hint, f"{prefix}{name}.")
        elif isinstance(element, type) and issubclass(element, Settings):
            yield from settings(element, f"{prefix}{name}[].")
        else:
            yield f"{prefix}{name}", hint


INTERVALS = {key: hint for key, hint in settings(Config) if isinstance(rules.rule_of(hint), In)}
PATHS = [key for key, hint in settings(Config) if isinstance(rules.rule_of(hint), PathRule)]
# Other settings that a boundary value needs.
WITH = {
    "steps": ["optimizer.warmup_steps=0", "optimizer.decay_steps=0"],
    "micro_batch_size": ["global_batch_size=16777216"],
    "global_batch_size": ["micro_batch_size=1"],
    "language.num_layers": ["language.dense_layers=0"],
    "language.dense_layers": ["language.num_layers=10000"],
    "language.hidden_size": ["language.num_heads=1"],
    "language.num_heads": ["language.hidden_size=1048576"],
    "language.num_experts": ["language.experts_per_token=1"],
    "language.experts_per_token": ["language.num_experts=1048576"],
    "language.rope_scaling.factor": ["language.rope_scaling.original_max_position_embeddings=256"],
    "language.rope_scaling.beta_fast": ["language.rope_scaling.beta_slow=1e-6"],
    "language.rope_scaling.beta_slow": ["language.rope_scaling.beta_fast=1e6"],
    "vision.num_heads": ["vision.hidden_size=1048576"],
    "vision.hidden_size": ["vision.num_heads=1"],
    "data.images.min_chars": ["data.images.max_chars=200"],
    "data.images.max_chars": ["data.images.min_chars=1"],
    "data.images.min_font_size": ["data.images.max_font_size=256"],
    "data.images.max_font_size": ["data.images.min_font_size=4"],
    "optimizer.warmup_steps": ["optimizer.decay_steps=0", "steps=1000000000"],
    "optimizer.decay_steps": ["optimizer.warmup_steps=0", "steps=1000000000"],
    "parallel.interleave": ["parallel.pipeline=2"],
    "profile.steps": ["steps=1000000000"],
}  # fmt: skip


def override(key: str, value: float) -> str:
    if key == "profile.steps":
        return f"{key}=[{value}, {value}]"
    if key.startswith("data.sources[]."):
        source = yaml_core.dump({"type": "standard_library", key.rpartition(".")[2]: value})
        return f"data.sources=[{{{source.strip().replace(chr(10), ', ')}}}, {{path: x}}]"
    return f"{key}={'.inf' if value == math.inf else '-.inf' if value == -math.inf else value}"


def is_integer(hint: Any) -> bool:
    return hint is int or any(is_integer(part) for part in typing.get_args(hint))


def boundaries(key: str) -> list[float]:
    """The lowest and the highest value that a setting can have."""
    rule = rules.rule_of(INTERVALS[key])
    assert isinstance(rule, In)
    low = math.nextafter(rule.low, math.inf) if rule.low_open else rule.low
    high = math.nextafter(rule.high, -math.inf) if rule.high_open else rule.high
    return [int(low), int(high)] if is_integer(INTERVALS[key]) else [low, high]


@pytest.mark.parametrize("key", INTERVALS)
def test_the_boundaries_of_every_setting_load_and_can_be_planned_or_are_refused_in_a_line(
    key: str, empty: Path
) -> None:
    for value in boundaries(key):
        loaded = config.load(empty, [*WITH.get(key, []), override(key, value)])
        if max(loaded.language.num_layers, loaded.vision.num_layers) < 10000:  # takes seconds
            try:
                budget.plan(loaded)
            except PretrainError as error:
                assert "\n" not in str(error)


@given(data=st.data())
def test_a_value_outside_a_settings_range_is_refused_at_load_in_a_line_with_the_range(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    key = data.draw(st.sampled_from(sorted(INTERVALS)))
    rule = rules.rule_of(INTERVALS[key])
    low, high = boundaries(key)
    if is_integer(INTERVALS[key]):
        outside: Any = st.integers(max_value=int(low) - 1) | st.integers(min_value=int(high) + 1)
    else:
        outside = st.floats(max_value=math.nextafter(low, -math.inf)) | st.floats(
            min_value=math.nextafter(high, math.inf)
        )
    value = data.draw(outside)
    path = tmp_path_factory.getbasetemp() / "outside.yaml"
    path.write_text("")
    with pytest.raises(PretrainError) as error:
        config.load(path, [*WITH.get(key, []), override(key, value)])
    told = str(error.value)
    assert "\n" not in told and rule is not None
    assert f"{key.replace('[]', '[0]')} must be {rule.text}" in told


@pytest.mark.parametrize("key", INTERVALS)
def test_nan_and_values_of_another_type_are_refused(key: str, empty: Path) -> None:
    for text in (".nan", "true", "text", "{a: 1}", "[1, 2, 3]"):
        value = f"[{{type: standard_library, {key.rpartition('.')[2]}: {text}}}]"
        written = f"data.sources={value}" if "[]" in key else f"{key}={text}"
        with pytest.raises(PretrainError, match=" must be ") as error:
            config.load(empty, [written])
        assert str(error.value).startswith(key.replace("[]", "[0]"))


def test_settings_shows_the_range_of_every_setting() -> None:
    lines = dict(line.split("=", 1) for line in config.describe().splitlines())
    for key, hint in INTERVALS.items():
        rule = rules.rule_of(hint)
        assert rule is not None and f"({rule.text}" in lines[key]
    assert lines["optimizer.ns_dtype"].endswith("(one of 'auto', 'bfloat16', 'float16', 'float32')")


def of_path(key: str, path: str) -> str:
    if key == "data.sources[].path":
        return f"data.sources=[{{path: {path!r}}}]"
    return f"{key}={path!r}"


def path_in(loaded: Config, key: str) -> str:
    value: Any = loaded
    for name in key.replace("[]", "").split("."):
        value = getattr(value, name)
        value = value[0] if isinstance(value, tuple) else value
    assert isinstance(value, str)
    return value


@pytest.mark.parametrize("key", PATHS)
def test_home_and_variables_are_expanded_in_every_path(
    key: str, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PLACE", "over there")
    monkeypatch.delenv("NOWHERE", raising=False)
    for written, path in (
        ("~/x", "/home/me/x"),
        ("$HOME/x", "/home/me/x"),
        ("a/${PLACE}/x", "a/over there/x"),
        ("a$$b", "a$b"),
        ("./~", "./~"),
        (config.escape_path("~$HOME"), "./~$HOME"),
    ):
        assert path_in(config.load(empty, [of_path(key, written)]), key) == path
    name = key.replace("[]", "[0]")
    for written, message in (
        ("$NOWHERE/x", "the environment has no variable NOWHERE"),
        ("cost$", "write \\$\\$ for a dollar sign"),
        ("~nobody-of-that-name/x", "there is no user 'nobody-of-that-name'"),
    ):
        with pytest.raises(PretrainError, match=f"^{name.replace('[', '.')[:8]}.*{message}"):
            config.load(empty, [of_path(key, written)])


def test_paths_of_a_checkpoints_configuration_are_not_expanded_again(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    loaded = config.load(empty, ["run_dir=$HOME/a$$b", "data.cache_dir=$$HOME"])
    assert config.from_dict(config.to_dict(loaded)) == loaded
    assert (loaded.run_dir, loaded.data.cache_dir) == ("/home/me/a$b", "$HOME")
