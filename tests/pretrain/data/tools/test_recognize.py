"""From files as people have them to the suggested configuration, and to a training step."""

import base64
import bz2
import contextlib
import gzip
import json
import lzma
import os
import sqlite3
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import yaml
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from pyarrow import feather, ipc, orc, parquet

from pretrain import cli
from pretrain.data.cache import TAG
from pretrain.data.tools.recognize import configuration, recognize
from pretrain.errors import PretrainError
from tests.pretrain.data import make
from tests.pretrain.data.media.test_video import film, greys
from tests.pretrain.data.tools import suggested

TEXTS = [make.text(number) for number in range(40)]
COLUMNS = {"id": [str(number) for number in range(40)], "body": TEXTS}
ROWS = [{"text": text} for text in TEXTS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
OPENAI = [
    {
        "messages": [
            {"role": "user", "content": f"Add {number}."},
            {"role": "assistant", "content": f"{number}"},
        ]
    }
    for number in range(40)
]
PARTS = [
    {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]}
    for messages in (one["messages"] for one in OPENAI)
]
SHARE = [
    {"conversations": [{"from": "human", "value": f"Hi {n}"}, {"from": "gpt", "value": "Hello!"}]}
    for n in range(40)
]
ALPACA = [{"instruction": f"Say {n}", "input": "", "output": f"{n}"} for n in range(40)]


PICTURES = [f"pictures/{number:03d}.png" for number in range(40)]
ASKED = "<image>\nWhat is it?"
LLAVA = [
    {
        "id": str(number),
        "image": picture,
        "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": f"{number}"}],
    }
    for number, picture in enumerate(PICTURES)
]
FACTORY = [
    {"messages": [{"role": "user", "content": ASKED}, one["messages"][1]], "images": [picture]}
    for one, picture in zip(OPENAI, PICTURES, strict=True)
]


FILMS = [f"films/{number}.mp4" for number in range(6)]
FILMED = [
    {
        "video": name,
        "conversations": [
            {"from": "human", "value": "<video>\nWhat happens?"},
            {"from": "gpt", "value": name},
        ],
    }
    for name in FILMS
]
FILMED_PARTS = [
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": name}},
                    {"type": "text", "text": "What happens?"},
                ],
            },
            {"role": "assistant", "content": name},
        ]
    }
    for name in FILMS
]
WEATHER = {"name": "weather", "parameters": {"type": "object"}}
TOOLS = [
    {
        "tools": [{"type": "function", "function": WEATHER}],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "Use the tools."}]},
            {"role": "user", "content": f"Is it raining in town {number}?"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "I look it up.",
                "tool_calls": [
                    {
                        "id": "a",
                        "function": {"name": "weather", "arguments": f'{{"town": {number}}}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "a", "content": "rain"},
            {"role": "assistant", "content": "Yes."},
        ],
    }
    for number in range(12)
]
SHARED_TOOLS = [
    {
        "system": "Be brief.",
        "tools": json.dumps([WEATHER]),
        "conversations": [
            {"from": "human", "value": f"Is it raining in town {number}?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    for number in range(12)
]


def seen(part: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Conversations in OpenAI's format about pictures, each in a part of a content."""
    text = {"type": "text", "text": "What is it?"}
    return [
        {"messages": [{"role": "user", "content": [part(picture), text]}, one["messages"][1]]}
        for one, picture in zip(OPENAI, PICTURES, strict=True)
    ]


def with_pictures(write: Callable[[Path], object]) -> Callable[[Path], object]:
    def both(path: Path) -> None:
        make.captioned_folder(path.parent / "pictures", len(PICTURES))
        for caption in (path.parent / "pictures").glob("*.txt"):
            caption.unlink()
        write(path)

    return both


def encoded(path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f"data:image/png;base64,{content}"


def trl(path: Path) -> None:
    """Messages with a part for each image of a column, as TRL has them."""
    text = {"type": "text", "text": "What is it?"}
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, text]},
                {"role": "assistant", "content": [{"type": "text", "text": f"{number}"}]},
            ],
            "images": [{"bytes": (path.parent / picture).read_bytes(), "path": None}],
        }
        for number, picture in enumerate(PICTURES)
    ]
    both = dataset(rows).cast_column("images", datasets.Sequence(datasets.Image()))
    both.to_parquet(path) if path.suffix else both.save_to_disk(str(path))


def megatron(path: Path) -> None:
    """Tokens in the format of megatron-core, which its builder writes."""
    path.mkdir()
    builder = IndexedDatasetBuilder(f"{path}/a.bin", np.uint16)
    for number in range(40):
        builder.add_item(torch.arange(100, 109 + number))
        builder.end_document()
    builder.finalize(f"{path}/a.idx")


def plain_texts(path: Path) -> None:
    path.mkdir()
    for number, text in enumerate(TEXTS):
        (path / f"{number}.md").write_text(text)
    (path / "packed.txt.xz").write_bytes(lzma.compress(TEXTS[0].encode()))


def arrow_stream(path: Path) -> None:
    table = pa.table(COLUMNS)
    with ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=9)


