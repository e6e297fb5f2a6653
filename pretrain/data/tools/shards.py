"""Write a folder of images and captions as WebDataset shards for megatron-energon."""

import contextlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from pretrain.config import DataConfig
from pretrain.data import skipped
from pretrain.data.composer import as_pair
from pretrain.data.media import frames, span
from pretrain.data.media.pixels import open_image, suffixes
from pretrain.data.media.span import Place
from pretrain.data.skipped import Skip
from pretrain.data.vision_text import reading
from pretrain.data.vision_text.document import Mixed
from pretrain.data.vision_text.layouts import Names
from pretrain.errors import PretrainError
from pretrain.runtime import atomic
from pretrain.runtime.progress import counted

# Energon's names of the splits.
_PARTS = {"train": "train", "held_out": "val"}
_NO_PAIR = "not one image with a caption: `data convert --to parquet` writes any document"
_SAMPLE_TYPE = {"__module__": "megatron.energon", "__class__": "CaptioningSample"}


def make_shards(
    folder: Path, out: Path, *, per_shard: int = 1000, held_out: float = 0.02
) -> tuple[dict[str, int], list[Skip]]:
    """Write each image of a folder with its caption, and energon's index.

    Args:
        folder: contains a ``captions.jsonl``, or ``a.txt`` for each ``a.jpg``.
        out: a new or empty folder.
        per_shard: pairs per shard.
        held_out: share of the pairs in energon's split ``val``, by a hash of name and caption.

    Returns:
        The number of pairs in each of energon's splits, and the skipped files.

    Raises:
        PretrainError: energon is not installed, there are no pairs, or ``out`` is not empty.
    """
    from pretrain.data.sources.energon import require_energon

    require_energon()
    if not folder.is_dir():
        raise PretrainError(f"{folder} is not a folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PretrainError(f"{out} exists already: choose a new folder for the shards")
    with atomic.written(out) as partial:
        partial.mkdir()
        return write(_records(folder), str(folder), partial, per_shard, held_out)


def write(
    records: Iterable[Mixed | Skip], where: str, out: Path, per_shard: int, held_out: float
) -> tuple[dict[str, int], list[Skip]]:
    """Write records of an image and its caption; arguments and results of :func:`make_shards`.

    Args:
        where: the records' source, for messages.
    """
    counts = dict.fromkeys(_PARTS.values(), 0)
    skips: list[Skip] = []
    suffixes_used: set[str] = set()
    writers = {part: _Writer(out, part, per_shard) for part in counts}
    for record in counted(records, "writing shards", "pairs"):
        pair = record if isinstance(record, Skip) else _pair(record)
        if isinstance(pair, Skip):
            skips.append(pair)
            continue
        hash, place, caption = pair
        content = span.content(place)
        part = _PARTS["held_out" if hash < int(held_out * 2**64) else "train"]
        suffix = _suffix(str(place), content)
        suffixes_used.add(suffix)
        # Keys must be unique in a dataset.
        writers[part].add(f"{part}{counts[part]:09}", {suffix: content, "txt": caption.encode()})
        counts[part] += 1
    for writer in writers.values():
        writer.close()
    if not sum(counts.values()):
        raise PretrainError(f"{where} has no image with a caption{skipped.first(skips)}")
    _index(out, [part for part, count in counts.items() if count], sorted(suffixes_used))
    return counts, skips


def _records(folder: Path) -> Iterator[Mixed | Skip]:
    for item in reading.find(str(folder), str(folder)):
        yield from (
            [item] if isinstance(item, Skip) else reading.read(item, Names(), "", str(folder))
        )


def _pair(record: Mixed) -> tuple[int, Place, str] | Skip:
    """(hash, image, caption) of a pair whose image can be decoded."""
    pair = as_pair(record.parts)
    if pair is None or pair[0].moving:
        return Skip(record.name, _NO_PAIR)
    media, caption = pair
    try:
        list(frames.read(media, DataConfig.video_fps))
    except ValueError as error:
        return Skip(record.name, str(error))
    return record.hash, media.paths[0], caption


class _Writer:
    """Shards of one split: train-000000.tar, …"""

    def __init__(self, out: Path, part: str, per_shard: int) -> None:
        self._out, self._part, self._per_shard = out, part, per_shard
        self._count = 0
        self._tar: tarfile.TarFile | None = None

    def add(self, key: str, files: dict[str, bytes]) -> None:
        if self._count % self._per_shard == 0:
            self.close()
            number = self._count // self._per_shard
            path = self._out / f"{self._part}-{number:06}.tar"
            self._tar = tarfile.open(path, "w")  # noqa: SIM115 (closed when full)
        assert self._tar is not None
        for suffix, content in files.items():
            entry = tarfile.TarInfo(f"{key}.{suffix}")
            entry.size = len(content)
            self._tar.addfile(entry, io.BytesIO(content))
        self._count += 1

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()


def _suffix(name: str, content: bytes) -> str:
    """The suffix of an image in a shard, without the dot: its own if known, or its format's."""
    if (suffix := Path(name).suffix.lower()) in suffixes():
        return suffix[1:]
    with open_image(content, name) as image:
        return image.suffix[1:]


def _index(out: Path, parts: list[str], images: list[str]) -> None:
    """Write energon's index, as `energon prepare` does.

    Args:
        images: suffixes of the images in the shards.
    """
    from megatron.energon.flavors import BaseWebdatasetFactory

    with contextlib.redirect_stdout(io.StringIO()):  # it prints names of the temporary folder
        BaseWebdatasetFactory.prepare_dataset(
            out,
            sorted(path.name for path in out.glob("*.tar")),
            split_parts_patterns=[(part, f"{part}-.*") for part in parts],
            shuffle_seed=None,
            workers=1,
        )
    fields = {"image": ",".join(images), "caption": "txt"}
    dataset = {"sample_type": _SAMPLE_TYPE, "field_map": fields}
    (out / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(dataset))
