"""Transcriptions are text, whatever the model prefers to write."""

from pathlib import Path

import torch

from pretrain import checkpoint
from pretrain.build import build
from pretrain.evaluate import transcribe
from pretrain.startup import set_up
from tests.distributed import training
from tests.distributed.launch import launch
from tests.pretrain.saved_run import SHAPE, Made


def wish_for_images(folder: str) -> list[tuple[str, str]]:
    """Transcriptions of a model that prefers image placeholders to all other tokens."""
    settings = training.tiny(folder, *SHAPE)
    here, data = set_up(settings)
    run = build(settings, here, data)
    checkpoint.restore(run)
    head = run.named_tensors["language.output_layer.weight"]
    with torch.no_grad():
        head[data.tokenizer.media_pad] = 100 * head[data.tokenizer.newline + 1]
    return transcribe(run)


def test_transcriptions_never_contain_image_placeholders(made: Made, run_folder: Path) -> None:
    (read,) = launch(wish_for_images, 1, str(run_folder))
    assert len(read) == 2
    assert all(truth and isinstance(answer, str) for truth, answer in read)
