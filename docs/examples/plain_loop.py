"""Plain PyTorch: float16 with a GradScaler, gradient accumulation and clipping, a learning rate
schedule, QK-Clip, and checkpoints. Run it again with more steps to resume.

    python docs/examples/plain_loop.py checkpoint.pt 20
"""

import sys
from pathlib import Path

import torch
from tiny_model import Model, batch
from torch import nn

from muonclip import for_model


def main(path: Path, steps: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Model().to(device)
    optimizer = for_model(model, lr=5e-3, adamw_lr=2e-3, weight_decay=0.1)  # QK-Clip included
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=10)
    scaler = torch.amp.GradScaler(device)

    objects = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    first = 0
    if path.exists():
        saved = torch.load(path, map_location=device)
        first = saved["step"]
        for name, value in objects.items():
            value.load_state_dict(saved[name])

    for step in range(first, steps):
        for tokens in batch(step).to(device).chunk(2):  # two micro-batches
            with torch.autocast(device, torch.float16):
                loss = model(tokens)
            scaler.scale(loss / 2).backward()
        scaler.unscale_(optimizer)
        # Limits the weight of one step in the momentum, not the size of Muon's updates.
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)  # skips the step and QK-Clip if gradients overflowed
        scaler.update()
        optimizer.zero_grad()
        schedule.step()
        print(f"step {step}: loss {loss.item():.4f}")
    torch.save({"step": steps} | {name: o.state_dict() for name, o in objects.items()}, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
