"""Files at URLs, such as those of HTTP, S3 or Hugging Face, copied once into the cache.

`fsspec` and its file systems read them (`s3fs` for `s3://`, `gcsfs` for `gs://`,
`huggingface_hub` for `hf://`, aiohttp for `https://`).
"""

import errno
import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pretrain.data.cache import key_of, make_folder
from pretrain.data.files import reason
from pretrain.errors import PretrainError

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
# Values that change with a file, by their names in different file systems.
_VERSIONS = (
    *("ETag", "etag", "Content-MD5", "Last-Modified", "LastModified", "mtime", "md5Hash"),
    *("generation", "blob_id"),
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class _CopyError(Exception):
    """A file could not be read to its end."""


class _Remote(NamedTuple):
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
    if not _URL.match(path):
        return path
    try:
        system, files = _listed(path)
        if not files:
            raise FileNotFoundError
        key = key_of("remote", path, *((str(f.name), f.size, f.version) for f in files))
        folder = Path(cache_dir, f"remote-{key}")
        if not folder.is_dir():
            make_folder(folder, lambda partial: _copy(system, files, partial), resumable=True)
    except PretrainError:
        raise
    except FileNotFoundError as error:
        why = f" ({reason(error.__cause__)})" if error.__cause__ else ""
        raise PretrainError(f"{setting}.path: no files are found at {path}{why}") from error
    except Exception as error:  # each file system has its own
        raise PretrainError(
            f"{setting}.path: {path} cannot be read: {reason(error)}; repeat it, which continues "
            "with the rest, or copy the files yourself"
        ) from error
    return str(folder / files[0].name if len(files) == 1 else folder)


def _listed(url: str) -> tuple[Any, list[_Remote]]:
    """The file system of a URL, and the files there, by name.

    Every rank asks for the list when it starts: a request for each folder, or HTTP file.
    """
    import fsspec.core

    system, root = fsspec.core.url_to_fs(url)
    http = root.startswith(("http://", "https://"))
    # A query may follow the path.
    if "*" in root or "[" in root or (not http and "?" in root):
        names = system.glob(root)
    # Asked for a folder, HTTP would read a whole file to look for links in it.
    elif url.endswith("/") or (not http and system.isdir(root)):
        names = system.find(root)
    else:
        names = [root]
    found = {name: system.info(name) for name in sorted(names)}
    files = {name: info for name, info in found.items() if info.get("type") != "directory"}
    base = os.path.commonpath([os.path.dirname(name) for name in files]) if files else ""
    return system, [
        _Remote(
            *(name, _relative(name, base), -1 if info.get("size") is None else int(info["size"])),
            next((str(info[key]) for key in _VERSIONS if info.get(key)), ""),
        )
        for name, info in files.items()
    ]


def _relative(name: str, base: str) -> PurePosixPath:
    """
    Raises:
        ValueError: the path leads out of the copy.
    """
    # commonpath joins the slashes of https://.
    normal = re.sub("/+", "/", re.sub(r"^(https?://[^?#]*).*", r"\1", name))
    path = PurePosixPath(normal.removeprefix(re.sub("/+", "/", base)).lstrip("/"))
    if not path.parts or ".." in path.parts:
        raise ValueError(f"the name {name!r} is not allowed")
    return path


def _copy(system: Any, files: list[_Remote], folder: Path) -> None:
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
