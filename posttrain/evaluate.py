"""Evaluation of a model on held-out data: transcriptions of images, and the loss of text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from posttrain import metrics, modes
from posttrain.config import Config, EvaluationConfig
from posttrain.data import Picture, held_out_texts, open_pretraining_data, pictures
from posttrain.model import TRAINED, Exported, load
from posttrain.modes import Mode
from pretrain.data import Data
from pretrain.data.media.png import png_base64
from pretrain.reading import Reading, listing, scores

SHOWN: modes.Messages = [{"role": "user", "content": [{"type": "image"}]}]
"""The conversation that asks for the text in an image."""
_MAX_CAPTION_TOKENS = 24
_MAX_PICTURES = 48
_PICTURE_SIZE = (448, 448)


def run(config: Config) -> None:
    """Evaluate the trained model of a run, or else the one that it starts from."""
    trained = Path(config.run_dir) / TRAINED
    exported = load(trained if trained.is_dir() else Path(config.model))
    data = open_pretraining_data(config.pretraining, exported.folder)
    found, readings = held_out(exported, data, config.evaluation, modes.find(exported, "document"))
    print(f"{exported.folder}: {' | '.join(metrics.cells(found)) or 'no data'}")
    if text := listing(readings):
        print(text)


@torch.no_grad()
def held_out(
    exported: Exported, data: Data, options: EvaluationConfig, mode: Mode
) -> tuple[dict[str, float | None], list[Reading]]:
    """The metrics of a model, and its transcriptions.

    Args:
        mode: how images are shown to the model.
    """
    model = exported.model
    was_training = model.training
    model.eval()
    try:
        readings = []
        if exported.has_images and options.images:
            found = pictures(data, "held_out", options.images)
            readings = transcribe(exported, found, options, mode)
        loss = text_loss(model, list(held_out_texts(data, options.text_sequences)), options)
    finally:
        model.train(was_training)
    return {"held_out_text_loss": loss, **scores(readings)}, readings


def transcribe(
    exported: Exported, images: Sequence[Picture], options: EvaluationConfig, mode: Mode
) -> list[Reading]:
    """Transcribe images by greedy decoding."""
    texts = []
    for start in range(0, len(images), options.batch_size):
        batch = [[one.image] for one in images[start : start + options.batch_size]]
        texts += modes.answer(exported, mode, [SHOWN] * len(batch), batch, _MAX_CAPTION_TOKENS)
    pngs = [_png(one) for one in images[:_MAX_PICTURES]] + [""] * (len(images) - _MAX_PICTURES)
    return [
        Reading(one.text, text, png) for one, text, png in zip(images, texts, pngs, strict=True)
    ]


def _png(picture: Picture) -> str:
    return png_base64(np.asarray(picture.image), _PICTURE_SIZE)


def text_loss(
    model: Any, texts: Sequence[tuple[Tensor, Tensor]], options: EvaluationConfig
) -> float | None:
    """Mean cross-entropy of labels by weight, in nats per token; None without any.

    Each document is read alone, from its first token.
    """
    total, count = 0.0, 0.0
    ordered = sorted(texts, key=lambda one: len(one[0]))
    for start in range(0, len(ordered), options.batch_size):
        batch = ordered[start : start + options.batch_size]
        tokens = pad_sequence([tokens for tokens, _ in batch], batch_first=True)
        weights = pad_sequence([weights for _, weights in batch], batch_first=True)
        lengths = torch.tensor([len(tokens) for tokens, _ in batch])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        device = model.device
        logits = model(
            input_ids=tokens.to(device), attention_mask=mask.long().to(device), use_cache=False
        ).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), tokens[:, 1:].to(device), reduction="none"
        ).cpu()
        total += float((losses * weights[:, 1:]).sum())
        count += float(weights.sum())
    return total / count if count else None
