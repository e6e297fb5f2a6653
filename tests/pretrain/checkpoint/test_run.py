"""A run starts with exactly the weights of another one, in either precision."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pretrain import batches, checkpoint, parallel
from pretrain.build import build
from pretrain.checkpoint import run as checkpoint_run
from pretrain.checkpoint import storage
from pretrain.checkpoint.imported import ImportedSettings
from pretrain.checkpoint.storage import Checkpoint
from pretrain.config import Config, DataConfig, SourceConfig, from_dict, rules, to_dict
from pretrain.errors import PretrainError
from pretrain.startup import set_up
from pretrain.step import train_step
from tests.distributed import training
from tests.distributed.launch import launch
from tests.pretrain.saved_run import SHAPE, STEP, Made


class Begun(NamedTuple):
    """The tensors of a run that starts from another one, by name.

    Attributes:
        states: keys of the optimizer's state before and after a step.
    """

    named_tensors: dict[str, Tensor]
    masters: dict[str, Tensor]
    states: tuple[set[str], set[str]]


def begin(folder: str, other: str, precision: str) -> Begun:
    settings = training.tiny(
        folder,
        *SHAPE,
        *(f"run_dir={folder}/new", f"start_from={folder}/{other}", f"precision={precision}"),
    )
    here, data = set_up(settings)
    run = build(settings, here, data)
    assert checkpoint.restore(run) == 0
    checkpoint.keep_tokenizer(run)
    named = {name: tensor.detach().clone() for name, tensor in run.named_tensors.items()}
    known = run.optimizer.state
    masters = {n: known[p]["master"].clone() for n, p in run.parameters() if "master" in known[p]}
    before = {key for _, parameter in run.parameters() for key in known[parameter]}
    train_step(run, batches.for_step(settings, here, data, 1), 1)
    after = {key for _, parameter in run.parameters() for key in known[parameter]}
    parallel.stop()
    return Begun(named, masters, (before, after))


FRESH = {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("other", ["run", "run16"])
def test_a_float32_run_starts_from_master_weights_and_keeps_imported_settings(
    made: Made, run_folder: Path, other: str
) -> None:
    imported = ImportedSettings(1234, "{{ messages }}", {"eos_token_id": [3, 4]})
    imported.write(run_folder / other)
    (begun,) = launch(begin, 1, str(run_folder), other, "float32")
    kept = ImportedSettings.read(run_folder / "new")
    for run_dir in (other, "new"):  # other tests have the folder as well
        (run_folder / run_dir / "imported.json").unlink()
    assert kept == imported
    assert begun.named_tensors.keys() == made.tensors.keys()
    assert all(
        torch.equal(begun.named_tensors[name], tensor) for name, tensor in made.tensors.items()
    )
    assert begun.states == (set(), FRESH)


@pytest.mark.parametrize("other", ["run", "run16"])
def test_a_bfloat16_run_uses_float32_weights_as_master_weights(
    made: Made, run_folder: Path, other: str
) -> None:
    (begun,) = launch(begin, 1, str(run_folder), other, "bfloat16")
    for name, tensor in made.tensors.items():
        if isinstance(tensor, nn.Parameter) or not name.endswith("expert_bias"):
            assert torch.equal(begun.masters[name], tensor), name
            assert torch.equal(begun.named_tensors[name], tensor.bfloat16()), name
        else:
            assert torch.equal(begun.named_tensors[name], tensor)
    assert begun.states == ({"master"}, FRESH | {"master"})


def check_settings(
    before: dict[str, Any],
    now: Config | None = None,
    sections: tuple[str, ...] = ("seed", "language"),
    ignored: tuple[str, ...] = (),
) -> None:
    """Compare a checkpoint's settings with a configuration, by default with the defaults."""
    before = json.loads(json.dumps(before))  # as in a manifest
    checkpoint_run._check_settings(
        "it has", before, now or Config(), sections=sections, ignored=ignored, remedy="change it"
    )


def with_data(**data: Any) -> Config:
    return from_dict({"data": data})


def test_a_checkpoint_without_a_newer_setting_has_its_default() -> None:
    values = to_dict(Config())
    del values["seed"], values["language"]["norm_eps"]
    check_settings(values)
    check_settings({})


@pytest.mark.parametrize(
    ("language", "message"),
    [
        ({"num_heads": 8}, "it has language.num_heads=8, not 4: change it"),
        ({"window": 64}, "it has language.window=64, not None: change it"),
        (3, "it has language=3, not None: change it"),
    ],
)
def test_a_setting_that_differs_or_is_unknown_is_named(language: Any, message: str) -> None:
    with pytest.raises(PretrainError, match=re.escape(message)):
        check_settings({"language": language})


# Values other than the defaults, of settings that do not change the data and of those that do.
MAY_DIFFER = {
    "cache_dir": "elsewhere",
    "decode_workers": 9,
    "max_corrupt": 7,
    "max_untokenized_mb": 0.5,
}
FIXED: dict[str, Any] = {
    "images": {"clip_share": 0.5},
    "sources": [{"path": "x"}, {"path": "y"}, {"path": "z"}],
    "deduplicate": "exact",
    "tokenizer": "tokenizer.json",
    "vision_share": 0.05,
    "held_out": 0.5,
    "seq_length": 64,
    "vocab_size": 300,
    "max_corpus_mb": 0.5,
    "max_image_tokens": 9,
    "video_fps": 1.0,
    "duplicate_threshold": 0.6,
}


