"""Every setting has an allowed range that is checked, described and complete."""

import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain import config
from pretrain.config import loading, rules, yaml_core
from pretrain.config.rules import In, PathRule, Settings
from pretrain.config.schema import Config
from pretrain.errors import PretrainError
from pretrain.plan import plan


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
YARN = [
    "language.rope_scaling.factor=2",
    "language.rope_scaling.original_max_position_embeddings=256",
]
SOURCE = ["data.sources=[{path: x}]"]
# Other settings that a boundary value needs.
WITH = {
    "steps": ["optimizer.warmup_steps=0", "optimizer.decay_steps=0"],
    "micro_batch_size": ["global_batch_size=16777216"],
    "global_batch_size": ["micro_batch_size=1"],
    "language.num_layers": ["language.dense_layers=0"],
    "language.dense_layers": ["language.num_layers=10000"],
    "language.hidden_size": ["language.num_heads=1"],
    "language.num_heads": ["language.hidden_size=1048576"],
    "language.num_kv_heads": [
        *(f"language.{x}" for x in ("attention=gqa", "head_dim=2")),
        *("language.num_heads=1048576", "language.hidden_size=1048576"),
    ],
    "language.head_dim": ["language.attention=gqa"],
    "language.num_experts": ["language.experts_per_token=1"],
    "language.expert_groups": ["language.num_experts=1048576"],
    "language.expert_groups_per_token": [
        *("language.num_experts=1048576", "language.expert_groups=524288"),
        "language.experts_per_token=2",
    ],
    "language.experts_per_token": ["language.num_experts=1048576"],
    "language.rope_scaling.factor": YARN[1:],
    "language.rope_scaling.original_max_position_embeddings": [
        *("language.rope_scaling.factor=1e6", "data.seq_length=64"),
    ],
    "language.rope_scaling.beta_fast": [*YARN, "language.rope_scaling.beta_slow=1e-6"],
    "language.rope_scaling.beta_slow": [*YARN, "language.rope_scaling.beta_fast=1e6"],
    "language.rope_scaling.mscale": YARN,
    "language.rope_scaling.mscale_all_dim": YARN,
    "vision.num_heads": ["vision.hidden_size=1048576"],
    "vision.hidden_size": ["vision.num_heads=1"],
    "data.images.min_chars": ["data.images.max_chars=200"],
    "data.images.max_chars": ["data.images.min_chars=1"],
    "data.images.min_font_size": ["data.images.max_font_size=256"],
    "data.images.max_font_size": ["data.images.min_font_size=4"],
    "optimizer.warmup_steps": ["optimizer.decay_steps=0", "steps=1000000000"],
    "optimizer.decay_steps": ["optimizer.warmup_steps=0", "steps=1000000000"],
    "data.duplicate_threshold": [*SOURCE, "data.deduplicate=near"],
    **{f"data.{name}": SOURCE for name in
       ("max_untokenized_mb", "held_out", "decode_workers", "max_corrupt")},
    "recompute.num_layers": ["recompute.granularity=full", "recompute.method=block"],
    "faults.spike_window": ["faults.spike=stop"],
    "faults.spike_deviations": ["faults.spike=stop"],
    "faults.max_in_a_row": ["faults.non_finite=roll_back"],
    "faults.collective_seconds": ["faults.hang_seconds=0"],
    "parallel.interleave": ["parallel.pipeline=2"],
    "parallel.layout": ["parallel.pipeline=2"],
    "profile.steps": ["steps=1000000000"],
}  # fmt: skip


def override(key: str, value: float) -> str:
    if key in ("profile.steps", "parallel.layout"):
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
def test_boundary_values_load_and_can_be_planned(key: str, empty: Path) -> None:
    for value in boundaries(key):
        is_off = (key, value) == ("language.rope_scaling.factor", 1)
        others = [] if is_off else WITH.get(key, [])
        loaded = config.load(empty, [*others, override(key, value)])
        if max(loaded.language.num_layers, loaded.vision.num_layers) < 10000:  # takes seconds
            try:
                plan(loaded)
            except PretrainError as error:
                assert "\n" not in str(error)


