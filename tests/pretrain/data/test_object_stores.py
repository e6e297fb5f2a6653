"""Files in object stores are read through their clients, from local servers of their protocols."""

import asyncio
import gzip
import http.server
import io
import json
import multiprocessing
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from pretrain.config import DataConfig, SourceConfig
from pretrain.data.remote import local_path
from pretrain.data.skipped import Skip
from pretrain.data.sources import find_sources
from pretrain.errors import PretrainError
from tests.pretrain.data import make, stores

TEXTS = [make.text(number) for number in range(20)]
LIMIT = stores.Limit()


@pytest.fixture(scope="module", params=stores.STORES)
def served(request: pytest.FixtureRequest) -> Iterator[stores.Store]:
    with stores.STORES[request.param](LIMIT) as store:
        yield store


@pytest.fixture
def store(served: stores.Store, request: pytest.FixtureRequest) -> stores.Store:
    LIMIT.bytes, LIMIT.sent = None, 0
    return served


def table(texts: list[str]) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.table({"text": texts}), out)
    return out.getvalue()


def records(path: str, folder: Path, **settings: Any) -> list[Any]:
    source = SourceConfig(path=path, **settings)
    config = DataConfig(sources=(source,), cache_dir=str(folder / "cache"))
    (found,) = find_sources(config, seed=0)
    read = list(found.records())
    assert not any(isinstance(one, Skip) for one in read)
    return read


def texts(path: str, folder: Path) -> list[str]:
    return [record.text for record in records(path, folder)]


def test_files_folders_and_patterns(store: stores.Store, tmp_path: Path) -> None:
    for part in range(4):
        store.put(f"web/{part // 2}/{part}.parquet", table(TEXTS[5 * part : 5 * part + 5]))
    root = f"{store.root}/web"
    assert texts(f"{root}/0/1.parquet", tmp_path) == TEXTS[5:10]
    sent = LIMIT.sent
    for path in (root, f"{root}/", f"{root}/*/*.parquet", f"{root}/**/[0-9].parquet"):
        assert texts(path, tmp_path) == TEXTS
    assert len(list((tmp_path / "cache").glob("remote-*"))) == 2, "the list of files decides"
    assert texts(f"{root}/1/?.parquet", tmp_path) == TEXTS[10:]
    assert LIMIT.sent > sent