def codecs(path: Path) -> None:
    """Columns that Parquet compresses itself, each in another way."""
    columns = {name: TEXTS for name in ("text", "gzip", "snappy", "lz4", "zstd", "none")}
    columns |= {"brotli": TEXTS}
    compression = {name: name for name in columns} | {"text": "brotli"}
    parquet.write_table(pa.table(columns), path, compression=compression)


def films(write: Callable[[Path], object]) -> Callable[[Path], object]:
    """With videos, of which every other one has pixels that are not square."""

    def both(path: Path) -> None:
        (path.parent / "films").mkdir(exist_ok=True)
        for number in range(len(FILMS)):
            aspect = Fraction(4, 3) if number % 2 else None
            film(path.parent / FILMS[number], greys(5), 10, aspect=aspect)
        write(path)

    return both


def dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def splits(path: Path) -> None:
    both = datasets.DatasetDict(train=dataset(ROWS), test=dataset(ROWS[:9]))
    both.save_to_disk(str(path))


def repository(path: Path) -> None:
    path.mkdir()
    dataset(ROWS).to_parquet(path / "train-00000-of-00001.parquet")
    dataset(ROWS[:9]).to_parquet(path / "test-00000-of-00001.parquet")


def saved(path: Path) -> None:
    dataset(ROWS).save_to_disk(str(path), num_shards=2)


def lines(*rows: dict[str, Any]) -> Callable[[Path], object]:
    return lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def array(rows: list[dict[str, Any]]) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(rows, indent=1))