@given(data=st.data())
def test_a_value_out_of_range_is_refused_with_the_range(
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
    message = str(error.value)
    assert "\n" not in message and rule is not None
    assert f"{key.replace('[]', '[0]')} must be {rule.text}" in message


@pytest.mark.parametrize("key", INTERVALS)
def test_nan_and_values_of_another_type_are_refused(key: str, empty: Path) -> None:
    for text in (".nan", "true", "text", "{a: 1}", "[1, 2, 3]"):
        value = f"[{{type: standard_library, {key.rpartition('.')[2]}: {text}}}]"
        written = f"data.sources={value}" if "[]" in key else f"{key}={text}"
        with pytest.raises(PretrainError, match=" must be ") as error:
            config.load(empty, [written])
        assert str(error.value).startswith(key.replace("[]", "[0]"))


def test_the_description_shows_every_range() -> None:
    lines = dict(line.split("=", 1) for line in config.describe(Config))
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


def test_paths_in_a_checkpoint_are_not_expanded_again(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    loaded = config.load(empty, ["run_dir=$HOME/a$$b", "data.cache_dir=$$HOME"])
    assert config.from_dict(config.to_dict(loaded)) == loaded
    assert (loaded.run_dir, loaded.data.cache_dir) == ("/home/me/a$b", "$HOME")


def test_every_setting_is_described() -> None:
    text = "\n".join(config.describe(Config))
    assert "optimizer.lr=0.002  Peak learning rate of the matrices (Muon)." in text
    assert "language.num_experts=8" in text


RECOMPUTE_TWO = ("recompute.granularity=full", "recompute.num_layers=2")


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["parallel.expert=3"], 3, "parallel.expert=3 does not divide language.num_experts=8"),
        (["parallel.expert=2"], 3, "3 processes cannot be divided by parallel.expert=2"),
        (["global_batch_size=12"], 2, "global_batch_size=12 is not a multiple of 2 data-parallel"),
        (["parallel.tensor=3"], 3, "parallel.tensor=3 does not divide language.num_heads=4"),
        (
            ["parallel.tensor=2", "language.q_lora_rank=25"],
            2,
            "parallel.tensor=2 does not divide language.q_lora_rank=25",
        ),
        (["parallel.pipeline=5"], 5, "pipeline=5 x parallel.interleave=1 is more than"),
        (
            ["recompute.granularity=full", "recompute.num_layers=3"],
            1,
            "recompute.num_layers=3 does not divide the 4 layers",
        ),
        (
            ["parallel.pipeline=2", "parallel.layout=[3, 1]", *RECOMPUTE_TWO],
            2,
            "recompute.num_layers=2 does not divide the 3 layers",
        ),
        (["parallel.pipeline=4"], 2, "2 processes cannot be divided by parallel.pipeline=4"),
        (
            ["language.attention=gqa", "language.num_kv_heads=1", "parallel.tensor=2"],
            2,
            "parallel.tensor=2 does not divide language.num_kv_heads=1: choose a divisor",
        ),
        (
            ["language.dense_layers=4", "parallel.expert=2"],
            2,
            "parallel.expert=2 needs layers of experts, and language.dense_layers=num_layers",
        ),
        (
            ["language.tie_embeddings=true", "parallel.pipeline=2"],
            2,
            "language.tie_embeddings needs parallel.pipeline=1",
        ),
        (
            ["language.vocab_size=1025", "parallel.tensor=2"],
            2,
            "parallel.tensor=2 does not divide language.vocab_size=1025",
        ),
        (["parallel.context=2"], 3, "3 processes cannot be divided by parallel.context=2"),
        (
            ["parallel.context=2", "parallel.tensor=2"],
            2,
            "2 processes cannot be divided by parallel.tensor x parallel.context=4",
        ),
        (
            ["parallel.context=3"],
            3,
            "data.seq_length=256 is not a multiple of 6, which parallel.tensor=1 and "
            "parallel.context=3 require",
        ),
        (
            ["parallel.pipeline=2", "parallel.interleave=2", "global_batch_size=8"],
            2,
            "a multiple of parallel.pipeline=2 micro-batches on each rank, not 1",
        ),
    ],
)
def test_a_number_of_processes_that_does_not_fit_is_refused(
    empty: Path, overrides: list[str], world_size: int, message: str
) -> None:
    with pytest.raises(PretrainError, match=message):
        config.load(empty, overrides).check_world_size(world_size)


