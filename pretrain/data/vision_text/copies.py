"""Copies in the cache of files whose images cannot be read in place: compressed ones."""

import io
from collections.abc import Callable
from pathlib import Path

from pretrain.data import files
from pretrain.data.cache import cached, key_of, stamp

_BLOCK = 1 << 20
_CONTENT, _SIZE = "content", "size"


def uncompressed(file: Path, cache_dir: str) -> Path:
    """The path of a file's content: the file itself, or a copy that is made if it is compressed.

    Raises:
        files.UNREADABLE: the file cannot be read or is damaged.
        PretrainError: the cache cannot be written.
    """
    if not files.is_compressed(file):
        return file
    return copied("unpacked", file, (), cache_dir, lambda target: _unpack(file, target))


def copied(
    kind: str, file: Path, settings: object, cache_dir: str, write: Callable[[Path], None]
) -> Path:
    """The path of a copy of a file, which is written if it is missing or the file has changed.

    Args:
        kind: beginning of its name in the cache.
        settings: everything else that the copy depends on.
        write: writes it to a path.

    Raises:
        PretrainError: the cache cannot be written; or an error of ``write``.
    """
    key = key_of(settings, stamps=[(str(file), stamp(file))])

    def build(folder: Path) -> None:
        write(folder / _CONTENT)
        (folder / _SIZE).write_text(str((folder / _CONTENT).stat().st_size))

    # One process writes it, and others wait: it may be as large as all images.
    return cached(Path(cache_dir) / f"{kind}-{key}", build, _load, resumable=True)[0]


def _load(folder: Path) -> Path:
    path = folder / _CONTENT
    if path.stat().st_size != int((folder / _SIZE).read_text()):
        raise ValueError(f"{path.name} is not what was written")
    return path


def _unpack(file: Path, target: Path) -> None:
    """Decompress a file up to the place where it is damaged, if it is. What is read of the copy
    says that its end is missing."""
    with files.open_file(file) as source, target.open("wb") as out:
        assert isinstance(source, io.BufferedReader)
        while True:
            try:
                block = source.read1(_BLOCK)
            except files.UNREADABLE as error:  # not of the cache
                if out.tell():
                    return
                raise ValueError(files.reason(error)) from error
            if not block:
                return
            out.write(block)
