"""``posttrain sft``, ``rl`` and ``eval``, from an export to an export, in small."""

import errno
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from posttrain import (
    cli,
    data,
    evaluate,
    metrics,
    model,
    modes,
    practice,
    report,
    rl,
    sft,
    trainer,
    vocabulary,
)
from posttrain.config import Config
from posttrain.run import Run
from pretrain import config as configuration
from pretrain import parallel
from pretrain.data import chat
from pretrain.errors import PretrainError
from pretrain.export.from_hf import import_hf
from pretrain.reading import Reading
from pretrain.runtime.run_lock import RunLock

PRETRAINING = """\
vision: {patch_size: 14}
data:
  max_corpus_mb: 0.1
  seq_length: 64
  images: {min_chars: 3, max_chars: 4, max_words: 1, wrapped_share: 0, clip_share: 0.1,
    large_share: 0, min_font_size: 10, max_font_size: 12}
"""
SETTINGS = """\
model: {export}
pretraining: {folder}/pretraining.yaml
run_dir: {folder}/run
steps: 4
save_every: 2
log_every: 1
optimizer: {{schedule: constant, warmup_steps: 0, lr: 1.0e-2}}
evaluation: {{images: 4, text_sequences: 1, problems: 2, max_tokens: 4}}
"""
READ = (
    "rl.prompts=2",
    "rl.group_size=2",
    "rl.tasks.read={max_tokens: 3, problems: 4, solved_share: 0.0}",
)


def settings(folder: Path, export: Path, *overrides: str) -> Config:
    folder.mkdir(exist_ok=True)
    cache = f"  cache_dir: {folder.parent}/cache\n"
    (folder / "pretraining.yaml").write_text(PRETRAINING + cache)
    (folder / "run.yaml").write_text(SETTINGS.format(export=export, folder=folder))
    return configuration.load_as(Config, folder / "run.yaml", overrides)


@pytest.fixture(autouse=True)
def few_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot takes half a second."""
    monkeypatch.setattr(report, "_PLOTS", ("reward",))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def records(folder: Path) -> list[dict[str, Any]]:
    return metrics.read(folder / "run" / "metrics.jsonl")


def spread_reward(answer: str, _truth: str) -> float:
    """A reward that differs between the random responses of an untrained model."""
    return sum(answer.encode()) % 7 / 6


def test_reading_is_trained_from_an_export_to_an_export(
    image_export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The trained folder has the files and names of the first one, and can be imported; a run that
    was interrupted ends with the same weights as one that was not."""
    monkeypatch.setattr(practice, "edit_distance_reward", spread_reward)
    out = rl.train(settings(tmp_path / "whole", image_export, *READ))
    origin = f"starting from {image_export}, with the data of {tmp_path}/whole/pretraining.yaml\n"
    assert origin in capsys.readouterr().out
    before, after = weights(image_export), weights(out)
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before if "o_proj" in name)
    assert {file.name for file in image_export.iterdir()} == {file.name for file in out.iterdir()}
    found = records(tmp_path / "whole")
    assert [record["step"] for record in found] == [0, 1, 2, 3, 4]
    assert [record["step"] for record in found if "reward" in record] == [1, 3]
    assert all(0 <= record["reward"] <= 1 for record in found if "reward" in record)
    state = tmp_path / "whole" / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    assert len(json.loads(state.read_text())["log_history"]) <= 1  # it does not grow with the steps
    assert found[0]["held_out_text_loss"] != found[-1]["held_out_text_loss"]
    assert "<svg" in (tmp_path / "whole" / "run" / "report.html").read_text()
    import_hf(out, tmp_path / "imported")
    parallel.stop()

    cut = tmp_path / "cut"
    rl.train(settings(cut, image_export, *READ, "steps=2"))
    resumed = weights(rl.train(settings(cut, image_export, *READ)))
    assert [record["step"] for record in records(cut)] == [0, 1, 2, 3, 4]
    for name, tensor in after.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize("name", ["muonclip", "adamw"])
