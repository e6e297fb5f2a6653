"""Folders written by `save_to_disk` of the `datasets` library: Arrow files and descriptions."""

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from pretrain.data.files import path_of, reason
from pretrain.data.skipped import Skip
from pretrain.errors import PretrainError

STATE, SPLITS = "state.json", "dataset_dict.json"
DESCRIBING = (STATE, SPLITS, "dataset_info.json")


def select(items: Iterable[Path | Skip], root: Path, setting: str) -> list[Path | Skip]:
    """The files of a source without those that belong to a saved dataset but are not its data:
    files about it, and Arrow files that an earlier dataset left in the same folder.

    Args:
        root: the source's path.
        setting: the source's name in messages.

    Raises:
        PretrainError: a saved dataset is damaged, or the folder has several splits, which must not
            be mixed.
    """
    chosen: list[Path | Skip] = []
    files = lru_cache(maxsize=None)(data_files)  # one call for each folder
    for item in items:
        if isinstance(item, Skip):
            chosen.append(item)
            continue
        if item.parent != root and root in item.parents and (names := splits(item.parent.parent)):
            folder = item.parent.parent
            raise PretrainError(
                f"{path_of(setting)}{folder} is a saved dataset with the splits "
                f"{', '.join(names)}: set it to one of them, such as {folder / names[0]}"
            )
        try:
            current = files(item.parent)
        except ValueError as error:
            raise PretrainError(f"{path_of(setting)}{error}: save the dataset again") from error
        if current is None and not (item.name == SPLITS and splits(item.parent)):
            chosen.append(item)
        elif item.name in DESCRIBING:
            chosen.append(Skip(str(item), "describes a saved dataset", corrupt=False))
        elif item.suffix != ".arrow" or item.name in (current or ()):
            chosen.append(item)
        else:
            chosen.append(Skip(str(item), f"not of the dataset in {STATE}", corrupt=False))
    return chosen


def data_files(folder: Path) -> list[str] | None:
    """Names of the Arrow files of a saved dataset; None if a folder is none.

    Raises:
        ValueError: its state cannot be read, or it selects rows in a way of datasets before 2.0.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_text())
        if not isinstance(state, dict) or "_data_files" not in state:
            return None  # another file of that name
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({reason(error)})") from error
    if state.get("_indices_data_files"):
        raise ValueError(f"{folder} is a dataset of an old version, with its rows in another order")
    return names


def splits(folder: Path) -> list[str]:
    """Names of the splits of a saved dictionary of datasets; empty if a folder is none."""
    try:
        names = json.loads((folder / SPLITS).read_text())["splits"]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [str(name) for name in names]
