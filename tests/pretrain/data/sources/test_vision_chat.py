"""Conversations with images are rendered and packed like others; what cannot be read is listed."""

import base64
import functools
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from pretrain.config import DataConfig, SourceConfig
from pretrain.data import files, open_data
from pretrain.data.chat import REPLY
from pretrain.data.mixture.data import MixtureData
from pretrain.data.packing import PackedSample
from pretrain.data.skipped import Skip
from pretrain.data.sources.chat import Chat
from pretrain.errors import PretrainError
from tests.pretrain.data import make
from tests.pretrain.data.test_remote import Handler

LENGTH, PATCH = 128, 14
NAMES = [f"pictures/{number:03d}.png" for number in range(12)]


def talk(asked: Any, number: int = 0) -> dict[str, Any]:
    reply = {"role": REPLY, "content": f"It is {number}."}
    return {"messages": [{"role": "user", "content": asked}, reply]}


def seen(reference: Any, kind: str = "image") -> list[dict[str, Any]]:
    return [{"type": kind, kind: reference}, {"type": "text", "text": "What is it?"}]


def url_of(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make.captioned_folder(tmp_path / "pictures", len(NAMES))
    return tmp_path


def lines(folder: Path, *values: dict[str, Any]) -> SourceConfig:
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return SourceConfig("vision_chat", str(path))


def opened(folder: Path, *sources: SourceConfig, **options: Any) -> MixtureData:
    options = {"seq_length": LENGTH, "vocab_size": 300, "held_out": 0.0} | options
    config = DataConfig(sources=sources, cache_dir=str(folder / "cache"), **options)
    data = open_data(config, PATCH, 3)
    assert isinstance(data, MixtureData)
    return data


def same(one: PackedSample, other: PackedSample) -> bool:
    names = ("tokens", "labels", "weights", "documents", "patches", "grids")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


FORMS = {
    "a file": lambda folder, name: talk(seen(name)),
    "a file: URL": lambda folder, name: talk(seen(f"file://{folder / name}")),
    "OpenAI": lambda folder, name: talk(
        [
            {"type": "image_url", "image_url": {"url": url_of(folder / name), "detail": "high"}},
            *seen("")[1:],
        ]
    ),
    "input_image": lambda folder, name: talk(
        [
            {"type": "input_image", "image_url": url_of(folder / name)},
            {"type": "input_text", "text": "What is it?"},
        ]
    ),
    "a placeholder": lambda folder, name: {**talk("<image>\nWhat is it?"), "images": [name]},
    "a part without a name": lambda folder, name: {
        **talk([{"type": "image"}, *seen("")[1:]]),
        "images": [name],
    },
    "LLaVA": lambda folder, name: {
        "image": name,
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "It is 0."},
        ],
    },
    "Alpaca": lambda folder, name: {
        "instruction": "<image>What is it?",
        "output": "It is 0.",
        "images": name,
    },
    "Qwen-VL": lambda folder, name: {
        "conversations": [
            {"from": "user", "value": f"<img>{name}</img>\nWhat is it?"},
            {"from": "assistant", "value": "It is 0."},
        ]
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_sequence(folder: Path, form: str) -> None:
    data = opened(folder, lines(folder, FORMS[form](folder, NAMES[3])))
    expected = opened(folder, lines(folder, talk(seen(NAMES[3]))))
    assert same(data.sample("train", 0), expected.sample("train", 0))
    sample = data.sample("train", 0)
    shown = [token for token in sample.tokens.tolist() if token != data.tokenizer.media_pad]
    assert data.tokenizer.decode(shown, skip_special_tokens=False).startswith(
        "<|bos|><|im_user|>user<|im_middle|><|media_begin|><|media_end|>What is it?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>It is 0.<|im_end|>"
    )
    learned = sample.labels[sample.weights > 0]
    reply = [*data.tokenizer.encode("It is 0.").tolist(), data.tokenizer.im_end]
    assert learned.tolist() == reply * (len(learned) // len(reply))
    without = data.samples("train", [0], pixels=False)[0]
    assert torch.equal(without.tokens, sample.tokens) and not len(without.patches)


def test_columns_of_images_are_read(folder: Path) -> None:
    images = [{"bytes": (folder / name).read_bytes(), "path": None} for name in NAMES]
    rows = [talk([{"type": "image"}, *seen("")[1:]], n)["messages"] for n in range(len(NAMES))]
    for _, reply in rows:
        reply["content"] = [{"type": "text", "text": reply["content"]}]
    table = pa.table({"messages": rows, "images": [[image] for image in images]})
    parquet.write_table(table, folder / "a.parquet")
    data = opened(folder, SourceConfig("vision_chat", str(folder / "a.parquet")))
    listed = lines(folder, *(talk(seen(name), n) for n, name in enumerate(NAMES)))
    expected = opened(folder, listed)
    found = {tuple(p.flatten().tolist()) for p in data.sample("train", 0).patches}
    others = (expected.sample("train", index).patches for index in range(12))
    assert found <= {tuple(p.flatten().tolist()) for patches in others for p in patches}
    assert "12 documents" in data.describe()


def test_rows_with_large_images_are_read(folder: Path) -> None:
    """Images have a larger limit than text."""
    content = (folder / NAMES[0]).read_bytes() + bytes(files.MAX_DOCUMENT_BYTES)
    row = {**talk("<image>Hi"), "images": [content]}
    parquet.write_table(pa.Table.from_pylist([row]), folder / "a.parquet")
    (found,) = make.records(SourceConfig("vision_chat", str(folder / "a.parquet")))
    assert isinstance(found, Chat) and len(found.conversation.media) == 1


def test_images_of_another_field_are_copied(folder: Path) -> None:
    value = talk(seen(url_of(folder / NAMES[0])))
    value["talk"] = talk(seen(url_of(folder / NAMES[1])))["messages"]
    source = lines(folder, value)
    first = opened(folder, source).sample("train", 0)
    other = opened(folder, replace(source, field="talk")).sample("train", 0)
    assert not torch.equal(first.patches, other.patches)


def test_videos_are_groups_of_frames(folder: Path) -> None:
    listed = NAMES[:1] * 6
    frames = lines(folder, talk(seen(listed, "video")))
    one = opened(folder, frames).sample("train", 0)
    assert one.grids[:2, 0].tolist() == [4, 2]
    placed = lines(folder, {**talk("<video>What is it?"), "videos": [listed]})
    assert same(opened(folder, placed).sample("train", 0), one)


BAD: dict[str, tuple[Any, str]] = {
    "missing": (talk(seen("none.png")), "none.png does not exist"),
    "broken": (talk(seen("broken.png")), "broken.png: cannot identify image file"),
    "outside": (talk(seen("../a.png")), "../a.png lies outside"),
    "base64": (talk(seen("data:image/png;base64,=x")), "a damaged data: URL"),
    "no image": (talk(seen("data:image/png;base64,aGVsbG8=")), "cannot identify image file"),
    "placeholders": (
        {**talk("<image><image>What?"), "images": [NAMES[0]]},
        "a placeholder <image> without its image: it has 1",
    ),
    "images": ({**talk("What?"), "images": [NAMES[0]]}, "1 images and 0 placeholders <image>"),
    "audio": ({**talk("<audio>What?"), "images": []}, "a placeholder of audio, which is not read"),
    "a kind": (talk(seen("a.wav", "input_audio")), "a part of type input_audio, which is not read"),
    "a type": (talk(seen(7)), "a medium is neither a file nor a URL: 7"),
    "a list": ({**talk("<image>What?"), "images": {"a": 1}}, "neither a file nor a URL: {'a': 1}"),
    "a reply": (
        {"messages": [talk("")["messages"][1], *talk("What?")["messages"]]},
        "it starts with a reply",
    ),
    "a drawn reply": (
        {"messages": [talk("Draw.")["messages"][0], {"role": REPLY, "content": seen(NAMES[0])}]},
        "message 2 is a reply with an image or video",
    ),
    "a URL": (talk(seen("http://127.0.0.1:9/a.png")), "http://127.0.0.1:9/a.png cannot be read: "),
    "a host": (
        talk(seen("http://a.org/a.png")),
        "cannot be read: a.org is not in media_urls",
    ),
    "another URL": (talk(seen("s3://a/a.png")), "only URLs of http and https are copied"),
}


@pytest.mark.parametrize("name", BAD)
def test_conversations_that_cannot_be_read_are_listed(folder: Path, name: str) -> None:
    value, reason = BAD[name]
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    source = lines(folder, talk(seen(NAMES[0])), value)
    data = opened(folder, replace(source, media_urls=("127.0.0.1",)))
    (skip,) = data.take_skipped()
    assert reason in skip.reason and skip.name == f"{folder}/chat.jsonl:2"
    assert skip.corrupt == (name != "a reply")
    assert "1 documents" in data.describe()


def test_preferences_end_the_run_in_one_line(folder: Path) -> None:
    value = {"prompt": "a", "chosen": talk("a")["messages"], "rejected": [], "images": NAMES[:1]}
    with pytest.raises(PretrainError, match="preference data") as raised:
        opened(folder, lines(folder, value))
    assert "\n" not in str(raised.value)


TABLES = {
    "no list of messages in 'messages'": {"messages": ["a"]},
    "no list of messages in 'text'": {"text": ["a"]},
    "has 'images' of type list<": {"messages": [talk("a")["messages"]], "images": [[7]]},
    "has 'image' of type double": {"messages": [talk("a")["messages"]], "image": [0.5]},
}


@pytest.mark.parametrize("reason", TABLES)
def test_a_table_with_another_schema_ends_the_run(folder: Path, reason: str) -> None:
    (folder / "tables").mkdir()
    first = {"messages": [talk("<image>a")["messages"]], "image": [str(folder / NAMES[0])]}
    parquet.write_table(pa.table(first), folder / "tables/a.parquet")
    parquet.write_table(pa.table(TABLES[reason]), folder / "tables/b.parquet")
    with pytest.raises(PretrainError, match=f"b.parquet .*{reason}") as raised:
        opened(folder, SourceConfig("vision_chat", str(folder / "tables")))
    assert "\n" not in str(raised.value)


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    Handler.broken, Handler.sent = "", []
    handler = functools.partial(Handler, directory=str(folder / "pictures"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_images_at_urls_are_copied_once(folder: Path, server: str) -> None:
    Handler.broken = "001.png"
    source = lines(folder, *(talk(seen(f"{server}/{number:03d}.png")) for number in range(3)))
    with pytest.raises(PretrainError, match=r"^data.sources\[0\].media_urls: a record names http"):
        opened(folder, source)
    assert not Handler.sent
    source = replace(source, media_urls=("127.0.0.1",))
    data = opened(folder, source)
    assert sorted(Handler.sent) == ["000.png", "001.png", "002.png"]
    (skip,) = data.take_skipped()
    assert skip.name.endswith("chat.jsonl:2") and "001.png cannot be read: " in skip.reason
    again = opened(folder, source)
    assert len(Handler.sent) == 3, "the index is cached"
    assert same(again.sample("train", 0), data.sample("train", 0))


def test_a_changed_image_is_measured_again(folder: Path) -> None:
    source = lines(folder, talk(seen(NAMES[0])))
    first = opened(folder, source).sample("train", 0)
    make.picture(1)[0].resize((140, 140)).save(folder / NAMES[0])
    assert opened(folder, source).sample("train", 0).grids.tolist() != first.grids.tolist()


def test_text_and_reasoning_survive_the_index(folder: Path) -> None:
    value = talk(seen(NAMES[0]))
    value["messages"][1] |= {"reasoning_content": "Hm.", "weight": 0}
    value["messages"] += [
        {"role": "user", "content": "Sure?", "name": "Bo"},
        {
            "role": REPLY,
            "content": None,
            "tool_calls": [{"id": "x", "function": {"name": "look", "arguments": {"at": 1}}}],
        },
        {"role": "tool", "tool_call_id": "x", "content": seen(NAMES[1])},
        {"role": REPLY, "content": "Sure."},
    ]
    value["tools"] = [{"type": "function", "function": {"name": "look"}}]
    data = opened(folder, lines(folder, value), seq_length=512)
    (record,) = make.records(SourceConfig("vision_chat", str(folder / "chat.jsonl")))
    assert isinstance(record, Chat)
    (documents,) = data._documents
    restored, _ = documents.describe(0)  # type: ignore[attr-defined]
    assert restored.hash == record.hash and restored.text == record.text
    shown = data.sample("train", 0)
    text = data.tokenizer.decode(
        [token for token in shown.labels[shown.weights > 0].tolist()], skip_special_tokens=False
    )
    call = "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0"
    assert text.startswith(call) and text.count("<|im_end|>") == 2


def test_held_out_replies_are_questions(folder: Path) -> None:
    values = [talk(seen(name), number) for number, name in enumerate(NAMES)]
    data = opened(folder, lines(folder, *values), held_out=0.5)
    questions = data.questions("held_out", 3)
    assert 0 < len(questions) <= 3
    for question in questions:
        text = data.tokenizer.decode(question.prompt.tokens[-20:], skip_special_tokens=False)
        assert text.endswith("What is it?<|im_end|><|im_assistant|>assistant<|im_middle|>")
        assert question.answer.startswith("It is ") and question.end == data.tokenizer.im_end
        assert question.picture.dtype == np.uint8


def test_questions_about_drawn_words_need_a_split(folder: Path) -> None:
    with pytest.raises(PretrainError, match="split must be train or held_out"):
        opened(folder, SourceConfig("image_questions"))


def test_mixtures_resume_exactly(folder: Path) -> None:
    make.jsonl(folder / "text.jsonl", range(40))
    listed = lines(folder, *(talk(seen(url_of(folder / n)), k) for k, n in enumerate(NAMES)))
    sources = (listed, SourceConfig("text", str(folder / "text.jsonl")))
    chat = SourceConfig("chat", str(folder / "other.jsonl"))
    (folder / "other.jsonl").write_text(json.dumps(talk("Hi")) + "\n")
    data = opened(folder, *sources, chat, vision_share=0.05)
    expected = [data.sample("train", index) for index in range(30)]
    state = data.state_dict(12)
    resumed = opened(folder, *sources, chat, vision_share=0.05)
    resumed.load_state_dict([json.loads(json.dumps(state))])
    for index in range(12, 30):
        assert same(resumed.sample("train", index), expected[index])
    assert any(len(sample.grids) for sample in expected[12:])
    assert not any(isinstance(one, Skip) for one in resumed.take_skipped())