def test_compressed_lines(store: stores.Store, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    store.put("lines/a.jsonl.gz", gzip.compress(lines.encode()))
    assert texts(f"{store.root}/lines/a.jsonl.gz", tmp_path) == TEXTS


def test_shards_with_images(store: stores.Store, tmp_path: Path) -> None:
    for part in range(2):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for number in range(3):
                image = io.BytesIO()
                Image.new("RGB", (28, 28), (part * 90, number * 90, 0)).save(image, "PNG")
                caption = f"{part} {number}".encode()
                for suffix, content in (("png", image.getvalue()), ("txt", caption)):
                    entry = tarfile.TarInfo(f"{part}{number}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        store.put(f"shards/{part:05d}.tar", out.getvalue())
    found = records(f"{store.root}/shards/*.tar", tmp_path, type="images")
    assert [one.text for one in found] == ["0 0", "0 1", "0 2", "1 0", "1 1", "1 2"]
    assert [len(one.media) for one in found] == [1] * 6


def test_a_changed_object_is_copied_again(store: stores.Store, tmp_path: Path) -> None:
    url = f"{store.root}/changed/0.parquet"
    for text in ("first", "other"):  # files of the same size
        store.put("changed/0.parquet", table([text]))
        assert texts(url, tmp_path) == [text]
    sent = LIMIT.sent
    assert texts(url, tmp_path) == ["other"]
    assert LIMIT.sent - sent < 4000, "only the list"


def test_a_copy_that_breaks_off_continues(
    store: stores.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = asyncio.sleep  # clients wait before they try again
    monkeypatch.setattr(asyncio, "sleep", lambda _: pause(0))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    contents = [b"a\n" * 10_000, b"b\n" * 1_500_000]
    for name, content in zip("ab", contents, strict=True):
        store.put(f"broken/{name}.txt", content)
    LIMIT.bytes = 150_000
    url = f"{store.root}/broken/"
    with pytest.raises(PretrainError, match=rf"^data\.sources\[0\]\.path: {url} cannot be") as e:
        texts(url, tmp_path)
    assert "continues with the rest" in str(e.value) and "\n" not in str(e.value)
    LIMIT.bytes, LIMIT.sent = None, 0
    assert [text.encode() for text in texts(url, tmp_path)] == contents
    assert LIMIT.sent < 3_015_000, "the first file was complete"


def test_readers_at_the_same_time_copy_a_file_once(store: stores.Store, tmp_path: Path) -> None:
    store.put("large/a.txt", b"a\n" * 500_000)
    LIMIT.sent = 0
    # Ranks are processes: a client's listings are not safe in several threads. The address of the
    # Hub is set in this process alone.
    in_threads = store.root.startswith("hf:")
    processes = multiprocessing.get_context("spawn")
    executor: Executor = ThreadPoolExecutor(3) if in_threads else ProcessPoolExecutor(3, processes)
    with executor as pool:
        copied = partial(local_path, f"{store.root}/large/", str(tmp_path), "data.sources[0]")
        paths = {future.result() for future in [pool.submit(copied) for _ in range(3)]}
    assert len(paths) == 1 and Path(paths.pop()).stat().st_size == 1_000_000
    assert LIMIT.sent < 1_200_000


@pytest.mark.parametrize("name", ["a.jsonl", "folder/", "*.jsonl", "folder/*.jsonl"])
def test_what_does_not_exist_is_one_line(store: stores.Store, tmp_path: Path, name: str) -> None:
    for root in (store.root, store.missing):
        with pytest.raises(PretrainError, match=r"path: no files are found at \S+") as raised:
            local_path(f"{root}/nothing/{name}", str(tmp_path), "data.sources[0]")
        assert "\n" not in str(raised.value) and not os.listdir(tmp_path)


class Refusing(http.server.BaseHTTPRequestHandler):
    """Allows nothing, as each of the services does."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, content = 401, b'{"error": {"code": 401, "message": "Anonymous caller"}}'
        if not self.path.startswith(("/api/", "/b/", "/storage/")):
            status, content = (
                403,
                b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
            )
        self.send_response(status)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Type", "application/json" if status == 401 else "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if self.command != "HEAD" else b"")

    do_HEAD = do_POST = do_GET

    def log_message(self, *_arguments: object) -> None:
        """Nothing is printed."""


ACCESS = {
    "s3": ("s3://bucket", {"AWS_EC2_METADATA_DISABLED": "true"}, "locate credentials: set AWS_"),
    "s3 of another": (
        "s3://bucket",
        {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "a"},
        "(Access Denied|Forbidden): set AWS_PROFILE, .*FSSPEC_S3_ANON=true",
    ),
    "gs": ("gs://bucket", {}, "Anonymous caller.*: run `gcloud auth application-default login`"),
    "hf": ("hf://datasets/a/b", {}, "gated repo.*: run `hf auth login` or set HF_TOKEN"),
}


@pytest.mark.parametrize("name", ACCESS)
@pytest.mark.parametrize("path", ["a.jsonl", "a/", "*.jsonl"])
def test_missing_access_is_one_line_with_the_fix(
    tmp_path: Path, name: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, environment, message = ACCESS[name]
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with stores.serving(Refusing) as port:
        address = f"http://127.0.0.1:{port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        servers = {
            "AWS_ENDPOINT_URL": address,
            "STORAGE_EMULATOR_HOST": address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        with (
            stores.variables(servers | environment),
            pytest.raises(PretrainError, match=message) as raised,
        ):
            local_path(f"{root}/{path}", str(tmp_path), "data.sources[0]")
    assert "\n" not in str(raised.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(PretrainError, match=r"adlfs.*: pip install"):
        local_path("az://bucket/a.jsonl", str(tmp_path), "data.sources[0]")


def test_ranges_of_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PretrainError, match=r"ranges of numbers are for local files, use \*"):
        local_path("s3://bucket/{000..009}.tar", str(tmp_path), "data.sources[0]")
