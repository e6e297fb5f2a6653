"""Files at URLs, copied once into the cache: those of sources, and media that records name.

`fsspec` and its file systems read those of sources (`s3fs` for `s3://`, `gcsfs` for `gs://`,
`huggingface_hub` for `hf://`, aiohttp for `https://`).
"""

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import http.client
import ipaddress
import logging
import os
import re
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from pretrain.data.cache import cached, key_of, make_cache
from pretrain.data.files import reason
from pretrain.errors import PretrainError

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
# Values that change with a file, by their names in different file systems.
_VERSIONS = (
    *("ETag", "etag", "Content-MD5", "Last-Modified", "LastModified", "mtime", "md5Hash"),
    *("generation", "blob_id"),
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_RANGE = re.compile(r"\{\d+\.\.\d+\}")
_GOOGLE = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
# How to get access, by the scheme of the URL.
_LOGIN = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket, "
    "FSSPEC_S3_ANON=true",
    **{"gs": _GOOGLE, "gcs": _GOOGLE},
    "hf": "run `hf auth login` or set HF_TOKEN, and accept the conditions on the page of a gated "
    "dataset",
}
# Words in the errors of clients and servers if access is not allowed.
_DENIED = re.compile(
    r"credential|denied|forbidden|unauthorized|authenticat|anonymous caller|gated|\b40[13]\b", re.I
)
# The host and port of a URL, without a user's name.
_HOST = re.compile(r"([a-zA-Z0-9._-]+|\[[0-9a-fA-F:.]+\])(:[0-9]+)?")
_ADDRESS = re.compile(r"[0-9]+(\.[0-9]+){3}|.*:.*")
# Limits of an image or video at a URL.
_MAX_MEDIA_BYTES = 256 << 20
_MAX_MEDIA_SECONDS = 600
_TIMEOUT = 30
_BLOCK = 1 << 20


def is_url(name: Any) -> bool:
    """Whether the path of a source, or the name of an image, is a URL."""
    return isinstance(name, str) and bool(_URL.match(name))


class _CopyError(Exception):
    """A file could not be read to its end."""


class Remote(NamedTuple):
    """A file at a URL: its path in the file system, in the copy, and its size (-1: unknown)."""

    path: str
    name: PurePosixPath
    size: int
    version: str


def local_path(path: str, cache_dir: str, setting: str) -> str:
    """The path of a local copy of the files at a URL, made if it is missing; of another path, the
    path itself.

    A copy is complete, and is made again if the list, the size or the version of a file has
    changed. If copying is interrupted, it continues with the first file that is not complete.

    Args:
        path: URL of a file, of a folder or of a pattern.
        setting: the source's name in messages.

    Raises:
        PretrainError: nothing is found, or it cannot be read.
    """
    if not is_url(path):
        return path
    try:
        system, files = listed(path)
        key = key_of("remote", *((f.path, str(f.name), f.size, f.version) for f in files))
        folder, _ = cached(
            Path(cache_dir, f"remote-{key}"),
            lambda partial: _copy(system, files, partial),
            lambda copy: _whole(copy, files),
            resumable=True,
        )
    except Exception as error:  # each file system has its own
        raise unreadable(path, error, setting) from error
    return str(folder / files[0].name if len(files) == 1 else folder)


def unreadable(url: str, error: Exception, setting: str = "") -> PretrainError:
    """The error of a URL whose files are not found or cannot be read, with the fix.

    Args:
        error: an error of a file system.
        setting: the source's name in messages.
    """
    if isinstance(error, PretrainError):
        return error
    text = reason(error)
    scheme = url.partition("://")[0].lower()
    if isinstance(error, FileNotFoundError):
        text = reason(error.__cause__) if error.__cause__ else ""
        what = f"no files are found at {url}" + (f" ({text})" if text else "")
        fix = ""
    else:
        what = f"{url} cannot be read: {text}"
        fix = "check it, or copy the files yourself"
    if isinstance(error, _CopyError):
        fix = "repeat it, which continues with the rest, or copy the files yourself"
    elif isinstance(error, ImportError):
        fix = "pip install '.[remote]'"
    elif scheme in _LOGIN and (isinstance(error, PermissionError) or _DENIED.search(text)):
        fix = _LOGIN[scheme]
    where = f"{setting}.path: " if setting else ""
    return PretrainError(where + what + (f": {fix}" if fix else ""))


