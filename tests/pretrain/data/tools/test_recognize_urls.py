"""Data at a URL is recognized as a copy of it would be, from the beginnings of its files."""

import functools
import gzip
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pyarrow import feather, ipc, parquet

from pretrain import cli
from pretrain.data.tools.recognize import configuration
from pretrain.errors import PretrainError
from tests.pretrain.data import stores
from tests.pretrain.data.test_remote import Handler
from tests.pretrain.data.tools import test_recognize, test_recognize_images

LAYOUTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{name: layout[:2] for name, layout in test_recognize.LAYOUTS.items()},
    **{name: layout[:2] for name, layout in test_recognize_images.LAYOUTS.items()},
}
LIMIT = stores.Limit()
COUNT = 20_000


@pytest.fixture(scope="module")
def s3() -> Iterator[stores.Store]:
    with stores.s3(LIMIT) as store:
        yield store


def put(store: stores.Store, path: Path, name: str) -> None:
    """Write a file or a folder."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            relative = file.relative_to(path).as_posix()
            store.put(f"{name}/{relative}" if file != path else name, file.read_bytes())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_url_is_recognized_as_its_copy(s3: stores.Store, tmp_path: Path, layout: str) -> None:
    file, write = LAYOUTS[layout]
    write(tmp_path / file)
    key = str(list(LAYOUTS).index(layout))
    put(s3, tmp_path / file, f"{key}/{file}")
    expected = configuration(str(tmp_path / file)).replace(str(tmp_path), f"{s3.root}/{key}")
    if "type: megatron" in expected or "type: energon" in expected:
        with pytest.raises(PretrainError, match="has no URL"):
            configuration(f"{s3.root}/{key}/{file}")
        return
    found = configuration(f"{s3.root}/{key}/{file}")
    assert found.splitlines()[0] == expected.splitlines()[0]
    assert yaml.safe_load(found) == yaml.safe_load(expected)


@functools.lru_cache
def rows() -> list[dict[str, Any]]:
    random.seed(0)  # text that cannot be compressed by much
    return [
        {"number": n, "body": f"{random.getrandbits(2000):x}", "note": "short"}
        for n in range(COUNT)
    ]


def to_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def to_gzip(path: Path, lines: list[dict[str, Any]]) -> None:
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content * 2, 1))


def to_array(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(lines, indent=1))


def to_text(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("é" * 6_000_001)


def to_parquet(path: Path, lines: list[dict[str, Any]]) -> None:
    parquet.write_table(pa.Table.from_pylist(lines), path, row_group_size=COUNT)


def to_feather(path: Path, lines: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(lines)
    feather.write_feather(table, str(path), compression="uncompressed", chunksize=1000)


def to_stream(path: Path, lines: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(lines)
    with ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)


LARGE: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "a.jsonl": to_lines,
    "a.jsonl.gz": to_gzip,
    "a.json": to_array,
    "a.txt": to_text,
    "a.parquet": to_parquet,
    "a.feather": to_feather,
    "a.arrow": to_stream,
}


READS = [("s3", name) for name in LARGE]
READS += [(kind, name) for kind in ("gs", "hf") for name in ("a.jsonl", "a.parquet")]


@pytest.mark.parametrize(("kind", "name"), READS)
def test_only_the_beginning_of_a_large_file_is_read(
    tmp_path: Path, kind: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    LARGE[name](tmp_path / name, rows())
    size = (tmp_path / name).stat().st_size
    assert size > 9 << 20
    with stores.STORES[kind](LIMIT) as store:
        for number in range(3):
            put(store, tmp_path / name, f"large/{name}/{number}-{name}")
        LIMIT.sent = 0
        url = f"{store.root}/large/{name}"
        capsys.readouterr()
        found = yaml.safe_load(configuration(url))["data"]["sources"]
    expected = {} if name == "a.txt" else {"field": "body"}
    assert found == [{"type": "text", "path": url} | expected]
    assert LIMIT.sent < 20 << 20, "a block ahead of the 8 MiB"
    said = capsys.readouterr().err
    assert said.count("reading the beginning of ") == 1 and f"of {size:,} bytes" in said


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a folder, which is sent without ranges of bytes."""
    (tmp_path / "served").mkdir()
    Handler.broken, Handler.sent = "", []
    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    with stores.serving(handler) as port:
        yield f"http://127.0.0.1:{port}", tmp_path / "served"


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_files_and_folders_of_http(server: tuple[str, Path], name: str) -> None:
    address, folder = server
    LARGE[name](folder / name, rows()[:100])
    for url in (f"{address}/{name}", f"{address}/{name}?token=a", f"{address}/"):
        (entry,) = yaml.safe_load(configuration(url))["data"]["sources"]
        assert entry == {"type": "text", "path": url, "field": "body"}


def test_a_large_table_of_a_server_without_ranges(
    server: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    address, folder = server
    to_parquet(folder / "a.parquet", rows())
    (entry,) = yaml.safe_load(configuration(f"{address}/a.parquet"))["data"]["sources"]
    assert entry["field"] == "body"
    assert "its server sends no ranges" in capsys.readouterr().err


def test_patterns_and_splits(s3: stores.Store, tmp_path: Path) -> None:
    for name in ("train-00000", "train-00001", "test-00000"):
        out = io.BytesIO()
        parquet.write_table(pa.table({"text": [name], "id": [1]}), out)
        s3.put(f"repository/data/{name}.parquet", out.getvalue())
    root = f"{s3.root}/repository"
    (entry,) = yaml.safe_load(configuration(f"{root}/*/train-*.parquet"))["data"]["sources"]
    assert entry == {"type": "text", "path": f"{root}/*/train-*.parquet"}
    entries = yaml.safe_load(configuration(f"{root}/data"))["data"]["sources"]
    assert [one["path"] for one in entries] == [
        f"{root}/data/test[-_.0-9]*",
        f"{root}/data/train[-_.0-9]*",
    ]


REFUSED = {
    "of energon": ({"e/.nv-meta/a": b"a", "e/0.tar": b"a"}, "e", "energon has no URL"),
    "preferences": (
        {"p/a.jsonl": b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'},
        "p/a.jsonl",
        "s3://bucket/p/a.jsonl: .*preference",
    ),
    "nothing": ({}, "nothing/*.jsonl", "no files are found at s3://bucket/nothing/"),
    "a foreign format": ({"f/a.csv": b"a,b\n"}, "f/a.csv", "s3://bucket/f/a.csv: CSV"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_name_the_url(s3: stores.Store, name: str) -> None:
    objects, path, message = REFUSED[name]
    for key, content in objects.items():
        s3.put(key, content)
    with pytest.raises(PretrainError, match=message) as raised:
        configuration(f"{s3.root}/{path}")
    assert "\n" not in str(raised.value) and "/tmp" not in str(raised.value)


def test_the_command_inspects_and_converts_urls(
    s3: stores.Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to_lines(tmp_path / "a.jsonl", rows()[:50])
    put(s3, tmp_path / "a.jsonl", "command/a.jsonl")
    url = f"{s3.root}/command/a.jsonl"
    assert cli.main(["data", "inspect", url]) == 0
    assert f"{{type: text, path: '{url}', field: body}}" in capsys.readouterr().out
    out, cache = str(tmp_path / "out"), f"data.cache_dir={tmp_path}/cache"
    options = ["data.vocab_size=400", "--to", "megatron", "--workers", "1"]
    assert cli.main(["data", "convert", url, out, cache, *options]) == 0
    assert "50 documents" in capsys.readouterr().out
