"""The splits of a data set, such as train and test, by the names of its files and folders."""

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pretrain.data import files

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "val", "valid", "validation", "dev"), "held_out"),
    **dict.fromkeys(("eval", "evaluation", "holdout", "heldout", "held_out"), "held_out"),
}
"""Names of splits, and what each is for."""
_NAMES = "|".join(sorted(SPLITS, key=len, reverse=True))
# At the beginning of a file name, or later in it, and the patterns of such names.
_IN_NAMES = (
    (re.compile(rf"({_NAMES})[-_.0-9]"), "{}[-_.0-9]*"),
    (re.compile(rf".*[-_.]({_NAMES})[-_.0-9]"), "*[-_.]{}[-_.0-9]*"),
)


class Split(NamedTuple):
    """Files of a split.

    Attributes:
        name: one of :data:`SPLITS`.
        path: their folder, or their pattern.
    """

    name: str
    path: str


def find(
    root: Path, paths: Sequence[Path], *, in_names: bool = True
) -> tuple[list[Split], list[Path]]:
    """The splits of a folder's files, and the files that are in none; no splits if there are fewer
    than two.

    Args:
        in_names: whether to look at names of files, besides those of folders.
    """
    groups: dict[Split, set[Path]] = {}
    for path in paths:
        if split := _of_file(root, path, in_names):
            groups.setdefault(split, set()).add(path)
    if in_names:
        groups = dict(_joined(root, groups))
    found = [path for group in groups.values() for path in group]
    if len({split.name for split in groups}) < 2 or any(
        set(_matched(split.path, paths)) != group for split, group in groups.items()
    ):
        return [], []
    return list(groups), [path for path in paths if path not in set(found)]


def _of_file(root: Path, path: Path, in_names: bool) -> Split | None:
    for folder in reversed(path.relative_to(root).parents[:-1]):
        if folder.name in SPLITS:
            return Split(folder.name, str(root / folder))
    for name, pattern in _IN_NAMES if in_names else ():
        if match := name.match(path.name):
            named = pattern.format(match[1])
            return Split(match[1], f"{glob.escape(str(path.parent))}/{named}")
    return None


def _joined(root: Path, groups: dict[Split, set[Path]]) -> Iterable[tuple[Split, set[Path]]]:
    """Files of the same names in several folders are matched by one pattern."""
    same: dict[Split, list[Split]] = {}
    for split in groups:
        is_folder = Path(split.path).is_dir()
        key = split if is_folder else Split(split.name, split.path.rpartition("/")[2])
        same.setdefault(key, []).append(split)
    for key, splits in same.items():
        path = f"{glob.escape(str(root))}/**/{key.path}" if len(splits) > 1 else splits[0].path
        yield Split(key.name, path), set().union(*(groups[split] for split in splits))


def _matched(path: str, paths: Sequence[Path]) -> Iterable[Path]:
    if Path(path).is_dir():
        return (each for each in paths if Path(path) in each.parents)
    matched = set(files.matches(Path(path)))
    return (each for each in paths if each in matched)
