"""Checkpoints: sharded over the ranks, written whole or not at all, and verified when read.

A checkpoint is a folder ``step-00000100`` of safetensors files, in which ranks write the blocks of
tensors that they hold; a block that several ranks hold is written by one of them. Blocks are stored
under the tensor's name in the whole model with their place in it, so a rank reads the parts it
needs, however the tensors were split when they were saved. ``manifest.json`` lists the tensors,
their blocks and the SHA-256 of every file. It is written last, into a folder that still has another
name; renaming that folder makes the checkpoint exist.

Nothing in a checkpoint is code or is unpickled: reading one from an unknown source is safe.
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
# A rank that has died is noticed at once; this is for disks that take their time.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class LocalShard:
    """This rank's part of a tensor that is split over ranks.

    Attributes:
        shape: of the whole tensor.
        pieces: (offsets in the whole tensor, values) of each block that is here.
    """

    shape: Sequence[int]
    pieces: Sequence[tuple[Sequence[int], Tensor]]


T = TypeVar("T")
Tensors = Mapping[str, Tensor | LocalShard]


def _as_part(tensor: Tensor | LocalShard) -> LocalShard:
    if isinstance(tensor, LocalShard):
        return tensor
    return LocalShard(tensor.shape, [([0] * tensor.ndim, tensor)])


def _blocks(tensors: Tensors) -> Iterator[Block]:
    for name, tensor in tensors.items():
        for offsets, values in _as_part(tensor).pieces:
            yield Block(name, tuple(offsets), values)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


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
    with _agreed(final, group):
        if is_main:
            _clear(folder)
            partial.mkdir(parents=True)
    share = _share(list(_blocks(tensors)), group)
    with _agreed(final, group):
        written = _write(partial, share, {name: list(x.shape) for name, x in tensors.items()})
    everything = _gather(written, group)
    with _agreed(final, group):
        if is_main:
            manifest = {"step": step, "facts": dict(facts), **_merge(everything)}
            with (partial / _MANIFEST).open("w") as file:
                json.dump(manifest, file)
                file.flush()
                os.fsync(file.fileno())
            _publish(partial, final, keep)
    return final


@contextmanager
def _agreed(final: Path, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Turn a failure of the block on any rank into one error on all, and free its disk space."""
    failure = None
    try:
        yield
    except Exception as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        failure = PretrainError(
            f"cannot write the checkpoint {final}: {cause}; earlier checkpoints are intact: "
            "see to the disk and start again"
        )
    try:
        raise_on_all_ranks(failure, group)
    except PretrainError:
        if dist.get_rank() == 0:
            shutil.rmtree(final.with_suffix(_PARTIAL), ignore_errors=True)
        raise


def _clear(folder: Path) -> None:
    """Remove what interrupted saves and removals left behind."""
    for suffix in (_PARTIAL, _REMOVED):
        for path in folder.glob(f"step-*{suffix}"):
            shutil.rmtree(path)


def _publish(partial: Path, final: Path, keep: int) -> None:
    """Give a complete checkpoint its name, and remove those older than the newest ``keep``."""
    _sync(partial)
    _remove(final)
    partial.rename(final)
    _sync(final.parent)
    for old in steps(final.parent)[:-keep]:
        _remove(path_of(final.parent, old))


def _share(blocks: Sequence[Block], group: dist.ProcessGroup | None) -> list[Block]:
    """Choose which of its blocks this rank writes: each is written once, the load balanced.

    Rank 0 decides, from every rank's list: its time grows with the number of blocks on all ranks.
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
        offered: name, offsets and bytes of each block, by rank.
    """
    holders: dict[Offer, list[tuple[int, int]]] = defaultdict(list)
    for rank, offers in enumerate(offered):
        for index, offer in enumerate(offers):
            holders[offer].append((rank, index))
    chosen: list[list[int]] = [[] for _ in offered]
    load = [0] * len(offered)
    # Those with fewest choices first, and the largest first, so that the rest can even out.
    for offer in sorted(holders, key=lambda offer: (len(holders[offer]), -offer[2])):
        rank, index = min(holders[offer], key=lambda holder: load[holder[0]])
        chosen[rank].append(index)
        load[rank] += offer[2]
    return chosen