@given(layers=st.integers(1, 200), stages=st.integers(1, 16), interleave=st.integers(1, 4))
def test_layers_are_divided_evenly_over_pipeline_stages(
    layers: int, stages: int, interleave: int
) -> None:
    interleave = interleave if stages > 1 else 1
    counts = config.ParallelConfig(pipeline=stages, interleave=interleave).layers(layers)
    assert len(counts) == stages * interleave and sum(counts) == layers
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == min(counts)  # the last one also has the output head


@given(layout=st.lists(st.integers(0, 9), max_size=12), stages=st.integers(1, 6), data=st.data())
def test_a_pipeline_layout_is_used_as_given_or_refused(
    layout: list[int], stages: int, data: st.DataObject
) -> None:
    """One message says why: another number of chunks, an empty one in the middle, another sum."""
    interleave = data.draw(st.integers(1, 3)) if stages > 1 else 1
    chunks = stages * interleave
    layout = data.draw(st.sampled_from([layout, (layout * chunks)[:chunks]]))
    overrides = {"pipeline": stages, "interleave": interleave, "layout": layout}
    expected = next(
        (
            message
            for wrong, message in (
                (
                    len(layout) != chunks,
                    "parallel.layout must be a list of pipeline=.* not of",
                ),
                (0 in layout[1:-1], "parallel.layout=.* has an empty model chunk"),
                (sum(layout) != 9, "parallel.layout has .* layers in all, but language.num_layers"),
            )
            if wrong
        ),
        None,
    )

    def load() -> Config:
        values = {"language": {"num_layers": 9}, "parallel": overrides, "global_batch_size": 144}
        settings = config.from_dict({**values, "micro_batch_size": 1})
        settings.check_world_size(stages)
        return settings

    if expected is None:
        assert load().parallel.layers(9) == layout
        return
    with pytest.raises(PretrainError, match=expected) as error:
        load()
    assert "\n" not in str(error.value)


def test_null_is_the_default_wherever_it_is_allowed(empty: Path) -> None:
    """Null in a file restores the default; only where config.json has it, it is another value."""
    defaults = config.to_dict(Config())
    loaded = config.load(empty, ["language.q_lora_rank=null"])
    assert loaded.language.q_lora_rank is None
    assert config.from_dict(config.to_dict(loaded)) == loaded
    defaults["language"]["q_lora_rank"] = None
    for key, hint in settings(Config):
        if type(None) in typing.get_args(hint):
            section: Any = defaults
            for name in key.split("."):
                section = section[name]
            assert section is None, key


