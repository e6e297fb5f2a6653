"""``python -m pretrain data``: inspect and tokenize data, and write shards."""

import glob
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from pretrain import config
from pretrain.data import data_config, files, open_data, skipped
from pretrain.data.files import reason
from pretrain.data.interface import Split
from pretrain.data.mixture.data import MixtureData
from pretrain.data.remote import is_url
from pretrain.data.skipped import Skip
from pretrain.data.tools import duplicates, inspect
from pretrain.data.tools.convert import to_megatron, to_parquet, to_shards
from pretrain.data.tools.recognize import configuration
from pretrain.data.tools.shards import make_shards
from pretrain.data.tools.tokenize import tokenize
from pretrain.errors import PretrainError, one_line

_MAX_SHOWN = 10


def run(options: Namespace) -> None:
    """Run the command with the parsed options.

    Raises:
        PretrainError: an option is invalid, or the data cannot be read or written.
    """
    if options.action == "inspect" and _is_data(options.config):
        if options.overrides:
            raise PretrainError(f"{options.overrides[0]}: {options.config} is no configuration")
        if options.duplicates:
            raise PretrainError(
                "--duplicates compares the documents of a configuration: write the one that is "
                f"printed for {options.config} into a file, and inspect that"
            )
        print(configuration(options.config))
    elif options.action == "inspect":
        split: Split = "held_out" if options.held_out else "train"
        inspect_data(
            options.config, options.overrides, options.out, options.count, split, options.duplicates
        )
    elif options.action == "tokenize":
        for line in tokenize(config.load(options.config, options.overrides), options.workers):
            print(line, flush=True)
    elif options.action == "convert":
        for line in _convert(options):
            print(line, flush=True)
    else:
        _make_shards(options.folder, options.out, options.per_shard, options.held_out)


def _convert(options: Namespace) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = options.config
        if _is_data(path):
            path = Path(folder) / "recognized.yaml"
            path.write_text(configuration(options.config))
        settings = config.load(path, options.overrides)
        if options.to == "shards":
            yield from to_shards(settings, options.out, options.per_shard)
        elif options.to == "parquet":
            yield from to_parquet(settings, options.out, options.per_shard)
        else:
            yield from to_megatron(settings, options.out, options.workers)


def _is_data(path: str) -> bool:
    """Whether a path is that of data; a file of plain text without a usual suffix is a
    configuration, like every file that ends with .yaml."""
    if path.lower().endswith((".yaml", ".yml")) and not is_url(path):
        return False
    if not os.path.isfile(path):
        return is_url(path) or os.path.isdir(path) or glob.has_magic(path)
    try:
        return files.ends_with(Path(path), files.PLAIN) or files.content(Path(path)) != "plain"
    except files.UNREADABLE:
        return True


def inspect_data(
    path: str,
    overrides: list[str],
    out: Path,
    count: int,
    split: Split,
    show_duplicates: bool = False,
) -> None:
    """Write an HTML page of the first ``count`` sequences of a configuration's data, and print a
    report on its duplicates."""
    if count < 1:
        raise PretrainError(f"--count must be > 0, not {count}")
    settings = config.load(path, overrides)
    data = open_data(data_config(settings), settings.vision.patch_size, settings.seed)
    if split == "held_out" and not data.has_held_out:
        raise PretrainError("nothing is held out: raise data.held_out")
    skipped_file = out.with_name(f"{out.stem}-{skipped.FILE}")
    text = inspect.page(data, split, count, f"Data of {path}", skipped_file.name)
    try:
        # File names may contain bytes that are not UTF-8.
        out.write_text(text, encoding="utf-8", errors="backslashreplace")
    except (OSError, ValueError) as error:
        raise PretrainError(f"cannot write {out}: {reason(error)}") from error
    _report(data.take_skipped(), skipped_file)
    print(f"{count} sequences of the {split} split: {out}")
    if show_duplicates:
        if not isinstance(data, MixtureData):
            raise PretrainError("--duplicates: the built-in data has no data.sources to compare")
        for line in duplicates.report(data):
            print(line)


def _make_shards(folder: Path, out: Path, per_shard: int, held_out: float) -> None:
    if per_shard < 1:
        raise PretrainError(f"--per-shard must be > 0, not {per_shard}")
    if not 0 <= held_out < 1:
        raise PretrainError(f"--held-out must be in [0, 1), not {held_out}")
    counts, skips = make_shards(folder, out, per_shard=per_shard, held_out=held_out)
    _report(skips, out / skipped.FILE)
    print(f"{counts['train']} pairs to train on and {counts['val']} held out: {out}")


def _report(skips: list[Skip], file: Path) -> None:
    """Print the first skips, and write all of them to a file."""
    for skip in skips[:_MAX_SHOWN]:
        print(f"skipped: {one_line(skip.name)} ({skip.reason})")
    file.unlink(missing_ok=True)
    if skips:
        skipped.write(file, skips)
    if len(skips) > _MAX_SHOWN:
        print(f"and {len(skips) - _MAX_SHOWN} more; all of them: {file}")
