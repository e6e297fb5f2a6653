"""Files of tokens, of megatron-core and of ``data tokenize``, are read as they were written."""

import itertools
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from pretrain import cli
from pretrain.config import DataConfig, SourceConfig
from pretrain.data import open_data
from pretrain.data.mixture.data import MixtureData
from pretrain.data.sources.interface import Segment
from pretrain.data.sources.megatron import MegatronDocuments
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from tests.distributed import training
from tests.distributed.launch import launch
from tests.pretrain.data import make

TOKENIZER = Tokenizer.train([make.text(number) for number in range(9)], 320)
LENGTH = 64


def built(
    prefix: Path, documents: Iterable[Sequence[Sequence[int]]], end: int | None = None
) -> Path:
    """Documents of sequences, written by megatron-core."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        if end is not None:
            builder.add_item(torch.tensor([end]))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def texts(numbers: Iterable[int]) -> list[list[list[int]]]:
    return [[TOKENIZER.encode(make.text(number)).tolist()] for number in numbers]


def opened(folder: Path, path: object, **options: Any) -> MixtureData:
    TOKENIZER.save(folder / "tokenizer.json")
    source = SourceConfig("megatron", str(path))
    options = {"held_out": 0.0, "tokenizer": str(folder / "tokenizer.json")} | options
    config = DataConfig(LENGTH, sources=(source,), cache_dir=str(folder / "cache"), **options)
    data = open_data(config, 14, 3)
    assert isinstance(data, MixtureData)
    return data


def tokens_of(data: MixtureData) -> list[list[int]]:
    """Every document, without the token with which the trainer begins it."""
    (documents,) = data._documents
    assert isinstance(documents, MegatronDocuments)
    sizes, _ = documents.sizes_of(np.arange(len(documents.hashes)))
    read = (documents.document(Segment(0, n, 0, size)) for n, size in enumerate(sizes.tolist()))
    return [document.tokens[1:] for document in read]  # type: ignore[union-attr]


def test_documents_of_megatron_core_are_read_to_identical_tokens(tmp_path: Path) -> None:
    """Documents of one sequence, of several and of none, in several files."""
    first = [[[21, 22], [23], []], [], [[25, 26, 27]], *texts(range(3)), []]
    second = [[], *texts(range(3, 9))]
    (tmp_path / "data").mkdir()
    built(tmp_path / "data" / "a", first)
    built(tmp_path / "data" / "b", second)
    expected = [[*itertools.chain(*document)] for document in (*first, *second)]
    for path in ("data", "data/*", "data/*.idx"):
        assert tokens_of(opened(tmp_path, tmp_path / path)) == expected
    for path in ("data/b", "data/b.bin", "data/b.idx"):
        assert tokens_of(opened(tmp_path, tmp_path / path)) == expected[len(first) :]


def test_every_token_is_packed_once_in_an_epoch(tmp_path: Path) -> None:
    built(tmp_path / "a", [[], *texts(range(30))], TOKENIZER.eos)
    data = opened(tmp_path, tmp_path / "a")
    (cursor,) = data._stream("train").cursors
    read: dict[int, list[int]] = {}
    while cursor.state()["position"] < 31:
        segment = cursor.take(LENGTH)
        document = data._documents[0].document(segment)
        read.setdefault(segment.number, []).extend(document.tokens[1:])  # type: ignore[union-attr]
    assert [read[number] for number in sorted(read)] == tokens_of(data)


def test_a_token_that_begins_a_document_is_not_repeated(tmp_path: Path) -> None:
    built(tmp_path / "a", [[[TOKENIZER.bos, *document[0]]] for document in texts(range(9))])
    built(tmp_path / "b", texts(range(9)))
    assert tokens_of(opened(tmp_path, tmp_path / "a")) == tokens_of(
        opened(tmp_path, tmp_path / "b")
    )


def test_documents_with_placeholders_of_images_are_skipped(tmp_path: Path) -> None:
    good, end = texts(range(9)), TOKENIZER.eos
    built(tmp_path / "a", [*good, [[*good[0][0], TOKENIZER.media_pad]]], end)
    data = opened(tmp_path, tmp_path / "a")
    for index in range(40):
        assert TOKENIZER.media_pad not in data.sample("train", index).tokens
    (skip,) = set(data.take_skipped())
    assert skip.name.endswith("a.bin: document 9") and "placeholders of images" in skip.reason


def test_a_resumed_run_continues_exactly(tmp_path: Path) -> None:
    built(tmp_path / "a", texts(range(40)), TOKENIZER.eos)
    data = opened(tmp_path, tmp_path / "a", held_out=0.2)
    samples = [data.sample("train", index).tokens.tolist() for index in range(60)]
    assert data.has_held_out
    again = opened(tmp_path, tmp_path / "a", held_out=0.2)
    again.load_state_dict([json.loads(json.dumps(data.state_dict(20)))])
    assert [again.sample("train", n).tokens.tolist() for n in range(20, 60)] == samples[20:]
    built(tmp_path / "a", texts(range(1, 41)), TOKENIZER.eos)
    other = opened(tmp_path, tmp_path / "a", held_out=0.2)
    with pytest.raises(PretrainError, match="are not those that the checkpoint was made with"):
        other.load_state_dict([data.state_dict(20)])


def test_a_file_keeps_its_split_when_others_are_added(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    built(tmp_path / "data" / "b", texts(range(40)), TOKENIZER.eos)
    alone = opened(tmp_path, tmp_path / "data", held_out=0.3)._documents[0]
    built(tmp_path / "data" / "a", texts(range(40, 50)))
    both = opened(tmp_path, tmp_path / "data", held_out=0.3)._documents[0]
    assert isinstance(alone, MegatronDocuments) and isinstance(both, MegatronDocuments)
    assert 0 < alone.count("held_out") < 40
    held_out = [number - 10 for number in both.numbers["held_out"] if number >= 10]
    assert held_out == [*alone.numbers["held_out"]]


# ---------------------------------------------------------------------- our own files


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, its tokens in ``moved``, and conversations."""
    folder = tmp_path_factory.mktemp("tokenized")
    TOKENIZER.save(folder / "tokenizer.json")
    make.jsonl(folder / "text.jsonl", range(50))
    messages = [{"role": role, "content": "Hello"} for role in ("user", "assistant")]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (folder / "tiny.yaml").write_text(f"data: {{tokenizer: {folder}/tokenizer.json}}\n")
    kinds = ("text", "chat")
    sources = ", ".join(f"{{type: {kind}, path: {folder}/{kind}.jsonl}}" for kind in kinds)
    settings = [f"data.sources=[{sources}]", f"data.cache_dir={folder}/cache"]
    command = ["data", "tokenize", str(folder / "tiny.yaml"), *settings, "--workers", "1"]
    assert cli.main(command) == 0
    for kind in kinds:
        (made,) = folder.glob(f"cache/{kind}-*")
        shutil.copytree(made, folder / "moved" / kind)
    return folder


