"""Storage of checkpoints: sharded over the ranks, written atomically, and verified when read.

A checkpoint is a folder ``step-00000100`` of safetensors files. Each rank writes blocks of its
tensors; a block that several ranks have is written by one of them. Blocks are stored under the
tensor's name in the whole model with their offsets in it, so a rank reads only the parts it needs,
however the tensors were split when they were saved. ``manifest.json`` lists the tensors, their
blocks and the SHA-256 of every file. It is written last, into a folder with a temporary name;
renaming that folder makes the checkpoint exist.

Nothing in a checkpoint is executed or unpickled: reading one from an untrusted source is safe.
"""

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import file_digest
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain import untrusted_files
from pretrain.checkpoint import tensor_files
from pretrain.checkpoint.tensor_files import Block
from pretrain.errors import PretrainError
from pretrain.parallel import raise_on_all_ranks

_FOLDER = re.compile(r"step-(\d{8})")
_FILE = re.compile(r"rank-\d{5,}-\d+\.safetensors")
_MANIFEST = "manifest.json"
# A trillion parameters on thousands of ranks have some hundred MiB.
_MAX_MANIFEST_BYTES = 8 << 30
_PARTIAL, _REMOVED = ".partial", ".removed"
# Ranks may wait for each other's slow disks; a rank that has died is noticed at once.
_WRITE_TIMEOUT = timedelta(hours=12)


@dataclass(frozen=True)
class LocalShard:
    """This rank's part of a tensor that is split over ranks.

    Attributes:
        shape: shape of the whole tensor.
        blocks: (offsets in the whole tensor, values) of each block on this rank.
    """

    shape: Sequence[int]
    blocks: Sequence[tuple[Sequence[int], Tensor]]


T = TypeVar("T")
Tensors = Mapping[str, Tensor | LocalShard]


def _as_shard(tensor: Tensor | LocalShard) -> LocalShard:
    if isinstance(tensor, LocalShard):
        return tensor
    return LocalShard(tensor.shape, [([0] * tensor.ndim, tensor)])


def _blocks(tensors: Tensors) -> Iterator[Block]:
    for name, tensor in tensors.items():
        for offsets, values in _as_shard(tensor).blocks:
            yield Block(name, tuple(offsets), values)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in ``folder``, in ascending order."""
    if not folder.is_dir():
        return []
    matches = (_FOLDER.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def path_of(folder: Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return folder / f"step-{step:08d}"


def save(
    folder: Path,
    step: int,
    tensors: Tensors,
    facts: Mapping[str, Any],
    keep: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint; every rank calls this with its own tensors.

    Args:
        folder: the folder of all checkpoints.
        step: number of the update after which the tensors were taken.
        tensors: tensors by name in the whole model. Blocks on several ranks are written once.
        facts: everything else to store, as values of JSON.
        keep: number of checkpoints to keep; older ones are removed once this one exists.
        group: a process group of all ranks; default: the default group.

    Returns:
        The checkpoint's folder.

    Raises:
        PretrainError: writing failed on any rank; earlier checkpoints are unchanged.
    """
    final = path_of(folder, step)
    partial = final.with_suffix(_PARTIAL)
    is_main = dist.get_rank() == 0
    with _failing_on_all_ranks(final, group):
        if is_main:
            _remove_leftovers(folder)
            partial.mkdir(parents=True)
    blocks = _blocks_to_write(list(_blocks(tensors)), group)
    with _failing_on_all_ranks(final, group):
        written = _write(partial, blocks, {name: list(x.shape) for name, x in tensors.items()})
    written_by_rank = _gather(written, group)
    with _failing_on_all_ranks(final, group):
        if is_main:
            manifest = {"step": step, "facts": dict(facts), **_merge(written_by_rank)}
            with (partial / _MANIFEST).open("w") as file:
                json.dump(manifest, file)
                file.flush()
                os.fsync(file.fileno())
            _publish(partial, final, keep)
    return final


