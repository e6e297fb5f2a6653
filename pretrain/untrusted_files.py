"""Reading whole files from untrusted sources, up to a size limit."""

import errno
import os
from pathlib import Path


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: the file cannot be read, is larger, or is a pipe or a device, which may never end;
            ``strerror`` is the reason.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        code = errno.EISDIR if path.is_dir() else errno.EINVAL
        reason = os.strerror(code) if path.is_dir() else "it is a pipe or a device, not a file"
        raise OSError(code, reason, str(path))
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        size = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit} bytes"
        raise OSError(errno.EFBIG, f"it is larger than {size}", str(path))
    return content


def read_text(path: str | Path, limit: int, encoding: str = "utf-8") -> str:
    """The decoded content of a file; see :func:`read_bytes`.

    Raises:
        UnicodeDecodeError: the file has another encoding.
    """
    return read_bytes(path, limit).decode(encoding)
