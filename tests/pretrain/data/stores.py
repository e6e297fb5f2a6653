"""Local servers of the protocols of object stores: S3, Google Cloud Storage and the Hugging Face
Hub."""

import contextlib
import hashlib
import http.server
import json
import logging
import re
import select
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest

from tests.ports import free_port

BUCKET = "bucket"


class Store(Protocol):
    """An object store on this machine.

    Attributes:
        root: URL of a bucket or a repository.
        missing: URL of one that does not exist.
    """

    root: str
    missing: str

    def put(self, name: str, content: bytes) -> None:
        """Write an object."""


@dataclass
class Bucket:
    """A bucket of S3 or Google Cloud Storage, written with its own client."""

    root: str
    missing: str

    def put(self, name: str, content: bytes) -> None:
        system, root = fsspec.core.url_to_fs(self.root)
        system.pipe_file(f"{root}/{name}", content)


@contextlib.contextmanager
def s3(limit: "Limit") -> Iterator[Store]:
    from moto.server import ThreadedMotoServer

    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    try:
        with limited(started.get_host_and_port()[1], limit) as port:
            environment = {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
            with variables(environment):
                fsspec.filesystem("s3").makedirs(BUCKET, exist_ok=True)  # shared by servers
                yield Bucket(f"s3://{BUCKET}", "s3://no-such-bucket")
    finally:
        started.stop()


@contextlib.contextmanager
def gs(limit: "Limit") -> Iterator[Store]:
    from gcp_storage_emulator.server import create_server

    port = free_port()
    started = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    started.start()
    try:
        with limited(port, limit) as port:
            environment = {
                "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
                # A bucket of another kind would be looked for with real credentials.
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            }
            with variables(environment):
                yield Bucket(f"gs://{BUCKET}", "gs://no-such-bucket")
    finally:
        started.stop()


@contextlib.contextmanager
def hf(limit: "Limit") -> Iterator[Store]:
    hub = Hub()
    handler = type("Handler", (_HubHandler,), {"hub": hub})
    with (
        serving(handler) as port,
        limited(port, limit) as port,
        pytest.MonkeyPatch.context() as patch,
    ):
        # The variable HF_ENDPOINT is read when the package is imported.
        endpoint = f"http://127.0.0.1:{port}"
        patch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        patch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield hub


STORES = {"s3": s3, "gs": gs, "hf": hf}


# ---------------------------------------------------------------------- Hugging Face Hub


@dataclass
class Hub:
    """A repository of a dataset, as the Hub's interface for programs shows it."""

    root: str = "hf://datasets/someone/web"
    missing: str = "hf://datasets/someone/nothing"
    files: dict[str, bytes] = field(default_factory=dict)

    def put(self, name: str, content: bytes) -> None:
        self.files[name] = content

    def entries(self, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        """The files and folders in a folder."""
        found: dict[str, dict[str, Any]] = {}
        for name, content in sorted(self.files.items()):
            if not name.startswith(folder):
                continue
            parts = name.removeprefix(folder).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                path = folder + "/".join(parts[:depth])
                found[path] = {"type": "directory", "path": path, "size": 0, "oid": _oid(b"")}
            if recursive or len(parts) == 1:
                found[name] = self.entry(name, content)
        return list(found.values())

    def entry(self, name: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class _HubHandler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, repository = unquote(url.path), "datasets/someone/web"
        if path.startswith(f"/{repository}/resolve/main/"):
            name = path.removeprefix(f"/{repository}/resolve/main/")
            content = self.hub.files.get(name)
            return self._send(404 if content is None else 200, content or b"")
        if path in (f"/api/{repository}", f"/api/{repository}/revision/main"):
            return self._json({"id": "someone/web", "sha": _oid(b""), "siblings": []})
        if path.startswith(f"/api/{repository}/tree/main"):
            folder = path.removeprefix(f"/api/{repository}/tree/main").strip("/")
            recursive = parse_qs(url.query).get("recursive", [""])[0].lower() == "true"
            folder += "/" * bool(folder)
            return self._json(self.hub.entries(folder, recursive=recursive))
        return self._refuse()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/api/datasets/someone/web/paths-info/main":
            return self._refuse()
        paths = json.loads(body)["paths"]
        entries = self.hub.entries("", recursive=True)
        return self._json([entry for entry in entries if entry["path"] in paths])

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode())

    def _refuse(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, status: int, content: bytes) -> None:
        etag, size = _oid(content), len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
            status, content = 206, content[first : last + 1]
            self.send_response(status)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", _oid(b""))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        """Nothing is printed."""


# ---------------------------------------------------------------------- servers


@contextlib.contextmanager
def serving(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[int]:
    """A server of HTTP; yields its port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Limit:
    """Bytes after which answers of a server break off, and all that it has sent."""

    bytes: int | None = None
    sent: int = 0


@contextlib.contextmanager
def limited(port: int, limit: Limit) -> Iterator[int]:
    """A proxy of a local server whose answers can break off; yields its port."""

    class Forward(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            sent = 0
            with (
                socket.create_connection(("127.0.0.1", port)) as server,
                contextlib.suppress(OSError),
            ):
                while True:
                    ready, _, _ = select.select([self.request, server], [], [])
                    if self.request in ready:
                        if not (data := self.request.recv(1 << 16)):
                            return
                        sent = 0
                        server.sendall(data)
                        continue
                    data = server.recv(1 << 16)
                    sent, limit.sent = sent + len(data), limit.sent + len(data)
                    if not data or sent > (limit.bytes or sent):
                        return
                    self.request.sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Forward) as proxy:
        proxy.daemon_threads, proxy.block_on_close = True, False
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            yield int(proxy.server_address[1])
        finally:
            proxy.shutdown()
            thread.join()


@contextlib.contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment, and forget clients that were made with others."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        forget()
        yield
    forget()


def forget() -> None:
    """Forget clients, whose settings come from variables of the environment."""
    for protocol in ("s3", "gs"):
        with contextlib.suppress(ImportError, ValueError):
            fsspec.get_filesystem_class(protocol).clear_instance_cache()