# Settings that turn others off, and a value of each that has no effect then.
ROPE, DEP, FAULTS = "language.rope_scaling", "encoder_process", "faults"
WITHOUT_EFFECT: dict[tuple[str, ...], tuple[str, ...]] = {
    (): (
        *(f"{ROPE}.original_max_position_embeddings=256", f"{ROPE}.beta_fast=9"),
        *(f"{ROPE}.beta_slow=2", f"{ROPE}.mscale=2", f"{ROPE}.mscale_all_dim=0.5"),
        *("data.held_out=0.5", "data.decode_workers=2", "data.max_untokenized_mb=1"),
        *("data.max_corrupt=1", "data.deduplicate=exact", "recompute.method=block"),
        *("recompute.num_layers=2", "recompute.modules=[mlp]", f"{FAULTS}.spike_window=9"),
        *(f"{FAULTS}.spike_deviations=2", f"{FAULTS}.max_in_a_row=2", "wandb.project=x"),
        *("wandb.mode=online", "data.duplicate_threshold=0.9"),
    ),
    ("recompute.granularity=selective",): ("recompute.method=block", "recompute.num_layers=2"),
    ("recompute.granularity=full",): ("recompute.modules=[mlp]",),
    (f"{FAULTS}.spike=stop",): (f"{FAULTS}.max_in_a_row=2",),
    (f"{DEP}.spread=round_robin",): (f"{DEP}.max_patches_per_rank=99",),
    (f"{DEP}.enabled=false",): (
        *(f"{DEP}.spread=round_robin", f"{DEP}.cost=measured", f"{DEP}.group_size=2"),
        *(f"{DEP}.activation_memory_gib=1", f"{DEP}.max_patches_per_rank=99"),
    ),
    (f"{DEP}.recompute=false",): (f"{DEP}.activation_memory_gib=1",),
    ("optimizer.decay_steps=0",): ("optimizer.final_lr_fraction=0.5",),
    ("optimizer.adjust_lr=none",): ("optimizer.update_rms=0.5",),
}
EACH = [(choice, one) for choice, settings in WITHOUT_EFFECT.items() for one in settings]


CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_encoder_process_can_be_disabled_for_any_file(file: Path) -> None:
    """As the documentation does, to compare runs."""
    assert not config.load(file, ["encoder_process.enabled=false"]).encoder_process.enabled


@pytest.mark.parametrize(("choice", "setting"), EACH)
def test_a_setting_without_effect_is_refused_unless_it_has_its_default(
    choice: tuple[str, ...], setting: str, empty: Path
) -> None:
    key, _, _ = setting.partition("=")
    with pytest.raises(PretrainError, match=rf"^{re.escape(key)}=\S+ has no effect with ") as error:
        config.load(empty, [*choice, setting])
    assert "\n" not in str(error.value)
    without = config.load(empty, choice)
    default: Any = config.to_dict(Config())
    for name in key.split("."):
        default = default[name]
    values = config.with_overrides({}, [*choice, f"{key}=null"])
    assert config.load(empty, [*choice, f"{key}=null"]) == without
    assert config.from_dict(config.merge(values, nested(key, default))) == without


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value  # type: ignore[no-any-return]


@given(chosen=st.lists(st.sampled_from(EACH), max_size=6), data=st.data())
def test_settings_without_effect_are_dropped_from_those_of_an_earlier_run(
    chosen: list[tuple[tuple[str, ...], str]], data: st.DataObject
) -> None:
    """The rest loads, and settings with an effect keep their values."""
    choices = [text for choice, _ in chosen for text in choice]
    settings = [setting for _, setting in chosen]
    values = config.with_overrides({"seed": 7}, data.draw(st.permutations(choices + settings)))
    kept = config.drop_without_effect(values)
    loaded = config.from_dict(kept)
    assert loaded.seed == 7 and config.drop_without_effect(kept) == kept
    if not choices:
        assert loaded == config.from_dict({"seed": 7})


def test_other_errors_in_the_settings_of_an_earlier_run_remain() -> None:
    values = {"wandb": {"project": "x"}, "data": {"window": 3}}
    with pytest.raises(PretrainError, match=r"data\.window"):
        config.from_dict(config.drop_without_effect(values))


@given(st.sampled_from(sorted({**loading._SYNONYMS, "zzz": "", "x" * 300: ""})))
def test_an_unknown_key_suggests_few_settings_of_its_section(name: str) -> None:
    sections = [Config, config.LanguageConfig, config.OptimizerConfig, config.DataConfig]
    names = {key.rpartition(".")[2] for key, _ in settings(Config)}
    assert loading._SYNONYMS.get(name, "lr") in names
    for section in sections:
        with pytest.raises(PretrainError, match=r"^unknown configuration key ") as error:
            loading._build(section, {name: 1}, "")
        suggested = str(error.value).rpartition(": ")[2]
        synonym = loading._SYNONYMS.get(name)
        if synonym in rules.field_types(section):
            assert suggested == f"did you mean {synonym!r}?"
        assert suggested.count(",") < loading._MAX_LISTED and "\n" not in suggested
