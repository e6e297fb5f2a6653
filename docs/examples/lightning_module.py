"""Lightning: ``configure_optimizers`` makes the optimizer; the Trainer passes it the forward
and backward passes as a closure, accumulates, clips, saves and resumes.

    python docs/examples/lightning_module.py runs/lightning
"""

import sys

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_model import Model, batch
from torch import Tensor
from torch.utils.data import DataLoader

from muonclip import for_model


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def training_step(self, tokens: Tensor) -> Tensor:
        loss = self.model(tokens)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = for_model(self, lr=5e-3, adamw_lr=2e-3)  # QK-Clip included
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=10)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def main(folder: str, resume_from: str | None = None, epochs: int = 2) -> Module:
    lightning.seed_everything(0)
    module = Module()
    batches = [rows for step in range(10) for rows in batch(step).chunk(2)]
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        logger=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=resume_from)
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])
