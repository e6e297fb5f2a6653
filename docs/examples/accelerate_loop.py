"""Hugging Face Accelerate: gradient accumulation, clipping, a schedule and checkpoints. The same
code runs in one process, with DDP, and sharded with ``accelerate launch --use_fsdp
--fsdp_version 2``.

    python docs/examples/accelerate_loop.py 20 runs/accelerate
    torchrun --nproc-per-node 2 docs/examples/accelerate_loop.py 20 runs/accelerate-ddp
"""

import sys

import torch
from accelerate import Accelerator
from tiny_model import Model, batch

from muonclip import for_model


def main(steps: int, save_to: str, load_from: str | None = None) -> Model:
    on_cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=on_cpu, gradient_accumulation_steps=2)
    rank, size = accelerator.process_index, accelerator.num_processes

    torch.manual_seed(0)
    model = Model()
    # Before prepare, which wraps both; QK-Clip included.
    optimizer = for_model(model, lr=5e-3, adamw_lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=10)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)
    if load_from is not None:
        accelerator.load_state(load_from)

    for step in range(schedule.last_epoch, steps):
        for tokens in batch(step, rank, size).to(accelerator.device).chunk(2):
            with accelerator.accumulate(wrapped):
                loss = wrapped(tokens)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()  # only in the last micro-batch
                optimizer.zero_grad()
        schedule.step()
        accelerator.print(f"step {step}: loss {loss.item():.4f}")
    accelerator.save_state(save_to)
    return model


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