@contextmanager
def _failing_on_all_ranks(final: Path, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Raise an error of any rank on all ranks, and remove the unfinished checkpoint."""
    failure = None
    try:
        yield
    except Exception as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        failure = PretrainError(
            f"cannot write the checkpoint {final}: {cause}; earlier checkpoints are intact: "
            "free or repair the disk, and start again"
        )
    try:
        raise_on_all_ranks(failure, group)
    except PretrainError:
        if dist.get_rank() == 0:
            shutil.rmtree(final.with_suffix(_PARTIAL), ignore_errors=True)
        raise


def _remove_leftovers(folder: Path) -> None:
    """Remove the folders of interrupted saves and removals."""
    for suffix in (_PARTIAL, _REMOVED):
        for path in folder.glob(f"step-*{suffix}"):
            shutil.rmtree(path)


def _publish(partial: Path, final: Path, keep: int) -> None:
    """Rename a complete checkpoint, and remove those older than the newest ``keep``."""
    _flush_names(partial)
    _remove(final)
    partial.rename(final)
    _flush_names(final.parent)
    for old in steps(final.parent)[:-keep]:
        _remove(path_of(final.parent, old))


def _blocks_to_write(blocks: Sequence[Block], group: dist.ProcessGroup | None) -> list[Block]:
    """The blocks that this rank writes: each block is written once, with a balanced load.

    Rank 0 decides for all ranks; its time grows with the total number of blocks.
    """
    offered = _gather([(x.name, x.offsets, x.values.nbytes) for x in blocks], group)
    chosen: list[list[int] | None] = [None]
    dist.scatter_object_list(
        chosen, _assign(offered) if dist.get_rank() == 0 else None, src=0, group=group
    )
    assert chosen[0] is not None
    return [blocks[index] for index in chosen[0]]


Offer = tuple[str, tuple[int, ...], int]


def _assign(offered: Sequence[Sequence[Offer]]) -> list[list[int]]:
    """Return for each rank the indices of the blocks that it writes.

    Args:
        offered: (name, offsets, bytes) of each block, by rank.
    """
    holders: dict[Offer, list[tuple[int, int]]] = defaultdict(list)
    for rank, offers in enumerate(offered):
        for index, offer in enumerate(offers):
            holders[offer].append((rank, index))
    chosen: list[list[int]] = [[] for _ in offered]
    load = [0] * len(offered)
    # Blocks with the fewest choices first, the largest of them first; the rest evens out the load.
    for offer in sorted(holders, key=lambda offer: (len(holders[offer]), -offer[2])):
        rank, index = min(holders[offer], key=lambda holder: load[holder[0]])
        chosen[rank].append(index)
        load[rank] += offer[2]
    return chosen


def _gather(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Return every rank's value on rank 0, and an empty list elsewhere."""
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=group)
    return values or []


class _Written(NamedTuple):
    """The files that a rank wrote (name to SHA-256), and its tensors as in the manifest."""

    files: dict[str, str]
    tensors: dict[str, dict[str, Any]]


def _write(folder: Path, blocks: Sequence[Block], shapes: Mapping[str, Sequence[int]]) -> _Written:
    """Write this rank's blocks; a tensor's second block goes to a second file, and so on."""
    written = _Written({}, {})
    by_file: dict[str, list[Block]] = defaultdict(list)
    for block in blocks:
        entry = written.tensors.setdefault(
            block.name,
            {
                "dtype": tensor_files.dtype_name(block.values.dtype),
                "shape": shapes[block.name],
                "blocks": [],
            },
        )
        file = f"rank-{dist.get_rank():05}-{len(entry['blocks'])}.safetensors"
        entry["blocks"].append([file, block.offsets, list(block.values.shape)])
        by_file[file].append(block)
    for file, members in by_file.items():
        written.files[file] = tensor_files.write(folder / file, members)
    return written


def _merge(written_by_rank: Sequence[_Written]) -> dict[str, Any]:
    """The manifest's files and tensors: those of all ranks."""
    files: dict[str, str] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for written in written_by_rank:
        files |= written.files
        for name, entry in written.tensors.items():
            tensors.setdefault(name, {**entry, "blocks": []})["blocks"] += entry["blocks"]
    return {"files": files, "tensors": tensors}