TEXT = {"type": "text"}
LAYOUTS: dict[str, tuple[str, Callable[[Path], object], str, list[dict[str, str]]]] = {
    "Parquet of pyarrow": (
        "a.parquet",
        lambda path: parquet.write_table(pa.table(COLUMNS), path),
        "a file of Parquet, 2 columns; the text is probably 'body'",
        [{**TEXT, "field": "body"}],
    ),
    "Parquet of pandas": (
        "b.parquet",
        lambda path: pd.DataFrame(COLUMNS).to_parquet(path),
        "a file of Parquet, 2 columns; the text is probably 'body'",
        [{**TEXT, "field": "body"}],
    ),
    "Feather": (
        "a.feather",
        lambda path: feather.write_feather(pa.table(COLUMNS), str(path)),
        "a file of Arrow, 2 columns; the text is probably 'body'",
        [{**TEXT, "field": "body"}],
    ),
    "a saved dataset": (
        "saved", saved, "2 files of Arrow, 1 column; the text is probably 'text'", [TEXT]
    ),
    "saved splits": (
        "splits",
        splits,
        "a saved dataset with the splits train, test",
        [{**TEXT, "path": "splits/train", "split": "train"},
         {**TEXT, "path": "splits/test", "split": "held_out"}],
    ),
    "splits in a repository": (
        "repository",
        repository,
        "2 files of Parquet, 1 column; the text is probably 'text'; its splits: test, train",
        [{**TEXT, "path": "repository/test[-_.0-9]*", "split": "held_out"},
         {**TEXT, "path": "repository/train[-_.0-9]*", "split": "train"}],
    ),
    "JSON lines of datasets": (
        "a.jsonl",
        lambda path: dataset(ROWS).to_json(path),
        "a file of JSON lines; the text is probably 'text'",
        [TEXT],
    ),
    "an array": (
        "a.json", array(ROWS), "a file of JSON arrays; the text is probably 'text'", [TEXT]
    ),
    **{
        f"compressed as {suffix}": (
            f"packed.jsonl{suffix}",
            lambda path, compress=compress: path.write_bytes(compress(LINES)),
            "a file of JSON lines; the text is probably 'text'",
            [TEXT],
        )
        for suffix, compress in {
            ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
            ".zst": zstandard.ZstdCompressor().compress,
        }.items()
    },
    "OpenAI": (
        "chat.jsonl", lines(*OPENAI), "a file of JSON lines; conversations as in OpenAI",
        [{"type": "chat"}],
    ),
    "OpenAI with parts, in Parquet": (
        "chat.parquet",
        lambda path: dataset(PARTS).to_parquet(path),
        "a file of Parquet, 1 column; conversations as in OpenAI",
        [{"type": "chat"}],
    ),
    "ShareGPT": (
        "share.json", array(SHARE), "a file of JSON arrays; conversations as in ShareGPT",
        [{"type": "chat"}],
    ),
    "Alpaca": (
        "alpaca.json", array(ALPACA), "a file of JSON arrays; conversations as in Alpaca",
        [{"type": "chat"}],
    ),
    "LLaVA": (
        "llava.json", with_pictures(array(LLAVA)),
        "a file of JSON arrays; conversations as in LLaVA", [{"type": "vision_chat"}],
    ),
    "LLaMA-Factory with images": (
        "factory.json", with_pictures(array(FACTORY)),
        "a file of JSON arrays; conversations as in OpenAI, with images or videos",
        [{"type": "vision_chat"}],
    ),
    "OpenAI with images in URLs": (
        "url.jsonl",
        with_pictures(
            lambda path: lines(*seen(lambda name: {
                "type": "image_url", "image_url": {"url": encoded(path.parent / name)}
            }))(path)
        ),
        "a file of JSON lines; conversations as in OpenAI, with images or videos",
        [{"type": "vision_chat"}],
    ),
    "Qwen": (
        "qwen.jsonl",
        with_pictures(
            lambda path: lines(*seen(lambda name: {
                "type": "image", "image": f"file://{path.parent / name}"
            }))(path)
        ),
        "a file of JSON lines; conversations as in OpenAI, with images or videos",
        [{"type": "vision_chat"}],
    ),
    "TRL, in Parquet": (
        "trl.parquet", with_pictures(trl),
        "a file of Parquet, 2 columns; conversations as in OpenAI, with images or videos",
        [{"type": "vision_chat"}],
    ),
    "TRL, saved": (
        "trl", with_pictures(trl),
        "a file of Arrow, 2 columns; conversations as in OpenAI, with images or videos",
        [{"type": "vision_chat"}],
    ),
    "LLaVA with videos": (
        "filmed.json", films(array(FILMED)),
        "a file of JSON arrays; conversations as in LLaVA", [{"type": "vision_chat"}],
    ),
    "OpenAI with videos": (
        "films.jsonl", films(lines(*FILMED_PARTS)),
        "a file of JSON lines; conversations as in OpenAI, with images or videos",
        [{"type": "vision_chat"}],
    ),
    "turns of the system, the developer and tools": (
        "tools.jsonl", lines(*TOOLS), "a file of JSON lines; conversations as in OpenAI",
        [{"type": "chat"}],
    ),
    "ShareGPT with tools": (
        "shared_tools.json", array(SHARED_TOOLS),
        "a file of JSON arrays; conversations as in ShareGPT", [{"type": "chat"}],
    ),
    "plain text": (
        "plain", plain_texts, "41 files of plain text", [TEXT]
    ),
    "an Arrow stream": (
        "a.arrow", arrow_stream, "a file of Arrow, 2 columns; the text is probably 'body'",
        [{**TEXT, "field": "body"}],
    ),
    "codecs of Parquet": (
        "codecs.parquet", codecs, "a file of Parquet, 7 columns; the text is probably 'text'",
        [TEXT],
    ),
    "a compressed array": (
        "packed.json.bz2", lambda path: path.write_bytes(bz2.compress(json.dumps(ROWS).encode())),
        "a file of JSON arrays; the text is probably 'text'", [TEXT],
    ),
    "tokens of Megatron": (
        "tokens", megatron, "tokens in Megatron's format; set data.tokenizer",
        [{"type": "megatron"}],
    ),
    "prompts and completions": (
        "trl.jsonl",
        lines(*(
            {"prompt": one["messages"][:1], "completion": one["messages"][1:]} for one in OPENAI
        )),
        "a file of JSON lines; conversations as prompts and completions",
        [{"type": "chat"}],
    ),
    "another field": (
        "talk.jsonl", lines(*({"talk": one["messages"]} for one in OPENAI)),
        "a file of JSON lines; conversations as in OpenAI", [{"type": "chat", "field": "talk"}],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[Any]]]:
    """The suggested configuration of each layout, and the metrics of a step with it."""
    layouts = {name: suggested.Layout(*layout) for name, layout in LAYOUTS.items()}
    return suggested.train(tmp_path_factory.mktemp("layouts"), layouts, TEXTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_suggested_configuration_trains(
    trained: dict[str, tuple[str, list[Any]]], name: str
) -> None:
    file, _, description, entries = LAYOUTS[name]
    text, steps = trained[name]
    assert text.splitlines()[0] == f"# {file}: {description}"
    assert yaml.safe_load(text) == {"data": {"sources": [{"path": file} | e for e in entries]}}
    assert [step["step"] for step in steps] == [0, 1]
    assert steps[1]["text_loss"] > 0


def test_the_command_prints_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("web").mkdir()
    parquet.write_table(pa.table(COLUMNS), "web/a.parquet")
    for path in ("web", "web/*"):
        assert cli.main(["data", "inspect", path]) == 0
        assert capsys.readouterr().out == (
            f"# {path}: a file of Parquet, 2 columns; the text is probably 'body'\n"
            "data:\n"
            "  sources:\n"
            f"    - {{type: text, path: {path}, field: body}}\n"
        )
    assert cli.main(["data", "inspect", "web", "steps=3"]) == 1
    assert capsys.readouterr().err == "error: steps=3: web is no configuration\n"


def test_single_records_do_not_change_the_format(tmp_path: Path) -> None:
    lines({"text": "No messages."}, OPENAI[0], {"messages": "none"}, OPENAI[1])(
        tmp_path / "a.jsonl"
    )
    assert recognize(str(tmp_path / "a.jsonl")).entries[0]["type"] == "chat"
    lines({"text": "a"}, {"Text": "a longer text"})(tmp_path / "b.jsonl")
    assert recognize(str(tmp_path / "b.jsonl")).entries[0]["field"] == "text"


def write_folder(**files: bytes) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("_", ".")).write_bytes(content)

    return write


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def lmdb(path: Path) -> None:
    path.mkdir()
    (path / "data.mdb").write_bytes(bytes(4096))


