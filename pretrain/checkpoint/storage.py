"""Storage of checkpoints: sharded over the ranks, written atomically, and verified when read.

A checkpoint is a folder ``step-00000100`` of safetensors files. Each rank writes blocks of its
tensors; a block that several ranks have is written by one of them, which each of them knows without
asking the others. Blocks are stored under the tensor's name in the whole model with their offsets
in it, so a rank reads only the parts it needs, however the tensors were split when they were saved.
``manifest.json`` lists the tensors, their blocks and the SHA-256 of every file. It is written last,
into a folder with a temporary name; renaming that folder makes the checkpoint exist.

Nothing in a checkpoint is executed or unpickled: reading one from an untrusted source is safe.
"""

import heapq
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, file_digest, sha256
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain import untrusted_files
from pretrain.checkpoint import tensor_files
from pretrain.checkpoint.collective import FailedError, on_all_ranks, on_rank_0
from pretrain.checkpoint.tensor_files import Block
from pretrain.errors import PretrainError
from pretrain.runtime.progress import counted

_FOLDER = re.compile(r"step-(\d{8})")
_FILE = re.compile(r"rank-\d{5,}-\d+\.safetensors")
_MANIFEST = "manifest.json"
# A trillion parameters have some hundred MiB.
_MAX_MANIFEST_BYTES = 8 << 30
_PARTIAL, _REMOVED = ".partial", ".removed"


@dataclass(frozen=True)
class Copy:
    """Position of this rank among the ranks that have copies of the same blocks.

    Attributes:
        group: name of these ranks. All of them list the same blocks with it, in the same order.
        index, count: position, and number of ranks.
    """

    group: str = "this rank"
    index: int = 0
    count: int = 1


_ONLY = Copy()


@dataclass(frozen=True)
class LocalShard:
    """This rank's part of a tensor that is split over ranks.

    Attributes:
        shape: shape of the whole tensor.
        blocks: (offsets in the whole tensor, values) of each block on this rank.
        copy: which other ranks have the same blocks; default: none.
        parts: number of ranks whose blocks together fill the tensor once, each of which passes it,
            without ``copy``; None: not known before the checkpoint is read.
    """

    shape: Sequence[int]
    blocks: Sequence[tuple[Sequence[int], Tensor]]
    copy: Copy = _ONLY
    parts: int | None = None


T = TypeVar("T")
Tensors = Mapping[str, Tensor | LocalShard]


def _as_shard(tensor: Tensor | LocalShard) -> LocalShard:
    """A tensor that only this rank has as its single block; a shard as it is."""
    if isinstance(tensor, LocalShard):
        return tensor
    return LocalShard(tensor.shape, [([0] * tensor.ndim, tensor)])


def _blocks(tensors: Tensors) -> Iterator[tuple[Block, Copy]]:
    for name, tensor in tensors.items():
        shard = _as_shard(tensor)
        for offsets, values in shard.blocks:
            yield Block(name, tuple(offsets), values), shard.copy


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in ``folder``, in ascending order.

    Raises:
        PretrainError: ``folder`` is a file, or a link to a folder that does not exist, such as one
            on a disk that is not mounted.
    """
    if not folder.is_dir():
        if os.path.lexists(folder):
            kind = "a link to nothing" if folder.is_symlink() else "not a folder"
            raise PretrainError(
                f"{folder} is {kind}: mount the disk or restore the folder with the checkpoints, "
                "or remove it to train without them"
            )
        return []
    matches = (_FOLDER.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def path_of(folder: Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return folder / f"step-{step:08d}"


# ---------------------------------------------------------------------- writing


class Share(NamedTuple):
    """The blocks that this rank writes of a checkpoint.

    Attributes:
        shapes: shape of the whole tensor, by name.
        expected, written: :func:`_weight_of` the blocks that this rank has, divided by the number
            of its copies, and of those that it writes; both times the number of ranks. Of tensors
            in parts also the elements that the ranks have on average, and those of this rank.
            Summed over all ranks, they are equal.
    """

    blocks: list[Block]
    shapes: dict[str, list[int]]
    expected: int
    written: int


class Part(NamedTuple):
    """A rank's part of a checkpoint, once it is written.

    Attributes:
        files: SHA-256 of its files, by name.
        tensors: its blocks by tensor, as JSON.
        elements: number of elements in its blocks of each tensor, by a random number for the name.
        sizes: number of elements of each of these tensors as a whole.
        expected, written: see :class:`Share`.
    """

    files: dict[str, str]
    tensors: str
    elements: dict[int, int]
    sizes: dict[int, int]
    expected: int
    written: int


def save(
    folder: Path,
    step: int,
    tensors: Tensors,
    facts: Mapping[str, Any],
    keep: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """:func:`write` the blocks of ``tensors``, by their names in the whole model; those that
    several ranks have are written once."""
    return write(folder, step, share_of(tensors, dist.get_world_size()), facts, keep, group)


def write(
    folder: Path,
    step: int,
    share: Share,
    facts: Mapping[str, Any],
    keep: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint; every rank calls this with its own share.

    Rank 0 receives from every rank the names of its files and its part of the manifest, some 150
    bytes for each block, and joins them without reading them. This grows with the number of blocks
    of the whole model, and by some 100 bytes for each rank.

    Args:
        folder: the folder of all checkpoints.
        step: number of the update after which the tensors were taken.
        facts: everything else to store, as values of JSON; those of rank 0 are written.
        keep: number of checkpoints to keep; older ones are removed once this one exists.
        group: a process group of all ranks; default: the default group.

    Returns:
        The checkpoint's folder.

    Raises:
        PretrainError: writing failed on any rank; earlier checkpoints are unchanged.
    """
    final = path_of(folder, step)
    build(
        final,
        keep,
        lambda partial: write_part(partial, share),
        lambda partial, parts: write_manifest(partial, step, facts, parts),
        group,
    )
    return final


