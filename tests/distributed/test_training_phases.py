"""A training phase starts with the weights of another run, and is otherwise a new run."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import storage
from pretrain.data.chat import render
from pretrain.data.conversations import conversation_of
from pretrain.data.tokenizer import Tokenizer
from pretrain.export.to_hf import export
from tests.distributed import training
from tests.distributed.launch import launch

SHORT = (
    *("evaluation.every=100", "evaluation.captions=4", "evaluation.transcriptions=0"),
    *("optimizer.warmup_steps=2", "optimizer.decay_steps=0"),
)
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def pretrained(folder: Path) -> Records:
    """Metrics of ``folder``/run: three steps, expert parallel over two ranks."""
    run = training.train_and_read
    return launch(run, 2, str(folder), "parallel.expert=2", "steps=3", *SHORT)[0]  # type: ignore[no-any-return]


def phase(folder: Path, name: str, *overrides: str) -> tuple[str, ...]:
    return (
        *(str(folder), f"run_dir={folder}/{name}", f"start_from={folder}/run", "steps=4"),
        *(*SHORT, *overrides),
    )


@pytest.fixture(scope="module")
def whole(folder: Path, pretrained: Records) -> Records:
    return launch(training.train_and_read, 1, *phase(folder, "whole"))[0]  # type: ignore[no-any-return]


def test_the_first_losses_are_those_of_the_other_runs_weights(
    folder: Path, pretrained: Records, whole: Records
) -> None:
    # Rounding may route a token to another expert, which changes a mean over hundreds of tokens by
    # less than 1e-4; other weights change it by more than 5e-3.
    keys = [key for key in whole[0] if key.endswith("_loss")]
    assert len(keys) == 5
    for key in keys:
        assert whole[0][key] == pytest.approx(pretrained[3][key], rel=2e-4), key
        assert whole[0][key] < pretrained[0][key] - 0.05, "not those of new weights"
    split = launch(training.train_and_read, 2, *phase(folder, "split", "parallel.tensor=2"))[0]
    for record, reference in zip(split, whole, strict=True):
        for key in ("held_out_text_loss", "loss", "grad_norm"):
            if key in reference:
                expected = pytest.approx(reference[key], rel=1e-3)
                assert record[key] == expected, (record["step"], key)


def test_schedule_data_and_optimizer_start_from_the_beginning(
    folder: Path, pretrained: Records, whole: Records
) -> None:
    assert [record["step"] for record in whole] == list(range(5))
    assert [record["lr"] for record in whole[1:4]] == [record["lr"] for record in pretrained[1:]]
    assert whole[1]["loss"] < pretrained[1]["loss"] - 0.05, "the same data, already learned"
    path = storage.path_of(folder / "whole" / "checkpoints", 4)
    (count,) = stored(path, "optimizer.language.embedding.word_embeddings.weight.step").values()
    assert count.item() == 4


def test_a_phase_resumes_from_its_own_checkpoint_without_the_other_run(
    folder: Path, whole: Records
) -> None:
    run = training.train_and_read
    launch(run, 1, *phase(folder, "parts", "steps=2"))
    parts = launch(run, 1, *phase(folder, "parts", "start_from=gone"))[0]
    assert parts[3:] == whole[3:]


def errors(folder: str) -> list[str]:
    """Error messages of the command line for phases that cannot start."""
    root = Path(folder)
    other = root / "other.json"
    text = (root / "run" / "tokenizer.json").read_text()
    other.write_text(text.replace("<|media_begin|>", "<|vision_start|>"))
    messages = []
    for changes in (
        ("language.norm_eps=1e-6",),
        ("vision.rope_base=500",),
        (f"data.tokenizer={other}",),
        ("start_from=nowhere",),
        (f"start_from={folder}/phase",),
    ):
        config = (str(root / "tiny.yaml"), f"data.cache_dir={root}/cache")
        _, *overrides = phase(root, "phase", *changes)
        status, line = training.command("train", *config, *overrides)
        assert status == 1
        messages.append(line.removeprefix("error: "))
    assert not storage.steps(root / "phase" / "checkpoints")
    return messages


def test_errors_name_why_a_phase_cannot_start(folder: Path, pretrained: Records) -> None:
    (messages,) = launch(errors, 1, str(folder))
    norm, rope, tokenizer, nowhere, itself = messages
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
    assert "/phase is the run_dir itself: choose another run_dir" in itself


REPLIES = {"What is one?": "A number.", "What is red?": "A colour, of course."}


@pytest.fixture(scope="module")
def chat(folder: Path, pretrained: Records) -> tuple[str, ...]:
    """Settings of a phase that memorizes two replies."""
    with (folder / "chats.jsonl").open("w") as file:
        for question, reply in REPLIES.items():
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": reply},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    sources = f"data.sources=[{{type: chat, path: {folder}/chats.jsonl}}]"
    sizes = ("global_batch_size=4", "micro_batch_size=4", "optimizer.lr=1e-2", "data.held_out=0")
    return phase(folder, "chat", sources, *sizes, "checkpoint.every=20", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def learned(folder: Path, chat: tuple[str, ...]) -> Records:
    return launch(training.train_and_read, 1, *chat, "steps=40")[0]  # type: ignore[no-any-return]


def stored(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint whose names start with ``prefix``."""
    saved = storage.Checkpoint.open(path)
    tensors = {
        name: torch.zeros(stored.shape, dtype=stored.dtype)
        for name, stored in saved.tensors.items()
        if name.startswith(prefix)
    }
    saved.load(tensors)
    return tensors


