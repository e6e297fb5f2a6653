"""Only replies are learned, conversations are never cut, and invalid ones are listed."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.config import DataConfig, SourceConfig
from pretrain.data import open_data
from pretrain.data.chat import Message, render
from pretrain.data.mixture.data import MixtureData
from pretrain.data.skipped import Skip
from pretrain.data.sources.chat import Chat, ChatDocuments
from pretrain.data.sources.interface import Segment
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from tests.pretrain.data import make

LENGTH = 96
PATCH = 14


def turns(number: int) -> list[dict[str, str]]:
    """A conversation, a different one for each number."""
    rng = np.random.default_rng([3, number])
    said = [{"role": "system", "content": "Be brief."}] if number % 3 == 0 else []
    for turn in range(int(rng.integers(1, 3))):
        said.append({"role": "user", "content": f"What is {number} and {turn}?"})
        said.append({"role": "assistant", "content": f"It is {number + turn}." * (number % 4)})
    return said


def lines(path: Path, conversations: list[Any], field: str = "messages") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({field: one}) + "\n" for one in conversations)
    make.write_packed(path, text.encode())
    return path


def opened(folder: Path, *sources: SourceConfig, **options: Any) -> MixtureData:
    options = {"seq_length": LENGTH, "vocab_size": 400, "held_out": 0.1} | options
    config = DataConfig(sources=sources, cache_dir=str(folder / "cache"), **options)
    data = open_data(config, PATCH, 3)
    assert isinstance(data, MixtureData)
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    lines(folder / "chats" / "a.jsonl.gz", [turns(number) for number in range(60)])
    lines(folder / "chats" / "b.jsonl", [turns(number) for number in range(60, 90)])
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> MixtureData:
    return opened(folder, SourceConfig("chat", str(folder / "chats")))


def test_only_replies_and_their_end_tokens_are_learned(data: MixtureData) -> None:
    ids = data.tokenizer
    messages = [
        Message("system", "Be brief."),
        Message("user", "<|im_end|>?"),
        Message("assistant", "No."),
        Message("user", "And?"),
        Message("assistant", "Yes"),
    ]
    document = render(ids, messages)
    learned = [t for t, weight in zip(document.tokens, document.weights, strict=True) if weight]
    assert learned == [*ids.encode("No."), ids.im_end, *ids.encode("Yes"), ids.im_end]
    assert ids.decode(document.tokens, skip_special_tokens=False) == (
        "<|bos|><|im_system|>system<|im_middle|>Be brief.<|im_end|>"
        "<|im_user|>user<|im_middle|><|im_end|>?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>No.<|im_end|>"
        "<|im_user|>user<|im_middle|>And?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>Yes<|im_end|>"
    )
    assert document.tokens.count(ids.im_end) == 5, "what looks like a token is text"


def test_sequences_contain_whole_conversations(data: MixtureData) -> None:
    ids = data.tokenizer
    rendered = {}
    for number in range(90):
        said = [Message(turn["role"], turn["content"]) for turn in turns(number)]
        document = render(ids, said)
        rendered[tuple(document.tokens)] = document.weights
    seen, filled = set(), []
    for split, index in itertools.product(("train", "held_out"), range(60)):
        sample = data.sample(split, index)  # type: ignore[arg-type]
        tokens, numbers = sample.tokens.numpy(), sample.documents.numpy()
        count = numbers.max() + (tokens[-1] != ids.pad)
        assert count >= 1
        for number in range(count):
            (places,) = np.nonzero(numbers == number)
            document = tuple(tokens[places].tolist())
            weights, labels = (x.numpy()[places] for x in (sample.weights, sample.labels))
            assert weights.tolist() == [*rendered[document][1:], 0]
            expected = np.where(weights > 0, [*document[1:], 0], 0)
            assert labels.tolist() == expected.tolist()
            seen.add(document)
        assert not sample.weights.numpy()[numbers == count].any()
        filled.append((numbers < count).mean())
    assert np.mean(filled) > 0.6
    assert len(seen) == 67, "all but those without a reply"
    assert not data.has_images


def test_every_epoch_reads_every_conversation_once(data: MixtureData) -> None:
    (documents,) = data._documents
    (cursor,) = data._stream("train").cursors
    count = documents.count("train")
    epochs = [[cursor.take(LENGTH).number for _ in range(count)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(documents.numbers["train"])
    assert epochs[0] != epochs[1]


def test_text_fills_the_space_that_conversations_leave(folder: Path) -> None:
    make.jsonl(folder / "text.jsonl", range(80))
    both = (
        SourceConfig("chat", str(folder / "chats"), weight=2),
        SourceConfig("text", str(folder / "text.jsonl")),
    )
    data = opened(folder, *both)
    stream = data._stream("train")
    for _ in range(400):
        stream.next()
    chat, text = (cursor.taken for cursor in stream.cursors)
    assert chat / text == pytest.approx(2, rel=0.02)
    full = [(data.sample("train", i).tokens != data.tokenizer.pad).sum() for i in range(20)]
    assert min(full) >= LENGTH - 1


def test_conversations_that_are_invalid_or_too_long_are_listed(tmp_path: Path) -> None:
    good = turns(1)
    long = [{"role": "user", "content": "why? " * 60}, *good]
    path = lines(
        tmp_path / "chats.jsonl",
        [
            good,
            long,
            "hello",
            [{"role": "tool", "content": "x"}],
            [{"role": "user", "content": ["x"]}],
            good[:1],
            [{"role": "assistant", "content": "\ud800"}],
            ["x"],
            turns(2),
        ],
    )
    path.write_text(path.read_text() + '{"messages": [\n{"other": 1}\n')
    data = opened(tmp_path, SourceConfig("chat", str(path)), held_out=0)
    assert "2 documents, 0 held out" in data.describe()
    assert "skipped: 6 corrupt, 3 empty, too long or not read" in data.describe()
    skips = {int(skip.name.rpartition(":")[2]): skip for skip in data.take_skipped()}
    reasons = {number: skip.reason for number, skip in skips.items()}
    assert reasons.pop(2).endswith(f"tokens do not fit data.seq_length={LENGTH}")
    assert reasons.pop(10).startswith("not JSON: ")
    assert reasons == {
        3: "no list of messages in 'messages'",
        4: "no reply of the assistant in it",
        5: "message 1 has a part of type None, which is not read",
        6: "no reply of the assistant in it",
        7: "half a surrogate pair in message 1",
        8: "message 1 is of role None, none of system, user, assistant, developer, tool",
        11: "has no field 'messages', only other: set the source's field",
    }
    assert [number for number, skip in skips.items() if not skip.corrupt] == [2, 4, 6]
    longer = opened(tmp_path, SourceConfig("chat", str(path)), held_out=0, seq_length=1024)
    assert "3 documents" in longer.describe(), "the cache knows of what length it is"
    with pytest.raises(PretrainError, match="3 samples are corrupt, more than"):
        opened(tmp_path, SourceConfig("chat", str(path)), max_corrupt=2)


def test_messages_may_be_in_another_field(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [turns(1)], field="talk")
    source = SourceConfig("chat", str(path), field="talk")
    (chat,) = make.records(source)
    assert isinstance(chat, Chat)
    assert chat.conversation.messages == tuple(Message(**turn) for turn in turns(1))
    with pytest.raises(PretrainError, match=r"a.jsonl:1 \(has no field 'messages', only talk: "):
        opened(tmp_path, SourceConfig("chat", str(path)))


def test_incompatible_sources_are_refused(folder: Path, tmp_path: Path) -> None:
    chats = SourceConfig("chat", str(folder / "chats"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(PretrainError, match=r"a.txt is neither a folder nor a .jsonl file"):
        opened(tmp_path, SourceConfig("chat", str(tmp_path / "a.txt")))
    Tokenizer.train([make.text(1)], 320).save(tmp_path / "tokenizer.json")
    without = (tmp_path / "tokenizer.json").read_text().replace("<|im_end|>", "<|end|>")
    (tmp_path / "tokenizer.json").write_text(without)
    with pytest.raises(PretrainError, match=r"tokenizer.json lacks tokens of the chat format"):
        opened(tmp_path, chats, tokenizer=str(tmp_path / "tokenizer.json"))


def test_the_standard_library_answers_questions(tmp_path: Path) -> None:
    data = opened(tmp_path, SourceConfig("standard_library_chat"), max_corpus_mb=1.0)
    (documents,) = data._documents
    assert isinstance(documents, ChatDocuments)
    assert documents.count("train") > 100 < 10 * documents.count("held_out")
    first = documents.document(Segment(0, int(documents.numbers["train"][0])))
    text = data.tokenizer.decode(first.tokens, skip_special_tokens=False)
    assert text.startswith("<|bos|><|im_user|>user<|im_middle|>What ")


ASKED = {"role": "user", "content": "What is it?"}
ANSWERED = {"role": "assistant", "content": "A cat."}
SEEN = {"type": "image_url", "image_url": {"url": "a.jpg"}}
LOST: dict[str, dict[str, Any]] = {
    "it has a 'system' and": {
        "messages": [{"role": "system", "content": "Hi."}, ASKED, ANSWERED],
        "system": "Be brief.",
    },
    "role 'critic'": {"messages": [ASKED, {"role": "critic", "content": "1"}, ANSWERED]},
    "from 'critic'": {"conversations": [{"from": "critic", "value": "1"}]},
    "tool call in message 1 is not JSON": {
        "conversations": [{"from": "function_call", "value": "f()"}]
    },
    "placeholder <image> without": {"conversations": [{"from": "human", "value": "<image>\nHi"}]},
    "a tool call of message 2 has no name": {
        "messages": [ASKED, ANSWERED | {"tool_calls": [{"function": {}}]}]
    },
    "'tools' is not a list": {"messages": [ASKED, ANSWERED], "tools": ["f"]},
    "message 1 of the role user has tool calls": {
        "messages": [ASKED | {"reasoning_content": "Hm."}, ANSWERED]
    },
    "'audio' would be lost": {"messages": [ASKED, ANSWERED], "audio": "a.wav"},
    "'history' is not a list of": {"instruction": "a", "output": "b", "history": ["a", "b"]},
    "'images' of message 1 would": {"messages": [ASKED | {"images": ["a.jpg"]}, ANSWERED]},
}


@pytest.mark.parametrize("reason", LOST)
def test_conversations_with_unsupported_content_are_skipped(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(LOST[reason]))
    (skip,) = make.records(SourceConfig("chat", str(path)))
    assert isinstance(skip, Skip) and skip.corrupt
    assert reason in skip.reason and skip.name == f"{path}:1"


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [ASKED, ANSWERED], "images": ["a.jpg"]},
        {"messages": [ASKED, ANSWERED], "video": "a.mp4"},
        {"messages": [ASKED | {"content": [SEEN]}, ANSWERED]},
    ],
)
def test_media_need_another_type_of_source(tmp_path: Path, value: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(value))
    with pytest.raises(
        PretrainError, match=r"a.jsonl:1 is a conversation with .*type to vision_ch"
    ):
        make.records(SourceConfig("chat", str(path)))


def test_replies_that_are_not_to_be_learned_have_no_weight(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    value = {"messages": [ASKED, ANSWERED | {"weight": 0}, ASKED, ANSWERED]}
    path.write_text(json.dumps(value))
    (chat,) = make.records(SourceConfig("chat", str(path)))
    assert isinstance(chat, Chat)
    assert [message.learned for message in chat.conversation.messages] == [True, False, True, True]


def test_empty_unsupported_fields_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]
    messages = [
        ASKED | {"content": parts, "images": [], "tool_calls": None, "name": None},
        ANSWERED | {"weight": 1, "prefix": False},
    ]
    path.write_text(json.dumps({"messages": messages, "images": [], "tools": None, "id": 7}))
    (chat,) = make.records(SourceConfig("chat", str(path)))
    assert isinstance(chat, Chat)
    assert chat.conversation == ((Message(**ASKED), Message(**ANSWERED)), ())


def test_conversations_may_be_an_array(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": [ASKED, ANSWERED]}] * 3, indent=1))
    assert len(make.records(SourceConfig("chat", str(path)))) == 3
