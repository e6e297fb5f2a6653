"""A cache of prepared data: folders named by a digest of everything that they depend on."""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.errors import PretrainError, one_line

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Part of every key. Raise it when the content of cached folders changes.
FORMAT = 5
# The file that marks a cache, also for programs that make backups (bford.info/cachedir).
TAG = "CACHEDIR.TAG"
# Resolution of file times in nanoseconds, on most file systems and on old ones. The latter are
# recognized by times that are whole seconds.
_FINE, _COARSE = 20_000_000, 2_000_000_000
# Age of a temporary folder in nanoseconds after which no process can still be writing it.
_ABANDONED = 7 * 24 * 3600 * 10**9

Stamp = tuple[int, ...]


def stamp(path: Path) -> Stamp:
    """Size, times and inode of a file, which differ after any change of the file.

    Two changes within the resolution of file times would have equal times. This function therefore
    waits for some milliseconds if the last change is that recent.

    Returns:
        An empty tuple if there is no such file.
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
    """A digest of settings and of the names and stamps of files."""
    digest = hashlib.sha256(repr((FORMAT, settings)).encode("utf-8", "surrogatepass"))
    for name, numbers in stamps:
        digest.update(f"{name}\0{numbers}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def cached(
    folder: Path,
    build: Callable[[Path], None],
    load: Callable[[Path], T],
    *,
    resumable: bool = False,
) -> tuple[T, bool]:
    """Load a folder of the cache; build it first if it is missing or damaged.

    Args:
        resumable: whether ``build`` continues with the content that it left in the folder when it
            was interrupted. One process at a time builds such a folder; others wait.

    Returns:
        The result of ``load``, and whether the folder existed.

    Raises:
        PretrainError: the folder cannot be written, or is damaged and cannot be replaced; or an
            error of ``build``.
    """
    if folder.is_dir():
        try:
            return load(folder), True
        except Exception as error:  # damage costs a rebuild, not the run
            logger.warning("rebuilding the damaged cache %s (%s)", folder, error)
            _remove(folder)
    make_folder(folder, build, resumable=resumable)
    try:
        return load(folder), False
    except Exception as error:  # such as another user's folder, which could not be removed
        raise PretrainError(
            f"the cache {folder} is damaged and cannot be replaced ({one_line(str(error))}): "
            "remove it, or set data.cache_dir to another folder"
        ) from error


def make_folder(folder: Path, build: Callable[[Path], None], *, resumable: bool = False) -> None:
    """Build a folder under a temporary name and rename it, so that it is never incomplete: several
    processes may build it at the same time, and any of them may be killed.

    Args:
        resumable: see :func:`cached`.

    Raises:
        PretrainError: the folder cannot be written; or an error of ``build``.
    """
    temporary = _unfinished(folder) if resumable else _temporary(folder.parent)
    try:
        make_cache(folder.parent)
        with temporary as partial:
            if not (resumable and folder.is_dir()):  # another process may have built it meanwhile
                build(partial)
                os.rename(partial, folder)
    except OSError as error:
        if not folder.is_dir():
            raise _unwritable(folder, error) from error


def make_cache(folder: Path) -> None:
    """Make and mark the folder of a cache. One with other files is left unmarked: programs that
    make backups would leave these out."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        with contextlib.suppress(FileExistsError), (folder / TAG).open("x") as tag:
            tag.write("Signature: 8a477f597d28d172789f06886806bc55\n")


@contextlib.contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    """A folder that is removed afterwards, and in a cache those that killed processes left, too."""
    for other in parent.glob("partial-*") if (parent / TAG).exists() else ():
        if time.time_ns() - _time(other) > _ABANDONED:
            shutil.rmtree(other, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(dir=parent, prefix="partial-"))
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A folder that stays if it is not renamed, and that no other process has meanwhile."""
    parent = folder.with_name(f"unfinished-{folder.name}")
    with contextlib.ExitStack() as stack:
        while True:
            try:
                parent.mkdir(exist_ok=True)
                file = stack.enter_context((parent / "lock").open("w"))
            except (FileExistsError, FileNotFoundError):
                # Another process may have removed the folder since.
                if parent.is_file() or not folder.parent.is_dir():
                    raise
                continue
            try:
                _lock(file, folder)
            except OSError:  # the file system has no locks
                yield stack.enter_context(_temporary(folder.parent))
                return
            # The process that had the lock may have removed the file, or the folder with it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(parent / "lock")):
                    break
        partial = parent / "result"
        partial.mkdir(exist_ok=True)
        yield partial
        for other in _abandoned(parent):
            _remove(other)


def _remove(folder: Path) -> None:
    """Remove a folder if possible, at once: another process could read it, or write into it, while
    its files are removed."""
    with contextlib.suppress(OSError), _temporary(folder.parent) as removed:
        os.rename(folder, removed / folder.name)


def _abandoned(unfinished: Path) -> Iterator[Path]:
    """A folder that has been finished, and unfinished ones of earlier content of the same files."""
    yield unfinished
    name = unfinished.name.rpartition("-")[0]
    for other in unfinished.parent.glob(f"{name}-*"):
        with contextlib.suppress(OSError), (other / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while a process continues it
            if os.path.samestat(os.fstat(file.fileno()), os.stat(other / "lock")):
                yield other


def _lock(file: IO[str], folder: Path) -> None:
    """Lock a file until it is closed; wait for another process that has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that writes {folder}", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)


def _unwritable(folder: Path, error: OSError) -> PretrainError:
    return PretrainError(
        f"cannot write the cache {folder}: {error.strerror or error}: set data.cache_dir to a "
        "folder with room that can be written"
    )


def siblings(folder: Path, load: Callable[[Path], T]) -> Iterator[T]:
    """Load the folders that were made with the same settings from other files, newest first.

    A folder's name consists of the settings and, after the last dash, the key of the files.
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


def map_array(path: Path, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Map a file into memory as a one-dimensional array."""
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)
