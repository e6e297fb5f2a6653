"""Converted data has the documents, the splits and the images of the source that it came from."""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from pretrain import cli
from pretrain.config import DataConfig, from_dict, load
from pretrain.data import megatron_format, open_data
from pretrain.data.mixture.data import MixtureData
from pretrain.data.packing import Document
from pretrain.data.sources.indexed import IndexedDocuments
from pretrain.data.sources.interface import Segment
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.tools.recognize import configuration
from pretrain.errors import PretrainError
from tests.pretrain.data import make

TOKENIZER = Tokenizer.train([make.text(number) for number in range(9)], 400)


def convert(*arguments: object) -> int:
    return cli.main(["data", "convert", *map(str, arguments)])


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """The lines before the configuration that is printed, and the configuration."""
    lines, _, settings = capsys.readouterr().out.partition("data:\n")
    return lines.splitlines(), f"data:\n{settings}"


def opened(settings: dict[str, Any], folder: Path, **changes: Any) -> MixtureData:
    values = settings["data"] | {"cache_dir": str(folder / "cache"), "seq_length": 128} | changes
    config: DataConfig = from_dict({"data": values}).data
    data = open_data(config, 14, 0)
    assert isinstance(data, MixtureData)
    return data


def contents(data: MixtureData, split: Any) -> list[list[int]]:
    (documents,) = data.documents
    numbers = documents.numbers[split]  # type: ignore[attr-defined]
    return [documents.content(number).tolist() for number in numbers]  # type: ignore[attr-defined]


def test_text_keeps_its_documents_and_its_held_out_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make.jsonl(tmp_path / "text.jsonl", range(60))
    with (tmp_path / "text.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": make.text(n)}) + "\n" for n in (3, 7))
    overrides = ("data.vocab_size=400", "data.held_out=0.2", f"data.cache_dir={tmp_path}/cache")
    arguments = (tmp_path / "text.jsonl", tmp_path / "out", "--to", "megatron", *overrides)
    assert convert(*arguments, "--workers=1", "data.deduplicate=exact") == 0
    lines, settings = printed(capsys)
    assert lines[0].startswith("2 of 62 documents (3.2%) are duplicates: 2 exact, 0 near")
    assert lines[1].startswith("2 skipped or left out: ") and lines[2].endswith(" tokens")
    made = opened(yaml.safe_load(settings), tmp_path, held_out=0.2)
    source = {"data": {"sources": [{"path": str(tmp_path / "text.jsonl")}], "vocab_size": 400}}
    original = opened(source, tmp_path, held_out=0.2, deduplicate="exact")
    for split in ("train", "held_out"):
        assert contents(made, split) == contents(original, split)
    stored = megatron_format.IndexedTokens.open(tmp_path / "out" / "source0")
    assert len(stored) == 60 and stored.tokens.dtype == np.uint16
    assert convert(*arguments) == 1
    assert "exists already: choose a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["megatron", "parquet"])
@pytest.mark.parametrize("name", ["$HOME", "a$", "~x", "[a] *", "a: b #c", "a\nb", "é, {b}", "'\""])
def test_the_configuration_reads_folders_of_any_name(
    tmp_path: Path,
    name: str,
    to: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name, "in").mkdir(parents=True)
    make.jsonl(Path(name, "in", "a.jsonl"), range(9))
    overrides = ("data.vocab_size=400", "data.cache_dir=cache", "data.held_out=0")
    assert convert(f"{name}/in", f"{name}/out", "--to", to, *overrides, "--workers=1") == 0
    Path("made.yaml").write_text(printed(capsys)[1])
    data = open_data(load("made.yaml", ["data.cache_dir=cache", "data.held_out=0"]).data, 14, 0)
    assert isinstance(data, MixtureData) and data.documents[0].count("train") == 9