def _gather(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Return every rank's value on rank 0, and an empty list elsewhere."""
    if dist.get_rank() != 0:
        dist.gather_object(value, None, dst=0, group=group)
        return []
    values: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(value, values, dst=0, group=group)
    return values


class _Written(NamedTuple):
    """The files that a rank wrote, by SHA-256, and its tensors as the manifest lists them."""

    files: dict[str, str]
    tensors: dict[str, dict[str, Any]]


def _write(folder: Path, blocks: Sequence[Block], shapes: Mapping[str, Sequence[int]]) -> _Written:
    """Write this rank's blocks; a second block of a tensor goes to a second file, and so on."""
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


def _merge(everything: Sequence[_Written]) -> dict[str, Any]:
    """Return the manifest's files and tensors: those of all ranks."""
    files: dict[str, str] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for written in everything:
        files |= written.files
        for name, entry in written.tensors.items():
            if name in tensors:
                tensors[name]["blocks"] += entry["blocks"]
            else:
                tensors[name] = entry
    return {"files": files, "tensors": tensors}


def _sync(path: Path) -> None:
    """Make the names in a folder survive a loss of power."""
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

    def _stage(self, tensors: Tensors) -> dict[str, LocalShard]:
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
            staged[name] = LocalShard(part.shape, pieces)
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


class Stored(NamedTuple):
    """A tensor in a checkpoint.

    Attributes:
        blocks: file, offsets in the tensor, and shape of each block.
    """

    dtype: torch.dtype
    shape: torch.Size
    blocks: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


class Manifest(NamedTuple):
    """Everything in a checkpoint but the values of its tensors.

    Attributes:
        facts: the ``facts`` that :func:`save` was given, as JSON returns them.
        files: SHA-256 by file name.
        tensors: by name in the whole model.
    """

    step: int
    facts: dict[str, Any]
    files: dict[str, str]
    tensors: dict[str, Stored]


_REMEDY = "remove that folder to resume from the checkpoint before it, or start a new run_dir"


def read_manifest(path: Path) -> Manifest:
    """Read and validate a checkpoint's manifest; the files are not looked at.

    Raises:
        PretrainError: it is not a checkpoint of this program.
    """
    try:
        manifest = json.loads(untrusted_files.read_bytes(path / _MANIFEST, _MAX_MANIFEST_BYTES))
        files = {_file_name(name): str(digest) for name, digest in manifest["files"].items()}
        tensors = {name: _stored(entry, files) for name, entry in manifest["tensors"].items()}
        return Manifest(int(manifest["step"]), dict(manifest["facts"]), files, tensors)
    # JSON of any shape, at any depth, can stand there.
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError
    ) as error:  # fmt: skip
        raise PretrainError(
            f"{path} is not a checkpoint of this program (no readable {_MANIFEST}): {_REMEDY}"
        ) from error


def _file_name(name: str) -> str:
    if not _FILE.fullmatch(name):
        raise ValueError(f"{name!r} is no file of a checkpoint")
    return name


def _stored(entry: dict[str, Any], files: Mapping[str, str]) -> Stored:
    """Return a manifest's entry of a tensor, if its blocks lie within it and fill it."""
    shape = torch.Size(entry["shape"])
    # torch.Size takes nothing but whole numbers.
    blocks = [
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
    return Stored(tensor_files.dtype_of(entry["dtype"]), shape, blocks)


def verify(path: Path, manifest: Manifest, rank: int = 0, ranks: int = 1) -> None:
    """Check that files are as they were written: this rank's share of them.

    Raises:
        PretrainError: a file is missing or damaged.
    """
    for name in sorted(manifest.files)[rank::ranks]:
        file = path / name
        try:
            intact = file.is_file() and _checksum(file) == manifest.files[name]
        except OSError as error:
            raise PretrainError(f"cannot read {file}: {error.strerror}; {_REMEDY}") from error
        if not intact:
            fault = "is not what was written" if file.is_file() else "is missing"
            raise PretrainError(f"the checkpoint {path} is damaged: {name} {fault}; {_REMEDY}")


def shapes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of every tensor in a checkpoint, by name.

    Raises:
        PretrainError: it is not a checkpoint of this program.
    """
    return {name: (x.shape, x.dtype) for name, x in read_manifest(path).tensors.items()}


def load(path: Path, tensors: Tensors) -> None:
    """Fill ``tensors`` in place from a checkpoint, each by its name in the whole model.

    Reads just the parts that are wanted, and no other process is needed. Values are converted to
    the tensors' dtypes.

    Raises:
        PretrainError: the checkpoint is of another model (names the first tensor that it lacks,
            or has in another shape), or damaged.
    """
    stored = read_manifest(path).tensors
    for name, tensor in tensors.items():
        if name not in stored:
            raise PretrainError(
                f"the checkpoint {path} is of another model: it has no {name}; "
                "use the configuration it was made with, or another run_dir"
            )
        if stored[name].shape != torch.Size(tensor.shape):
            raise PretrainError(
                f"the checkpoint {path} is of another model: {name} is "
                f"{tuple(stored[name].shape)} there and {tuple(tensor.shape)} here; "
                "use the configuration it was made with, or another run_dir"
            )
    reads: dict[str, list[tensor_files.Read]] = defaultdict(list)
    for block in _blocks(tensors):
        for file, read in _overlaps(block, stored[block.name]):
            reads[file].append(read)
    for file, wanted in reads.items():
        try:
            tensor_files.read(path / file, wanted)
        except (OSError, ValueError) as error:
            raise PretrainError(f"the checkpoint {path} is damaged: {error}; {_REMEDY}") from error


def _overlaps(block: Block, stored: Stored) -> Iterator[tuple[str, tensor_files.Read]]:
    """Yield the file and part of each stored block that a block has elements of."""
    for file, offsets, size in stored.blocks:
        sides = list(zip(block.offsets, block.values.shape, offsets, size, strict=True))
        first = [max(a, b) for a, _, b, _ in sides]
        last = [min(a + m, b + n) for a, m, b, n in sides]
        if any(start >= end for start, end in zip(first, last, strict=True)):
            continue
        target = block.values
        for dim, (start, end) in enumerate(zip(first, last, strict=True)):
            target = target.narrow(dim, start - block.offsets[dim], end - start)
        start_there = tuple(a - b for a, b in zip(first, offsets, strict=True))
        yield file, tensor_files.Read(block.name, start_there, target)
