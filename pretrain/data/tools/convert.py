"""Write sources of data in other formats: Megatron's tokens, energon's shards, Parquet."""

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.config import Config, DataConfig, sources_yaml
from pretrain.data import data_config, megatron_format, skipped
from pretrain.data.composer import Composer
from pretrain.data.duplicates import without_duplicates
from pretrain.data.interface import SPLITS, Split
from pretrain.data.open import load_tokenizer
from pretrain.data.skipped import Skip
from pretrain.data.sources import chat, find_sources
from pretrain.data.sources.images import ImageSource
from pretrain.data.sources.indexed import IndexedSource
from pretrain.data.sources.interface import Record, Source
from pretrain.data.sources.megatron import MegatronSource
from pretrain.data.sources.splits import held_out_below
from pretrain.data.sources.tokens import TokenDocuments
from pretrain.data.tools import parquet, shards
from pretrain.errors import PretrainError
from pretrain.runtime import atomic
from pretrain.runtime.progress import Progress

# Tokens that are copied at once.
_PIECE = 1 << 22


def to_megatron(config: Config, out: Path, workers: int) -> Iterator[str]:
    """Write the text of every source as ``out/source0.bin`` and ``.idx``, and the tokenizer.

    For conversations, two more files have the weight and the category of each token. Tokenizing
    continues after a kill, in ``data.cache_dir``; then the folder appears at once.
    Duplicates are left out as ``data.deduplicate`` says.

    Args:
        out: a new folder.
        workers: number of processes that tokenize.

    Yields:
        the number of documents and tokens, and the configuration that reads the result.

    Raises:
        PretrainError: the folder exists, a source has images or tokens, or the data cannot be read
            or written.
    """
    data, sources = _opened(config, out)
    for source in sources:
        if source.has_images or isinstance(source, MegatronSource):
            why = "has images" if source.has_images else "has tokens already"
            raise PretrainError(
                f"{source.setting}: {source.location} ({source.config.type}) {why}: only text and "
                "conversations without images are converted to .bin and .idx; leave the source out"
            )
        if isinstance(source, IndexedSource):
            source.workers = workers
    tokenizer = load_tokenizer(data, sources)
    composer = Composer.of(data, tokenizer, config.vision.patch_size)
    documents, duplicates = without_duplicates([one.open(composer) for one in sources], data)
    skips = [skip for one in documents for skip in one.skips]
    skips += duplicates.skips() if duplicates else []
    with atomic.written(out) as folder:
        folder.mkdir()
        tokenizer.save(folder / "tokenizer.json")
        counts = []
        for one in documents:
            assert isinstance(one, TokenDocuments)
            counts.append(_write_tokens(folder / f"source{one.source.number}", one))
        if skips:
            skipped.write(folder / skipped.FILE, skips)
    if duplicates:
        yield duplicates.summary()
    if skips:
        yield f"{len(skips):,} skipped or left out: {out / skipped.FILE}"
    for one, (count, tokens) in zip(documents, counts, strict=True):
        yield f"{one.source.setting}: {count:,} documents, {tokens:,} tokens"
    entries = [
        _entry(
            "megatron_chat" if one.source.is_chat else "megatron",
            out / f"source{one.source.number}",
            one.source,
        )
        for one in documents
    ]
    yield sources_yaml(entries, str(out / "tokenizer.json"))


