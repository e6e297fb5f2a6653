"""Hugging Face Trainer: ``for_trainer`` gives it MuonClip and QK-Clip. The Trainer does the rest:
schedule, accumulation, clipping, checkpoints, DDP, FSDP2.

    python docs/examples/hf_trainer.py runs/hf
    torchrun --nproc-per-node 2 docs/examples/hf_trainer.py runs/hf-ddp
"""

import sys

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from muonclip import for_trainer


class Counting(Dataset):
    """Tokens that count up from each start."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, start: int) -> dict[str, torch.Tensor]:
        tokens = (start + torch.arange(16)) % 64
        return {"input_ids": tokens, "labels": tokens}


def main(folder: str, resume_from: str | None = None) -> Trainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    arguments = TrainingArguments(
        folder,
        max_steps=20,
        learning_rate=5e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        save_steps=10,
        logging_steps=5,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        LlamaForCausalLM(config),
        arguments,
        train_dataset=Counting(),
        optimizer_cls_and_kwargs=for_trainer(arguments, qk_clip_threshold=100.0),
    )
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