def sqlite(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("create table a (text)")
        connection.commit()


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "preferences in Parquet": (
        "a.parquet",
        lambda path: dataset([{"prompt": "a", "chosen": "b", "rejected": "c"}]).to_parquet(path),
        "a.parquet: preference data",
    ),
    "prompts with completions": (
        "a.jsonl",
        lines({"prompt": "a", "completion": "b"}),
        "'prompt' with its reply in 'completion', which is not read: write them as instruction",
    ),
    "ratings of completions": (
        "a.parquet",
        lambda path: dataset([{"prompt": "a", "completion": "b", "label": True}]).to_parquet(path),
        "'prompt' with its reply in 'completion'",
    ),
    "sound": ("a.jsonl", lines({"audio": "a.wav", "text": "a"}), "sound, which is not read"),
    "ORC": ("a.orc", lambda path: orc.write_table(pa.table(COLUMNS), path), "ORC, .*to Parquet"),
    "NumPy": ("a.npz", lambda path: np.savez(path, a=np.arange(9)), "NumPy, which is not read"),
    "SQLite": ("a.db", sqlite, "SQLite, which is not read"),
    "pickled data": ("a.pt", lambda path: torch.save({}, path), "pickled data|a ZIP archive"),
    "Brotli": ("a.jsonl.br", raw(b"\x8b\x0e\x80"), "Brotli, which is not read: decompress it"),
    "LZ4": ("a.jsonl.lz4", raw(b"\x04\x22\x4d\x18"), "LZ4, which is not read: decompress it"),
    "TFRecord": ("a.tfrecord-00000-of-00002", raw(bytes(20)), "TFRecord, which is not read"),
    "Avro": ("a.avro", raw(b"Obj\x01\x04\x14"), "Avro, which is not read"),
    "LMDB": ("a", lmdb, r"has no data in it \(.*data.mdb: LMDB, which is not read"),
    "preferences": (
        "a.jsonl",
        lines({"prompt": "a", "chosen": OPENAI[0]["messages"], "rejected": []}),
        "a.jsonl: preference data",
    ),
    "CSV": ("a.csv", lambda path: path.write_text("a,b\n"), "CSV, which is not read"),
    "tool calls": (
        "a.jsonl",
        lines({"conversations": [{"from": "function_call", "value": "f"}]}),
        "conversations that are not read: the tool call in message 1 is not JSON",
    ),
    "numbers": ("a.jsonl", lines({"a": 1}), "no text in its fields, which are a"),
    "instructions with context": (
        "a.jsonl",
        lines({"instruction": "a", "context": "a long text", "response": "b"}),
        "'instruction' with its reply in 'response'",
    ),
    "queries": ("a.jsonl", lines({"query": "a b", "response": "b"}), "'query' with its reply in"),
    "KTO": ("a.jsonl", lines({**OPENAI[0], "label": True}), "preference data .* as in KTO"),
    "Gemini": (
        "a.jsonl",
        lines({"contents": [{"role": "user", "parts": [{"text": "a"}]}]}),
        "a conversation in Gemini's layout",
    ),
    "single messages": ("a.jsonl", lines(*OPENAI[0]["messages"]), "single messages .*a line for"),
    "trees of messages": (
        "a.jsonl",
        lines({"parent_id": None, "role": "prompter", "text": "a b"}),
        "single messages",
    ),
    "conversations without replies": (
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": "a"}]}),
        "conversations that are not read: no reply of the assistant",
    ),
    "identifiers": ("a.jsonl", lines({"id": "abc", "url": "a.org", "data": ["a"]}), "no text in"),
    "nothing": ("a", write_folder(), "has no data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_layouts_are_refused_by_name(tmp_path: Path, name: str) -> None:
    file, write, message = REFUSED[name]
    write(tmp_path / file)
    with pytest.raises(PretrainError, match=message) as raised:
        recognize(str(tmp_path / file))
    assert "\n" not in str(raised.value)


def test_other_layouts_of_a_folder_are_named(tmp_path: Path) -> None:
    for name, row in {"a": {"text": "a b"}, "b": {"text": "c"}, "c": {"body": "d e"}}.items():
        lines(row)(tmp_path / f"{name}.jsonl")
    found = recognize(str(tmp_path))
    assert found.entries == [{"type": "text", "path": str(tmp_path), "field": "text"}]
    assert found.description.endswith(
        "; other files differ, such as c.jsonl: the text is probably 'body'"
    )
    (tmp_path / "c.jsonl").unlink()
    assert "differ" not in recognize(str(tmp_path)).description


def test_caches_and_hidden_folders_are_not_looked_into(tmp_path: Path) -> None:
    """As when a source is read."""
    (tmp_path / "a.jsonl").write_bytes(LINES)
    megatron(tmp_path / "cache")
    megatron(tmp_path / ".hidden")
    assert recognize(str(tmp_path)).entries[0]["type"] == "megatron"
    (tmp_path / "cache" / TAG).touch()
    assert recognize(str(tmp_path)).entries[0]["type"] == "text"


def test_hidden_files_do_not_count_among_those_looked_at(tmp_path: Path) -> None:
    """macOS writes one for each file, and they come first."""
    for number in range(10_000):
        (tmp_path / f"._{number}").touch()
    make.captioned_folder(tmp_path, 3)
    assert recognize(str(tmp_path)).description == "3 images with captions"


def test_other_data_in_a_folder_of_images_is_named(tmp_path: Path) -> None:
    """Its configuration does not read them; files next to an image are its own."""
    make.captioned_folder(tmp_path / "data", 3)
    lines({"width": 28})(tmp_path / "data" / "000.json")
    lines({"name": "data"})(tmp_path / "data" / "dataset_infos.json")  # about the images
    assert recognize(str(tmp_path / "data")).description == "3 images with captions"
    (tmp_path / "data" / "text").mkdir()
    lines({"text": "a"})(tmp_path / "data" / "text" / "web.jsonl")
    assert recognize(str(tmp_path / "data")).description == (
        "3 images with captions; other data is not read: inspect web.jsonl separately"
    )


def test_names_that_a_configuration_cannot_contain(tmp_path: Path) -> None:
    lines({"text": "a"})(tmp_path / "a\nb.jsonl")
    text = configuration(f"{tmp_path}/a\nb.jsonl")
    assert text.startswith(f"# {tmp_path}/a b.jsonl: ")
    assert yaml.safe_load(text)["data"]["sources"][0]["path"] == f"{tmp_path}/a\nb.jsonl"
    path = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.jsonl")
    lines({"text": "a"})(Path(path))
    with pytest.raises(PretrainError, match=r"caf\\udce9.jsonl: its name is not UTF-8.*rename it"):
        configuration(path)


def test_formats_of_the_trainer_are_recognized(tmp_path: Path) -> None:
    make.captioned_folder(tmp_path / "pictures", 3)
    found = recognize(str(tmp_path / "pictures"))
    assert found.description == "3 images with captions"
    assert found.entries == [{"type": "images", "path": str(tmp_path / "pictures")}]
    (tmp_path / "tokens").mkdir()
    for suffix in ("bin", "idx"):
        (tmp_path / "tokens" / f"a.{suffix}").write_bytes(b"")
    assert recognize(str(tmp_path / "tokens")).entries[0]["type"] == "megatron"
    (tmp_path / "shards" / ".nv-meta").mkdir(parents=True)
    assert recognize(str(tmp_path / "shards")).entries[0]["type"] == "energon"
    lines({"image": "a.png", "caption": "a cat"})(tmp_path / "a.jsonl")
    assert recognize(str(tmp_path / "a.jsonl")).entries[0]["type"] == "images"
    (tmp_path / "a.md").write_text("# A text")
    assert recognize(str(tmp_path / "a.md")).description == "a file of plain text"