def test_a_signal_saves_after_the_rollout_and_the_run_resumes(
    text_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also that sums are trained with budgets, after the finetuning that teaches the modes."""
    common = (f"optimizer.name={name}", "evaluation.images=0", "sums.max_operands=2")
    teaching = ("sft.batch_size=4", "sft.agent_share=0.0")  # replies with tools are too long
    taught = sft.train(settings(tmp_path / "sft", text_export, *common, *teaching))
    exported = model.load(taught)
    assert all(exported.tokenizer.id_of(token) is not None for token in chat.MARKUP)
    last = records(tmp_path / "sft")[-1]
    assert last["thinking_tokens"] > 0 and "thinking_long_tokens" not in last  # one length
    assert exported.hf_tokenizer.chat_template == modes.chat_template(exported)

    sums = (
        *("rl.tasks.sums={problems: 4, max_tokens: 3}", "rl.prompts=2", "rl.group_size=2"),
        *("rl.tasks.sums.toggle.mode=toggle", "rl.tasks.sums.toggle.period=1"),
    )
    chosen = settings(tmp_path / "rl", taught, *common, *sums)
    write = Run.write

    def stopping(run: Run, record: dict[str, Any]) -> None:
        write(run, record)
        if record["step"] == 1:
            run.termination.signal = 15

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write", stopping)
        with pytest.raises(SystemExit) as ended:
            rl.train(chosen)
    assert ended.value.code == 128 + 15
    budgets = json.loads((tmp_path / "rl" / "run" / "budgets.json").read_text())
    assert len(budgets["sums"]) == 4 and set(budgets["sums"].values()) <= {1.0, 2.0, 3.0}
    rl.train(chosen)
    found = records(tmp_path / "rl")
    assert [record["step"] for record in found] == [0, 1, 2, 3, 4]
    assert [record["has_budget"] for record in found if "has_budget" in record] == [1, 0]


JOINT = (
    "rl.tasks.read={share: 1, problems: 6, max_tokens: 3, solved_share: null}",
    "rl.tasks.sums={share: 2, problems: 6, max_tokens: 5, toggle: {mode: toggle, period: 1}}",
    "rl.tasks.count_shapes={share: 1, problems: 6, max_tokens: 4}",
    "rl.tasks.sort={share: 0.5, problems: 6, max_tokens: 4}",
    "rl.tasks.follow={share: 1, problems: 6, max_tokens: 9}",
    *("rl.prompts=4", "rl.group_size=2", "sums.max_operands=2"),
)


def test_tasks_of_text_and_images_are_trained_together(
    image_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every task has its own prompts, limit, reward and metrics; an interrupted run ends with the
    same weights as one that was not."""
    monkeypatch.setattr(practice, "edit_distance_reward", spread_reward)
    start = vocabulary.extend(model.load(image_export), tmp_path / "hf", chat.MARKUP).folder
    after = weights(rl.train(settings(tmp_path / "whole", start, *JOINT)))
    found = records(tmp_path / "whole")
    assert [record["step"] for record in found] == [0, 1, 2, 3, 4]
    rollouts = [record for record in found if "reward" in record]
    limits = {"read": 3, "sums": 5, "count_shapes": 4, "sort": 4, "follow": 9}
    for task, limit in limits.items():
        of_task = [record for record in rollouts if f"{task}_reward" in record]
        assert of_task or task == "sort"  # whose share is less than a prompt
        for record in of_task:
            assert 0 < record[f"{task}_response_tokens"] <= limit
            assert 0 <= record[f"{task}_reward"] <= 1
    assert [record["sums_has_budget"] for record in rollouts] == [1, 0]
    for when in (found[0], found[-1]):
        assert 0 <= when["held_out_sort_accuracy"] <= when["held_out_sort_reward"] <= 1
        assert when["held_out_count_shapes_reward"] is not None
        assert when["thinking_accuracy"] is not None and when["exact_match"] is not None
    budgets = json.loads((tmp_path / "whole" / "run" / "budgets.json").read_text())
    assert set(budgets) == {"sums"} and set(budgets["sums"].values()) <= {1.0, 2.0, 3.0, 4.0, 5.0}

    cut = tmp_path / "cut"
    rl.train(settings(cut, start, *JOINT, "steps=2"))
    resumed = weights(rl.train(settings(cut, start, *JOINT)))
    for name, tensor in after.items():
        assert torch.equal(tensor, resumed[name]), name


def test_an_agentic_task_needs_the_tokens_of_tool_calls(text_export: Path, tmp_path: Path) -> None:
    thinking = ("<think>", modes.END_OF_THINKING)
    start = vocabulary.extend(model.load(text_export), tmp_path / "hf", thinking).folder
    with pytest.raises(PretrainError, match=r"lacks .*tool_call_begin.*: run .*posttrain sft"):
        rl.train(settings(tmp_path / "bad", start, "rl.tasks.follow={}"))


def test_a_prompt_that_leaves_no_room_is_one_line(text_export: Path, tmp_path: Path) -> None:
    start = vocabulary.extend(model.load(text_export), tmp_path / "hf", chat.MARKUP).folder
    long = ("sums.min_operands=64", "sums.max_operands=64", "rl.tasks.sums={problems: 8}")
    with pytest.raises(PretrainError, match=r"sums\.max_tokens=16: .* leave 0 for the response"):
        rl.train(settings(tmp_path / "long", start, *long))


def test_a_part_of_a_batch_may_have_no_images(image_export: Path, tmp_path: Path) -> None:
    """One group of responses to each task: one of the two updates can be without images."""
    start = vocabulary.extend(model.load(image_export), tmp_path / "hf", chat.MARKUP).folder
    few = ("rl.tasks.read={problems: 2, max_tokens: 3, solved_share: null}", "rl.updates=4")
    sums = ("rl.tasks.sums={share: 3, problems: 6, max_tokens: 3}", "steps=8", "save_every=8")
    sizes = ("rl.prompts=4", "rl.group_size=2", "evaluation.images=0", "evaluation.problems=0")
    rl.train(settings(tmp_path / "few", start, *few, *sums, *sizes))
    assert len([r for r in records(tmp_path / "few") if "read_reward" in r]) == 2


def test_the_spread_of_rewards_is_within_groups(
    image_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Problems of different difficulty have none if the responses to each have equal rewards."""
    monkeypatch.setattr(practice, "edit_distance_reward", lambda _answer, truth: len(truth) / 10)
    chosen = settings(tmp_path / "equal", image_export, *READ, "rl.prompts=4", "steps=2")
    rl.train(chosen)
    assert records(tmp_path / "equal")[1]["reward_spread"] == 0
    monkeypatch.setattr(practice, "edit_distance_reward", spread_reward)
    rl.train(settings(tmp_path / "spread", image_export, *READ, "steps=2"))
    assert records(tmp_path / "spread")[1]["reward_spread"] > 0


def test_frozen_parameters_stay(
    image_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder of images alone is trained: the loss of text is exactly the same."""
    monkeypatch.setattr(practice, "edit_distance_reward", spread_reward)
    frozen = "optimizer.frozen=[model.language_model.*, lm_head.*]"
    out = rl.train(settings(tmp_path / "frozen", image_export, *READ, frozen, "steps=2"))
    before, after = weights(image_export), weights(out)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vision_tower", "mm_projector"}
    first, *_, last = records(tmp_path / "frozen")
    assert first["held_out_text_loss"] == last["held_out_text_loss"]


def test_other_images_than_those_of_pretraining_are_practised_and_evaluated(
    image_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts are of another length, so that the source of each image is visible."""
    practised: set[int] = set()

    def noted(answer: str, truth: str) -> float:
        practised.add(len(truth))
        return spread_reward(answer, truth)

    monkeypatch.setattr(practice, "edit_distance_reward", noted)
    longer = "rl.tasks.read.images=[data.images.min_chars=6, data.images.max_chars=6]"
    chosen = settings(tmp_path / "longer", image_export, *READ, longer, "steps=2")
    out = rl.train(chosen)
    assert practised == {6}
    readings = json.loads((tmp_path / "longer" / "run" / "transcriptions.json").read_text())
    assert {len(reading[0]) for reading in readings} == {6}

    exported = model.load(out)
    data = evaluate.open_pretraining_data(chosen.pretraining, exported.folder)
    found, _ = evaluate.held_out(exported, data, chosen)
    assert "changed_exact_match" not in found


def test_a_model_that_reads_all_images_is_one_line(
    image_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although there are always more of them."""
    seen: list[int] = []

    def endless(_data: Any, _split: str, count: int) -> list[data.Picture]:
        seen.append(count)
        return [data.Picture(Image.new("RGB", (28, 28)), "a")] * count

    def read(_exported: Any, images: Sequence[data.Picture], _options: Any) -> list[Reading]:
        return [Reading(one.text, one.text, "") for one in images]

    monkeypatch.setattr(practice, "pictures", endless)
    monkeypatch.setattr(evaluate, "transcribe", read)
    chosen = settings(tmp_path, image_export, *READ, "rl.tasks.read.solved_share=0.5")
    with pytest.raises(PretrainError, match=r"has 0 different problems .*solved_share=null"):
        rl.train(chosen)
    assert seen == [4, 8, 16, 32, 64]


def test_evaluation_of_the_command(
    image_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings(tmp_path / "eval", image_export)
    assert cli.main(["eval", str(tmp_path / "eval" / "run.yaml")]) == 0
    output = capsys.readouterr().out
    assert "character error rate" in output and "text in the image" in output


def test_evaluation_of_a_model_without_images(
    text_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings(tmp_path, text_export)
    faint = "rl.tasks.read.images=[data.images.min_contrast=0.2]"
    assert cli.main(["eval", str(tmp_path / "run.yaml"), faint]) == 0
    output = capsys.readouterr().out
    assert "text" in output and "character error rate" not in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("rl.tasks.sums={}",), "does not know the mode thinking.*posttrain sft"),
        (("rl.group_size=1",), "group_size must be in"),
        (("rl.updates=3",), "updates=3 must divide"),
        (("save_every=3",), "save_every=3 must be a multiple of rl.updates=2"),
        (("rl.ratio_high=0.9",), "ratio_high must be in"),
        (("sft.batch_size=8",), "the section sft has no effect"),
        (("rl.tasks.read.toggle.period=3",), "period=3 has no effect with mode=off"),
        (
            ("optimizer.name=adamw", "optimizer.qk_clip_threshold=9"),
            "has no effect with name=adamw",
        ),
        (
            ("rl.prompts=50", "rl.tasks.read={problems: 3, solved_share: null}"),
            r"3 different problems .* fewer than .* or raise rl\.tasks\.read\.problems",
        ),
        (
            ("sums.redundant_share=0.1",),
            "sums.redundant_share=0.1 has no effect with `posttrain rl`",
        ),
        (("model=/nowhere",), "/nowhere"),
        (
            ("rl.tasks.read.images=[data.images.max_ink=3]",),
            "unknown configuration key 'data.images.max_ink'",
        ),
        (("rl.tasks.read.images=[large]",), "large"),
        ((*READ, "optimizer.frozen=[encoder.*]"), "no parameter matches 'encoder"),
        ((*READ, "optimizer.frozen=['*']"), "leaves no parameter to train"),
        (("rl.rat=1",), "unknown configuration key 'rl.rat'"),
        (("rl.tasks.write={}",), "rl.tasks.write is no task: the tasks are read, sums"),
        (("rl.tasks={}",), "rl.tasks must contain a task"),
        (("rl.tasks.read.share=0",), "rl.tasks.read.share must be in"),
        (("rl.tasks.read.share=-1",), "rl.tasks.read.share must be in"),
        (("rl.tasks.read.shared=1",), "unknown configuration key 'rl.tasks.read.shared'"),
        (("rl.tasks.read=1",), "rl.tasks.read must be a mapping"),
        (("rl.tasks.follow.toggle.mode=toggle",), "rl.tasks.follow.toggle has no effect"),
        (
            ("rl.tasks.sort.solved_share=0.5",),
            "rl.tasks.sort.solved_share=0.5 has no effect with the task sort",
        ),
        (("rl.tasks.read={max_tokens: 60, problems: 8}",), "reads 64 tokens, which leave [1-9]"),
        (("rl.tasks.read.solved_share=1",), r"solved_share must be in \[0, 1\)"),
        (("rl.tasks.read={}", "rl.tasks.count_shapes={}"), "does not know the mode thinking"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line(
    image_export: Path, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(PretrainError, match=message) as error:
        rl.train(settings(tmp_path / "bad", image_export, *overrides))
    assert "\n" not in str(error.value)


def test_a_budget_of_one_of_two_tasks_is_half() -> None:
    """The mean over two tasks of which one has no budget at the moment is not shown as none."""
    assert metrics.cells({"has_budget": 0.5, "sums_has_budget": 1.0}) == [
        "budget 50%",
        "sums budget 100%",
    ]


def test_reasoning_without_an_end_is_no_answer(text_export: Path, tmp_path: Path) -> None:
    """Although it may contain the result: a server would return an empty message."""
    exported = vocabulary.extend(model.load(text_export), tmp_path / "hf", chat.MARKUP)
    tokenizer = exported.tokenizer
    steps, answer = tokenizer.encode("1+2=3").tolist(), tokenizer.encode("3").tolist()
    end = [tokenizer.id_of(modes.END_OF_THINKING)]
    thinking, instant = (modes.find(exported, name) for name in ("thinking", "instant"))
    assert modes.final_answer(exported, thinking, [*steps, tokenizer.im_end]) == ""
    assert modes.final_answer(exported, thinking, steps + end + answer) == "3"
    assert modes.final_answer(exported, instant, [*answer, tokenizer.im_end]) == "3"
    document = modes.find(exported, "document")
    assert modes.final_answer(exported, document, [*answer, tokenizer.newline]) == "3"


def test_sums_are_counted_by_length(text_export: Path, tmp_path: Path) -> None:
    """Replies of one token to all sums: the lengths are 1, and no sum is solved."""
    chosen = settings(tmp_path / "sums", text_export, "evaluation.problems=8")
    exported = vocabulary.extend(model.load(text_export), tmp_path / "hf", chat.MARKUP)
    one = replace(chosen, evaluation=replace(chosen.evaluation, max_tokens=1))
    found = evaluate.sums(exported, one, "instant")
    lengths = ("instant", "instant_short", "instant_long")
    assert found == {
        f"{name}_{key}": value
        for name in lengths
        for key, value in (("accuracy", 0.0), ("tokens", 1))
    }
    assert set(found) <= set(metrics.HELD_OUT)


def test_a_folder_with_another_run_is_refused(text_export: Path, tmp_path: Path) -> None:
    """But a run that ended before its first result may be started with other settings."""
    for learning_rate in (0.1, 0.2):
        with pytest.raises(PretrainError, match="needs a model with images"):
            rl.train(settings(tmp_path, text_export, f"optimizer.lr={learning_rate}"))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(PretrainError, match="contains a run with another optimizer"):
        rl.train(settings(tmp_path, text_export, "optimizer.lr=0.5"))


@pytest.mark.parametrize(("name", "resumes"), [("redundant_share", True), ("largest", False)])
def test_a_setting_of_sums_without_effect_does_not_keep_an_earlier_run_from_resuming(
    text_export: Path, tmp_path: Path, name: str, resumes: bool
) -> None:
    chosen = settings(tmp_path, text_export)
    with pytest.raises(PretrainError, match="needs a model with images"):
        rl.train(chosen)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    file = tmp_path / "run" / "config.json"
    started = json.loads(file.read_text())
    started["sums"][name] = 0
    file.write_text(json.dumps(started))
    refused = "needs a model with images" if resumes else "contains a run with another sums"
    with pytest.raises(PretrainError, match=refused):
        rl.train(chosen)


def copied(export: Path, folder: Path) -> str:
    return str(shutil.copytree(export, folder))


@pytest.mark.parametrize("name", ["run", "run/hf", "run/"])
def test_the_model_to_start_from_is_not_overwritten(
    text_export: Path, tmp_path: Path, name: str
) -> None:
    """Its folder, or the one that pretraining exported it into, is no run."""
    copied(text_export, tmp_path / name)
    with pytest.raises(PretrainError, match=r"must differ from model|something else than a run"):
        rl.train(settings(tmp_path, text_export, f"model={tmp_path}/{name}"))
    with pytest.raises(PretrainError, match="something else than a run"):
        rl.train(settings(tmp_path, text_export))
    for file in text_export.iterdir():
        assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["run/extended", "run/other"])
def test_a_run_does_not_contain_the_model_to_start_from(
    text_export: Path, tmp_path: Path, name: str
) -> None:
    """A run writes and removes folders in its own."""
    copied(text_export, tmp_path / name)
    with pytest.raises(PretrainError, match="must not contain it"):
        settings(tmp_path, text_export, f"model={tmp_path}/{name}")


@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_state_of_the_random_numbers_is_one_line(
    text_export: Path, tmp_path: Path, missing: bool
) -> None:
    """It is read before the first step that is still to be trained."""
    few = ("sums.max_operands=2", "sft.agent_share=0.0", "sft.batch_size=2", "save_every=1")
    nothing = "evaluation={images: 0, text_sequences: 0, problems: 0}"
    sft.train(settings(tmp_path, text_export, *few, nothing, "steps=1"))
    file = tmp_path / "run" / "checkpoints" / "checkpoint-1" / "rng_state.pth"
    file.unlink()
    if not missing:
        file.write_bytes(b"PK")
    with pytest.raises(PretrainError, match=r"checkpoint-1 cannot be read.*remove it"):
        sft.train(settings(tmp_path, text_export, *few, nothing, "steps=2"))


def test_a_start_of_finetuning_that_failed_leaves_its_settings_free(
    text_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although its tokens were added already."""
    few = ("steps=1", "sums.max_operands=2", "sft.agent_share=0.0", "sft.batch_size=2")
    nothing = "evaluation={images: 0, text_sequences: 0, problems: 0}"
    with monkeypatch.context() as patch:
        patch.setattr("posttrain.data.texts", lambda *_: [])
        with pytest.raises(PretrainError, match=r"no document of text .*sft\.replay_share=0"):
            sft.train(settings(tmp_path, text_export, *few, nothing))
        sft.train(settings(tmp_path, text_export, *few, nothing, "sft.replay_share=0"))


def test_finetuning_with_more_steps_continues_with_the_same_rows(
    text_export: Path, tmp_path: Path
) -> None:
    few = ("sums.max_operands=2", "sft.agent_share=0.0", "sft.batch_size=2")
    nothing = "evaluation={images: 0, text_sequences: 0, problems: 0}"
    whole = weights(sft.train(settings(tmp_path / "whole", text_export, *few, nothing)))
    sft.train(settings(tmp_path / "more", text_export, *few, nothing, "steps=2"))
    more = weights(sft.train(settings(tmp_path / "more", text_export, *few, nothing)))
    assert all(torch.equal(whole[name], more[name]) for name in whole)


def test_demonstrations_that_do_not_fit_are_one_line(text_export: Path, tmp_path: Path) -> None:
    """Two numbers are the least: those with tools can only be left out."""
    message = r"up to \d+ tokens, and the model reads 64: .*set sft\.agent_share=0"
    with pytest.raises(PretrainError, match=message):
        sft.train(settings(tmp_path, text_export, "sums.max_operands=2"))


def test_steps_of_finetuning_have_no_batches_of_rollouts(text_export: Path, tmp_path: Path) -> None:
    settings(tmp_path, text_export, "steps=3", "save_every=1").require_fit("sft")


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_a_damaged_checkpoint_is_one_line(
    image_export: Path, tmp_path: Path, name: str, missing: bool
) -> None:
    """After its removal, the run resumes from the one before; a state that was not completely
    written is no checkpoint."""
    nothing = (*READ, "evaluation={images: 0, text_sequences: 0, problems: 0}")
    rl.train(settings(tmp_path, image_export, *nothing))
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    content = (newest / name).read_bytes()
    (newest / name).unlink()
    if not missing:
        (newest / name).write_bytes(content[:20])
    with pytest.raises(PretrainError, match=r"checkpoint-4 cannot be read.*remove it") as error:
        rl.train(settings(tmp_path, image_export, *nothing))
    assert "\n" not in str(error.value)
    (newest / "trainer_state.json").write_text("{")
    rl.train(settings(tmp_path, image_export, *nothing))
    with pytest.raises(PretrainError, match="checkpoint-4 has more than steps=2"):
        rl.train(settings(tmp_path, image_export, *nothing, "steps=2"))
    assert [record["step"] for record in records(tmp_path)][-2:] == [3, 4]


def test_a_full_disk_is_one_line(
    image_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint before is kept, and the run resumes from it."""
    nothing = (*READ, "evaluation={images: 0, text_sequences: 0, problems: 0}")
    rl.train(settings(tmp_path, image_export, *nothing, "steps=2"))

    def save(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_file", save)
        with pytest.raises(PretrainError, match="cannot write the checkpoint of step 4: I/O error"):
            rl.train(settings(tmp_path, image_export, *nothing))
        patch.setattr(model, "save_file", save)
        with pytest.raises(PretrainError, match=r"cannot write the model .*: I/O error"):
            rl.train(settings(tmp_path, image_export, *nothing, "steps=2"))
    rl.train(settings(tmp_path, image_export, *nothing))
    assert [record["step"] for record in records(tmp_path)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["config.json", "transcriptions_before.json", "report.html"])
def test_a_file_that_cannot_be_written_is_named(
    text_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An error of a full disk has no name of a file."""
    write_text = Path.write_text

    def full(file: Path, *arguments: Any, **options: Any) -> int:
        if file.name.startswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(file, *arguments, **options)

    few = ("steps=1", "sums.max_operands=2", "sft.agent_share=0.0", "sft.batch_size=2")
    nothing = "evaluation={images: 0, text_sequences: 0, problems: 0}"
    chosen = settings(tmp_path, text_export, *few, nothing)
    monkeypatch.setattr(Path, "write_text", full)
    message = r"cannot write .*(run|run/\w+\.json): No space left on device"
    with pytest.raises(PretrainError, match=message):
        sft.train(chosen)


def test_a_run_whose_folder_is_deleted_ends(
    image_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete(answer: str, truth: str) -> float:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return spread_reward(answer, truth)

    monkeypatch.setattr(practice, "edit_distance_reward", delete)
    with pytest.raises(PretrainError, match=r"metrics\.jsonl was deleted .* ends after step 1"):
        rl.train(settings(tmp_path, image_export, *READ, "evaluation.images=0"))


def test_a_run_whose_folder_another_job_takes_ends(
    image_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both would write into metrics.jsonl and the checkpoints."""
    locks: list[RunLock] = []

    def acquire(folder: Path) -> RunLock:
        locks.append(RunLock(folder))
        return locks[-1]

    def take(answer: str, truth: str) -> float:
        other = tmp_path / "other.lock"
        other.write_text(json.dumps({"token": "another job", "pid": 1}))
        other.replace(tmp_path / "run" / "run.lock")
        deadline = time.monotonic() + 60
        while not locks[0].lost and time.monotonic() < deadline:
            time.sleep(0.01)
        return spread_reward(answer, truth)

    monkeypatch.setattr(RunLock, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr("posttrain.run.RunLock", acquire)
    monkeypatch.setattr(practice, "edit_distance_reward", take)
    with pytest.raises(PretrainError, match=r"another job has taken run_dir=.* ends after step 1"):
        rl.train(settings(tmp_path, image_export, *READ, "evaluation.images=0"))
    assert (tmp_path / "run" / "run.lock").read_text(), "it is the lock of the other job"


@pytest.mark.parametrize("name", ["muonclip", "adamw"])
def test_a_gradient_that_is_not_finite_is_one_line(
    image_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def infinite(loss: torch.Tensor, *_: Any) -> torch.Tensor:
        return loss.sum() * float("inf")

    monkeypatch.setattr(trainer.objective, "mean_over_tokens", infinite)
    with pytest.raises(
        PretrainError, match=r"gradient of step 1 is not finite: .*lower optimizer\.lr"
    ):
        rl.train(
            settings(tmp_path, image_export, *READ, f"optimizer.name={name}", "evaluation.images=0")
        )


def test_weights_that_are_not_finite_are_not_saved(
    text_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Exploding(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.fill_(float("inf"))

    monkeypatch.setattr(trainer, "make_optimizer", lambda model, _: Exploding(model.parameters()))
    few = ("steps=1", "sums.max_operands=2", "sft.agent_share=0.0", "evaluation.images=0")
    chosen = settings(tmp_path, text_export, *few)
    with pytest.raises(PretrainError, match=r"after step 1, .* not finite: .*lower optimizer\.lr"):
        sft.train(chosen)
    assert not list((tmp_path / "run" / "checkpoints").glob("*/trainer_state.json"))
    assert not (tmp_path / "run" / "hf").exists()


def test_rewards_out_of_range_end_the_run(
    image_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (float("nan"), 1.5):
        monkeypatch.setattr(practice, "edit_distance_reward", lambda *_, value=value: value)
        folder = tmp_path / str(value)
        with pytest.raises(PretrainError, match=r"rewards must be in \[0, 1\]"):
            rl.train(settings(folder, image_export, *READ, "evaluation.images=0"))


def test_equal_images_are_encoded_once_with_the_same_result(image_export: Path) -> None:
    from posttrain.shared_images import distinct, encode_once

    exported = model.load(image_export)
    exported.model.cpu()
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(n, 3, 14, 14, generator=generator) for n in (4, 8))
    pixels = torch.cat([one, other, one, one])
    grids = torch.tensor([[1, 2, 2], [1, 2, 4], [1, 2, 2], [1, 2, 2]])
    assert distinct(pixels, grids) == ([0, 1], [0, 1, 0, 0])
    inner = exported.model.model
    expected = torch.cat(list(inner.get_image_features(pixels, grids).pooler_output))
    encode_once(exported.model)
    found = torch.cat(list(inner.get_image_features(pixels, grids).pooler_output))
    torch.testing.assert_close(found, expected)


def test_the_time_of_a_step_is_all_of_it_without_its_evaluation(
    image_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    def slow_reward(answer: str, truth: str) -> float:
        pass_time(1)
        return spread_reward(answer, truth)

    monkeypatch.setattr(practice, "edit_distance_reward", slow_reward)
    monkeypatch.setattr(Run, "evaluate", lambda _run, _step: pass_time(60))
    monkeypatch.setattr(time, "monotonic", lambda: now)
    rl.train(settings(tmp_path / "timed", image_export, *READ, "evaluation.every=1", "steps=2"))
    # The four responses of the batch are generated in the first of its two steps.
    assert [record["seconds"] for record in records(tmp_path / "timed")] == [4, 0]


def test_evaluation_leaves_the_models_mode(image_export: Path, tmp_path: Path) -> None:
    exported = model.load(image_export)
    chosen = settings(tmp_path / "mode", image_export)
    data = evaluate.open_pretraining_data(chosen.pretraining, exported.folder)
    found, readings = evaluate.held_out(exported, data, chosen)
    assert exported.model.training and len(readings) == 4
    assert found["character_error_rate"] is not None
