"""Transcriptions are text, the same on any number of ranks, and read in batches."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pretrain import checkpoint, evaluate
from pretrain.build import Run, build
from pretrain.evaluate import transcribe
from pretrain.model.multimodal import MicroBatch
from pretrain.reading import Reading
from pretrain.startup import set_up
from pretrain.step import run_schedule
from tests.distributed import training
from tests.distributed.launch import launch
from tests.pretrain.saved_run import SHAPE, Made, randomize


def wish_for_images(folder: str) -> list[Reading]:
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
    assert all(reading.caption and isinstance(reading.text, str) for reading in read)


def read_many(folder: str) -> tuple[list[Reading], list[int]]:
    """Transcriptions of 197 images in float64, and the rows of every forward pass."""
    sizes = ("global_batch_size=16", "micro_batch_size=8", "evaluation.transcriptions=197")
    settings = training.tiny(folder, *SHAPE, training.EXACT, *sizes)
    here, data = set_up(settings)
    run = build(settings, here, data)
    with torch.no_grad():
        for name, tensor in run.named_tensors.items():
            randomize(name, tensor)
    rows = []

    def counting(run: Run, micro_batches: Sequence[MicroBatch], *args: Any, **options: Any) -> None:
        rows.extend(len(batch.tokens) for batch in micro_batches)
        run_schedule(run, micro_batches, *args, **options)

    evaluate.run_schedule = counting
    return transcribe(run), rows


def test_many_images_are_read_alike_in_batches_by_one_and_two_ranks(run_folder: Path) -> None:
    """Two ranks share the images; no forward pass has more of them than a micro-batch.

    The last batch has five images: one rank has a row that does not count.
    """
    ((alone, rows),) = launch(read_many, 1, str(run_folder))
    shared = launch(read_many, 2, str(run_folder))
    assert [readings for readings, _ in shared] == [alone, alone]
    assert len({reading.caption for reading in alone}) == len(alone) == 197
    assert max(rows) == 8 and sum(rows) % 197 == 0
    assert all(max(some) <= 8 and sum(some) <= sum(rows) / 2 + 8 * 24 for _, some in shared)
    pictures = [bool(reading.picture) for reading in alone]
    assert pictures == [True] * sum(pictures) + [False] * (197 - sum(pictures))
    picture = Image.open(io.BytesIO(base64.b64decode(alone[0].picture)))
    assert picture.format == "PNG" and min(picture.size) >= 28
