"""Files at URLs are copied once, completely, and copying continues after an interruption."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from pretrain.config import DataConfig, SourceConfig
from pretrain.data.remote import local_path
from pretrain.data.skipped import Skip
from pretrain.data.sources import find_sources
from pretrain.errors import PretrainError
from tests.pretrain.data import make

TEXTS = [make.text(number) for number in range(20)]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; a file named in ``broken`` breaks off in the middle."""

    broken: str = ""
    sent: list[str]

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.sent.append(name)
        if name and name == self.broken:
            content = (Path(self.directory) / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:9])
            self.close_connection = True
            return
        super().do_GET()

    def log_message(self, *_arguments: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a folder of two tables."""
    folder = tmp_path / "served"
    folder.mkdir()
    for part in range(2):
        table = pa.table({"text": TEXTS[10 * part : 10 * part + 10]})
        parquet.write_table(table, folder / f"{part}.parquet")
    Handler.broken, Handler.sent = "", []
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}", folder
        served.shutdown()
        thread.join()


def texts(url: str, folder: Path) -> list[str]:
    config = DataConfig(sources=(SourceConfig("text", url),), cache_dir=str(folder / "cache"))
    (source,) = find_sources(config, seed=0)
    return [record.text for record in source.records() if not isinstance(record, Skip)]


def test_a_file_and_a_folder_are_copied_once(server: tuple[str, Path], tmp_path: Path) -> None:
    address, _ = server
    assert texts(f"{address}/0.parquet", tmp_path) == TEXTS[:10]
    assert texts(f"{address}/", tmp_path) == TEXTS
    sent = Handler.sent.count("1.parquet")
    assert texts(f"{address}/", tmp_path) == TEXTS
    assert Handler.sent.count("1.parquet") == sent


def test_a_changed_file_is_copied_again(server: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = server
    assert texts(f"{address}/0.parquet", tmp_path) == TEXTS[:10]
    parquet.write_table(pa.table({"text": TEXTS[:3]}), folder / "0.parquet")
    assert texts(f"{address}/0.parquet", tmp_path) == TEXTS[:3]


def test_a_connection_that_breaks_off_is_one_line_and_continues(
    server: tuple[str, Path], tmp_path: Path
) -> None:
    address, _ = server
    Handler.broken = "1.parquet"
    with pytest.raises(PretrainError, match=r"^data\.sources\[0\]\.path: http\S+ cannot be") as e:
        texts(f"{address}/", tmp_path)
    assert "\n" not in str(e.value)
    Handler.broken, before = "", Handler.sent.count("0.parquet")
    assert texts(f"{address}/", tmp_path) == TEXTS
    assert Handler.sent.count("0.parquet") == before, "it was complete"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/a.jsonl", r"no files are found at \S+ \(.*[Cc]onnect"),
        ("file:///nowhere/a.jsonl", "no files are found at file:///nowhere/a.jsonl$"),
        ("nosuch://bucket/a.jsonl", "cannot be read: Protocol not known: nosuch"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(PretrainError, match=message) as raised:
        local_path(url, str(tmp_path), "data.sources[0]")
    assert "\n" not in str(raised.value)


def test_other_paths_are_unchanged() -> None:
    for path in ("a.jsonl", "web/*.parquet", "C:/a", "a b://c"):
        assert local_path(path, "cache", "data.sources[0]") == path
