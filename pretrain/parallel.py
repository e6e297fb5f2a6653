"""The processes of a run: joining, process groups, and errors on all ranks.

A new kind of parallelism starts here. Its size is a setting of
:class:`~pretrain.config.ParallelConfig`, which also derives the sizes of the groups. :func:`start`
passes it to megatron-core and stores this rank's position in a :class:`ParallelContext`.
:mod:`pretrain.model.weights` says which weights it splits, :mod:`pretrain.batches` which sequences
a rank reads, and :mod:`pretrain.plan` what it costs.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.rendezvous import rendezvous

from pretrain.config import ParallelConfig
from pretrain.errors import PretrainError, first_line
from pretrain.model.context_parallel import SequenceShare
from pretrain.runtime import without_cuda, without_transformer_engine
from pretrain.runtime.allocator import keep_freed_memory

T = TypeVar("T")

# Practically none: a slow process may take its time, and one that has died is noticed at once.
_NO_TIMEOUT = timedelta(days=365)


@dataclass(frozen=True)
class ParallelContext:
    """The position of this rank in the parallelism of a run.

    Attributes:
        rank, world_size: among all processes.
        data_rank, data_size: share of the global batch.
        context_rank, context_size: share of each sequence.
        expert_rank: share of the experts.
        expert_data_rank: position among the ranks with the same experts.
        tensor_rank: shard of each tensor-parallel weight.
        first_stage: whether this rank is in the first pipeline stage, which reads the images.
        device: the device of its tensors.
        patient_group: all ranks over gloo, without a time limit: for the start of a run, and then
            for writing checkpoints in the background.
    """

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    context_rank: int
    context_size: int
    expert_rank: int
    expert_data_rank: int
    tensor_rank: int
    first_stage: bool
    device: torch.device
    patient_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sequence_share(self) -> SequenceShare:
        """The tokens of every sequence that this rank computes."""
        return SequenceShare(self.context_rank, self.context_size)


class ImageGroups(NamedTuple):
    """Process groups of ranks that share their images.

    Attributes:
        exchange: this rank's group, to send images and features.
        planning: the same ranks over gloo, to plan in another thread, with the same time limit.
        number: number of such groups.
    """

    exchange: dist.ProcessGroup | None
    planning: dist.ProcessGroup | None
    number: int


def world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher.

    Raises:
        PretrainError: the environment variable WORLD_SIZE is not a number.
    """
    return _from_environment("WORLD_SIZE", 1)


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise PretrainError(f"the environment variable {name}={text!r} must be a number")
    return int(text)