def _write_tokens(prefix: Path, documents: TokenDocuments) -> tuple[int, int]:
    """Copy documents that are not duplicates; returns the number of documents and of tokens.

    Needs 12 bytes of memory for each document.
    """
    removed, stored, count = documents.removed, documents.stored, len(documents.hashes)
    starts, stops = np.append(0, removed + 1), np.append(removed, count)
    runs = [(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]
    extents = [
        (stored.extent(int(start)).start, stored.extent(int(stop) - 1).stop) for start, stop in runs
    ]
    names = list(chat.COLUMNS) if documents.source.is_chat else []
    columns = {megatron_format.bin_path(prefix): stored.tokens}
    columns |= {megatron_format.column_path(prefix, n): getattr(documents, n) for n in names}
    total = sum(last - first for first, last in extents)
    with Progress(f"writing {prefix.name}", total * len(columns)) as progress:
        done = 0
        for path, values in columns.items():
            with path.open("wb") as file:
                for first, last in extents:
                    for place in range(first, last, _PIECE):
                        piece = values[place : min(place + _PIECE, last)]
                        file.write(piece.tobytes())
                        done += len(piece)
                        progress(done)

    def kept(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.concatenate([values[:0], *(values[start:stop] for start, stop in runs)])

    lengths, hashes = kept(stored.lengths), kept(np.asarray(documents.hashes[:]))
    megatron_format.write_index(megatron_format.idx_path(prefix), lengths, stored.tokens.dtype)
    hashes.tofile(megatron_format.column_path(prefix, megatron_format.HASHES))
    description = megatron_format.column_path(prefix, megatron_format.DESCRIPTION)
    described = {"tokenizer": documents.composer.tokenizer.digest, "columns": ["tokens", *names]}
    description.write_text(json.dumps(described))
    return len(lengths), total


def to_shards(config: Config, out: Path, per_shard: int) -> Iterator[str]:
    """Write the captioned images of every source as WebDataset shards for megatron-energon.

    Args:
        out: a new folder, which appears when all are written.
        per_shard: images per shard.

    Yields:
        the number of images, and the configuration that reads the result.

    Raises:
        PretrainError: energon is not installed, the folder exists, or a source has no images with
            captions.
    """
    from pretrain.data.sources.energon import require_energon

    require_energon()
    data, sources = _opened(config, out)
    _check_records(data, per_shard)
    for source in sources:
        if not isinstance(source, ImageSource):
            raise PretrainError(
                f"{source.setting}: {source.location} ({source.config.type}) has no images with "
                "captions: only sources of images are converted to shards; leave the source out"
            )
    records = (record for source in sources for record in _records(source))
    where = ", ".join(source.location for source in sources)
    with atomic.written(out) as folder:
        folder.mkdir()
        counts, skips = shards.write(records, where, folder, per_shard, data.held_out)
        if skips:
            skipped.write(folder / skipped.FILE, skips)
    yield from _skipped(skips, out)
    yield f"{counts['train']:,} images to train on and {counts['val']:,} held out"
    yield sources_yaml([{"type": "energon", "path": str(out)}])


def to_parquet(config: Config, out: Path, per_shard: int) -> Iterator[str]:
    """Write the documents and conversations of every source as ``out/source0/train-00000.parquet``.

    Images and videos are in the files. Held-out documents are in separate files.

    Args:
        out: a new folder, which appears when all are written.
        per_shard: documents per file.

    Yields:
        the number of documents, and the configuration that reads the result.

    Raises:
        PretrainError: the folder exists, a source has tokens instead of documents, or the data
            cannot be read or written.
    """
    data, sources = _opened(config, out)
    _check_records(data, per_shard)
    for source in sources:
        if isinstance(source, MegatronSource) or not isinstance(source, IndexedSource):
            raise PretrainError(
                f"{source.setting}: {source.location} ({source.config.type}) is not converted to "
                "Parquet, only text, images and conversations are: leave the source out"
            )
    below = held_out_below(data)
    entries: list[dict[str, Any]] = []
    lines: list[str] = []
    skips: list[Skip] = []
    with atomic.written(out) as folder:
        folder.mkdir()
        for source in sources:
            assert isinstance(source, IndexedSource)
            split = source.config.split

            def split_of(record: Record, split: str = split) -> Split:
                if split == "hash":
                    return "held_out" if record.hash < below else "train"
                return "held_out" if split == "held_out" else "train"

            name = f"source{source.number}"
            type, counts, left_out = parquet.write(
                _records(source), folder / name, per_shard, split_of
            )
            if not sum(counts.values()):
                why = skipped.first(left_out)
                raise PretrainError(f"{source.setting}: nothing in {source.location}{why}")
            skips.extend(left_out)
            lines.append(
                f"{source.setting}: {counts['train']:,} documents to train on and "
                f"{counts['held_out']:,} held out"
            )
            for part in SPLITS:
                if counts[part]:
                    files = Path(glob.escape(str(out / name)), f"{part}-*.parquet")
                    entries.append(_entry(type, files, source) | {"split": part})
        if skips:
            skipped.write(folder / skipped.FILE, skips)
    yield from _skipped(skips, out)
    yield from lines
    yield sources_yaml(entries)


def _check_records(data: DataConfig, per_shard: int) -> None:
    """
    Raises:
        PretrainError: an option does not apply to the conversion of records.
    """
    if per_shard < 1:
        raise PretrainError(f"--per-shard must be > 0, not {per_shard}")
    if data.deduplicate != "none":
        raise PretrainError(
            "data.deduplicate is applied by `--to megatron` alone: set it to none, and convert "
            "data without duplicates"
        )


def _skipped(skips: Sequence[Skip], out: Path) -> Iterator[str]:
    if skips:
        yield f"{len(skips):,} skipped: {out / skipped.FILE}{skipped.first(skips)}"


def _records(source: Source) -> Iterator[Any]:
    assert isinstance(source, IndexedSource)
    source.check()
    yield from source.skips
    yield from source.records()


def _opened(config: Config, out: Path) -> tuple[DataConfig, Sequence[Source]]:
    """The sources of a configuration, if the result can be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PretrainError(f"{out} exists already: choose a new folder for the result")
    data = data_config(config)
    if not data.sources:
        raise PretrainError("data.sources is empty: the built-in data is not converted")
    return data, find_sources(data, config.seed)


def _entry(type: str, path: Path, source: Source) -> dict[str, Any]:
    config = source.config
    others = {"weight": config.weight, "split": config.split}
    defaults = {"weight": 1.0, "split": "hash"}
    kept = {name: value for name, value in others.items() if value != defaults[name]}
    return {"type": type, "path": str(path), **kept}
