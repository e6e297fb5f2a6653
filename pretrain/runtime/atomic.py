"""Files and folders that are written completely or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.errors import PretrainError


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary path for a file or a folder, which is renamed to ``path`` at the end.

    A file of that name is replaced, a folder only if it is empty. Several processes may write the
    same path. After an error, nothing has changed. A killed process leaves the temporary path:
    it is hidden, so that it is not read as data.

    Raises:
        PretrainError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}.partial-"
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as folder:
            partial = Path(folder) / path.name
            yield partial
            partial.rename(path)
    except OSError as error:
        raise PretrainError(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, replacing a file of that name.

    Raises:
        PretrainError: it cannot be written.
    """
    with written(path) as partial:
        partial.write_text(text, encoding="utf-8")