@pytest.mark.parametrize("name", rules.field_types(DataConfig))
def test_a_resumed_run_has_the_same_data_and_may_read_it_faster(name: str) -> None:
    base: dict[str, Any] = {"sources": [{"path": "x"}, {"path": "y"}]}
    if name == "duplicate_threshold":
        base["deduplicate"] = "near"
    before, now = with_data(**base), with_data(**{**base, name: {**MAY_DIFFER, **FIXED}[name]})
    assert before != now
    fixed, free = checkpoint_run._FIXED, checkpoint_run._FIXED_EXCEPT
    if name in MAY_DIFFER:
        check_settings(to_dict(before), now, fixed, free)
        return
    with pytest.raises(PretrainError, match=rf"^it has data\.{name}="):
        check_settings(to_dict(before), now, fixed, free)


@pytest.mark.parametrize("name", rules.field_types(SourceConfig))
def test_a_source_that_differs_is_named_with_its_setting(name: str) -> None:
    other = {"path": "moved", "type": "chat", "weight": 2.0, "field": "x", "image_field": "x",
             "media_urls": ["example.org"], "split": "train", "trust_code": True}[name]  # fmt: skip
    second = {"path": "y", name: other}
    before = with_data(sources=[{"path": "x"}, {"path": "y"}])
    now = with_data(sources=[{"path": "x"}, second])
    if name == "path":  # the fingerprint of the files is compared instead
        check_settings(to_dict(before), now, ("data",))
        return
    value = getattr(before.data.sources[1], name)
    value, other = list(value) if isinstance(value, tuple) else value, other
    with pytest.raises(PretrainError) as error:
        check_settings(to_dict(before), now, ("data",))
    assert str(error.value) == f"it has data.sources[1].{name}={value}, not {other}: change it"


def test_another_number_of_sources_is_named() -> None:
    before = with_data(sources=[{"path": "x"}])
    with pytest.raises(PretrainError, match="=a list of 1, not a list of 0: change it"):
        check_settings(to_dict(before), sections=("data",))


def test_a_setting_without_effect_does_not_keep_an_earlier_run_from_resuming(
    tmp_path: Path,
) -> None:
    values = to_dict(Config())
    values["data"]["held_out"], values["wandb"]["project"] = 0.5, "x"
    checkpoint = Checkpoint(tmp_path, 1, {"config": values}, {}, {})
    found = checkpoint_run._config_values(checkpoint)
    assert from_dict(found) == Config()
    check_settings(dict(found), sections=checkpoint_run._FIXED)


def test_a_field_that_a_source_does_not_read_does_not_keep_an_earlier_run_from_resuming() -> None:
    for source_type, changed in (("megatron", False), ("energon", False), ("text", True)):
        before = with_data(sources=[{"type": source_type, "path": "x", "field": "body"}])
        now = with_data(sources=[{"type": source_type, "path": "x"}])
        context = pytest.raises(PretrainError, match="field=body") if changed else nullcontext()
        with context:
            check_settings(to_dict(before), now, sections=("data",))


WRONG: dict[str, Any] = {
    "updates": st.sampled_from(["x", -1, 1.5, True, None, 1 << 63, []]),
    "source_tokens": st.sampled_from(["x", 3, [1, "x"], [-1], [0.5], {}]),
    "data": st.sampled_from(["x", {}, [3], [None]]),
    "faults": st.sampled_from(["x", [], {"losses": 3}, {"losses": ["x"]}, {"skipped": -1}]),
    "weights_only": st.sampled_from(["x", 1, None, []]),
    "config": st.sampled_from(["x", 1, None, []]),
    "step": st.sampled_from([-3, 8, 6, 1 << 70, 7.5e9]),
}


@given(name=st.sampled_from(sorted(WRONG)), data=st.data())
def test_a_manifest_with_a_wrong_fact_or_step_is_damaged(
    made: Made, run_folder: Path, tmp_path_factory: pytest.TempPathFactory, name: str, data: Any
) -> None:
    source = storage.path_of(run_folder / "run" / "checkpoints", STEP)
    run_dir = tmp_path_factory.mktemp("damaged")
    path = storage.path_of(run_dir / "checkpoints", STEP)
    path.mkdir(parents=True)
    for file in source.iterdir():
        (path / file.name).symlink_to(file)
    manifest = path / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.unlink()
    manifest.write_text(json.dumps(values))
    assert checkpoint_run._open(run_dir).step == STEP
    value = data.draw(WRONG[name])
    (values if name == "step" else values["facts"])[name] = value
    manifest.write_text(json.dumps(values))
    with pytest.raises(PretrainError) as error:
        checkpoint.find(run_dir)
    message = str(error.value)
    assert str(path) in message and name in message and "\n" not in message
