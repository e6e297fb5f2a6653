"""Writing of a run's checkpoints, in the background if asked to."""

from collections.abc import Mapping
from concurrent import futures
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.checkpoint import storage
from pretrain.checkpoint.local_tier import LocalTier
from pretrain.checkpoint.storage import Share, Tensors
from pretrain.runtime import background
from pretrain.runtime.faults import is_time_limit

# Ranks may wait for each other's slow disks; a rank that has died is noticed at once.
_WRITE_TIMEOUT = timedelta(hours=12)


class Saver:
    """Writes a run's checkpoints one after another, in the background if asked to.

    Every rank creates one and calls its methods at the same points of the run. As a context
    manager, it finishes writing at the end. An asynchronous
    save copies the blocks that this rank writes to memory, and leaves the writing to a thread. The
    threads of all ranks communicate through a process group that the run's steps do not use.

    Args:
        folder: the folder of all checkpoints.
        keep: number of checkpoints to keep.
        asynchronous: write in the background.
        group: a group of all ranks over gloo; default: a new one, made when it is first needed,
            since each rank then connects to every other one.
        local_tier: where to write checkpoints first, in the background.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        asynchronous: bool,
        group: dist.ProcessGroup | None = None,
        local_tier: LocalTier | None = None,
    ) -> None:
        self.folder, self._keep = folder, keep
        self._pending: Future[None] | None = None
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._asynchronous = asynchronous
        self._group, self._local_tier = group, local_tier

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """Finish writing, unless other ranks do not answer; an error of it is not raised."""
        if self._pending is not None and not (error and is_time_limit(error)):
            futures.wait([self._pending])

    def save(self, step: int, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        """Wait for the previous checkpoint to be written, then write this one or start to.

        Raises:
            PretrainError: this or the previous checkpoint could not be written.
        """
        self.wait()
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=_WRITE_TIMEOUT)
        share = storage.share_of(tensors, dist.get_world_size())
        if not self._asynchronous:
            self._write(step, share, facts)
            return
        write = partial(self._write, step, self._stage(share), facts)
        self._pending = background.start(write, "checkpoint")

    def _write(self, step: int, share: Share, facts: Mapping[str, Any]) -> None:
        if self._local_tier is None:
            storage.write(self.folder, step, share, facts, self._keep, self._group)
        else:
            self._local_tier.write(step, share, facts, self._group)

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

    def _stage(self, share: Share) -> Share:
        """Copy the blocks to buffers in memory, which are reused for every checkpoint."""
        blocks, before = [], self._buffers
        self._buffers = {}
        for block in share.blocks:
            values, key = block.values, (block.name, block.offsets)
            buffer = before.get(key)
            if buffer is None:
                buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[key] = buffer.copy_(values, non_blocking=True)
            blocks.append(block._replace(values=buffer))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return share._replace(blocks=blocks)
