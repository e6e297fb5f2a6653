"""Checkpoints on a disk of each node, which are written first and then copied to ``run_dir``.

Each rank writes its files to a folder that only it writes to. A checkpoint exists once each rank
has renamed its folder. It is removed when its copy exists. After a crash in between, the next start
copies it, if the nodes are the same; which rank runs on which of them does not matter.

A run's folder there has the name of ``run_dir`` and a random number that ``run_dir`` keeps in
``run.id``, so that neither a run in the same place after ``run_dir`` was deleted, nor one in
another container, nor a copy of ``run_dir`` uses or removes its files.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from pretrain import untrusted_files
from pretrain.checkpoint import storage
from pretrain.checkpoint.collective import FailedError, on_all_ranks, on_rank_0
from pretrain.checkpoint.storage import Share
from pretrain.errors import PretrainError
from pretrain.runtime.output import warn

_FOLDER = re.compile(r"rank-(\d{5,})-of-(\d{5,})")
_SAVE = re.compile(r"step-(\d{8})-([0-9a-f]{16})")
_RUN_ID = re.compile("[0-9a-f]{16}")
_PARTIAL, _DIGESTS = "save.partial", "digests.json"
_MAX_DIGESTS_BYTES = 64 << 20
_BUFFER_BYTES = 4 << 20


class LocalSave(NamedTuple):
    """A checkpoint in the local tier.

    Attributes:
        name: a random number, so that files of two saves of the same step are never mixed.
        world_size: number of ranks that wrote it.
    """

    step: int
    name: str
    world_size: int


class LocalTier:
    """The local tier of a run; all ranks create it together.

    Args:
        local_dir: a folder that exists on every node, or can be made there.
        folder: the folder of the run's checkpoints, which all ranks see.
        keep: number of checkpoints to keep there.
        group: a process group of all ranks; default: the default group.

    Raises:
        PretrainError: on all ranks, if ``run_dir`` cannot be written.
    """

    def __init__(
        self, local_dir: Path, folder: Path, keep: int, group: dist.ProcessGroup | None = None
    ) -> None:
        try:
            run_id = on_rank_0(lambda: _run_id(folder.parent), group)
        except FailedError as error:
            raise PretrainError(f"cannot write into run_dir={folder.parent}: {error}") from error
        self.root = local_dir / f"{folder.parent.name}-{run_id}"
        self._folder, self._keep = folder, keep

    def write(
        self, step: int, share: Share, facts: Mapping[str, Any], group: dist.ProcessGroup | None
    ) -> None:
        """Write a checkpoint to the local tier, and copy it; every rank calls this.

        Raises:
            PretrainError: on all ranks, if that failed on any; earlier checkpoints are unchanged.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        digests: dict[str, str] = {}
        own = self.root / f"rank-{rank:05}-of-{size:05}"
        partial = own / _PARTIAL

        def write() -> storage.Part:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            part = storage.write_part(partial, share)
            digests.update(part.files)
            return part

        try:
            parts = on_all_ranks(write, group)

            def finish() -> str:
                digests.update(storage.write_manifest(partial, step, facts, parts))
                return secrets.token_hex(8)

            final = own / f"step-{step:08}-{on_rank_0(finish, group)}"
            on_all_ranks(lambda: _complete(partial, final, digests), group)
        except FailedError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise storage.not_written(self.root / f"step-{step:08}", error) from error
        self._copy(step, [final], group)
        for path in own.iterdir():
            shutil.rmtree(path, ignore_errors=True)

    def flush(self, newest: int | None, group: dist.ProcessGroup | None) -> None:
        """Copy the newest complete checkpoint, if ``run_dir`` has none as new; every rank calls it.

        Each rank tells rank 0 which folders it sees: some 100 bytes for each rank of a node.

        Args:
            newest: step of the newest checkpoint in ``run_dir``.

        Raises:
            PretrainError: on all ranks, if a file is damaged or cannot be copied, or a node has no
                such folder.
        """
        try:
            seen = on_all_ranks(self._list, group)
        except FailedError as error:
            raise PretrainError(
                f"checkpoint.local_dir={self.root.parent} cannot be used ({error}): choose a "
                "folder that every node can write to, or leave it out"
            ) from error
        chosen, tasks = on_rank_0(lambda: _choose(seen, newest), group)
        if chosen is not None:
            mine = [self.root / path for path in tasks.get(dist.get_rank(), [])]
            self._copy(chosen.step, mine, group)
            newest = chosen.step
        for path in self.root.glob("rank-*/*"):
            match = _SAVE.fullmatch(path.name)
            is_old = match and newest is not None and int(match[1]) <= newest
            if is_old or path.name == _PARTIAL:  # another number of ranks left it
                shutil.rmtree(path, ignore_errors=True)

    def _list(self) -> list[str]:
        """This node's folders of saves, relative to the root."""
        self.root.mkdir(parents=True, exist_ok=True)
        return [str(path.relative_to(self.root)) for path in self.root.glob("rank-*/step-*")]

    def _copy(self, step: int, sources: Sequence[Path], group: dist.ProcessGroup | None) -> None:
        """Copy a checkpoint to ``run_dir``; each rank its folders in ``sources``."""
        final = storage.path_of(self._folder, step)
        storage.build(
            final, self._keep, lambda partial: _copy_all(sources, partial), _nothing_else, group
        )


