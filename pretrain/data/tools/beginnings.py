"""The beginnings of files at a URL, in a local folder with the names of all of them, from which
their format is recognized.

Of each folder, the first file of each suffix is read, and files that describe others; of tables,
their columns and first rows. All other files are empty.
"""

import contextlib
import itertools
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data import files, saved_datasets, tables
from pretrain.data.media import pixels, video
from pretrain.data.remote import Remote, listed, relative, unreadable
from pretrain.data.vision_text import mds, reading

# Bytes of a file that are read, and bytes of a table that are read at once.
_BYTES = 8 << 20
_TABLE_BYTES = 1 << 18
_ROWS = 20
_MOST_FILES = 20
_DESCRIBING = (*reading.METADATA, reading.CAPTIONS, *saved_datasets.DESCRIBING, mds.INDEX)
_MAGIC = re.compile(r"[*?\[]")


class Beginnings(NamedTuple):
    """Beginnings of files.

    Attributes:
        path: the path of the files, as the URL names them.
        folder: the folder of all names.
        url: URL of that folder.
    """

    path: str
    folder: Path
    url: str

    def with_urls(self, text: str) -> str:
        """A text with URLs in place of local paths."""
        return text.replace(f"{self.folder}/", f"{self.url}/").replace(str(self.folder), self.url)


@contextlib.contextmanager
def beginnings(url: str) -> Iterator[Beginnings]:
    """Read the beginnings of the files at a URL, for as long as the context lasts.

    Raises:
        PretrainError: nothing is found, or it cannot be read.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        try:
            system, found = listed(url)
            is_file = [file.path for file in found] == [system._strip_protocol(url)]
            base, pattern = _split(url, is_file=is_file)
            root = system._strip_protocol(base)
            local = {file: folder / relative(file.path, root) for file in found}
            for path in local.values():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            for file in _chosen(found):
                _read(system, file, local[file])
        except Exception as error:  # each file system has its own
            raise unreadable(url, error) from error
        yield Beginnings(str(local[found[0]] if is_file else folder / pattern), folder, base)


def _split(url: str, *, is_file: bool) -> tuple[str, str]:
    """The URL of the folder, and the pattern or the name of the file in it."""
    if is_file:
        return url.rpartition("/")[0], ""
    if magic := _MAGIC.search(url):
        base, _, _ = url[: magic.start()].rpartition("/")
        return base, url[len(base) + 1 :]
    return url.rstrip("/"), ""


def _chosen(found: Sequence[Remote]) -> list[Remote]:
    """The files whose beginnings are read."""
    first: dict[tuple[str, str], Remote] = {}
    for file in found:
        path = Path(file.name)
        picture = files.ends_with(path, pixels.suffixes()) or video.is_video(path.name)
        if file.size and not picture and path.name not in _DESCRIBING:
            first.setdefault((str(path.parent), "".join(path.suffixes[-2:])), file)
    describing = [file for file in found if file.name.name in _DESCRIBING]
    return [*itertools.islice(itertools.chain(describing, first.values()), _MOST_FILES)]


def _read(system: Any, file: Remote, target: Path) -> None:
    size = f", of {file.size:,} bytes" if file.size > 0 else ""
    print(f"reading the beginning of {file.path}{size}", file=sys.stderr, flush=True)
    http = file.path.startswith(("http://", "https://"))
    if http:  # without ranges of bytes, which not every server sends
        with system.open(file.path, "rb", block_size=0) as stream:
            content = stream.read(_BYTES)
    else:
        content = system.cat_file(file.path, start=0, end=_BYTES)
    target.write_bytes(content)
    if file.size <= len(content) and file.size >= 0:
        return
    if kind := tables.kind(target):
        try:
            _read_table(system, file, target, kind)
        except ValueError:
            if not http:
                raise
            print(f"copying {file.path}: its server sends no ranges", file=sys.stderr, flush=True)
            system.get_file(file.path, str(target))
    elif files.ends_with(target, files.with_compressed((*files.JSON_LINES, *files.PLAIN))):
        target.write_bytes(_without_end(target))


def _without_end(file: Path) -> bytes:
    """The text of a file that is cut off, decompressed, up to its last complete line."""
    content = b""
    with contextlib.suppress(*files.UNREADABLE), files.open_file(file) as stream:
        while len(content) < _BYTES and (piece := stream.read(1 << 16)):
            content += piece
    return content[: content.rfind(b"\n") + 1] or content.decode(errors="ignore").encode()


def _read_table(system: Any, file: Remote, target: Path, kind: str) -> None:
    """Read the columns and the first rows of a table."""
    pyarrow = tables.require_pyarrow()
    from pyarrow import ipc, parquet

    with system.open(file.path, "rb", block_size=_TABLE_BYTES) as stream:
        if kind == "Parquet":
            table = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=_TABLE_BYTES)
            schema, batches = table.schema_arrow, table.iter_batches(_ROWS)
        else:
            is_file = stream.read(6) == b"ARROW1"
            stream.seek(0)
            reader = (ipc.open_file if is_file else ipc.open_stream)(stream)
            schema = reader.schema
            batches = (
                (reader.get_batch(n) for n in range(reader.num_record_batches))
                if is_file
                else iter(reader)
            )
        first = [batch.slice(0, _ROWS) for batch in itertools.islice(batches, 1)]
        rows = pyarrow.Table.from_batches(first, first[0].schema if first else schema)
        rows = rows.replace_schema_metadata(schema.metadata)
    if kind == "Parquet":
        parquet.write_table(rows, target)
    else:
        with ipc.new_stream(str(target), rows.schema) as writer:
            writer.write_table(rows)
