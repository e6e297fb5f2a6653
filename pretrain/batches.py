"""Micro-batches: each rank's share of the packed sequences of a step or an evaluation."""

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable, Sequence, Set
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config import Config
from pretrain.data import Data, PackedSample, skipped
from pretrain.data.skipped import Skip, Skipped
from pretrain.encoder_process.encoder import ImagePlan
from pretrain.errors import PretrainError
from pretrain.model.context_parallel import WHOLE_SEQUENCE, SequenceShare
from pretrain.model.flex import to_device
from pretrain.model.multimodal import MicroBatch
from pretrain.parallel import ParallelContext
from pretrain.runtime import background
from pretrain.runtime.output import warn

_END_SECONDS = 5.0


def for_step(
    config: Config,
    context: ParallelContext,
    data: Data,
    step: int,
    left_out: Collection[tuple[int, int]] = (),
) -> list[MicroBatch]:
    """This rank's micro-batches for update ``step`` of 1, 2, …

    The global batch has the same sequences, in the same order, on any number of ranks.

    Args:
        left_out: documents that other ranks could not read; see :meth:`Data.samples`.
    """
    share = config.global_batch_size // context.data_size
    first = (step - 1) * config.global_batch_size + context.data_rank * share
    indices, pixels = range(first, first + share), _needs_pixels(config, context)
    samples = data.samples("train", indices, pixels=pixels, left_out=left_out)
    return _micro_batches(samples, config, context)


def _needs_pixels(config: Config, context: ParallelContext) -> bool:
    """Whether this rank's encoder reads the images of its sequences.

    In DEP, one of the ranks that have the same sequences distributes them.
    """
    first = context.tensor_rank == context.context_rank == 0
    return context.first_stage and (first or not config.encoder_process.enabled)


def prefetch(
    config: Config,
    context: ParallelContext,
    data: Data,
    steps: Iterable[int],
    skipped_samples: "SkippedSamples",
    plan_images: Callable[[list[MicroBatch], str | None], ImagePlan],
    *,
    in_background: bool = True,
) -> Generator[tuple[int, list[MicroBatch], ImagePlan | None]]:
    """Yield each step with its micro-batches and the plan of their images, if it is valid.

    Close it before the process groups are destroyed.

    Args:
        plan_images: called on every rank, with the micro-batches, or none and an error.
        in_background: whether a thread prepares the next step while this one is computed.

    Raises:
        PretrainError: some rank cannot read its data; the same on every rank.
    """

    def prepare(step: int) -> _Prepared:
        made: list[MicroBatch] = []
        failure = plan = None
        try:
            made = for_step(config, context, data, step)
        except Exception as error:
            failure = error
        # An error of a plan is one of all its ranks, which then plan again when they encode.
        with contextlib.suppress(PretrainError):
            plan = plan_images(made, str(failure) if failure else None)
        return _Prepared(step, made, plan, failure)

    def result(prepared: _Prepared) -> tuple[int, list[MicroBatch], ImagePlan | None]:
        step, made, plan, failure = prepared
        agreed: set[tuple[int, int]] = set()
        while True:
            local = {document for batch in made for document in batch.left_out}
            agreed |= skipped_samples.synchronize(failure, local - agreed)
            if not skipped_samples.found:
                return step, made, plan
            plan = None
            # A rank that reads no pixels learns of damaged images from the ranks that do. What is
            # read again may fail again, so the ranks compare until nothing new is found.
            if local != agreed:
                try:
                    made = for_step(config, context, data, step, agreed)
                except Exception as error:
                    failure = error

    pending: Future[_Prepared] | None = None
    try:
        for step in steps:
            if not in_background:
                yield result(prepare(step))
                continue
            ready = result(pending.result()) if pending else None
            # Started after the previous call has ended: all ranks plan steps in the same order.
            pending = background.start(partial(prepare, step), "data")
            if ready:
                yield ready
        if pending:
            yield result(pending.result())
    finally:
        if pending:  # do not destroy its process group meanwhile, unless a rank does not answer
            wait([pending], _END_SECONDS)


class _Prepared(NamedTuple):
    """Micro-batches of a step and the plan of their images, or why there are none."""

    step: int
    micro_batches: list[MicroBatch]
    plan: ImagePlan | None
    failure: Exception | None