def listed(url: str) -> tuple[Any, list[Remote]]:
    """The file system of a URL, and the files there, by name.

    Every rank asks for the list when it starts: a request for each folder, or HTTP file.

    Raises:
        FileNotFoundError: there are none.
    """
    import fsspec.core

    if _RANGE.search(url):
        raise ValueError("ranges of numbers are for local files, use * instead")
    # It would print a traceback before the error is raised.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    system, root = fsspec.core.url_to_fs(url)
    system.invalidate_cache()  # of lists that this process has seen before
    http = root.startswith(("http://", "https://"))
    # A query may follow the path.
    if "*" in root or "[" in root or (not http and "?" in root):
        found = system.glob(root, detail=True)
    # Asked for a folder, HTTP would read a whole file to look for links in it.
    elif url.endswith("/") or (not http and system.isdir(root)):
        found = system.find(root, detail=True)
    else:
        found = {root: system.info(root)}
    files = {name: info for name, info in sorted(found.items()) if info["type"] != "directory"}
    if http:  # a folder's page has no sizes
        files = {name: system.info(name) for name in files}
    if not files:
        raise FileNotFoundError
    base = os.path.commonpath([os.path.dirname(name) for name in files])
    return system, [
        Remote(
            *(name, relative(name, base), -1 if info.get("size") is None else int(info["size"])),
            next((str(info[key]) for key in _VERSIONS if info.get(key)), ""),
        )
        for name, info in files.items()
    ]


def relative(name: str, base: str) -> PurePosixPath:
    """The path of a file in a folder.

    Raises:
        ValueError: the path leads out of the copy.
    """
    # commonpath joins the slashes of https://.
    normal = re.sub("/+", "/", re.sub(r"^(https?://[^?#]*).*", r"\1", name))
    path = PurePosixPath(normal.removeprefix(re.sub("/+", "/", base)).lstrip("/"))
    if not path.parts or ".." in path.parts:
        raise ValueError(f"the name {name!r} is not allowed")
    return path


def _whole(copy: Path, files: Iterable[Remote]) -> Path:
    """The folder of a copy.

    Raises:
        OSError, ValueError: a file is missing, or has another size.
    """
    for file in files:
        size = (copy / file.name).stat().st_size
        if size != file.size >= 0:
            raise ValueError(f"{file.name} has {size} bytes instead of {file.size}")
    return copy


def _copy(system: Any, files: list[Remote], folder: Path) -> None:
    """Copy files that are not complete yet, each under a temporary name."""
    for number, file in enumerate(files, 1):
        target = folder / file.name
        if target.exists():
            continue
        print(f"copying {file.path} ({number} of {len(files)})", file=sys.stderr, flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        try:
            system.get_file(file.path, str(partial))
        except Exception as error:  # each file system has its own
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise
            raise _CopyError(f"{file.path}: {reason(error)}") from error
        size = partial.stat().st_size
        if size != file.size >= 0:
            raise _CopyError(f"{file.path} ends after {size} of {file.size} bytes")
        partial.rename(target)


# ---------------------------------------------------------------------- media in records


class MediaDownloads:
    """Copies the images and videos that records name by URL, when they are first named.

    A record could name a service that only this machine can reach. Files are therefore only copied
    from the hosts of ``media_urls``. A pattern does not allow hosts with addresses of a private
    network; the name of a host does. Redirections are checked in the same way.

    Args:
        hosts: the source's ``media_urls``.
        setting: the source's name in messages.
    """

    def __init__(self, hosts: Sequence[str], cache_dir: str, setting: str) -> None:
        self._hosts, self._cache, self._setting = hosts, Path(cache_dir), setting
        self._failed: dict[str, str] = {}  # these are not tried again
        self._opener = urllib.request.build_opener(
            _Redirects(hosts), _Handler(hosts), _SecureHandler(hosts)
        )

    def check(self, url: str) -> None:
        """
        Raises:
            ValueError: the host of a URL is not allowed, by its name or an address in it.
        """
        _is_listed(url, self._hosts)

    def find(self, url: str) -> str:
        """The path of the copy, which is made if it is missing.

        Raises:
            PretrainError: ``media_urls`` is empty.
            ValueError: its host is not allowed, or it cannot be read to its end.
        """
        host = _host(url)
        if not self._hosts:
            raise PretrainError(
                f"{self._setting}.media_urls: a record names {url[:200]}, and files at URLs are "
                f"only copied from the hosts in this setting: set it to [{host}], or to ['*'] for "
                "all public hosts, or copy the files yourself"
            )
        digest = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        suffix = re.search(r"\.\w{1,5}$", re.split("[?#]", url)[0], re.ASCII)
        path = self._cache / "urls" / digest[:2] / (digest + (suffix[0].lower() if suffix else ""))
        if not path.exists() and url not in self._failed:
            try:
                make_cache(self._cache)
                path.parent.mkdir(parents=True, exist_ok=True)
                with _locked(path.parent / "lock"):
                    if not path.exists():  # another process may have made it meanwhile
                        self._download(url, path)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._failed[url] = f"{url[:200]} cannot be read: {reason(error)}"
        if url in self._failed:
            raise ValueError(self._failed[url])
        return str(path)

    def _download(self, url: str, path: Path) -> None:
        """
        Raises:
            OSError, HTTPException, ValueError: it is not allowed, or cannot be read to its end.
        """
        self.check(url)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (pretrain)"})
        try:
            with self._opener.open(request, timeout=_TIMEOUT) as source, unfinished.open("wb") as f:
                size = _copy_stream(source, f)
                if size != int(source.headers.get("Content-Length", size)):
                    raise ValueError(f"it ends after {size} bytes")
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)


