"""Trains a step with the configuration that `data inspect` suggests for files."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pretrain.data.tokenizer import Tokenizer
from pretrain.data.tools.recognize import configuration
from tests.distributed import training
from tests.distributed.launch import launch


class Layout(NamedTuple):
    """Files in a layout, and the suggestion for them.

    Attributes:
        file: name of the file or folder.
        write: creates it.
        description: expected comment.
        entries: expected entries, without the path if it is the file's.
    """

    file: str
    write: Callable[[Path], object]
    description: str
    entries: list[dict[str, str]]


def _train_each(folder: str, count: int) -> list[list[dict[str, Any]]]:
    """A step with each configuration of the folder."""
    metrics = []
    for number in range(count):
        (Path(folder) / f"{number}.yaml").replace(Path(folder) / "tiny.yaml")
        metrics.append(training.train_and_read(folder, f"run_dir={folder}/run{number}"))
    return metrics


def train(
    folder: Path, layouts: Mapping[str, Layout], texts: Iterable[str]
) -> dict[str, tuple[str, list[Any]]]:
    """The suggested configuration of each layout, and the metrics of a step with it.

    Args:
        texts: the tokenizer is trained on them.
    """
    Tokenizer.train(texts, 400).save(folder / "tokenizer.json")
    suggested = {}
    for number, (name, layout) in enumerate(layouts.items()):
        layout.write(folder / layout.file)
        suggested[name] = configuration(str(folder / layout.file))
        settings = yaml.safe_load(training.TINY)
        settings["data"] |= yaml.safe_load(suggested[name])["data"]
        settings["data"] |= {"tokenizer": str(folder / "tokenizer.json"), "held_out": 0.1}
        settings["data"]["seq_length"] = 512
        settings |= {"steps": 1, "global_batch_size": 2}
        settings["evaluation"] |= {"sequences": 2}
        settings["optimizer"] |= {"warmup_steps": 0, "decay_steps": 0}
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(settings))
    (records,) = launch(_train_each, 1, str(folder), len(layouts))
    return {
        name: (text.replace(f"{folder}/", ""), steps)
        for (name, text), steps in zip(suggested.items(), records, strict=True)
    }