def _choose(
    seen: Sequence[Sequence[str]], newest: int | None
) -> tuple[LocalSave | None, dict[int, list[str]]]:
    """The newest complete save that is newer than a step, and the folders that each rank copies.

    Args:
        seen: the folders that each rank sees.
    """
    places: dict[LocalSave, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, paths in enumerate(seen):
        for path in paths:
            folder, _, name = path.partition("/")
            by, what = _FOLDER.fullmatch(folder), _SAVE.fullmatch(name)
            if by and what:
                found = LocalSave(int(what[1]), what[2], int(by[2]))
                places[found][int(by[1])].append(rank)
    newer = sorted(save for save in places if save.step > (-1 if newest is None else newest))
    for save in reversed(newer):
        missing = [r for r in range(save.world_size) if r not in places[save]]
        if missing:
            warn(
                f"checkpoint.local_dir has step {save.step} without the files of "
                f"{len(missing)} of {save.world_size} ranks (such as rank {missing[0]}), whose "
                "node is missing: it is left out"
            )
            continue
        tasks: dict[int, list[str]] = defaultdict(list)
        for writer, ranks in places[save].items():
            path = f"rank-{writer:05}-of-{save.world_size:05}/step-{save.step:08}-{save.name}"
            tasks[ranks[writer % len(ranks)]].append(path)
        return save, dict(tasks)
    return None, {}


def _nothing_else(_partial: Path, _results: list[None]) -> None:
    """The manifest has been copied, too."""


def _run_id(run_dir: Path) -> str:
    """The random number that ``run_dir`` keeps; made if it has none, or one of another folder.

    The file also contains its own inode number, which a copy does not have.
    """
    path = run_dir / "run.id"
    if path.is_file():
        known, _, inode = path.read_text(errors="replace").partition(" ")
        if _RUN_ID.fullmatch(known) and inode == str(path.stat().st_ino):
            return known
    run_dir.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.touch()
    made = secrets.token_hex(8)
    _write(partial, f"{made} {partial.stat().st_ino}")
    partial.rename(path)
    return made


def _complete(partial: Path, final: Path, digests: Mapping[str, str]) -> None:
    _write(partial / _DIGESTS, json.dumps(digests))
    storage.flush_names(partial)
    partial.rename(final)
    storage.flush_names(final.parent)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _copy_all(sources: Sequence[Path], target: Path) -> None:
    """Copy the files of some folders, comparing them with their digests.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a file is damaged.
    """
    for source in sources:
        digests = json.loads(untrusted_files.read_bytes(source / _DIGESTS, _MAX_DIGESTS_BYTES))
        remedy = f"remove {source.parent.parent} on every node"
        for name, digest in digests.items():
            path = source / Path(name).name
            if not path.is_file():
                raise ValueError(f"{path} is missing: {remedy}")
            if _copy_file(path, target / path.name) != digest:
                raise ValueError(f"{path} differs from its checksum: {remedy}")


def _copy_file(source: Path, target: Path) -> str:
    """Copy a file and force it to disk; its SHA-256."""
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while chunk := reading.read(_BUFFER_BYTES):
            digest.update(chunk)
            writing.write(chunk)
        writing.flush()
        os.fsync(writing.fileno())
    return digest.hexdigest()