def _flush_names(path: Path) -> None:
    """Force a folder's list of names to disk, so that it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Saver:
    """Writes a run's checkpoints one after another, in the background if asked to.

    Every rank creates one and calls its methods at the same points of the run. An asynchronous
    save copies the tensors to memory and leaves the writing to a thread. The threads of all ranks
    communicate through a separate process group, so they never interfere with the run's
    collectives.

    Args:
        folder: the folder of all checkpoints.
        keep: number of checkpoints to keep.
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
            self._group = dist.new_group(backend="gloo", timeout=_WRITE_TIMEOUT)

    def save(self, step: int, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        """Wait for the previous checkpoint to be written, then write this one or start to.

        Raises:
            PretrainError: this or the previous checkpoint could not be written.
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
        """Wait until the last checkpoint is written.

        Raises:
            PretrainError: it could not be written; the same error on every rank.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish writing and end the thread; an error of the last checkpoint is not raised."""
        if self._pool is not None:
            self._pool.shutdown()

    def _stage(self, tensors: Tensors) -> dict[str, LocalShard]:
        """Copy the tensors to buffers in memory, which are reused for every checkpoint."""
        staged = {}
        for name, tensor in tensors.items():
            shard = _as_shard(tensor)
            blocks = []
            for number, (offsets, values) in enumerate(shard.blocks):
                buffer = self._buffers.get((name, number))
                if buffer is None:
                    buffer = torch.empty(
                        values.shape, dtype=values.dtype, pin_memory=values.is_cuda
                    )
                    self._buffers[name, number] = buffer
                blocks.append((offsets, buffer.copy_(values, non_blocking=True)))
            staged[name] = LocalShard(shard.shape, blocks)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return staged


def _remove(path: Path) -> None:
    """Delete a checkpoint such that a kill half-way leaves nothing that looks like one."""
    if path.exists():
        renamed = path.with_suffix(_REMOVED)
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)
        shutil.rmtree(renamed)


class StoredTensor(NamedTuple):
    """A tensor in a checkpoint.

    Attributes:
        blocks: (file, offsets in the tensor, shape) of each block.
    """

    dtype: torch.dtype
    shape: torch.Size
    blocks: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


_REMEDY = "remove that folder to resume from the checkpoint before it, or start a new run_dir"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its manifest in memory, its tensors to be loaded.

    Attributes:
        path: its folder.
        step: number of the update after which it was written.
        facts: the ``facts`` passed to :func:`save`, as JSON returns them.
        files: SHA-256 by file name.
        tensors: the stored tensors by name in the whole model.
    """

    path: Path
    step: int
    facts: dict[str, Any]
    files: dict[str, str]
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read and validate the manifest; the other files are not read.

        Raises:
            PretrainError: the folder is not a checkpoint of this program.
        """
        try:
            manifest = json.loads(untrusted_files.read_bytes(path / _MANIFEST, _MAX_MANIFEST_BYTES))
            files = {_file_name(name): str(digest) for name, digest in manifest["files"].items()}
            tensors = {name: _stored(entry, files) for name, entry in manifest["tensors"].items()}
            return cls(path, int(manifest["step"]), dict(manifest["facts"]), files, tensors)
        # The file may contain JSON of any shape and depth.
        except (
            OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError
        ) as error:  # fmt: skip
            raise PretrainError(
                f"{path} is not a checkpoint of this program (no readable {_MANIFEST}): {_REMEDY}"
            ) from error

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare the files with their checksums; each rank does its share of the files.

        Raises:
            PretrainError: a file is missing or damaged.
        """
        for name in sorted(self.files)[rank::world_size]:
            file = self.path / name
            try:
                intact = file.is_file() and _checksum(file) == self.files[name]
            except OSError as error:
                raise PretrainError(f"cannot read {file}: {error.strerror}; {_REMEDY}") from error
            if not intact:
                fault = "differs from its checksum" if file.is_file() else "is missing"
                raise PretrainError(
                    f"the checkpoint {self.path} is damaged: {name} {fault}; {_REMEDY}"
                )

    def load(self, tensors: Tensors) -> None:
        """Copy stored values into ``tensors``, by their names in the whole model.

        Reads only the blocks needed, without other processes. Values are converted to the dtypes
        of ``tensors``.

        Raises:
            PretrainError: a tensor is missing or has another shape (the first one is named), or
                a file is damaged.
        """
        for name, tensor in tensors.items():
            self.check(name, tensor.shape)
        reads: dict[str, list[tensor_files.Read]] = defaultdict(list)
        for block in _blocks(tensors):
            for file, read in _overlaps(block, self.tensors[block.name]):
                reads[file].append(read)
        for file, file_reads in reads.items():
            try:
                tensor_files.read(self.path / file, file_reads)
            except (OSError, ValueError) as error:
                raise PretrainError(
                    f"the checkpoint {self.path} is damaged: {error}; {_REMEDY}"
                ) from error

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise PretrainError unless there is a tensor of this name and shape."""
        stored = self.tensors.get(name)
        if stored is None:
            difference = f"it has no {name}"
        elif tuple(stored.shape) != tuple(shape):
            difference = f"{name} has shape {tuple(stored.shape)} in it, not {tuple(shape)}"
        else:
            return
        raise PretrainError(
            f"the checkpoint {self.path} is of another model: {difference}; use the configuration "
            "it was made with, or another run_dir"
        )


def _file_name(name: str) -> str:
    if not _FILE.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a checkpoint's file")
    return name


def _stored(entry: dict[str, Any], files: Mapping[str, str]) -> StoredTensor:
    """Parse a tensor's entry of a manifest; its blocks must lie within the tensor and fill it."""
    shape = torch.Size(entry["shape"])
    blocks = [
        # torch.Size accepts only whole numbers.
        (file, tuple(torch.Size(offsets)), tuple(torch.Size(size)))
        for file, offsets, size in entry["blocks"]
    ]
    for file, offsets, size in blocks:
        files[file]
        for first, length, whole in zip(offsets, size, shape, strict=True):
            if not 0 <= first <= first + length <= whole:
                raise ValueError(f"a block {offsets} of {size} is not within {tuple(shape)}")
    if sum(prod(size) for _, _, size in blocks) != prod(shape):
        raise ValueError("blocks do not fill their tensor")
    return StoredTensor(tensor_files.DTYPES_BY_NAME[entry["dtype"]], shape, blocks)


def _overlaps(block: Block, stored: StoredTensor) -> Iterator[tuple[str, tensor_files.Read]]:
    """Yield the file and the overlapping part of each stored block that overlaps ``block``."""
    for file, offsets, size in stored.blocks:
        sides = list(zip(block.offsets, block.values.shape, offsets, size, strict=True))
        first = [max(a, b) for a, _, b, _ in sides]
        last = [min(a + m, b + n) for a, m, b, n in sides]
        if any(start >= end for start, end in zip(first, last, strict=True)):
            continue
        target = block.values
        for dim, (start, end) in enumerate(zip(first, last, strict=True)):
            target = target.narrow(dim, start - block.offsets[dim], end - start)
        start_in_block = tuple(a - b for a, b in zip(first, offsets, strict=True))
        yield file, tensor_files.Read(block.name, start_in_block, target)