def test_tokens_equal_their_text(tokenized: Path) -> None:
    """Same documents, splits and fingerprint: a run may change from one to the other."""
    tokens = opened(tokenized, tokenized / "moved" / "text", held_out=0.2)
    source = SourceConfig("text", str(tokenized / "text.jsonl"))
    config = DataConfig(
        LENGTH,
        sources=(source,),
        held_out=0.2,
        tokenizer=str(tokenized / "tokenizer.json"),
        cache_dir=str(tokenized / "cache"),
    )
    text = open_data(config, 14, 3)
    assert tokens.fingerprint == text.fingerprint
    for split in ("train", "held_out"):
        for index in range(20):
            assert tokens.sample(split, index).tokens.equal(text.sample(split, index).tokens)
    tokens.load_state_dict([text.state_dict(2)])


def test_another_tokenizer_is_refused(tokenized: Path) -> None:
    other = tokenized / "other.json"
    Tokenizer.train(["aaaa bbbb"], 310).save(other)
    with pytest.raises(PretrainError, match=r"tokens\.bin was made with another tokenizer.*other"):
        opened(tokenized, tokenized / "moved" / "text", tokenizer=str(other))


@pytest.mark.parametrize("size", [0, 3, 16, 395, 401])
def test_hashes_of_another_size_are_refused(tokenized: Path, tmp_path: Path, size: int) -> None:
    """Without a word, other documents would be held out."""
    shutil.copytree(tokenized / "moved" / "text", tmp_path / "data")
    hashes = tmp_path / "data" / "tokens.hashes"
    hashes.write_bytes(hashes.read_bytes()[:size].ljust(size, b"x"))
    with pytest.raises(PretrainError, match=rf"hashes has {size} bytes instead of 400: copy"):
        opened(tmp_path, tmp_path / "data")


def test_hashes_that_arrive_later_decide_the_split(tokenized: Path, tmp_path: Path) -> None:
    """Splits in the cache are not those of other hashes."""
    shutil.copytree(tokenized / "moved" / "text", tmp_path / "data")
    (tmp_path / "data" / "tokens.hashes").rename(tmp_path / "hashes")

    def held_out() -> list[int]:
        data = opened(tmp_path, tmp_path / "data", held_out=0.3)
        return [*data._documents[0].numbers["held_out"]]  # type: ignore[attr-defined]

    by_number = held_out()
    (tmp_path / "hashes").rename(tmp_path / "data" / "tokens.hashes")
    by_content = held_out()
    hashes = np.fromfile(tmp_path / "data" / "tokens.hashes", np.uint64)
    assert by_content == np.flatnonzero(hashes < 0.3 * 2**64).tolist() != by_number


def test_conversations_are_refused(tokenized: Path) -> None:
    with pytest.raises(PretrainError, match=r"has conversations, .* set it to megatron_chat"):
        opened(tokenized, tokenized / "moved" / "chat")


# ---------------------------------------------------------------------- bad input


def test_a_tokenizer_is_needed(tmp_path: Path) -> None:
    built(tmp_path / "a", texts(range(9)))
    with pytest.raises(PretrainError, match=r"has tokens instead of text: set data\.tokenizer"):
        opened(tmp_path, tmp_path / "a", tokenizer=None)