def build(
    final: Path,
    keep: int,
    fill: Callable[[Path], T],
    finish: Callable[[Path, list[T]], object],
    group: dist.ProcessGroup | None,
) -> None:
    """Make a checkpoint's folder, under another name until it is complete.

    Args:
        final: the checkpoint's folder.
        fill: writes a rank's files to a folder.
        finish: called on rank 0 with the results of all ranks.
        keep, group: as for :func:`write`.

    Raises:
        PretrainError: as :func:`write`.
    """
    partial = final.with_suffix(_PARTIAL)

    def prepare() -> None:
        _remove_leftovers(final.parent)
        partial.mkdir(parents=True)

    def publish() -> None:
        finish(partial, results)
        _publish(partial, final, keep)

    try:
        on_rank_0(prepare, group)
        results = on_all_ranks(lambda: fill(partial), group)
        on_rank_0(publish, group)
    except FailedError as error:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise not_written(final, error) from error


def not_written(final: Path, error: FailedError) -> PretrainError:
    """The error for a checkpoint that could not be written."""
    return PretrainError(
        f"cannot write the checkpoint {final}: {error}; earlier checkpoints are intact: free or "
        "repair the disk, and start again"
    )


def write_part(folder: Path, share: Share) -> Part:
    """Write this rank's files."""
    by_file, entries = files_of(share, dist.get_rank())
    files = {name: tensor_files.write(folder / name, by_file[name]) for name in by_file}
    return part_of(share, files, entries)


def part_of(share: Share, files: dict[str, str], entries: str) -> Part:
    """The part of a rank, given the SHA-256 of its files, and its blocks by tensor as JSON."""
    elements: dict[int, int] = defaultdict(int)
    for block in share.blocks:
        elements[_random_number(block.name)] += block.values.numel()
    sizes = {_random_number(name): prod(shape) for name, shape in share.shapes.items()}
    return Part(files, entries, dict(elements), sizes, share.expected, share.written)


def write_manifest(
    folder: Path, step: int, facts: Mapping[str, Any], parts: Sequence[Part]
) -> dict[str, str]:
    """Write ``manifest.json`` and force it to disk, given the part of each rank.

    Returns:
        The file's name and SHA-256.

    Raises:
        OSError: it cannot be written.
        ValueError: some blocks were not written once, so :meth:`Checkpoint.open` would refuse them.
    """
    if sum(part.expected for part in parts) != sum(part.written for part in parts):
        raise ValueError(
            "ranks that have copies or parts of the same tensors list different ones (are all of "
            "them running the same version of the program?)"
        )
    stored: dict[int, int] = defaultdict(int)
    for part in parts:
        for number, elements in part.elements.items():
            stored[number] += elements
    if stored != {number: size for part in parts for number, size in part.sizes.items()}:
        for name, entry in _joined(json.loads(part.tensors) for part in parts).items():
            _check_filled(name, entry)
    files = {name: digest for part in parts for name, digest in part.files.items()}
    start = json.dumps({"step": step, "facts": dict(facts), "files": files})
    # Not parsed: with a trillion parameters these are tens of MiB.
    tensors = (
        f",\n{part.tensors}" if number else part.tensors for number, part in enumerate(parts)
    )
    digest = sha256()
    with (folder / _MANIFEST).open("wb") as file:
        for text in (start[:-1] + ', "tensors": [', *tensors, "]}"):
            file.write(text.encode())
            digest.update(text.encode())
        file.flush()
        os.fsync(file.fileno())
    return {_MANIFEST: digest.hexdigest()}


def _remove_leftovers(folder: Path) -> None:
    """Remove the folders of interrupted saves and removals."""
    for suffix in (_PARTIAL, _REMOVED):
        for path in folder.glob(f"step-*{suffix}"):
            shutil.rmtree(path)


def _publish(partial: Path, final: Path, keep: int) -> None:
    """Rename a complete checkpoint, and remove those older than the newest ``keep``."""
    flush_names(partial)
    _remove(final)
    partial.rename(final)
    flush_names(final.parent)
    for old in steps(final.parent)[:-keep]:
        _remove(path_of(final.parent, old))


def _remove(path: Path) -> None:
    """Delete a checkpoint such that a kill half-way leaves nothing that looks like one."""
    if path.exists():
        renamed = path.with_suffix(_REMOVED)
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)
        shutil.rmtree(renamed)


