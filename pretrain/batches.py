"""Which packed sequences a rank sees, and how they become micro-batches."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.config import Config
from pretrain.data import Data, PackedSample, skipped
from pretrain.data.skipped import Skip, Skipped
from pretrain.errors import PretrainError
from pretrain.model.multimodal import MicroBatch
from pretrain.parallel import ParallelContext
from pretrain.runtime.output import warn


def collate(
    samples: Sequence[PackedSample], device: torch.device, *, images: bool = True
) -> MicroBatch:
    """Stack packed sequences; their images follow one another in the sequences' order.

    Without ``images``, for a pipeline stage that does not see them, they are left out.
    """
    patches = torch.cat([sample.patches for sample in samples])
    grids = torch.cat([sample.grids for sample in samples])
    if not images:
        patches, grids = patches[:0], grids[:0]
    return MicroBatch(
        tokens=torch.stack([sample.tokens for sample in samples]).to(device),
        labels=torch.stack([sample.labels for sample in samples]).to(device),
        weights=torch.stack([sample.weights for sample in samples]).to(device),
        categories=torch.stack([sample.categories for sample in samples]).to(device),
        documents=torch.stack([sample.documents for sample in samples]).to(device),
        patches=patches.to(device),
        grids=grids.to(device),
    )


def for_step(config: Config, context: ParallelContext, data: Data, step: int) -> list[MicroBatch]:
    """This rank's micro-batches of update ``step`` of 1, 2, …: a function of seed and step alone.

    The global batch is the same sequences in the same order for every number of ranks.
    """
    share = config.global_batch_size // context.data_size
    first = (step - 1) * config.global_batch_size + context.data_rank * share
    samples = [data.sample("train", index) for index in range(first, first + share)]
    return _micro_batches(samples, config, context)


class SkippedSamples:
    """Samples not read by any rank, listed in the run's folder; past the limit all ranks leave."""

    def __init__(self, config: Config, context: ParallelContext, data: Data) -> None:
        self._path = Path(config.run_dir) / skipped.FILE
        self._own = bool(config.data.sources)
        self._context, self._data = context, data
        self._all = Skipped(config.data.max_corrupt)
        # Listed by earlier jobs of this run. All ranks read before any writes, in synchronize().
        self._listed = {skip.name for skip in skipped.read(self._path)} if self._own else set()

    def synchronize(self, failure: Exception | None = None) -> None:
        """Tell each other what was skipped since the last time; called by all ranks at once.

        Raises:
            PretrainError: a rank failed, or too much is corrupt; the same on every rank.
        """
        found = self._data.take_skipped()
        if not self._own:
            if failure:
                raise failure
            return
        news = torch.tensor([len(found) + (failure is not None)], device=self._context.device)
        dist.all_reduce(news)
        if not news.item():
            return
        every: list[tuple[str | None, list[Skip]]] = [(None, [])] * self._context.world_size
        dist.all_gather_object(every, (str(failure) if failure else None, found))
        failures = [message for message, _ in every if message is not None]
        if failures:
            raise PretrainError(failures[0]) from failure
        together = [skip for _, skips in every for skip in skips]
        if self._context.is_main:
            unlisted = {skip.name: skip for skip in together if skip.name not in self._listed}
            try:
                skipped.write(self._path, unlisted.values())
            except OSError as error:
                warn(f"cannot write {self._path} ({error.strerror}): some samples are not listed")
        self._listed |= {skip.name for skip in together}
        self._all.add(together)


def prefetch(
    config: Config,
    context: ParallelContext,
    data: Data,
    steps: Iterable[int],
    skips: SkippedSamples,
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """Yield each step with its micro-batches, making the next ones while these are worked on.

    Images are drawn, or read, in a thread: it runs while the step waits for other ranks.

    Raises:
        PretrainError: the data cannot be read on some rank; the same on every rank.
    """

    def settled(future: Future[list[MicroBatch]]) -> list[MicroBatch]:
        skips.synchronize(future.exception())  # type: ignore[arg-type]
        return future.result()

    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[int, Future[list[MicroBatch]]] | None = None
        for step in steps:
            following = step, pool.submit(for_step, config, context, data, step)
            if waiting:
                yield waiting[0], settled(waiting[1])
            waiting = following
        if waiting:
            yield waiting[0], settled(waiting[1])


def for_evaluation(
    samples: Sequence[PackedSample], config: Config, context: ParallelContext
) -> list[MicroBatch]:
    """This rank's share of a fixed list of sequences, the same number on every rank.

    Ranks must run in step, for their experts serve each other, and the micro-batches of a pipeline
    are of one size: the list is filled up with repetitions of its first sequence in which nothing
    counts.
    """
    unit = context.data_size
    if config.parallel.pipeline > 1:
        unit *= config.micro_batch_size
    if config.parallel.interleave > 1:
        unit *= config.parallel.pipeline
    filler = [samples[0].without_labels()]
    padded = [*samples, *filler * (-len(samples) % unit)]
    share = len(padded) // context.data_size
    mine = padded[context.data_rank * share : (context.data_rank + 1) * share]
    return _micro_batches(mine, config, context)


def _micro_batches(
    samples: Sequence[PackedSample], config: Config, context: ParallelContext
) -> list[MicroBatch]:
    size = config.micro_batch_size
    return [
        collate(samples[start : start + size], context.device, images=context.first_stage)
        for start in range(0, len(samples), size)
    ]
