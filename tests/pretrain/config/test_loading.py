"""Reading a configuration: values arrive unchanged, and each error is one line with its cause."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain import config
from pretrain.config.rules import Settings
from pretrain.config.schema import PathName, Positive
from pretrain.errors import PretrainError

YARN = (
    "language.rope_scaling.factor=2",
    "language.rope_scaling.original_max_position_embeddings=256",
)
CONFIGS = sorted(Path("configs").glob("*.yaml"))


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


def test_options_are_merged_by_name_and_survive_a_checkpoint(tmp_path: Path) -> None:
    """Names and values are those of megatron-core, which checks them when a run starts."""
    (tmp_path / "base.yaml").write_text("megatron: {a: 1, b: [x, y], c: true}\n")
    path = tmp_path / "run.yaml"
    path.write_text("base: base.yaml\nmegatron: {a: null, d: 0.5}\n")
    loaded = config.load(path, ["megatron.c=false", "ddp.bucket_size=1000"])
    assert loaded.megatron == {"b": ("x", "y"), "c": False, "d": 0.5}
    assert loaded.ddp == {"bucket_size": 1000}
    assert config.from_dict(json.loads(json.dumps(config.to_dict(loaded)))) == loaded


RECOMPUTE = ("recompute.granularity=selective",)
# Settings of the language model, and the error.
SHAPES = (
    ("qk_norm=true", "qk_norm=True has no effect with attention=mla: leave it out, or set null"),
    ("num_kv_heads=2", "num_kv_heads=2 has no effect with attention=mla"),
    ("head_dim=8", "head_dim=8 has no effect with attention=mla"),
    ("attention=gqa kv_lora_rank=8", "kv_lora_rank=8 has no effect with attention=gqa"),
    ("attention=gqa num_kv_heads=3", "num_kv_heads=3 does not divide num_heads=4"),
    ("attention=gqa head_dim=3", "head_dim must be even, not 3"),
    ("attention=gqa num_heads=3", "num_heads=3 does not divide hidden_size=128: set head_dim"),
    (
        "attention=gqa rope_scaling.factor=4 rope_scaling.original_max_position_embeddings=256",
        "rope_scaling=RopeScalingConfig(",
    ),
    ("dense_layers=4 num_experts=4", "num_experts=4 has no effect with dense_layers=num_layers"),
    ("dense_layers=4 router_score=softmax", "router_score='softmax' has no effect with dense_lay"),
    (
        "router_score=softmax expert_bias_update_rate=0.1",
        "expert_bias_update_rate=0.1 has no effect with router_score=softmax",
    ),
    ("normalize_expert_weights=false", "normalize_expert_weights=False needs router_score=softmax"),
    ("expert_groups=3", "expert_groups=3 does not divide num_experts=8"),
    ("expert_groups_per_token=2", "expert_groups_per_token is 2 of only 1 expert_groups"),
    ("expert_groups=4 router_score=softmax", "expert_groups=4 needs router_score=sigmoid"),
    (
        "expert_groups=4 expert_groups_per_token=2",
        "expert_groups_per_token=2 needs experts_per_token=4 to 5, not 2",
    ),
    (
        "expert_groups=2 experts_per_token=3",
        "expert_groups_per_token=1 needs experts_per_token=2, not 3: groups",
    ),
    ("expert_groups=8", "expert_groups=8 of 1 experts are too small"),
    ("load_balancing_loss=-1", "load_balancing_loss must be in [0, 1], not -1.0"),
    ("vocab_size=0", "vocab_size must be in [1, 16777216] or null, not 0"),
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimiser.lr=1"], "unknown configuration key 'optimiser': did you mean 'optimizer'?"),
        (["optimizer.lrr=1"], "unknown configuration key 'optimizer.lrr': did you mean 'lr'?"),
        (["optimizer.learning_rate=1"], "key 'optimizer.learning_rate': did you mean 'lr'?"),
        (["language.rope_theta=1"], "key 'language.rope_theta': did you mean 'rope_base'?"),
        (["wandb.zzz=1"], "key 'wandb.zzz': known keys: enabled, mode, project"),
        (["megatron=[1]"], "megatron must be a mapping of names to values, not [1]"),
        (["ddp.a.b=1"], "ddp.a must be bool or int or float or str or a list of bool or int or"),
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
        (["language.dense_layers=9"], "language.dense_layers=9 is more than num_layers=4"),
        (
            ["data.images.max_words=1", "data.images.wrapped_share=0.2"],
            "data.images.wrapped_share=0.2 has no effect with max_words=1: leave it out",
        ),
        (["language.experts_per_token=99"], "experts_per_token is 99 of only 8 experts"),
        *(
            ([f"language.{setting}" for setting in settings.split()], f"language.{message}")
            for settings, message in SHAPES
        ),
        (
            [
                *RECOMPUTE,
                "recompute.modules=[shared_experts]",
                "language.shared_expert_ffn_hidden_size=0",
            ],
            "recompute.modules has shared_experts, which no layer has",
        ),
        (
            [*RECOMPUTE, "recompute.modules=[core_attn, mlp]", "language.dense_layers=0"],
            "recompute.modules has mlp, which no layer has",
        ),
        (
            ["encoder_process.enabled=false", "encoder_process.group_size=2"],
            "encoder_process.group_size=2 has no effect with enabled=false",
        ),
        *(
            (
                [f"encoder_process.{choice}=false", "encoder_process.activation_memory_gib=1"],
                f"encoder_process.activation_memory_gib=1.0 has no effect with {choice}=false",
            )
            for choice in ("enabled", "recompute")
        ),
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
        (["run_dir="], "the override 'run_dir=' has no value: null restores the default"),
        (["run_dir=' '"], "run_dir must be a path, not ' '"),
        (['start_from="a\\0b"'], "start_from must be a path or null, not 'a\\x00b'"),
        (["wandb.project=''"], "wandb.project must be text that is not empty, not ''"),
        (["peak_tflops=1" + "0" * 400], "peak_tflops must be float or null, not 1000"),
        (["seed=1" + "0" * 5000], "the number has 5001 digits"),
        (["data.sources=" + "[" * 10000], "it is nested too deeply"),
        (["optimizer=&x {lr: 1}"], "anchors and aliases are not supported"),
        (["run_dir=!!python/object/apply:os.getcwd []"], "tags are not supported"),
        (["steps=500", "steps.x=1"], "steps must be int, not {'x': 1}"),
    ],
)
def test_an_error_names_the_setting(empty: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(PretrainError) as error:
        config.load(empty, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
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


@given(lr=st.floats(1e-8, 10), steps=st.integers(1000, 10**9), enabled=st.booleans())
def test_values_are_read_from_yaml_exactly(
    lr: float, steps: int, enabled: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(f"optimizer: {{lr: {lr!r}}}\n")
    loaded = config.load(
        path, [f"steps={steps}", f"encoder_process.enabled={str(enabled).lower()}"]
    )
    assert loaded.optimizer.lr == lr
    assert (loaded.steps, loaded.encoder_process.enabled) == (steps, enabled)


def test_a_section_given_as_an_override_changes_only_the_settings_in_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {lr: 0.5, momentum: 0.9}")
    loaded = config.load(path, ["optimizer={lr: 0.25}", "optimizer.adamw_lr=1", "steps=1000"])
    assert (loaded.optimizer.lr, loaded.optimizer.momentum, loaded.optimizer.adamw_lr) == (
        0.25, 0.9, 1.0
    )  # fmt: skip


def test_a_second_section_of_a_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {lr: 1}\nsteps: 300\noptimizer: {momentum: 0.5}\n")
    with pytest.raises(PretrainError, match="line 3: 'optimizer' is given twice: merge the two"):
        config.load(path)


@dataclass(frozen=True)
class Part(Settings):
    weight: Positive = 1.0
    file: PathName = "a"


@dataclass(frozen=True)
class Whole(Settings):
    """A section with a mapping of sections."""

    parts: dict[str, Part] = field(default_factory=lambda: {"first": Part()})


def test_a_mapping_of_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "there")
    path = tmp_path / "whole.yaml"
    path.write_text("parts: {one: {weight: 2}, two: {file: $PLACE/b}, three: {}}")
    assert config.load_as(Whole, path, ["parts.one.file=c", "parts.three=null"]).parts == {
        "one": Part(2.0, "c"),
        "two": Part(1.0, "there/b"),
    }
    for override, message in (
        ("parts.one.weight=0", r"^parts\.one\.weight must be in"),
        ("parts.one=3", r"^parts\.one must be a mapping, not 3$"),
        ("parts.one.height=0", r"^unknown configuration key 'parts\.one\.height'"),
    ):
        with pytest.raises(PretrainError, match=message):
            config.load_as(Whole, path, [override])
    (tmp_path / "empty.yaml").write_text("")
    assert config.load_as(Whole, tmp_path / "empty.yaml").parts == {"first": Part()}
    lines = list(config.describe(Whole))
    assert lines[0] == "parts={'first': {}}"
    assert lines[1].startswith("parts.NAME.weight=1.0")