def chats(path: Path, count: int) -> Path:
    """Conversations of one to three replies, of which some are not learned; one is very long."""
    with path.open("w") as file:
        for number in range(count):
            messages: list[dict[str, Any]] = []
            for turn in range(number % 3 + 1):
                length = 500 if number == 5 else number % 4 + 1
                reply = f"It is {number + turn}. " * length
                messages.append({"role": "user", "content": f"What is {number} and {turn}?"})
                messages.append({"role": "assistant", "content": reply, "weight": turn % 2})
            messages.append({"role": "assistant", "content": f"Bye, {number}."})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def test_conversations_and_text_keep_every_sequence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens, weights and categories are those of a run without conversion, which may continue with
    the result; `data inspect` names it."""
    chats(tmp_path / "chat.jsonl", 60)
    make.jsonl(tmp_path / "text.jsonl", range(60))
    sources = [{"type": kind, "path": f"{tmp_path}/{kind}.jsonl"} for kind in ("chat", "text")]
    config = {"data": {"sources": sources, "vocab_size": 400, "held_out": 0.2, "seq_length": 256}}
    config["data"]["cache_dir"] = f"{tmp_path}/cache"
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(config))
    assert convert(tmp_path / "both.yaml", tmp_path / "out", "--to=megatron", "--workers=1") == 0
    lines, converted = printed(capsys)
    assert lines[0].startswith("1 skipped or left out")
    assert lines[1].startswith("data.sources[0]: 59 documents")
    assert [one["type"] for one in yaml.safe_load(converted)["data"]["sources"]] == [
        "megatron_chat",
        "megatron",
    ]
    made = opened(yaml.safe_load(converted), tmp_path, held_out=0.2, seq_length=256)
    original = opened(config, tmp_path, seq_length=256)
    assert made.fingerprint == original.fingerprint
    seen = set()
    for split in ("train", "held_out"):
        for index in range(30):
            mine, theirs = made.sample(split, index), original.sample(split, index)
            for name in ("tokens", "labels", "weights", "categories", "documents", "sources"):
                assert getattr(mine, name).equal(getattr(theirs, name))
            seen |= set(mine.weights.tolist())
    assert seen == {0.0, 1.0}
    made.load_state_dict([original.state_dict(2)])
    assert yaml.safe_load(configuration(str(tmp_path / "out")))["data"] == {
        "sources": yaml.safe_load(converted)["data"]["sources"]
    }
    with pytest.raises(PretrainError, match=r"source1\.bin has text: set it to megatron$"):
        opened(_only(converted, 1, "megatron_chat"), tmp_path)
    with pytest.raises(PretrainError, match=r"source0\.bin has conv.*: set it to megatron_chat$"):
        opened(_only(converted, 0, "megatron"), tmp_path)


def _only(settings: str, number: int, type: str) -> dict[str, Any]:
    """One source of a configuration, as another type."""
    data = yaml.safe_load(settings)["data"]
    return {"data": data | {"sources": [data["sources"][number] | {"type": type}]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.unlink(), r"source0\.weights.*: copy the files again"),
        (lambda weights: weights.write_bytes(weights.read_bytes()[:-4]), r"values for .* tokens"),
        (lambda weights: weights.write_bytes(weights.read_bytes()[:-1]), r"source0\.weights.*copy"),
        (lambda weights: weights.with_suffix(".json").unlink(), r"say what of a conversation is"),
    ],
)
def test_damaged_conversations_are_refused(
    tmp_path: Path, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chats(tmp_path / "chat.jsonl", 5)
    settings = ("data.vocab_size=400", f"data.cache_dir={tmp_path}/cache", "--workers=1")
    assert convert(tmp_path / "chat.jsonl", tmp_path / "out", "--to=megatron", *settings) == 0
    _, converted = printed(capsys)
    change(tmp_path / "out" / "source0.weights")
    with pytest.raises(PretrainError, match=message):
        opened(yaml.safe_load(converted), tmp_path)


def test_megatron_core_reads_the_result(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    make.jsonl(tmp_path / "text.jsonl", range(30))
    cache = f"data.cache_dir={tmp_path}/cache"
    out = tmp_path / "out"
    assert convert(tmp_path / "text.jsonl", out, "--to=megatron", "data.vocab_size=400", cache) == 0
    theirs = IndexedDataset(str(out / "source0"))
    ours = megatron_format.IndexedTokens.open(out / "source0")
    assert len(theirs) == len(ours) == 30
    for number in range(30):
        assert np.array_equal(theirs[number], ours.tokens[ours.extent(number)])


def test_images_in_a_table_become_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions, images = [], []
    for number in range(8):
        image, caption = make.picture(number)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        captions.append(caption)
        images.append({"bytes": buffer.getvalue(), "path": f"{number}.png"})
    images[2] = {"bytes": b"no image", "path": "2.png"}
    parquet.write_table(
        pyarrow.table({"image": images, "caption": captions}), tmp_path / "images.parquet"
    )
    cache = f"data.cache_dir={tmp_path}/cache"
    arguments = (tmp_path / "images.parquet", tmp_path / "shards", "--to", "shards", cache)
    assert convert(*arguments, "data.held_out=0", "--per-shard=4") == 0
    lines, settings = printed(capsys)
    assert lines[-2].startswith("1 skipped: ") and "2.png" in lines[-2]
    assert lines[-1] == "7 images to train on and 0 held out"
    assert len(lines) == 2, "energon prints names of the temporary folder"
    assert len(list((tmp_path / "shards").glob("train-*.tar"))) == 2
    make_tokenizer = {
        "data": {"sources": [{"path": str(make.jsonl(tmp_path / "t.jsonl", range(9)))}]}
    }
    opened(make_tokenizer, tmp_path, vocab_size=400).tokenizer.save(tmp_path / "tokenizer.json")
    data = opened(
        yaml.safe_load(settings), tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), held_out=0
    )
    seen = {data.tokenizer.decode(data.sample("train", n).tokens.tolist()) for n in range(8)}
    found = {caption for caption in captions if any(caption in text for text in seen)}
    assert found == {*captions} - {captions[2]}
    assert Image.open(io.BytesIO(images[0]["bytes"])).format == "PNG"


PICTURES = [Image.new("RGB", (28 * n, 28), (20 * n, 99, 0)) for n in range(1, 9)]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def asked(number: int) -> dict[str, Any]:
    """A conversation with up to two images, a tool call and reasoning; its text has what looks like
    a placeholder."""
    names = [f"{(number + n) % 8}.png" for n in range(number % 3)]
    content = [{"type": "image", "image": name} for name in names]
    return {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [*content, {"type": "text", "text": f"<image>? {number}"}]},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "I look." if number % 2 else None,
                "tool_calls": [{"id": "a", "function": {"name": "look", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "seen", "tool_call_id": "a"},
            {"role": "assistant", "content": "Wait.", "weight": number % 2},
            {"role": "assistant", "content": f"It is {number}."},
        ],
        "tools": [TOOL],
    }


def documents(number: int) -> dict[str, Any]:
    """A document of images, a video of three frames and text in reading order."""
    frames = [f"{(number + n) % 8}.png" for n in (0, 0, 0)]
    parts: list[Any] = [{"text": f"first {number}"}, {"image": f"{number % 8}.png"}]
    parts += [{"text": "then"}, {"video": frames}] if number % 2 else []
    return {"parts": [*parts, {"text": make.text(number)}]}


def read_all(data: MixtureData, split: Any) -> list[list[Any]]:
    """Every document: its tokens, their weights, and its images."""
    found = []
    for place, one in enumerate(data.documents):
        assert isinstance(one, IndexedDocuments)
        sizes, _ = one.sizes_of(np.array([*one.numbers[split]], np.int64))
        for number, size in zip(one.numbers[split], sizes.tolist(), strict=True):
            document = one.document(Segment(place, int(number), 0, size))
            assert isinstance(document, Document)
            patches = [patch.tolist() for patch in document.patches]
            found.append([document.tokens, document.weights, document.categories, patches])
    return sorted(found, key=repr)


@settings(deadline=None, max_examples=4)
@given(st.data())
def test_parquet_has_the_same_documents(drawn: st.DataObject) -> None:
    """Text, conversations with and without images, and documents of images, each with its split."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, picture in enumerate(PICTURES):
            picture.save(folder / f"{number}.png")
        count = drawn.draw(st.integers(8, 30))
        records: dict[str, Callable[[int], dict[str, Any]]] = {
            "text": lambda number: {"text": make.text(number)},
            "chat": lambda number: asked(3 * number),
            "vision_chat": asked,
            "images": documents,
        }
        sources = []
        for kind in records:
            path = folder / f"{kind}.jsonl"
            path.write_text("".join(json.dumps(records[kind](n)) + "\n" for n in range(count)))
            split = drawn.draw(st.sampled_from(["hash", "hash", "train"]))
            sources.append({"type": kind, "path": str(path), "split": split})
        TOKENIZER.save(folder / "tokenizer.json")
        shared = {"held_out": 0.3, "seq_length": 512, "tokenizer": str(folder / "tokenizer.json")}
        shared |= {"cache_dir": str(folder / "cache"), "vision_share": 0.001}
        config = {"data": {"sources": sources, **shared}}
        (folder / "mine.yaml").write_text(yaml.safe_dump(config))
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            per_file = f"--per-shard={drawn.draw(st.integers(3, 40))}"
            assert convert(folder / "mine.yaml", folder / "out", "--to=parquet", per_file) == 0
        lines, _, converted = output.getvalue().partition("data:\n")
        assert "skipped" not in lines
        original = opened(config, folder, **shared)
        made = opened(yaml.safe_load(f"data:\n{converted}"), folder, **shared)
        theirs = {split: read_all(original, split) for split in ("train", "held_out")}
        assert sum(map(len, theirs.values())) == 4 * count
        for split, expected in theirs.items():
            assert read_all(made, split) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("text.jsonl", "new", "--to=shards"), "(text) has no images with captions: only sources"),
        (("pictures", "new", "--to=megatron"), "(images) has images: only text and conversations"),
        (("tokens.yaml", "new", "--to=megatron"), "(megatron) has tokens already: only text and"),
        (("pictures", "new", "--to=shards", "--per-shard=0"), "--per-shard must be > 0, not 0"),
        (
            ("pictures", "new", "--to=shards", "data.deduplicate=exact"),
            "applied by `--to megatron`",
        ),
        (
            ("parts.jsonl", "new", "--to=shards"),
            "parts.jsonl:1 (not one image with a caption: `data",
        ),
        (("nothing", "new", "--to=shards"), "nothing"),
        (("empty.yaml", "new", "--to=megatron"), "data.sources is empty"),
        (("tokens.yaml", "new", "--to=parquet"), "(megatron) is not converted to Parquet, only"),
        (("text.jsonl", "new", "--to=parquet", "--per-shard=0"), "--per-shard must be > 0, not 0"),
        (("text.jsonl", "new", "--to=parquet", "data.deduplicate=exact"), "`--to megatron` alone"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make.jsonl(Path("text.jsonl"), range(5))
    make.captioned_folder(Path("pictures"), 4)
    Path("empty.yaml").write_text("steps: 200\n")
    assert convert("text.jsonl", "tokens", "--to=megatron", "data.cache_dir=cache") == 0
    parts = [{"image": f"pictures/{name}"} for name in sorted(os.listdir("pictures"))[:2]]
    Path("parts.jsonl").write_text(json.dumps({"parts": [*parts, {"text": "two"}]}) + "\n")
    settings = capsys.readouterr().out.partition("data:\n")
    Path("tokens.yaml").write_text("".join(settings[1:]))
    assert convert(*arguments, "data.cache_dir=cache") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("new")]