def join(timeout: timedelta = _NO_TIMEOUT) -> None:
    """Create the default process group, of one process without a launcher, unless it exists.

    Args:
        timeout: time limit of its collectives.

    Raises:
        PretrainError: the other processes cannot be reached.
    """
    if without_cuda.USE_CUDA:
        _set_device(_from_environment("LOCAL_RANK", 0))
    if dist.is_initialized():
        return
    # NCCL gets no device_id and uses the current device, which _set_device() has set. With a
    # device_id, torch splits every group from the default one, by a collective of all ranks for
    # each group of any of them (perform_nocolor_split in distributed_c10d.py, torch 2.13):
    # megatron-core's groups would need as many collectives as there are groups, which grow with the
    # ranks, and muonclip's groups, which only their members create, would wait forever.
    backend = "nccl" if without_cuda.USE_CUDA else "gloo"
    if "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    try:
        store, rank, size = next(rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun's c10d rendezvous uses one store for all restarts of a node. It contains
            # the addresses of processes that no longer exist.
            store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:  # torch's errors are RuntimeErrors
        where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
        rank_name = os.environ.get("RANK", "0")
        reason = first_line(error)
        failure = PretrainError(
            f"rank {rank_name} cannot join the other processes at {where} ({reason}): check that "
            "all of them were started, and that no other job uses the port"
        )
        if rank_name != "0":  # the command line prints only rank 0's errors, as those of all
            print(f"error: {failure}", file=sys.stderr, flush=True)
        raise failure from error


def _set_device(local_rank: int) -> None:
    """Make a GPU the current device, before anything is allocated on another one."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise PretrainError(
            f"LOCAL_RANK={local_rank} needs {local_rank + 1} GPUs on its node, which has {count}: "
            f"start at most {count} processes on each node"
        )
    torch.cuda.set_device(local_rank)


def start(parallel: ParallelConfig, seed: int, collective_seconds: float = 0.0) -> ParallelContext:
    """Join the other processes and create megatron-core's process groups.

    Args:
        parallel: sizes of the groups.
        seed: seed of megatron-core's random states.
        collective_seconds: time limit of collectives, except of ``patient_group``; 0: none.

    Raises:
        PretrainError: the other processes cannot be reached.
    """
    without_cuda.enable()
    without_transformer_engine.enable()
    if not without_cuda.USE_CUDA:
        keep_freed_memory()
    timeout = _timeout(collective_seconds)
    join(timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.interleave if parallel.interleave > 1 else None
        ),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=timeout / timedelta(minutes=1),
        create_gloo_process_groups=False,  # only its distributed optimizer uses them
    )
    model_parallel_cuda_manual_seed(seed)
    return ParallelContext(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_data_rank=parallel_state.get_expert_data_parallel_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        device=torch.device("cuda", torch.cuda.current_device())
        if without_cuda.USE_CUDA
        else torch.device("cpu"),
        patient_group=dist.new_group(backend="gloo", timeout=_NO_TIMEOUT),
    )


def _timeout(seconds: float) -> timedelta:
    return timedelta(seconds=seconds) if seconds else _NO_TIMEOUT


def image_groups(
    size: int, context: ParallelContext, pipeline: int, collective_seconds: float = 0.0
) -> ImageGroups:
    """Create the groups of ranks that share their images; every rank calls this.

    A group has ``size`` ranks: all those of consecutive data-parallel ranks, in the order of ranks.
    All ranks create all groups, as torch requires: there are as many as ``size`` divides ranks.

    Args:
        size: ranks in a group.
        context: position of this rank.
        pipeline: number of pipeline stages.
        collective_seconds: time limit of collectives; 0: none.
    """
    timeout = _timeout(collective_seconds)
    world, in_stage = context.world_size, context.world_size // pipeline
    blocks = world // size
    in_block = in_stage // blocks  # ranks of a pipeline stage
    members: list[list[int]] = [[] for _ in range(blocks)]
    for rank in range(world):
        members[rank % in_stage // in_block].append(rank)
    exchange, planning = dist.group.WORLD, None
    for ranks in members:
        group = dist.new_group(ranks, timeout=timeout) if blocks > 1 else exchange
        gloo = dist.new_group(ranks, backend="gloo", timeout=timeout)
        if context.rank in ranks:
            exchange, planning = group, gloo
    return ImageGroups(exchange, planning, blocks)


def require_same(what: str, value: str) -> None:
    """Compare a value, such as the content of a file, on all ranks.

    Args:
        what: name of the value, for the message.

    Raises:
        PretrainError: on every rank, if any differs from rank 0; names those ranks.
    """
    values = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    different = [str(rank) for rank, other in enumerate(values) if other != values[0]]
    if different:
        raise PretrainError(
            f"{what} is not the same on all ranks: {', '.join(different)} of {len(values)} differ "
            "from rank 0; start all of them with the same file"
        )


def stop() -> None:
    """Destroy megatron-core's groups and the process group, if they exist.

    Also reverts the changes that :func:`start` made to torch and megatron-core; models built since
    then no longer work.
    """
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    without_transformer_engine.disable()
    without_cuda.disable()


def max_over_ranks(*values: int) -> list[int]:
    """The maximum of each value (0 to 255) over all ranks; every rank calls this."""
    device = "cuda" if without_cuda.USE_CUDA else "cpu"
    maxima = torch.tensor(values, dtype=torch.uint8, device=device)
    dist.all_reduce(maxima, dist.ReduceOp.MAX)
    return [int(value) for value in maxima.tolist()]


def raise_on_all_ranks(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise the error of any rank on every rank.

    Every rank calls this after an action that can fail on a single rank, such as reading a file,
    so that no rank waits in a collective for one that has ended.

    Args:
        error: this rank's error; None if it has none.
        group: a process group of all ranks; default: the default group.

    Raises:
        PretrainError: with the message of the lowest rank that has an error.
    """
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else str(error), group=group)
    for message in messages:
        if message is not None:
            raise PretrainError(message) from error


def call_on_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call a function on every rank; if it fails on any rank, raise the error on all of them.

    Args:
        group: a process group of all ranks; default: the default group.

    Returns:
        The result of this rank.

    Raises:
        PretrainError: with the message of the lowest rank that has an error.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    raise_on_all_ranks(failure, group)
    return result
