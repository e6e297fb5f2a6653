"""A configuration is what was written, or one line says what is wrong with it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain import config
from pretrain.errors import PretrainError

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
        (["optimizer.lr=-1"], "optimizer.lr must be > 0, not -1"),
        (["language.dense_layers=9"], "language.dense_layers must leave a layer of experts"),
        (["language.experts_per_token=99"], "experts_per_token is 99 of only 8 experts"),
        (["steps=10"], "is more than steps = 10"),
        (["start_from=runs/default"], "start_from=runs/default is the run_dir itself"),
        (["language.rope_scaling.factor=0.5"], "rope_scaling.factor must be >= 1, not 0.5"),
        (
            ["language.rope_scaling.factor=4"],
            "rope_scaling.original_max_position_embeddings must be given with factor=4",
        ),
        ([*YARN, "data.seq_length=1024"], "data.seq_length=1024 is more than language.rope_scal"),
        ([*YARN, "language.rope_scaling.beta_fast=0.5"], "beta_fast=0.5 must be >= beta_slow=1"),
        (
            [*YARN, "language.rope_scaling.mscale=2", "language.rope_scaling.mscale_all_dim=0"],
            "mscale_all_dim must be > 0, or 0 beside mscale=1, not 0.0 beside mscale=2.0",
        ),
        (["profile.steps=[3, 2]"], "profile.steps must be [first, last], 1 <= first <= last"),
        (["profile.steps=[3]"], "profile.steps must be"),
        (["profile.steps=[1, 2000]"], "profile.steps ends after steps = 1000"),
        (["wandb.mode=on"], "wandb.mode must be one of 'offline', 'online'"),
        (["peak_tflops=0"], "peak_tflops must be > 0 or null"),
        (["steps"], "cannot read the override 'steps': write key=value"),
        (["steps=[1"], "cannot read the value of the override 'steps=[1'"),
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
