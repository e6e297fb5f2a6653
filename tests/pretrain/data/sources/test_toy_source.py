"""A new source type is one class and one row of :data:`SOURCES`."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain import cli
from pretrain.config import DataConfig, SourceConfig
from pretrain.data import files, open_data
from pretrain.data.composer import Composer
from pretrain.data.mixture.data import MixtureData
from pretrain.data.skipped import Skip
from pretrain.data.sources import SOURCES
from pretrain.data.sources.indexed import FileSource
from pretrain.data.sources.text import Text, TextDocuments, index_text
from pretrain.errors import PretrainError
from tests.distributed import training
from tests.distributed.launch import launch
from tests.pretrain.data import make


class CsvSource(FileSource[Text]):
    """Text in a column of CSV files."""

    def find(self) -> list[Path | Skip]:
        return files.find(self.config.path, self.setting, (".csv",), "CSV files")

    def read(self, file: Path) -> Iterator[Text | Skip]:
        with file.open(newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream), 2):
                text = row.get(self.config.field)
                name = f"{file}:{number}"
                yield Text(name, text) if text else Skip(name, "an empty cell")

    def index(self, composer: Composer) -> TextDocuments:
        return index_text(self, composer)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(SOURCES, "csv", CsvSource)
    table = tmp_path / "tables" / "a.csv"
    table.parent.mkdir()
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("id", "body"))
        writer.writerows((number, make.text(number)) for number in range(60))
        writer.writerow((60, ""))
    (tmp_path / "tiny.yaml").write_text(training.TINY)
    return tmp_path


def source(folder: Path) -> str:
    return f"data.sources=[{{type: csv, path: {folder}/tables, field: body}}]"


def opened(folder: Path) -> MixtureData:
    sources = (SourceConfig("csv", str(folder / "tables"), field="body"),)
    config = DataConfig(
        seq_length=128,
        vocab_size=400,
        held_out=0.1,
        cache_dir=str(folder / "cache"),
        sources=sources,
    )
    data = open_data(config, 14, 3)
    assert isinstance(data, MixtureData)
    return data


def test_a_new_source_type_is_packed_indexed_and_resumed(folder: Path) -> None:
    data = opened(folder)
    written = {make.text(number) for number in range(60)}
    read = {
        data.tokenizer.decode(data._documents[0].document(segment).tokens)
        for _ in range(100)
        for segment in data._stream("train").next()
        if segment.start == 0
    }
    assert read and all(any(text.startswith(start) for text in written) for start in read)
    (skip,) = data.take_skipped()
    assert skip.name.endswith("a.csv:62") and skip.reason == "an empty cell"
    samples = [data.sample("train", index).tokens.tolist() for index in range(20)]
    again = opened(folder)
    assert "have not changed since" in again.describe()
    again.load_state_dict([json.loads(json.dumps(data.state_dict(10)))])
    assert [again.sample("train", n).tokens.tolist() for n in range(10, 20)] == samples[10:]


def test_a_new_source_type_is_inspected(folder: Path) -> None:
    page = folder / "page.html"
    options = [source(folder), f"data.cache_dir={folder / 'cache'}", "--out", str(page)]
    assert cli.main(["data", "inspect", str(folder / "tiny.yaml"), *options]) == 0
    assert "data.sources[0]: " in page.read_text()


def _train(*arguments: str) -> list[dict[str, Any]]:
    SOURCES["csv"] = CsvSource
    return training.train_and_read(*arguments)


def test_a_new_source_type_is_trained_on(folder: Path) -> None:
    short = ("steps=2", "optimizer.warmup_steps=0", "optimizer.decay_steps=0", "data.held_out=0.2")
    records = launch(_train, 1, str(folder), source(folder), *short)[0]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[2]["held_out_text_loss"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"type": "csw", "path": "a"},
            r"^data\.sources\[0\]\.type must be one of 'text', .*'csv', not 'csw'$",
        ),
        ({"type": "csv"}, r"^data\.sources\[0\]\.path must be given for a source of csv$"),
        (
            {"type": "standard_library", "path": "a"},
            r"\.path must be left out for a source of standard_library$",
        ),
        (
            {"type": "csv", "path": "a", "trust_code": True},
            r"\.trust_code applies to sources of type energon, not csv$",
        ),
        *(
            (
                {"type": type, "path": path, "field": "body"},
                rf"\.field applies to sources of type text, .*, csv, not {type}$",
            )
            for type, path in [
                ("energon", "a"),
                ("megatron", "a"),
                ("megatron_chat", "a"),
                ("standard_library", ""),
                ("standard_library_chat", ""),
                ("image_questions", ""),
            ]
        ),
    ],
)
def test_settings_that_do_not_apply_to_a_type_are_refused(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(PretrainError, match=message):
        open_data(DataConfig(sources=(SourceConfig(**settings),)), 14, 3)
