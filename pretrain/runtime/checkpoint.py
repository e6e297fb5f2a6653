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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
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
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from pretrain.errors import PretrainError
from pretrain.runtime.processes import agree

_FOLDER = re.compile(r"step-(\d{8})")
_MANIFEST = "manifest.json"
_PARTIAL, _REMOVED = ".partial", ".removed"
# A rank that has died is noticed at once; this is for disks that take their time.
_PATIENCE = timedelta(hours=12)


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


class _Writer(FileSystemWriter):
    """Tells what the system said about a file, where torch.save tells what it made of that."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


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


def save(
    folder: Path,
    step: int,
    tensors: Tensors,
    facts: Mapping[str, Any],
    keep: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint; every rank calls it with the tensors it holds.

    Args:
        folder: where checkpoints live.
        tensors: by name in the whole model. What several ranks have is written once.
        facts: what else is to be read back, as JSON.
        keep: older checkpoints than the newest ``keep`` are removed, once this one exists.
        group: of all ranks, in place of the default one.

    Raises:
        PretrainError: the disk refused; earlier checkpoints are as they were.
    """
    final = path_of(folder, step)
    partial = final.with_suffix(_PARTIAL)
    is_main = dist.get_rank() == 0

    def prepare() -> None:
        # What a kill left behind, here and in earlier attempts.
        for suffix in (_PARTIAL, _REMOVED):
            for path in folder.glob(f"step-*{suffix}"):
                shutil.rmtree(path)
        partial.mkdir(parents=True)

    def write() -> None:
        planner, writer = _SavePlanner(tensors), _Writer(partial)
        state_dict_saver.save({}, storage_writer=writer, planner=planner, process_group=group)

    def publish() -> None:
        files = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
        manifest = {"step": step, "facts": dict(facts), "files": files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*partial.iterdir(), partial):
            _sync(path)
        _remove(final)
        partial.rename(final)
        _sync(folder)
        for old in steps(folder)[:-keep]:
            _remove(path_of(folder, old))

    for action, everywhere in ((prepare, False), (write, True), (publish, False)):
        failure = None
        if is_main or everywhere:
            try:
                action()
            # What a file system or a peer did has one answer here.
            except (Exception, CheckpointException) as error:
                failure = PretrainError(
                    f"cannot write the checkpoint {final}: {_cause(error)}; earlier checkpoints "
                    "are intact: see to the disk and start again"
                )
        try:
            agree(failure, group)
        except PretrainError:
            if is_main:  # a full disk gets its space back
                shutil.rmtree(partial, ignore_errors=True)
            raise
    return final


def _cause(error: BaseException) -> str:
    """The first line of what went wrong, on whichever rank it did."""
    while isinstance(error, CheckpointException) and error.failures:
        error, _stack = next(iter(error.failures.values()))
    return (str(error).splitlines() or [type(error).__name__])[0]


def _sync(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder, through a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Saver:
    """Writes a run's checkpoints one after another, while the run goes on if so asked.

    Every rank makes one and calls its methods at the same points of the run. In the background,
    the tensors are first copied to memory; a thread then writes them. What the threads of all
    ranks tell each other goes through a process group of their own, so that it never meets the
    run's collectives.

    Args:
        folder: where checkpoints live.
        keep: the newest ones that stay.
        asynchronous: write in the background.
    """

    def __init__(self, folder: Path, keep: int, asynchronous: bool) -> None:
        self.folder, self._keep = folder, keep
        self._pending: Future[Path] | None = None
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._group: dist.ProcessGroup | None = None
        if asynchronous:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def save(self, step: int, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        """Write a checkpoint, or begin to, once the one before it is written.

        Raises:
            PretrainError: this one, or the one before it, could not be written.
        """
        self.wait()
        if self._pool is None:
            save(self.folder, step, tensors, facts, self._keep)
            return
        staged = self._stage(tensors)
        self._pending = self._pool.submit(
            save, self.folder, step, staged, facts, self._keep, self._group
        )

    def failed(self) -> bool:
        """Whether writing in the background has failed on this rank: :meth:`wait` will raise."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Return once nothing is being written.

        Raises:
            PretrainError: it could not be written; the same on every rank.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread, after what it is writing; an error of that is not told."""
        if self._pool is not None:
            self._pool.shutdown()

    def _stage(self, tensors: Tensors) -> dict[str, Part]:
        """Copies in memory that this object keeps from one checkpoint to the next."""
        staged = {}
        for name, tensor in tensors.items():
            part = _as_part(tensor)
            pieces = []
            for number, (offsets, values) in enumerate(part.pieces):
                buffer = self._buffers.get((name, number))
                if buffer is None:
                    buffer = torch.empty(
                        values.shape, dtype=values.dtype, pin_memory=values.is_cuda
                    )
                    self._buffers[name, number] = buffer
                pieces.append((offsets, buffer.copy_(values, non_blocking=True)))
            staged[name] = Part(part.shape, pieces)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return staged


def _remove(path: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves nothing that looks like one."""
    if path.exists():
        doomed = path.with_suffix(_REMOVED)
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
