"""A stage begins with the weights of another run, at any parallel sizes, and else anew."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader

from pretrain.runtime import checkpoint
from tests.distributed import training
from tests.distributed.launch import launch

SHORT = (
    *("evaluation.every=100", "evaluation.captions=4", "evaluation.transcriptions=0"),
    *("optimizer.warmup_steps=2", "optimizer.decay_steps=0"),
)
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def pretrained(folder: Path) -> Records:
    """The metrics of three steps at EP 2, whose run is in ``folder``/run."""
    run = training.train_and_read
    return launch(run, 2, str(folder), "parallel.expert=2", "steps=3", *SHORT)[0]  # type: ignore[no-any-return]


def stage(folder: Path, name: str, *overrides: str) -> tuple[str, ...]:
    return (
        *(str(folder), f"run_dir={folder}/{name}", f"start_from={folder}/run", "steps=4"),
        *(*SHORT, *overrides),
    )


@pytest.fixture(scope="module")
def whole(folder: Path, pretrained: Records) -> Records:
    return launch(training.train_and_read, 1, *stage(folder, "whole"))[0]  # type: ignore[no-any-return]


def test_its_first_losses_are_those_of_the_weights_it_begins_with(
    folder: Path, pretrained: Records, whole: Records
) -> None:
    keys = [key for key in whole[0] if key.endswith("_loss")]
    assert len(keys) == 4
    for key in keys:
        assert whole[0][key] == pytest.approx(pretrained[3][key], rel=2e-6), key
        assert whole[0][key] < pretrained[0][key] - 0.05, "and not those of new weights"
    cut = launch(training.train_and_read, 2, *stage(folder, "cut", "parallel.tensor=2"))[0]
    for mine, reference in zip(cut, whole, strict=True):
        for key in ("held_out_text_loss", "loss", "grad_norm"):
            if key in reference:
                assert mine[key] == pytest.approx(reference[key], rel=1e-4), (mine["step"], key)


def test_schedule_data_and_optimizer_begin_anew(
    folder: Path, pretrained: Records, whole: Records
) -> None:
    assert [record["step"] for record in whole] == list(range(5))
    assert [record["lr"] for record in whole[1:4]] == [record["lr"] for record in pretrained[1:]]
    assert whole[1]["loss"] < pretrained[1]["loss"] - 0.05, "the same data, better known"
    count = {"optimizer.language.embedding.word_embeddings.weight.step": torch.zeros(())}
    path = checkpoint.path_of(folder / "whole" / "checkpoints", 4)
    state_dict_loader.load(count, checkpoint_id=path, no_dist=True)
    assert [value.item() for value in count.values()] == [4]


def test_it_goes_on_from_its_own_checkpoint_wherever_the_other_run_is(
    folder: Path, whole: Records
) -> None:
    run = training.train_and_read
    launch(run, 1, *stage(folder, "parts", "steps=2"))
    parts = launch(run, 1, *stage(folder, "parts", "start_from=gone"))[0]
    assert parts[3:] == whole[3:]


def refuse(folder: str) -> list[str]:
    """What the command line says to stages that cannot begin."""
    root = Path(folder)
    other = root / "other.json"
    text = (root / "run" / "tokenizer.json").read_text()
    other.write_text(text.replace("<|media_begin|>", "<|vision_start|>"))
    said = []
    for changes in (
        ("language.norm_eps=1e-6",),
        ("vision.rope_base=500",),
        (f"data.tokenizer={other}",),
        ("start_from=nowhere",),
        (f"start_from={folder}/stage",),
    ):
        config = (str(root / "tiny.yaml"), f"data.cache_dir={root}/cache")
        _, *overrides = stage(root, "stage", *changes)
        status, line = training.command("train", *config, *overrides)
        assert status == 1
        said.append(line.removeprefix("error: "))
    assert not checkpoint.steps(root / "stage" / "checkpoints")
    return said


def test_what_cannot_be_begun_with_is_told(folder: Path, pretrained: Records) -> None:
    (said,) = launch(refuse, 1, str(folder))
    norm, rope, tokenizer, nowhere, itself = said
    assert norm == (
        f"the model of start_from={folder}/run has language.norm_eps=1e-05, not 1e-06: set it to "
        "that, or start from another run"
    )
    assert "has vision.rope_base=10000.0, not 500.0" in rope
    assert (
        f"the data's tokenizer is not {folder}/run/tokenizer.json, whose ids the model of"
        in tokenizer
    )
    assert nowhere.startswith("start_from=nowhere has no tokenizer.json: give the run_dir of a run")
    assert "/stage is the run_dir itself: choose another run_dir" in itself
