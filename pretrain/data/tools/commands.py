"""``python -m pretrain data …``: looking at data, and writing shards."""

from argparse import Namespace
from pathlib import Path

from pretrain import config
from pretrain.data import data_config, open_data, skipped
from pretrain.data.builtin.standard_library import Split
from pretrain.data.files import reason
from pretrain.data.skipped import Skip
from pretrain.data.tools import inspect
from pretrain.data.tools.shards import make_shards
from pretrain.errors import PretrainError, one_line

_MOST_SHOWN = 10


def run(options: Namespace) -> None:
    """Do what the command line asks for.

    Raises:
        PretrainError: what was asked for cannot be done.
    """
    if options.action == "inspect":
        split: Split = "held_out" if options.held_out else "train"
        inspect_data(options.config, options.overrides, options.out, options.count, split)
    else:
        _make_shards(options.folder, options.out, options.per_shard, options.held_out)


def inspect_data(path: str, overrides: list[str], out: Path, count: int, split: Split) -> None:
    """Write the first ``count`` sequences of a configuration's data as a page."""
    if count < 1:
        raise PretrainError(f"--count must be > 0, not {count}")
    settings = config.load(path, overrides)
    data = open_data(data_config(settings), settings.vision.patch_size, settings.seed)
    if split == "held_out" and not data.has_held_out:
        raise PretrainError("nothing is held out: raise data.held_out")
    text = inspect.page(data, split, count, f"Data of {path}")
    try:
        # File names may have bytes that are not UTF-8.
        out.write_text(text, encoding="utf-8", errors="backslashreplace")
    except (OSError, ValueError) as error:
        raise PretrainError(f"cannot write {out}: {reason(error)}") from error
    _tell(data.take_skipped(), out.with_name(f"{out.stem}-{skipped.FILE}"))
    print(f"{count} sequences of the {split} split: {out}")


def _make_shards(folder: Path, out: Path, per_shard: int, held_out: float) -> None:
    if per_shard < 1:
        raise PretrainError(f"--per-shard must be > 0, not {per_shard}")
    if not 0 <= held_out < 1:
        raise PretrainError(f"--held-out must be in [0, 1), not {held_out}")
    counts, skips = make_shards(folder, out, per_shard=per_shard, held_out=held_out)
    _tell(skips, out / skipped.FILE)
    print(f"{counts['train']} pairs to train on and {counts['val']} held out: {out}")


def _tell(skips: list[Skip], complete: Path) -> None:
    """Print the first skips; where there are more, write all of them to a file."""
    for skip in skips[:_MOST_SHOWN]:
        print(f"skipped: {one_line(skip.name)} ({skip.reason})")
    if len(skips) > _MOST_SHOWN:
        complete.unlink(missing_ok=True)
        skipped.write(complete, skips)
        print(f"and {len(skips) - _MOST_SHOWN} more; all of them: {complete}")
