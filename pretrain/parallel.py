"""The processes of a run: their groups, their devices, and leaving together."""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.rendezvous import rendezvous

from pretrain.config import ParallelConfig
from pretrain.errors import PretrainError
from pretrain.runtime import cpu

T = TypeVar("T")

# A process that has died is noticed at once; this is for one that takes its time.
_PATIENCE = timedelta(days=365)
# The watchdog, which shows where ranks are stuck, comes before the groups' own limit.
_AFTER_WATCHDOG = timedelta(minutes=2)


@dataclass(frozen=True)
class ParallelContext:
    """Where this rank stands.

    Attributes:
        rank, world_size: among all processes.
        data_rank, data_size: which share of a global batch is this rank's.
        expert_rank: which share of the experts is this rank's.
        tensor_rank, tensor_size: which part of each cut matrix is this rank's.
        first_stage, last_stage: whether it takes in the batch; whether it computes the loss.
        device: where its tensors live.
        patient_group: all ranks over gloo, without a time limit.
    """

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    expert_rank: int
    tensor_rank: int
    tensor_size: int
    first_stage: bool
    last_stage: bool
    device: torch.device
    patient_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_size() -> int:
    """Processes that the launcher started; 1 without a launcher.

    Raises:
        PretrainError: WORLD_SIZE is not a number.
    """
    return _from_environment("WORLD_SIZE", 1)


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise PretrainError(f"the environment variable {name}={text!r} must be a number")
    return int(text)


def join(timeout: timedelta = _PATIENCE) -> None:
    """Join the other processes, or be a group of one; a process group that exists is used.

    Args:
        timeout: of its collectives.

    Raises:
        PretrainError: the others cannot be reached.
    """
    if cpu.USE_CUDA:
        torch.cuda.set_device(_from_environment("LOCAL_RANK", 0))
    if dist.is_initialized():
        return
    backend = "nccl" if cpu.USE_CUDA else "gloo"
    if "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    try:
        store, rank, size = next(rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun's c10d rendezvous has one store for all restarts of a node, in which
            # the addresses of processes that are gone would be found.
            store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:  # torch's errors are RuntimeErrors
        where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
        rank_name = os.environ.get("RANK", "0")
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        failure = PretrainError(
            f"rank {rank_name} cannot join the other processes at {where} ({reason}): check that "
            "all of them were started, and that no other job uses the port"
        )
        if rank_name != "0":  # the command line prints rank 0's errors, as those of all
            print(f"error: {failure}", file=sys.stderr, flush=True)
        raise failure from error


def start(parallel: ParallelConfig, seed: int, hang_seconds: float = 0.0) -> ParallelContext:
    """Join the other processes and set up megatron-core's groups.

    Started by torchrun, or as a single process without it.

    Args:
        hang_seconds: ``faults.hang_seconds``: collectives fail a while after the watchdog would
            have ended the process; 0: they wait for as long as it takes.

    Raises:
        PretrainError: the others cannot be reached.
    """
    cpu.enable()
    timeout = timedelta(seconds=hang_seconds) + _AFTER_WATCHDOG if hang_seconds else _PATIENCE
    join(timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.interleave if parallel.interleave > 1 else None
        ),
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
    )
    model_parallel_cuda_manual_seed(seed)
    return ParallelContext(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        device=torch.device("cuda", torch.cuda.current_device())
        if cpu.USE_CUDA
        else torch.device("cpu"),
        patient_group=dist.new_group(backend="gloo", timeout=_PATIENCE),
    )


def require_same(what: str, value: str) -> None:
    """Refuse to go on where ranks were told different things, such as two versions of a file.

    Raises:
        PretrainError: on every rank, naming ``what`` and the ranks that differ from rank 0.
    """
    values = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    others = [str(rank) for rank, theirs in enumerate(values) if theirs != values[0]]
    if others:
        raise PretrainError(
            f"{what} is not the same on all ranks: {', '.join(others)} of {len(values)} differ "
            "from rank 0; start them all from one file"
        )


def stop() -> None:
    """Leave megatron-core's groups and the process group, if they were joined.

    What :func:`start` changed in torch for a CPU is as before; models built since are of no use.
    """
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    cpu.disable()


def max_over_ranks(*values: int) -> list[int]:
    """The greatest of each value (0 to 255) over all ranks, which all call it."""
    device = "cuda" if cpu.USE_CUDA else "cpu"
    found = torch.tensor(values, dtype=torch.uint8, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [int(value) for value in found.tolist()]


def raise_on_all_ranks(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise the first rank's error on every rank, or nothing if no rank has one.

    For steps that can fail on one rank alone (reading its files, say): all ranks call it after
    the step, and none is left waiting in a collective for one that has gone.

    Args:
        group: of all ranks, in place of the default one.

    Raises:
        PretrainError: with the message of the lowest rank that had an error.
    """
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else str(error), group=group)
    for message in messages:
        if message is not None:
            raise PretrainError(message) from error


def call_on_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Do something on every rank that can fail on one alone; returns its result on this rank.

    Raises:
        PretrainError: with the message of the lowest rank that had an error.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    raise_on_all_ranks(failure, group)
    return result