def for_evaluation(
    count: int,
    read: Callable[[Sequence[int]], Sequence[PackedSample]],
    config: Config,
    context: ParallelContext,
) -> list[MicroBatch]:
    """This rank's share of a fixed list of sequences, as many as on every other rank.

    Ranks compute in lockstep, because they share experts, and pipelines need micro-batches of equal
    size. The list is therefore padded with copies of its first sequence with all weights 0.

    Args:
        count: number of sequences, at least 1.
        read: returns the sequences with these indices; only those of this rank are read.
    """
    unit = context.data_size
    if config.parallel.pipeline > 1:
        unit *= config.micro_batch_size
    if config.parallel.interleave > 1:
        unit *= config.parallel.pipeline
    share = -(-count // unit) * unit // context.data_size
    places = range(context.data_rank * share, (context.data_rank + 1) * share)
    samples = read([place if place < count else 0 for place in places])
    local = [
        sample if place < count else sample.without_labels()
        for place, sample in zip(places, samples, strict=True)
    ]
    return _micro_batches(local, config, context)


def _micro_batches(
    samples: Sequence[PackedSample], config: Config, context: ParallelContext
) -> list[MicroBatch]:
    size = config.micro_batch_size
    return [
        collate(
            samples[start : start + size],
            context.device,
            images=context.first_stage,
            share=context.sequence_share,
        )
        for start in range(0, len(samples), size)
    ]


def collate(
    samples: Sequence[PackedSample],
    device: torch.device,
    *,
    images: bool = True,
    share: SequenceShare = WHOLE_SEQUENCE,
) -> MicroBatch:
    """Stack packed sequences to a micro-batch; their images are concatenated in order.

    Args:
        images: include the images. False for pipeline stages after the first, which only see text.
        share: the tokens that this rank computes. Default: all.
    """

    def stack(field: str) -> Tensor:
        return to_device(torch.stack([getattr(sample, field) for sample in samples]), device)

    patches = torch.cat([sample.patches for sample in samples])
    grids = torch.cat([sample.grids for sample in samples])
    return MicroBatch(
        tokens=stack("tokens"),
        host_tokens=torch.stack([sample.tokens for sample in samples]),
        labels=stack("labels"),
        weights=torch.stack([sample.weights for sample in samples]),
        categories=stack("categories"),
        documents=torch.stack([sample.documents for sample in samples]),
        sources=torch.stack([sample.sources for sample in samples]),
        patches=to_device(patches if images else patches[:0], device),
        grids=grids if images else grids[:0],
        share=share,
        left_out=tuple(document for sample in samples for document in sample.left_out),
    )


class SkippedSamples:
    """Samples that could not be read, on any rank: listed in the run's folder, and limited.

    Args:
        data: its unreadable samples are counted against ``data.max_corrupt``.

    Attributes:
        found: whether the last :meth:`synchronize` found any, on any rank.
    """

    found = False

    def __init__(self, config: Config, context: ParallelContext, data: Data) -> None:
        self._path = Path(config.run_dir) / skipped.FILE
        self._enabled = bool(config.data.sources)  # the built-in data has none
        self._context, self._data = context, data
        self._all = Skipped(config.data.max_corrupt)
        if not context.is_main:
            data.take_skipped()  # all ranks have found the same ones when they opened the data
        # Earlier jobs of this run have listed some. All ranks read the file before any writes to
        # it, in the first synchronize().
        self._listed = {s.name for s in skipped.read(self._path)} if self._enabled else set()

    def synchronize(
        self, failure: Exception | None = None, left_out: Set[tuple[int, int]] = frozenset()
    ) -> Set[tuple[int, int]]:
        """Gather what every rank has skipped since the last call; a collective of all ranks.

        Args:
            failure: the exception that this rank's data raised, if any.
            left_out: the documents of a step that this rank could not read.

        Returns:
            The documents of the step that could not be read by any rank with the same sequences.

        Raises:
            PretrainError: a rank failed, or too many samples are corrupt; the same on every rank.
        """
        local = self._data.take_skipped()
        if not self._enabled:
            if failure:
                raise failure
            return left_out
        count = len(local) + len(left_out) + (failure is not None)
        total = torch.tensor([count], device=self._context.device)
        dist.all_reduce(total)
        self.found = bool(total.item())
        if not self.found:
            return left_out
        found = _Found(str(failure) if failure else None, local, self._context.data_rank, left_out)
        gathered = [found] * self._context.world_size
        dist.all_gather_object(gathered, found)
        messages = [other.failure for other in gathered if other.failure is not None]
        if messages:
            raise PretrainError(messages[0]) from failure
        skips = [skip for other in gathered for skip in other.skips]
        if self._context.is_main:
            unlisted = {skip.name: skip for skip in skips if skip.name not in self._listed}
            try:
                skipped.write(self._path, unlisted.values())
            except OSError as error:
                warn(f"cannot write {self._path} ({error.strerror}): some samples are not listed")
        self._listed |= {skip.name for skip in skips}
        self._all.add(skips)
        peers = [other for other in gathered if other.data_rank == self._context.data_rank]
        return {document for peer in peers for document in peer.left_out}


class _Found(NamedTuple):
    """The results of a rank that :meth:`SkippedSamples.synchronize` gathers."""

    failure: str | None
    skips: list[Skip]
    data_rank: int
    left_out: Set[tuple[int, int]]
