"""Checkpoints: sharded over the ranks, written whole or not at all, and verified when read.

A checkpoint is a folder ``step-00000100`` that torch.distributed.checkpoint wrote: every tensor
under its name in the whole model, so that it does not matter which rank held it. A manifest with
the checksum of every file is written last, into a folder that still has another name; the rename
that follows makes the checkpoint exist.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pretrain.errors import PretrainError
from pretrain.runtime.processes import agree

_FOLDER = re.compile(r"step-(\d{8})")
_MANIFEST = "manifest.json"


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def steps(folder: Path) -> list[int]:
    """The steps that complete checkpoints in ``folder`` were written at, in order."""
    if not folder.is_dir():
        return []
    found = (_FOLDER.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int
) -> Path:
    """Write a checkpoint; every rank calls it with the tensors it holds.

    Args:
        folder: where checkpoints live.
        tensors: by name in the whole model. A name that several ranks have is written once.
        facts: what else is to be read back, as JSON.
        keep: older checkpoints than the newest ``keep`` are removed, once this one exists.

    Raises:
        PretrainError: the disk refused; earlier checkpoints are as they were.
    """
    final = path_of(folder, step)
    partial = final.with_suffix(".partial")
    is_main = dist.get_rank() == 0

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def publish() -> None:
        files = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
        manifest = {"step": step, "facts": dict(facts), "files": files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _remove(final)
        partial.rename(final)
        for old in steps(folder)[:-keep]:
            _remove(path_of(folder, old))

    for action, everywhere in (
        (prepare, False),
        (lambda: state_dict_saver.save(dict(tensors), checkpoint_id=partial), True),
        (publish, False),
    ):
        failure = None
        if is_main or everywhere:
            try:
                action()
            except Exception as error:  # what a file system or a peer did has one answer here
                failure = PretrainError(f"cannot write the checkpoint {final}: {error}")
        agree(failure)
    return final


def _remove(path: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves nothing that looks like one."""
    if path.exists():
        doomed = path.with_suffix(".removed")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint's manifest.

    Raises:
        PretrainError: it is no checkpoint of this program, or a file of it is missing or damaged.
    """
    remedy = "remove that folder to go on from the checkpoint before it, or start a new run_dir"
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
        files = manifest["files"]
        manifest["facts"], manifest["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PretrainError(
            f"{path} is not a checkpoint of this program (no readable {_MANIFEST}): {remedy}"
        ) from error
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise PretrainError(f"the checkpoint {path} is damaged: {name} is missing; {remedy}")
        if _checksum(file) != expected:
            raise PretrainError(
                f"the checkpoint {path} is damaged: {name} is not what was written; {remedy}"
            )
    return manifest


def shapes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in a checkpoint, by name, without reading them."""
    metadata = FileSystemReader(path).read_metadata()
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def load(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill ``tensors`` in place from a checkpoint, each by its name in the whole model.

    Raises:
        PretrainError: the checkpoint is of another model: the first tensor that it lacks, or has
            in another shape.
    """
    stored = shapes(path)
    for name, tensor in tensors.items():
        if name not in stored:
            raise PretrainError(
                f"the checkpoint {path} is of another model: it has no {name}; "
                "use the configuration it was made with, or another run_dir"
            )
        if stored[name][0] != tensor.shape:
            raise PretrainError(
                f"the checkpoint {path} is of another model: {name} is "
                f"{tuple(stored[name][0])} there and {tuple(tensor.shape)} here; "
                "use the configuration it was made with, or another run_dir"
            )
    state_dict_loader.load(dict(tensors), checkpoint_id=path)