def _copy_stream(source: Any, out: IO[bytes]) -> int:
    """Copy a response, and return its size.

    Raises:
        ValueError: it is too large or too slow.
    """
    size, end = 0, time.monotonic() + _MAX_MEDIA_SECONDS
    while block := source.read(_BLOCK):
        size += len(block)
        if size > _MAX_MEDIA_BYTES:
            raise ValueError(f"larger than {_MAX_MEDIA_BYTES >> 20} MiB")
        if time.monotonic() > end:
            raise ValueError(f"not complete after {_MAX_MEDIA_SECONDS} s")
        out.write(block)
    return size


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process of this machine has a lock."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # the file system has no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _host(url: str) -> str:
    """The host of a URL of http or https.

    Raises:
        ValueError: it is another URL, or its parts could be read in several ways.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError("only URLs of http and https are copied")
    if not _HOST.fullmatch(parts.netloc):
        raise ValueError(f"its host {parts.netloc!r} is not read")
    return str(parts.hostname)


def _is_listed(url: str, hosts: Sequence[str]) -> bool:
    """Whether the host of a URL is allowed by its name, not by a pattern.

    Raises:
        ValueError: it is not allowed.
    """
    host = _host(url)
    names = [name.lower() for name in hosts]
    if host in names:
        return True
    if not any(fnmatch.fnmatchcase(host, name) for name in names):
        raise ValueError(f"{host} is not in media_urls")
    if _ADDRESS.fullmatch(host):
        _require_public(host, host)
    return False


def _require_public(address: str, host: str) -> None:
    """
    Raises:
        ValueError: the address is in a private network, or that of this machine.
    """
    found = ipaddress.ip_address(address)
    found = getattr(found, "ipv4_mapped", None) or found
    if not found.is_global or found.is_multicast:
        raise ValueError(f"{host} has the private address {found}, and is not in media_urls")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to hosts that are allowed."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts

    def redirect_request(self, *arguments: Any) -> urllib.request.Request | None:
        _is_listed(arguments[-1], self._hosts)
        return super().redirect_request(*arguments)


class _Public(http.client.HTTPConnection):
    """A connection that is closed before a request is sent if the address is not public."""

    def connect(self) -> None:
        super().connect()
        _require_public(self.sock.getpeername()[0], self.host)


class _SecurePublic(http.client.HTTPSConnection, _Public):
    """The same for https."""


def _is_checked(request: urllib.request.Request, hosts: Sequence[str]) -> bool:
    """Whether the address must be public; a proxy looks up the address itself."""
    direct = urlsplit(request.full_url).netloc == request.host
    return not _is_listed(request.full_url, hosts) and direct


class _Handler(urllib.request.HTTPHandler):
    def __init__(self, hosts: Sequence[str]) -> None:
        super().__init__()
        self._hosts = hosts

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        checked = _is_checked(request, self._hosts)
        return self.do_open(_Public if checked else http.client.HTTPConnection, request)


class _SecureHandler(urllib.request.HTTPSHandler):
    def __init__(self, hosts: Sequence[str]) -> None:
        super().__init__()
        self._hosts = hosts

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        checked = _is_checked(request, self._hosts)
        return self.do_open(_SecurePublic if checked else http.client.HTTPSConnection, request)