def flush_names(path: Path) -> None:
    """Force a folder's list of names to disk, so that it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share_of(tensors: Tensors, world_size: int) -> Share:
    """The blocks that this rank writes: each is written once, with a balanced load.

    Every rank decides by itself, because those that have copies of blocks decide the same.
    """
    by_copy: dict[Copy, list[Block]] = defaultdict(list)
    for block, copy in _blocks(tensors):
        by_copy[copy].append(block)
    chosen: list[Block] = []
    expected = 0
    for copy, blocks in by_copy.items():
        sizes = [block.values.nbytes for block in blocks]
        chosen += [blocks[number] for number in shares(sizes, copy.count)[copy.index]]
        expected += sum(map(_weight_of, blocks)) * (world_size // copy.count)
    written = sum(map(_weight_of, chosen)) * world_size
    for name, tensor in tensors.items():
        if isinstance(tensor, LocalShard) and tensor.parts is not None:
            key = _random_number(name)
            expected += key * prod(tensor.shape) * (world_size // tensor.parts)
            written += key * sum(values.numel() for _, values in tensor.blocks) * world_size
    shapes = {block.name: list(tensors[block.name].shape) for block in chosen}
    return Share(chosen, shapes, expected, written)


def shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Divide items among ``count`` ranks: indices for each, with about the same sum of sizes.

    The largest come first, each to the rank with the least so far (Graham, 1969).
    """
    chosen: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, rank) for rank in range(count)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, rank = loads[0]
        chosen[rank].append(index)
        heapq.heapreplace(loads, (load + sizes[index], rank))
    return chosen


def _weight_of(block: Block) -> int:
    """A random number for each block, to compare sets of blocks by sums."""
    return _random_number(f"{block.name} {block.offsets} {tuple(block.values.shape)}")


def _random_number(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def files_of(share: Share, rank: int) -> tuple[dict[str, list[Block]], str]:
    """The files of a rank's blocks: a tensor's second block goes to a second file, and so on.

    Returns:
        Blocks by file name, and the rank's blocks by tensor as JSON, for the manifest.
    """
    by_file: dict[str, list[Block]] = defaultdict(list)
    entries: dict[str, dict[str, Any]] = {}
    for block in share.blocks:
        entry = entries.setdefault(
            block.name,
            {
                "dtype": tensor_files.dtype_name(block.values.dtype),
                "shape": share.shapes[block.name],
                "blocks": [],
            },
        )
        file = f"rank-{rank:05}-{len(entry['blocks'])}.safetensors"
        entry["blocks"].append([file, block.offsets, list(block.values.shape)])
        by_file[file].append(block)
    return by_file, json.dumps(entries)


# ---------------------------------------------------------------------- reading


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
            entries = _joined(manifest["tensors"])
            tensors = {name: _stored(name, entry, files) for name, entry in entries.items()}
            return cls(path, int(manifest["step"]), dict(manifest["facts"]), files, tensors)
        except _NotFilledError as error:
            raise PretrainError(
                f"the checkpoint {path} cannot be loaded: {error}. Other tensors in it may be "
                f"whole: move it out of {path.parent} to resume from the checkpoint before it"
            ) from error
        # The file may contain JSON of any shape and depth.
        except (
            OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError
        ) as error:  # fmt: skip
            raise PretrainError(
                f"{path} is not a checkpoint of this program (no readable {_MANIFEST}): {_REMEDY}"
            ) from error

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare the files with their checksums; each file by one rank, with a balanced load.

        Raises:
            PretrainError: a file is missing or damaged.
        """
        sizes = dict.fromkeys(sorted(self.files), 0)
        for tensor in self.tensors.values():
            for name, _, shape in tensor.blocks:
                sizes[name] += prod(shape) * tensor.dtype.itemsize
        names = list(sizes)
        share = shares(list(sizes.values()), world_size)[rank]
        for number in counted(share, f"verifying {self.path.name}", "files"):
            name = names[number]
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
        for block, _ in _blocks(tensors):
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


def _joined(parts: Any) -> dict[str, dict[str, Any]]:
    """The entries of all ranks by tensor; those of older checkpoints are joined already."""
    if isinstance(parts, dict):
        return parts
    tensors: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, entry in part.items():
            known = tensors.setdefault(name, {**entry, "blocks": []})
            if (known["dtype"], known["shape"]) != (entry["dtype"], entry["shape"]):
                raise ValueError(f"{name} has several dtypes or shapes")
            known["blocks"] += entry["blocks"]
    return tensors


class _NotFilledError(ValueError):
    """The blocks of a tensor have more or fewer elements than the tensor."""


def _check_filled(name: str, entry: dict[str, Any]) -> None:
    """Raise _NotFilledError unless the blocks in a tensor's entry have as many elements as it."""
    stored, expected = sum(prod(size) for _, _, size in entry["blocks"]), prod(entry["shape"])
    if stored != expected:
        raise _NotFilledError(f"{name!r:.200} has {stored:,} elements in it, not {expected:,}")


def _stored(name: str, entry: dict[str, Any], files: Mapping[str, str]) -> StoredTensor:
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
    _check_filled(name, entry)
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
