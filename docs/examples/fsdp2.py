"""FSDP2: parameters are sharded, each matrix is orthogonalized on one rank, and checkpoints can be
loaded with another number of ranks.

    torchrun --nproc-per-node 2 docs/examples/fsdp2.py 10 first
    torchrun --nproc-per-node 4 docs/examples/fsdp2.py 20 second first
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_model import Model, batch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muonclip import for_model


def main(steps: int, save_to: str, load_from: str | None = None) -> None:
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device, (size,))

    torch.manual_seed(0)
    model = Model().to(device)
    for layer in model.body.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = for_model(model, lr=5e-3, adamw_lr=2e-3)  # after fully_shard; QK-Clip included

    first = 0
    if load_from is not None:
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state, "step": 0}
        dcp.load(saved, checkpoint_id=load_from)
        first = saved["step"]
        weights, state = saved["model"], saved["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)

    for step in range(first, steps):
        loss = model(batch(step, rank, size).to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}: loss {loss.item() / size:.4f}")
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "step": steps}, checkpoint_id=save_to)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
