"""Tokenizers that exist already give the ids that their own library gives."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import DataConfig, SourceConfig
from pretrain.data import open_data, tokenizer
from pretrain.data.tokenizer import KIMI_PATTERN, Tokenizer
from pretrain.errors import PretrainError
from tests.pretrain.data import make

TEXT = "The quick brown fox isn't lazy; it's 12345 years old.\n\n  def f(x):\n\treturn x  \n"
HAN = "\u5feb\u901f\u7684\u68d5\u8272\u72d0\u72f8 \u00c9t\u00e9 na\u00efve \U0001f600"


def ranks() -> dict[bytes, int]:
    """Byte pairs in a custom order of merges, as a tiktoken file lists them."""
    found = {bytes([byte]): byte for byte in range(256)}
    words = [
        *TEXT.split(" "),
        *HAN.split(" "),
        " the",
        " fox",
        " is",
        "123",
        "\n\n",
        "  ",
        "returns",
    ]
    for word in words:
        content = word.encode()
        for end in range(2, len(content) + 1):
            found.setdefault(content[:end], len(found))
    return found


def tiktoken_file(folder: Path, specials: dict[int, str] | None = None) -> Path:
    path = folder / "tiktoken.model"
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks().items())
    path.write_text("\n".join(lines) + "\n")
    if specials is not None:
        decoder = {str(number): {"content": name} for number, name in specials.items()}
        described = json.dumps({"added_tokens_decoder": decoder})
        (folder / "tokenizer_config.json").write_text(described)
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiktoken_file(tmp_path_factory.mktemp("tiktoken")))


THEIRS = tiktoken.Encoding("kimi", pat_str=KIMI_PATTERN, mergeable_ranks=ranks(), special_tokens={})
pieces = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [TEXT, HAN, " the", "don't", "DON'T", "1234567", "\r\n", "   x", "<|media_pad|>"]
    ),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(pieces, max_size=6).map("".join))
def test_a_tiktoken_file_encodes_as_tiktoken_does(ours: Tokenizer, text: str) -> None:
    assert ours.encode(text).tolist() == THEIRS.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text


def test_kimis_special_tokens_follow_the_text_tokens(ours: Tokenizer) -> None:
    first = len(ranks())
    assert (ours.bos, ours.eos, ours.pad) == (first, first + 1, first + 255)
    assert (ours.media_begin, ours.media_end, ours.media_pad) == (
        first + 18,
        first + 20,
        first + 21,
    )
    places = {"system": first + 10, "user": first + 3, "assistant": first + 4}
    assert (ours.roles, ours.im_middle, ours.im_end) == (places, first + 17, first + 2)
    # Kimi K2: 163584 text tokens; media_begin is 163602, media_pad 163605, of 163840 in all.
    assert ours.vocab_size == first + 256


def test_special_tokens_are_read_from_tokenizer_config(tmp_path: Path) -> None:
    first = len(ranks())
    names = ["[BOS]", "[EOS]", "<|media_pad|>", "<|media_begin|>", "<|media_end|>"]
    path = tiktoken_file(tmp_path, {first + 3 * place: name for place, name in enumerate(names)})
    found = Tokenizer.load(path)
    assert (found.bos, found.eos, found.media_pad) == (first, first + 3, first + 6)
    assert found.pad == found.eos


def test_saving_and_loading_a_tiktoken_tokenizer_preserves_it(
    ours: Tokenizer, tmp_path: Path
) -> None:
    ours.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.digest == ours.digest
    assert again.encode(TEXT + HAN).tolist() == ours.encode(TEXT + HAN).tolist()
    assert (again.media_pad, again.pad, again.newline) == (ours.media_pad, ours.pad, ours.newline)


def written(tmp_path: Path, change: Any) -> Path:
    """A small tokenizer.json, changed."""
    path = tmp_path / "tokenizer.json"
    Tokenizer.train([TEXT] * 9, 320).save(path)
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
    return path


def test_text_never_encodes_to_special_tokens(tmp_path: Path) -> None:
    def plain(described: Any) -> None:
        for token in described["added_tokens"]:
            token["special"] = False
        described["truncation"] = {
            **{"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        }

    found = Tokenizer.load(written(tmp_path, plain))
    ids = found.encode("a<|media_pad|>b<|eos|>")
    assert len(ids) > 4 and not {found.media_pad, found.eos} & set(ids.tolist())


def test_ids_above_16_bits_are_preserved(tmp_path: Path) -> None:
    def many(described: Any) -> None:
        vocabulary = described["model"]["vocab"]
        vocabulary["x"], vocabulary["filler"] = 150_001, vocabulary["x"]
        for number in range(len(vocabulary), 150_001):
            vocabulary[f"\u0100filler{number}"] = number

    path = written(tmp_path, many)
    make.jsonl(tmp_path / "text.jsonl", range(5))
    (tmp_path / "text.jsonl").write_text('{"text": "axaxaxax"}\n')
    source = SourceConfig("text", str(tmp_path / "text.jsonl"))
    config = DataConfig(
        seq_length=64, tokenizer=str(path), cache_dir=str(tmp_path / "cache"), sources=(source,)
    )
    data = open_data(config, 14, 0)
    assert data.tokenizer.vocab_size == 150_002
    assert data.tokenizer.dtype is np.int32
    assert (data.sample("train", 0).tokens == 150_001).sum() >= 4


def test_a_tokenizer_without_media_tokens_works_for_text_only(tmp_path: Path) -> None:
    def no_media(described: Any) -> None:
        gone = ("<|media_begin|>", "<|media_pad|>", "<|media_end|>")
        kept = [token for token in described["added_tokens"] if token["content"] not in gone]
        described["added_tokens"] = kept
        for name in gone:
            described["model"]["vocab"][name.replace("media", "other")] = described["model"][
                "vocab"
            ].pop(name)

    path = written(tmp_path, no_media)
    make.jsonl(tmp_path / "text.jsonl", range(9))
    make.captioned_folder(tmp_path / "pictures", 4)
    text = SourceConfig("text", str(tmp_path / "text.jsonl"))
    images = SourceConfig("images", str(tmp_path / "pictures"))
    options: Any = {"seq_length": 64, "tokenizer": str(path), "cache_dir": str(tmp_path / "cache")}
    data = open_data(DataConfig(sources=(text,), **options), 14, 0)
    assert data.tokenizer.media_pad == -1
    assert (data.sample("train", 0).tokens >= 0).all()
    for sources in ((text, images), ()):
        with pytest.raises(PretrainError, match=r"has no tokens for images: add <\|media_begin\|>"):
            open_data(DataConfig(sources=sources, **options), 14, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is neither a tokenizer.json nor a tiktoken file"),
        ("not a tokenizer", "is neither a tokenizer.json nor a tiktoken file"),
        ("IQ== 0\n", "its ranks are not 0, 1, 2"),
        ("", "its ranks are not 0, 1, 2"),
    ],
)
def test_files_that_are_not_tokenizers_are_rejected(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(PretrainError, match=message) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_oversized_files_are_rejected_before_they_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiktoken_file(tmp_path)
    long = base64.b64encode(b"ab" * 600).decode()
    path.write_text(path.read_text() + f"{long} {len(ranks())}\n")
    with pytest.raises(PretrainError, match="a token is longer than 1024 bytes"):
        Tokenizer.load(path)
    with pytest.raises(PretrainError, match="cannot read the tokenizer /dev/zero: it is a pipe"):
        Tokenizer.load(Path("/dev/zero"))
    monkeypatch.setattr(tokenizer, "_MAX_BYTES", 1000)
    with pytest.raises(PretrainError, match=r"larger than 1000 bytes; give a tokenizer\.json or"):
        Tokenizer.load(path)


def test_a_regular_expression_that_gives_up_is_reported_in_one_line(tmp_path: Path) -> None:
    def endless(described: Any) -> None:
        described["normalizer"] = {
            **{"type": "Replace", "pattern": {"String": "\n"}, "content": "a" * 60 + "!"}
        }
        split = {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated"}
        described["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, described["pre_tokenizer"]],
        }

    with pytest.raises(PretrainError, match=r"cannot encode the text .*retry-limit") as error:
        Tokenizer.load(written(tmp_path, endless))
    assert "\n" not in str(error.value)
