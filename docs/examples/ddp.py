"""DistributedDataParallel: the ranks share the orthogonalization of their matrices, and QK-Clip
uses the max logits of all ranks.

    torchrun --nproc-per-node 2 docs/examples/ddp.py 20
"""

import os
import sys

import torch
import torch.distributed as dist
from tiny_model import Model, batch
from torch.nn.parallel import DistributedDataParallel

from muonclip import for_model


def main(steps: int) -> None:
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group()
    rank, size = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = Model().to(device)
    ddp = DistributedDataParallel(model)
    # Given the wrapper, the ranks share the matrices; without it, each orthogonalizes all of them.
    optimizer = for_model(ddp, lr=5e-3, adamw_lr=2e-3)

    for step in range(steps):
        loss = ddp(batch(step, rank, size).to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}: loss {loss.item() / size:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
