"""``posttrain swarm``, from an export to an export, with TRL's trainer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posttrain import metrics, model
from posttrain.config import Config
from posttrain.environment.episode import Episode
from posttrain.environment.markup import TOKENS
from posttrain.environment.trajectory import Trajectory
from posttrain.losses import weighted_loss
from posttrain.swarm import start, train
from posttrain.swarm.orchestrator import SwarmEpisode
from posttrain.swarm.parl import Stage
from posttrain.swarm.tasks import LookUps
from pretrain import config
from pretrain.errors import PretrainError

PRETRAINING = "data: {images: null, max_corpus_mb: 0.1, seq_length: 64}\n"


def settings(folder: Path, export: Path, *overrides: str) -> Config:
    (folder / "pretraining.yaml").write_text(PRETRAINING)
    (folder / "swarm.yaml").write_text(
        f"model: {export}\npretraining: {folder}/pretraining.yaml\nrun_dir: {folder}/run\n"
        "steps: 4\nsave_every: 2\nlog_every: 1\nrl: {prompts: 2, group_size: 2}\n"
        "swarm: {start_steps: 2, start_batch: 2, evaluation_tasks: 2, context: 120,"
        " sub_context: 80, reply_tokens: 8, records: 2, critical_steps: 3}\n"
        "evaluation: {images: 0, text_sequences: 1}\n"
    )
    return config.load_as(Config, str(folder / "swarm.yaml"), list(overrides))


def test_from_an_export_to_an_export(text_export: Path, tmp_path: Path) -> None:
    train.train(settings(tmp_path, text_export, "steps=2"))
    begun = (tmp_path / "run" / "start" / "config.json").stat().st_mtime_ns
    # It resumes; the start is not trained again.
    trained = model.load(train.train(settings(tmp_path, text_export)))
    assert (tmp_path / "run" / "start" / "config.json").stat().st_mtime_ns == begun
    assert all(trained.tokenizer.id_of(name) is not None for name in TOKENS)
    assert trained.max_length == 120
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    rollouts = [record for record in records if "performance" in record]
    assert [record["step"] for record in rollouts] == [1, 3]  # two steps for each
    assert all(0 <= record["performance"] <= 1 for record in rollouts)
    assert [r["step"] for r in records if "held_out_performance" in r] == [0, 2, 4]


def test_without_different_rewards_nothing_is_learned(text_export: Path, tmp_path: Path) -> None:
    """In groups of equal rewards, every ratio is exactly 1: no weight is moved by rounding."""
    folder = tmp_path / "run"
    equal = ("swarm.parallel_weight=0", "swarm.finish_weight=0", "rl.group_size=4")
    out = train.train(settings(tmp_path, text_export, *equal))
    rewards = [r for r in metrics.read(folder / "metrics.jsonl") if "reward_spread" in r]
    assert [record["reward_spread"] for record in rewards] == [0, 0]
    before, after = (load_file(f / "model.safetensors") for f in (folder / "start", out))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_mean_over_no_episode_is_left_out() -> None:
    task = LookUps(deep_share=1).task(0)
    episode = Episode(Trajectory([1]), 0.5, "", 1, None)
    found = train.summary([SwarmEpisode(task, episode, (Stage(),), ())])
    assert found == {"performance": 0.5, "deep_performance": 0.5, "deep_sub_agents": 0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.tasks.read.max_tokens=20", "rl.tasks has no effect"),
        ("swarm.start_steps=0 swarm.start_batch=16", "lacks tokens of tool calls"),
        ("swarm.start_steps=0", "start_batch=2 has no effect with start_steps=0"),
        ("swarm.records=14", "swarm.records=14 x swarm.depth=1 .* must not exceed the 13 names"),
        ("swarm.start.frozen=['*']", "swarm.start.frozen leaves no parameter to train"),
        ("swarm.context=34", "swarm.context=34: too short"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line(
    text_export: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(PretrainError, match=message) as error:
        train.train(settings(tmp_path, text_export, *override.split()))
    assert "\n" not in str(error.value)


def test_contexts_fit_the_model(text_export: Path, tmp_path: Path) -> None:
    """The supervised start extends a model to them; without it, the model has a limit."""
    longer = ("steps=2", "swarm.sub_context=130")
    trained = model.load(train.train(settings(tmp_path, text_export, *longer)))
    assert trained.max_length == 130
    (tmp_path / "other").mkdir()
    nothing = ("swarm.start_steps=0", "swarm.start_batch=16", "swarm.context=131")
    with pytest.raises(PretrainError, match=r"swarm\.context=131 exceeds the 130 tokens"):
        train.train(settings(tmp_path / "other", trained.folder, *nothing))


def test_a_gradient_of_the_start_that_is_not_finite_is_one_line(
    text_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def infinite(*arguments: Any) -> torch.Tensor:
        return weighted_loss(*arguments) * float("inf")

    monkeypatch.setattr(start, "weighted_loss", infinite)
    message = r"step 1 of the supervised start is not finite: .*lower swarm\.start\.lr"
    with pytest.raises(PretrainError, match=message):
        train.train(settings(tmp_path, text_export))