@pytest.mark.parametrize(("there", "missing"), [("bin", "idx"), ("idx", "bin")])
def test_half_of_a_pair_is_refused(tmp_path: Path, there: str, missing: str) -> None:
    (tmp_path / "data").mkdir()
    Path(f"{built(tmp_path / 'data' / 'a', texts(range(9)))}.{missing}").unlink()
    for path in (tmp_path / "data", tmp_path / "data" / "a", tmp_path / "data" / f"a.{there}"):
        with pytest.raises(PretrainError, match=rf"a\.{there} exists, but a\.{missing} does not: "):
            opened(tmp_path, path)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, suffix: str) -> None:
    path = Path(f"{built(tmp_path / 'a', texts(range(9)))}.{suffix}")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(
        PretrainError, match=rf"^data\.sources\[0\]\.path: \S+a\.{suffix} has .* bytes"
    ):
        opened(tmp_path, tmp_path / "a")


@pytest.mark.parametrize("place", [2, 8, 40])
@pytest.mark.parametrize("value", [-8, 10**12])
@pytest.mark.parametrize("array", ["starts", "documents"])
def test_an_index_that_points_outside_of_the_tokens_is_refused(
    tmp_path: Path, array: str, value: int, place: int
) -> None:
    """Such as one with a block that was never written."""
    built(tmp_path / "a", texts(range(50)), TOKENIZER.eos)
    index = tmp_path / "a.idx"
    content = bytearray(index.read_bytes())
    at = 34 + (4 if array == "starts" else 12) * 100 + 8 * place
    content[at : at + 8] = value.to_bytes(8, "little", signed=True)
    index.write_bytes(content)
    with pytest.raises(PretrainError, match=r"a\.idx is damaged: .*: copy the files again"):
        opened(tmp_path, tmp_path / "a")


def test_documents_without_tokens_are_no_data(tmp_path: Path) -> None:
    built(tmp_path / "a", [[]] * 5)
    with pytest.raises(PretrainError, match=r"none of the documents in .*a can be used"):
        opened(tmp_path, tmp_path / "a")


@pytest.mark.parametrize("path", ["nothing", "nothing/*", "empty"])
def test_nothing_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PretrainError, match=r"^data\.sources\[0\]\.path: "):
        opened(tmp_path, tmp_path / path)


def test_a_larger_vocabulary_is_refused(tmp_path: Path) -> None:
    built(tmp_path / "a", [*texts(range(9)), [[TOKENIZER.vocab_size]]])
    with pytest.raises(PretrainError, match=r"a\.bin has the token \d+, but there are \d+ in the "):
        opened(tmp_path, tmp_path / "a")


def test_documents_that_end_with_another_token_are_refused(tmp_path: Path) -> None:
    (other,) = TOKENIZER.encode("q")
    built(tmp_path / "a", texts(range(40)), end=other)
    with pytest.raises(PretrainError, match=r"all end with the token \d+, not with 2 in the tok"):
        opened(tmp_path, tmp_path / "a")


def test_text_that_always_ends_with_a_newline_is_not_another_vocabulary(tmp_path: Path) -> None:
    built(tmp_path / "a", texts(range(40)), end=TOKENIZER.newline)
    assert "do not end with <|eos|>" in opened(tmp_path, tmp_path / "a").describe()


def test_documents_without_an_end_are_noted(tmp_path: Path) -> None:
    built(tmp_path / "a", [[[*document[0], 20 + n]] for n, document in enumerate(texts(range(40)))])
    note = "do not end with <|eos|>, so the model does not learn where documents end"
    assert note in opened(tmp_path, tmp_path / "a").describe()
    built(tmp_path / "b", texts(range(9)), TOKENIZER.eos)
    assert note not in opened(tmp_path, tmp_path / "b").describe()


def test_a_foreign_token_outside_the_sample_is_skipped(tmp_path: Path) -> None:
    documents = texts(range(400))
    documents[5].append([TOKENIZER.vocab_size])
    built(tmp_path / "a", documents, TOKENIZER.eos)
    data = opened(tmp_path, tmp_path / "a")
    for index in range(1000):
        data.sample("train", index)
    assert {skip.name for skip in data.take_skipped()} == {f"{tmp_path}/a.bin: document 5"}


# ---------------------------------------------------------------------- training


def _train(*arguments: str) -> list[dict[str, Any]]:
    return training.train_and_read(*arguments)


def test_two_ranks_train_on_tokens(tmp_path: Path) -> None:
    built(tmp_path / "a", texts(range(300)), TOKENIZER.eos)
    TOKENIZER.save(tmp_path / "tokenizer.json")
    (tmp_path / "tiny.yaml").write_text(training.TINY)
    options = (
        f"data.sources=[{{type: megatron, path: {tmp_path}/a}}]",
        f"data.tokenizer={tmp_path}/tokenizer.json",
        *("steps=2", "optimizer.warmup_steps=0", "optimizer.decay_steps=0", "data.held_out=0.2"),
    )
    records = launch(_train, 2, str(tmp_path), *options)[0]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[2]["held_out_text_loss"] > 0
