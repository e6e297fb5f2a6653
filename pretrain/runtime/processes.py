"""The processes of a run: their groups, their devices, and leaving together."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.rendezvous import rendezvous

from pretrain.config import ParallelConfig
from pretrain.errors import PretrainError
from pretrain.runtime import cpu


@dataclass(frozen=True)
class Processes:
    """Where this rank stands.

    Attributes:
        rank, world_size: among all processes.
        data_rank, data_size: which share of a global batch is this rank's.
        expert_rank: which share of the experts is this rank's.
        tensor_rank, tensor_size: which part of each cut matrix is this rank's.
        first_stage, last_stage: whether it takes in the batch; whether it computes the loss.
        device: where its tensors live.
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

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_size() -> int:
    """Processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launcher_rank() -> int:
    """This process's rank as the launcher says, known before anything is set up."""
    return int(os.environ.get("RANK", "0"))


def join() -> None:
    """Join the other processes, or be a group of one; a process group that exists is used."""
    if cpu.USE_CUDA:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        backend = "nccl" if cpu.USE_CUDA else "gloo"
        if "MASTER_ADDR" in os.environ:
            store, rank, size = next(rendezvous("env://"))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # torchrun's c10d rendezvous has one store for all restarts of a node, in which
                # the addresses of processes that are gone would be found.
                store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def start(parallel: ParallelConfig, seed: int) -> Processes:
    """Join the other processes and set up megatron-core's groups.

    Started by torchrun, or as a single process without it.
    """
    cpu.enable()
    join()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.interleave if parallel.interleave > 1 else None
        ),
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )
    model_parallel_cuda_manual_seed(seed)
    return Processes(
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


def any_rank(*flags: bool) -> list[bool]:
    """Which of the flags are set on any rank: the same answer on every rank, which all call it."""
    device = "cuda" if cpu.USE_CUDA else "cpu"
    told = torch.tensor(flags, dtype=torch.uint8, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return [bool(flag) for flag in told.tolist()]


def agree(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
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
