"""Checkpoints: sharded over the ranks, written whole or not at all, and verified when read.

A checkpoint is a folder ``step-00000100`` that torch.distributed.checkpoint wrote: every tensor
whole, under its name in the whole model, so that it does not matter which rank held it, nor how it
was cut: ranks write the parts they have, and read those they need. A manifest with
the checksum of every file is written last, into a folder that still has another name; the rename
that follows makes the checkpoint exist.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from pretrain.errors import PretrainError
from pretrain.runtime.processes import agree

_FOLDER = re.compile(r"step-(\d{8})")
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Part:
    """What this rank has of a tensor of which other ranks have other parts.

    Attributes:
        shape: of the whole tensor.
        pieces: (offsets in the whole tensor, values) of each block that is here.
    """

    shape: Sequence[int]
    pieces: Sequence[tuple[Sequence[int], Tensor]]


Tensors = Mapping[str, Tensor | Part]


def _as_part(tensor: Tensor | Part) -> Part:
    if isinstance(tensor, Part):
        return tensor
    return Part(tensor.shape, [([0] * tensor.ndim, tensor)])


class _Blocks:
    """Names to parts, as torch.distributed.checkpoint's planners look them up."""

    def __init__(self, tensors: Tensors) -> None:
        self.parts = {name: _as_part(tensor) for name, tensor in tensors.items()}
        self._blocks = {
            MetadataIndex(name, offsets): values
            for name, part in self.parts.items()
            for offsets, values in part.pieces
        }

    def __getitem__(self, index: MetadataIndex) -> Tensor:
        return self._blocks[index]


class _SavePlanner(DefaultSavePlanner):
    """Plans to write each block of each tensor; what several ranks have, one of them writes."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._blocks = _Blocks(tensors)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    MetadataIndex(name, offsets),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        ChunkStorageMetadata(torch.Size(offsets), values.shape),
                        TensorProperties.create_from_tensor(values),
                        torch.Size(part.shape),
                    ),
                )
                for name, part in self._blocks.parts.items()
                for offsets, values in part.pieces
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._blocks[index]


class _LoadPlanner(DefaultLoadPlanner):
    """Plans to fill each block of each tensor from whatever blocks it was written as."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._blocks = _Blocks(tensors)

    def create_local_plan(self) -> LoadPlan:
        assert isinstance(self.metadata, Metadata)
        items = []
        for name, part in self._blocks.parts.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            wanted = [
                ChunkStorageMetadata(torch.Size(offsets), values.shape)
                for offsets, values in part.pieces
            ]
            items += create_read_items_for_chunk_list(name, stored, wanted)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._blocks[index]


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


def save(folder: Path, step: int, tensors: Tensors, facts: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint; every rank calls it with the tensors it holds.

    Args:
        folder: where checkpoints live.
        tensors: by name in the whole model. What several ranks have is written once.
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
        (
            lambda: state_dict_saver.save({}, checkpoint_id=partial, planner=_SavePlanner(tensors)),
            True,
        ),
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


def load(path: Path, tensors: Tensors) -> None:
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
        if stored[name][0] != torch.Size(tensor.shape):
            raise PretrainError(
                f"the checkpoint {path} is of another model: {name} is "
                f"{tuple(stored[name][0])} there and {tuple(tensor.shape)} here; "
                "use the configuration it was made with, or another run_dir"
            )
    state_dict_loader.load({}, checkpoint_id=path, planner=_LoadPlanner(tensors))
