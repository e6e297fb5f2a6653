"""Parquet, Arrow and saved datasets, written by the libraries that people use, are read alike."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather, ipc, parquet

from pretrain import cli
from pretrain.config import DataConfig, SourceConfig
from pretrain.data import open_data, tables
from pretrain.data.mixture.data import MixtureData
from pretrain.data.skipped import Skip
from pretrain.data.sources.interface import Record
from pretrain.data.sources.text import TextDocuments
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from tests.pretrain.data import make

TEXTS = [make.text(number) for number in range(30)]
TABLE = pa.table({"id": range(30), "text": TEXTS})


def read(path: Path, field: str = "text") -> list[str]:
    """The texts of a source, none of whose records is skipped."""
    records: list[Record | Skip] = make.records(SourceConfig("text", str(path), field=field))
    return [record.text for record in records if not isinstance(record, Skip)]


def save_dataset(path: Path, texts: list[str], shards: int = 1) -> None:
    dataset = datasets.Dataset.from_dict({"text": texts})
    dataset.save_to_disk(str(path), num_shards=shards)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.sampled_from(["snappy", "zstd", "none"]), st.booleans())
def test_row_groups_and_encodings_do_not_change_the_texts(
    tmp_path_factory: pytest.TempPathFactory, rows: int, compression: str, dictionary: bool
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    options = {"compression": compression, "use_dictionary": dictionary}
    parquet.write_table(TABLE, folder / "a.parquet", row_group_size=rows, **options)
    assert read(folder / "a.parquet") == TEXTS
    packing = "zstd" if dictionary else "uncompressed"
    feather.write_feather(TABLE, str(folder / "a.feather"), compression=packing, chunksize=rows)
    assert read(folder / "a.feather") == TEXTS
    with ipc.new_stream(folder / "a.arrow", TABLE.schema) as stream:
        stream.write_table(TABLE, max_chunksize=rows)
    assert read(folder / "a.arrow") == TEXTS
    (folder / "a.txt").write_bytes((folder / "a.parquet").read_bytes())
    assert read(folder / "a.txt") == TEXTS, "the content determines the format"


@pytest.mark.parametrize("type", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_every_type_of_text_is_read(tmp_path: Path, type: pa.DataType) -> None:
    table = pa.table({"text": pa.array(TEXTS).cast(type)})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path) == TEXTS


def test_pandas_writes_a_source(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": TEXTS})[::2]  # with an index column
    frame.to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path) == TEXTS[::2]


def test_a_saved_dataset_is_read_as_it_is_saved_last(tmp_path: Path) -> None:
    save_dataset(tmp_path / "saved", TEXTS, shards=3)
    shuffled = datasets.load_from_disk(str(tmp_path / "saved")).shuffle(seed=1).select(range(9))
    expected = list(shuffled["text"])
    shuffled.save_to_disk(str(tmp_path / "again"))
    for path in (tmp_path / "saved").glob("*-of-00003.arrow"):  # left by an earlier dataset
        (tmp_path / "again" / path.name).write_bytes(path.read_bytes())
    assert read(tmp_path / "again") == expected
    skips = [r for r in make.records(SourceConfig("text", str(tmp_path / "again"))) if
             isinstance(r, Skip)]  # fmt: skip
    assert {Path(skip.name).name for skip in skips} == {
        *("state.json", "dataset_info.json"),
        *(f"data-0000{number}-of-00003.arrow" for number in range(3)),
    }
    assert not any(skip.corrupt for skip in skips)


def test_splits_of_a_saved_dataset_are_not_mixed(tmp_path: Path) -> None:
    both = {name: datasets.Dataset.from_dict({"text": TEXTS}) for name in ("train", "test")}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "saved", tmp_path):
        with pytest.raises(
            PretrainError, match=r"saved is a saved dataset with the splits train, test: set it to "
            r"one of them, such as \S+/saved/train$"
        ):  # fmt: skip
            read(path)
    assert read(tmp_path / "saved" / "train") == TEXTS


COLUMNS: dict[str, tuple[Any, str]] = {
    "another name": (
        {"id": [1], "body": ["A text."]},
        r"has no column 'text'; its columns are id \(int64\), body \(string\): set it to 'body'",
    ),
    "the longest text": (
        {"id": ["1"], "words": ["A text."]},
        r"set it to 'words', the likely one; files with different columns are different sources$",
    ),
    "a wrong type": (
        {"text": [b"A text."]},
        r"has 'text' of type binary, not text; .*: there is no",
    ),
    "a number": ({"text": [1]}, r"has 'text' of type int64, not text; "),
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_table_without_the_column_ends_with_one_line(
    tmp_path: Path, kind: str, place: str
) -> None:
    """Also if other files have the column: the schema must not change unnoticed."""
    columns, message = COLUMNS[kind]
    parquet.write_table(pa.table(columns), tmp_path / f"{'a' if place == 'first' else 'z'}.parquet")
    parquet.write_table(TABLE, tmp_path / "m.parquet")
    with pytest.raises(PretrainError, match=message) as raised:
        read(tmp_path)
    assert str(raised.value).startswith("data.sources[0].field: ") and "\n" not in str(raised.value)


def test_rows_of_a_column_without_values_are_listed(tmp_path: Path) -> None:
    """Pandas writes a column of nothing but nulls of the type null."""
    pd.DataFrame({"text": ["a", None]}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame({"text": [None, None]}).to_parquet(tmp_path / "b.parquet")
    first, *others = make.records(SourceConfig("text", str(tmp_path)))
    assert not isinstance(first, Skip) and first.text == "a"
    assert [skip.reason for skip in others if isinstance(skip, Skip)] == [
        "has no text in its field 'text'"
    ] * 3


words = st.text("abcdefgh ", min_size=3).filter(lambda text: len(text.split()) > 1)


@given(
    st.lists(st.tuples(words, st.uuids(), st.dates()), min_size=1, max_size=4),
    st.sampled_from(["quote", "summary", "lyrics"]),
    st.permutations(["id", "url", "created_at", "title_hash"]),
)
def test_identifiers_are_not_taken_for_the_text(
    rows: list[tuple[str, object, object]], field: str, about: list[str]
) -> None:
    long = "0123456789" * 40
    values = [
        dict.fromkeys(about, f"{uuid}{long}") | {field: text, "date": f"{date} 00:00:00 {long}"}
        for text, uuid, date in rows
    ]
    assert tables.likely_field(values) == field
    assert tables.likely_field([{key: row[key] for key in about} for row in values]) == ""


def test_repeated_columns_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(PretrainError, match=r"has 2 columns 'text'.*: rename all but one of"):
        read(tmp_path)


def test_bad_rows_are_skipped_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_DOCUMENT_BYTES", 1000)
    good, broken = "A text.", pa.array([b"caf\xe9"]).view(pa.string())[0]
    texts = [good, None, " ", good, "long" * 1000, good]
    images = [None, None, None, "a.jpg", None, None]
    table = pa.table({"text": texts, "image": images})
    parquet.write_table(table, tmp_path / "a.parquet")
    binary = pa.array([b"A text.", b"caf\xe9", b"A text."]).view(pa.string())
    feather.write_feather(pa.table({"text": binary}), str(tmp_path / "b.feather"))
    assert broken is not None
    records = make.records(SourceConfig("text", str(tmp_path)))
    skips = {Path(skip.name).name: skip.reason for skip in records if isinstance(skip, Skip)}
    assert {name: reason.partition(":")[0] for name, reason in skips.items()} == {
        "a.parquet:2": "has no text in its field 'text'",
        "a.parquet:3": "no text in it",
        "a.parquet:4": "its 'image' would be lost",
        "a.parquet:5": "larger than 0 MiB",
        "b.feather:2": "damaged",
    }
    assert [record.text for record in records if not isinstance(record, Skip)] == [good] * 4


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_damaged_table_is_listed(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    name = data.draw(st.sampled_from(["a.parquet", "a.feather", "a.arrow"]))
    if name == "a.parquet":
        parquet.write_table(TABLE, folder / name, row_group_size=7)
    elif name == "a.feather":
        feather.write_feather(TABLE, str(folder / name), chunksize=7)
    else:
        with ipc.new_stream(folder / name, TABLE.schema) as stream:
            stream.write_table(TABLE, max_chunksize=7)
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(8, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    end = data.draw(st.integers(8, len(content)))
    (folder / name).write_bytes(content[:end])
    try:
        records = make.records(SourceConfig("text", str(folder)))
    except PretrainError as error:
        assert "\n" not in str(error)
        return
    assert records
    for record in records:
        if isinstance(record, Skip):
            assert record.reason.isprintable() and len(record.reason) < 500
            json.dumps(record._asdict())


def test_a_large_row_group_is_read_in_little_memory(tmp_path: Path) -> None:
    """A single row group, as pandas writes up to 2^20 rows."""
    rng = np.random.default_rng(3)
    words = [rng.bytes(5_000).hex() for _ in range(2_000)] * 3
    table = pa.table({"text": words, "other": words})
    parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False, compression="none")
    del table
    before = pa.total_allocated_bytes()
    most = 0
    for _ in tables.read_rows(tmp_path / "a.parquet", ["text"]):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 40 << 20, "the column has 57 MiB"


def test_large_tables_are_tokenized_beforehand_by_several_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in range(2):
        path = tmp_path / "tables" / f"{part}.parquet"
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(TABLE[15 * part : 15 * (part + 1)], path, row_group_size=4)
    Tokenizer.train(TEXTS, 320).save(tmp_path / "tokenizer.json")
    config = DataConfig(
        sources=(SourceConfig("text", str(tmp_path / "tables")),),
        tokenizer=str(tmp_path / "tokenizer.json"),
        cache_dir=str(tmp_path / "cache"),
        max_untokenized_mb=0.0,
    )
    with pytest.raises(PretrainError, match=r"tables is not tokenized yet.*pretrain data tokenize"):
        open_data(config, 14, 3)
    (tmp_path / "run.yaml").write_text(
        f"data: {{cache_dir: {tmp_path}/cache, tokenizer: {tmp_path}/tokenizer.json}}\n"
    )
    sources = f"data.sources=[{{type: text, path: {tmp_path}/tables}}]"
    assert cli.main(["data", "tokenize", str(tmp_path / "run.yaml"), sources, "--workers=2"]) == 0
    assert "tables: 30 documents, " in capsys.readouterr().out
    monkeypatch.setattr(tables, "read_rows", lambda *_: pytest.fail("read again"))
    data = open_data(config, 14, 3)
    assert isinstance(data, MixtureData)
    (documents,) = data._documents
    assert isinstance(documents, TextDocuments)
    stored = [documents.tokens[documents.extent(number)].tolist() for number in range(30)]
    assert [data.tokenizer.decode(tokens[:-1]) for tokens in stored] == TEXTS


def test_a_mixture_of_tables_and_conversations_resumes_exactly(tmp_path: Path) -> None:
    parquet.write_table(TABLE, tmp_path / "a.parquet", row_group_size=4)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    datasets.Dataset.from_dict({"messages": [turns] * 9}).save_to_disk(str(tmp_path / "chat"))
    sources = (
        SourceConfig("text", str(tmp_path / "a.parquet"), weight=3),
        SourceConfig("chat", str(tmp_path / "chat")),
    )
    config = DataConfig(64, 320, sources=sources, cache_dir=str(tmp_path / "cache"), held_out=0)
    data = open_data(config, 14, 3)
    samples = [data.sample("train", index).tokens.tolist() for index in range(40)]
    again = open_data(config, 14, 3)
    again.load_state_dict([json.loads(json.dumps(data.state_dict(25)))])
    assert [again.sample("train", n).tokens.tolist() for n in range(25, 40)] == samples[25:]


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet.write_table(TABLE, tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(PretrainError, match=r"^Parquet and Arrow .*: pip install '\.\[data\]'$"):
        read(tmp_path)
