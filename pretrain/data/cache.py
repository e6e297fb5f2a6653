"""Prepared data on disk: folders that are made once, named by everything they depend on."""

import hashlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pretrain.errors import PretrainError, one_line

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Part of every key: to be raised when what is cached changes.
FORMAT = 4
# Seconds between two lines about an operation that takes long.
_EVERY = 10.0
# The resolution of a file's times, in nanoseconds: of most file systems, and of old ones, which
# are recognized by whole seconds.
_FINE, _COARSE = 20_000_000, 2_000_000_000

Stamp = tuple[int, ...]


def stamp(path: Path) -> Stamp:
    """Numbers that are others once a file has been changed: size, times and inode.

    A change that follows another within the resolution of a file's times would go unnoticed. So
    this waits, for milliseconds, until the last one is older.

    Returns:
        Empty where there is no such file.
    """
    try:
        status = os.stat(path)
        last = max(status.st_mtime_ns, status.st_ctime_ns)
        age, resolution = time.time_ns() - last, _FINE if last % 10**9 else _COARSE
        if 0 <= age < resolution:
            time.sleep((resolution - age) / 1e9)
            status = os.stat(path)
    except (OSError, ValueError):
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def key_of(*settings: object, stamps: Iterable[tuple[str, Stamp]] = ()) -> str:
    """A name for everything that is made with these settings of files with these stamps."""
    digest = hashlib.sha256(repr((FORMAT, settings)).encode("utf-8", "surrogatepass"))
    for name, numbers in stamps:
        digest.update(f"{name}\0{numbers}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def cached(
    folder: Path, build: Callable[[Path], None], load: Callable[[Path], T]
) -> tuple[T, bool]:
    """Load a folder of the cache, and build it if it is missing or damaged.

    Returns:
        It, and whether the folder was there.

    Raises:
        PretrainError: the folder cannot be written, or is damaged and cannot be replaced; or as
            ``build`` does.
    """
    if folder.is_dir():
        try:
            return load(folder), True
        except Exception as error:  # a damaged cache costs time; it must not cost the run
            logger.warning("rebuilding the damaged cache %s (%s)", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder, build)
    try:
        return load(folder), False
    except Exception as error:  # such as another user's folder, which could not be removed
        raise PretrainError(
            f"the cache {folder} is damaged and cannot be replaced ({one_line(str(error))}): "
            "remove it, or set data.cache_dir to another folder"
        ) from error


def make_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Build a folder aside and rename it: processes that build it at once, or are killed, leave
    nothing incomplete.

    Raises:
        PretrainError: it cannot be written; or as ``build`` does.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix="partial-"))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        build(partial)
        os.rename(partial, folder)
    except OSError as error:
        if not folder.is_dir():
            raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> PretrainError:
    return PretrainError(
        f"cannot write the cache {folder}: {error.strerror or error}: set data.cache_dir to a "
        "folder with room that can be written"
    )


def siblings(folder: Path, load: Callable[[Path], T]) -> Iterator[T]:
    """Folders made with the same settings from files with other stamps, the newest first.

    The folder's name ends in a key; the rest of the name stands for the settings.
    """
    name = folder.name.rpartition("-")[0]
    if not folder.parent.is_dir():
        return
    for other in sorted(folder.parent.glob(f"{name}-*"), key=_time, reverse=True):
        try:
            yield load(other)
        except Exception:  # damaged, or removed by another process
            logger.info("the cache %s cannot be read", other)


def _time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


class Progress:
    """A line on stderr about an operation every ten seconds.

    Args:
        doing: the operation.
    """

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._next = time.monotonic() + _EVERY

    def __call__(self, count: int) -> None:
        """Tell how many documents are done."""
        if time.monotonic() >= self._next:
            print(f"{self._doing}: {count:,} documents so far", file=sys.stderr, flush=True)
            self._next = time.monotonic() + _EVERY
