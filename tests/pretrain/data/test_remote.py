"""Files at URLs are copied once, completely, and copying continues after an interruption.

Media that records name are copied only from hosts that are allowed."""

import functools
import http.server
import ipaddress
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from pretrain.config import DataConfig, SourceConfig
from pretrain.data.cache import TAG
from pretrain.data.remote import MediaDownloads, local_path
from pretrain.data.skipped import Skip
from pretrain.data.sources import find_sources
from pretrain.errors import PretrainError
from tests.pretrain.data import make, stores

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


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 9), Path.unlink])
def test_a_copy_that_has_lost_content_is_made_again(
    server: tuple[str, Path], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    address, _ = server
    assert texts(f"{address}/", tmp_path) == TEXTS
    damage(next((tmp_path / "cache").rglob("1.parquet")))
    assert texts(f"{address}/", tmp_path) == TEXTS


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


# ---------------------------------------------------------------------- media in records

PRIVATE = (
    *("127.0.0.1", "localhost", "LOCALHOST", "localhost.", "127.1", "2130706433", "0x7f.1"),
    *("0177.0.0.1", "%31%32%37.0.0.1", "0", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "[::]"),
    *("a.org@127.0.0.1", "127.0.0.1\\@a.org", "a.org\\@127.0.0.1", "127。0。0。1", "ⓛocalhost"),
)


@pytest.mark.parametrize("host", PRIVATE)
def test_a_pattern_allows_no_private_address(
    server: tuple[str, Path], tmp_path: Path, host: str
) -> None:
    address, _ = server
    downloads = MediaDownloads(["*"], str(tmp_path), "data.sources[0]")
    with pytest.raises(ValueError, match=r"cannot be read: |not read"):
        downloads.find(address.replace("127.0.0.1", host) + "/0.parquet")
    assert not Handler.sent


NETWORKS = [
    *("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
    *("192.168.0.0/16", "224.0.0.0/4", "240.0.0.0/4", "0.0.0.0/8"),
    *(
        "::1/128",
        "fc00::/7",
        "fe80::/10",
        "ff00::/8",
        "::ffff:10.0.0.0/104",
        "::ffff:127.0.0.0/104",
    ),
]


@given(st.sampled_from(NETWORKS).flatmap(lambda network: st.ip_addresses(network=network)))
def test_addresses_of_private_networks_are_refused(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    host = f"[{address}]" if address.version == 6 else str(address)
    with pytest.raises(ValueError, match="has the private address"):
        MediaDownloads(["*"], "/nowhere", "").check(f"http://{host}/a.png")


def test_a_name_allows_a_private_address(server: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = server
    cache = tmp_path / "cache"
    downloads = MediaDownloads(["a.org", "127.0.0.1"], str(cache), "data.sources[0]")
    copied = Path(downloads.find(f"{address}/0.parquet"))
    assert (cache / TAG).is_file()
    assert copied.read_bytes() == (folder / "0.parquet").read_bytes()
    downloads.find(f"{address}/0.parquet")
    assert Handler.sent == ["0.parquet"]


@pytest.mark.parametrize(
    ("host", "patterns", "allowed"),
    [
        ("a.org", ["a.org"], True),
        ("A.org", ["a.ORG"], True),
        ("b.a.org", ["a.org"], False),
        ("b.a.org", ["*.a.org"], True),
        ("a.org", ["*.a.org"], False),
        ("ba.org", ["*.a.org"], False),
        ("a.org.b", ["a.org", "*.a.org"], False),
        ("a.org:8080", ["a.org"], True),
        ("8.8.8.8", ["*"], True),
    ],
)
def test_hosts_and_patterns(host: str, patterns: list[str], allowed: bool) -> None:
    downloads = MediaDownloads(patterns, "/nowhere", "")
    if allowed:
        downloads.check(f"https://{host}/a.png")
    else:
        with pytest.raises(ValueError, match="is not in media_urls"):
            downloads.check(f"https://{host}/a.png")


class Redirecting(Handler):
    """Sends every request elsewhere."""

    target: str

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.target)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{address}/0.parquet", "localhost is not in media_urls"),
        ("file:///etc/passwd", "not allowed|only URLs of http and https"),
        ("ftp://127.0.0.1/a.png", "only URLs of http and https"),
        ("data:image/png;base64,aGVsbG8=", "not allowed|only URLs of http and https"),
    ],
)
def test_redirections_are_checked(
    server: tuple[str, Path], tmp_path: Path, target: str, message: str
) -> None:
    address = server[0].replace("127.0.0.1", "localhost")
    Redirecting.target = target.format(address=address)
    with stores.serving(Redirecting) as port:
        downloads = MediaDownloads(["127.0.0.1"], str(tmp_path), "data.sources[0]")
        with pytest.raises(ValueError, match=message):
            downloads.find(f"http://127.0.0.1:{port}/a.png")
    assert not Handler.sent


def test_without_the_setting_nothing_is_copied(server: tuple[str, Path], tmp_path: Path) -> None:
    downloads = MediaDownloads([], str(tmp_path), "data.sources[0]")
    with pytest.raises(PretrainError, match=r"^data\.sources\[0\]\.media_urls: a record") as raised:
        downloads.find(f"{server[0]}/0.parquet")
    assert "\n" not in str(raised.value) and "set it to [127.0.0.1]" in str(raised.value)
    assert not Handler.sent and not list(tmp_path.glob("urls"))
