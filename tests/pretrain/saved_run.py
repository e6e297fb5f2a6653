"""Checkpoints of a small model with randomized weights, and its outputs."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pretrain import batches, checkpoint
from pretrain.build import Run, build
from pretrain.checkpoint import storage
from pretrain.config import Config, to_dict
from pretrain.data import Data, Document
from pretrain.data.media.fit import frame_groups
from pretrain.data.media.patches import VisionItem
from pretrain.evaluate import held_out_losses
from pretrain.model import multimodal
from pretrain.parallel import ParallelContext
from pretrain.runtime.faults import Guard
from pretrain.startup import set_up
from tests.distributed import training

STEP = 7
SHAPE = (
    *("language.num_layers=3", "language.num_heads=3", "language.num_experts=5"),
    *("language.experts_per_token=2", "language.expert_ffn_hidden_size=24"),
    *("language.shared_expert_ffn_hidden_size=48", "language.rope_base=500.0"),
    *("language.qk_nope_head_dim=6", "language.v_head_dim=10", "vision.num_layers=2"),
)
# YaRN with channels that stay, that are slowed down partly and wholly, and with either factor.
SCALING = (
    *("language.rope_scaling.factor=4", "language.rope_scaling.beta_fast=4"),
    *("language.rope_scaling.original_max_position_embeddings=24",),
    *("language.rope_scaling.beta_slow=0.25", "language.rope_scaling.mscale=0.7"),
    "language.rope_scaling.mscale_all_dim=0.9",
)


class Read(NamedTuple):
    """A text with images, and the model's logits after each of its tokens [s, vocabulary]."""

    tokens: Tensor
    patches: Tensor
    grids: Tensor
    logits: Tensor


def randomize(name: str, tensor: Tensor) -> None:
    """Draw weights that give attention, routers and logits a large spread."""
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    noise = torch.empty(tensor.shape).normal_(generator=generator)
    if name.endswith("expert_bias"):
        tensor.copy_(0.2 * noise)
    elif tensor.ndim < 2:
        tensor.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
    else:
        tensor.copy_(
            noise * (1.5 if "q_" in name or "k" in name else 1.0) / tensor[0].numel() ** 0.5
        )


def documents(run: Run) -> dict[str, Document]:
    """A text; one as long as a sequence; an image, odd in size, in a text; clips of one to nine
    frames."""
    rng = np.random.default_rng(0)
    tokenizer, patch = run.data.tokenizer, run.config.vision.patch_size
    encode = tokenizer.encode

    def item(frames: int, rows: int, columns: int) -> VisionItem:
        size = (frames, rows * patch, columns * patch, 3)
        return VisionItem(rng.integers(0, 256, size, dtype=np.uint8), "")

    text = Document(tokenizer).add_tokens(encode("The same text in two models, with 42 numbers."))
    long = Document(tokenizer).add_tokens(encode("No two of 87 are the same. " * 9)[:95])
    image = Document(tokenizer).add_tokens(encode("Look: ")).add_image(item(1, 4, 10), patch)
    image.add_tokens(encode(" and ")).add_image(item(1, 2, 2), patch).add_tokens(encode("so."))
    clip = Document(tokenizer).add_image(item(3, 4, 4), patch).add_tokens(encode("moves"))
    video, frames = Document(tokenizer), item(9, 4, 6).pixels
    for group in frame_groups(len(frames)):
        video.add_image(VisionItem(frames[group], ""), patch).add_tokens(encode("then "))
    return {"text": text, "long": long, "image": image, "clip": clip, "video": video}


@torch.no_grad()
def read(run: Run, document: Document) -> Read:
    """The outputs of the trainer's model for a document."""
    (sample,) = run.data.pack([document], len(document))
    batch = batches.collate([sample], run.context.device)
    features = run.tower(batch.patches, batch.grids)
    placeholder = run.data.tokenizer.media_pad
    logits = multimodal.forward(run.language[0], batch, features, placeholder, logits=True)
    return Read(batch.tokens, batch.patches, batch.grids, logits[0])


class Made(NamedTuple):
    """The results of :func:`make`, in addition to the run's folder."""

    reads: dict[str, Read]
    scaled: dict[str, Read]
    tensors: dict[str, Tensor]
    held_out: dict[str, float | None]


def make(folder: str) -> Made:
    """Save a run of randomized weights in ``folder``/run; its readings and every tensor.

    ``run16`` has the same weights as a bfloat16 run saves them, rounded and with float32 masters,
    and ``scaled`` has them with YaRN.
    """
    config = training.tiny(folder, *SHAPE)
    here, data = set_up(config)
    run = _save(config, here, data)
    scaled = _save(training.tiny(folder, *SHAPE, *SCALING, f"run_dir={folder}/scaled"), here, data)
    rounded = {
        f"model.{name}": tensor.bfloat16() if isinstance(tensor, nn.Parameter) else tensor
        for name, tensor in run.named_tensors.items()
    }
    masters = {
        f"optimizer.{name}.master": parameter.detach() for name, parameter in run.parameters()
    }
    sixteen = Path(folder, "run16")
    facts = {"config": {**to_dict(config), "precision": "bfloat16"}}
    storage.save(sixteen / "checkpoints", STEP, rounded | masters, facts, 1)
    checkpoint.write_tokenizer(data.tokenizer, sixteen)
    read_by = []
    for model in (run, scaled):
        model.train(False)
        read_by.append({name: read(model, text) for name, text in documents(model).items()})
    tensors = {name: tensor.detach().clone() for name, tensor in run.named_tensors.items()}
    return Made(*read_by, tensors, held_out_losses(run))


# Heads of 32 channels: vLLM's attention kernel for CPUs supports only certain head sizes.
SERVED = ("language.qk_nope_head_dim=16", "language.qk_rope_head_dim=16", "language.v_head_dim=32")


def make_served(folder: str) -> dict[str, Read]:
    """Save a run in ``folder``/served whose export vLLM can serve on a CPU; return its readings."""
    config = training.tiny(folder, *SHAPE, *SERVED, f"run_dir={folder}/served")
    run = _save(config, *set_up(config))
    run.train(False)
    return {name: read(run, document) for name, document in documents(run).items()}


def _save(config: Config, here: ParallelContext, data: Data) -> Run:
    run = build(config, here, data)
    with torch.no_grad():
        for name, tensor in run.named_tensors.items():
            randomize(name, tensor)
    with checkpoint.saver(run) as saver:
        checkpoint.save(run, saver, Guard(config.faults), STEP)
    checkpoint.keep_tokenizer(run)
    return run