def test_finetuning_learns_replies_resumes_exactly_and_keeps_the_vision_encoder(
    folder: Path, chat: tuple[str, ...], learned: Records
) -> None:
    assert learned[40]["text_loss"] < 0.1 < learned[1]["text_loss"]
    assert learned[1]["caption_loss"] is None
    stopped = f"run_dir={folder}/stopped"
    launch(training.train_and_read, 1, *chat, stopped, "steps=20")
    rest = launch(training.train_and_read, 1, *chat, stopped, "steps=24")[0]
    assert [record["loss"] for record in rest[21:]] == [r["loss"] for r in learned[21:25]]
    before = stored(storage.path_of(folder / "run" / "checkpoints", 3), "model.vision.")
    after = stored(storage.path_of(folder / "chat" / "checkpoints", 40), "model.vision.")
    assert before.keys() == after.keys() and len(before) > 10
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def ask(run: str) -> list[str]:
    """Replies that the command line prints."""
    printed = []
    for question in REPLIES:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            ask = ("--chat", "--prompt", question, "--temperature", "0")
            assert training.command("sample", run, *ask) == (0, "")
        printed.append(output.getvalue())
    return printed


def test_learned_replies_are_generated_and_end_like_the_reply(
    folder: Path, learned: Records
) -> None:
    (printed,) = launch(ask, 1, str(folder / "chat"))
    assert printed == [f"{reply}\n" for reply in REPLIES.values()]


def test_transformers_renders_conversations_and_generates_learned_replies(
    folder: Path, learned: Records
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    hf = export(folder / "chat", text_only=True)
    exported = transformers.AutoTokenizer.from_pretrained(hf)
    trained = Tokenizer.load(folder / "chat" / "tokenizer.json")
    messages = [
        {"role": "system", "content": " Be\n brief. "},
        {"role": "user", "content": "Was ist größer: 12 or 7?\n"},
        {"role": "assistant", "content": "12."},
        {"role": "developer", "content": "Be exact."},
        {"role": "tool", "tool_call_id": "functions.add:0", "content": "12"},
        {"role": "tool", "content": "7"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "So?"},
    ]
    document = render(trained, *(conversation_of({"messages": messages}, "messages") or ((),)))
    ids = exported.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids == document.tokens
    prompt = exported.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert ids[len(prompt) :] == [*trained.encode("So?"), trained.im_end]
    roles = "the roles are system, user, assistant, developer, tool"
    with pytest.raises(Exception, match=f"{roles}, not critic"):
        exported.apply_chat_template([{"role": "critic", "content": ""}])

    model = transformers.AutoModelForCausalLM.from_pretrained(hf)
    question, reply = next(iter(REPLIES.items()))
    asked = exported.apply_chat_template(
        [{"role": "user", "content": question}],
        **{"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"},
    )
    written = model.generate(**asked, max_new_tokens=40, do_sample=False)
    answer = written[0, asked["input_ids"].shape[1] :]
    assert exported.decode(answer, skip_special_tokens=True) == reply
    assert answer[-1] == trained.im_end
