"""Held-out evaluation: loss by modality, whether the model sees, and what it reads."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain import batches, objective
from pretrain.build import Run
from pretrain.data import PackedSample
from pretrain.model.multimodal import MicroBatch
from pretrain.step import run_backbone, run_schedule

_MAX_CAPTION_TOKENS = 24


def held_out_losses(run: Run) -> dict[str, float | None]:
    """Held-out loss of text and captions, and of captions beside another sample's image.

    A model that reads its images has a much lower caption loss with the right one. What there is
    none of in the data is None.
    """
    run.train(False)
    options = run.config.evaluation
    length = run.config.data.seq_length
    count = options.sequences if run.data.has_held_out else 0
    packed = _mean_losses(run, [run.data.sample("held_out", i) for i in range(count)])
    right, swapped = run.data.caption_documents("held_out", options.captions)
    return {
        "held_out_loss": packed["loss"],
        "held_out_text_loss": packed["text_loss"],
        "held_out_caption_loss": packed["caption_loss"],
        "right_caption_loss": _mean_losses(run, run.data.pack(right, length))["caption_loss"],
        "swapped_caption_loss": _mean_losses(run, run.data.pack(swapped, length))["caption_loss"],
    }


@torch.no_grad()
def _mean_losses(run: Run, samples: Sequence[PackedSample]) -> dict[str, float | None]:
    """Mean loss a token over fixed sequences, dealt to all ranks; None without any."""
    if not samples:
        return objective.mean_losses(objective.no_losses())
    micro_batches = batches.for_evaluation(samples, run.config, run.context)
    features = run.encoder.encode([(batch.patches, batch.grids) for batch in micro_batches])
    sums = run_backbone(run, micro_batches, features, forward_only=True)
    dist.all_reduce(sums)
    return objective.mean_losses(sums)


@torch.no_grad()
def transcribe(run: Run) -> list[tuple[str, str]]:
    """Let the model read some held-out images, greedily.

    Every rank computes the same batch, since the experts that it needs are on all of them.

    Returns:
        (truth, transcription) of each of ``evaluation.transcriptions`` images.
    """
    run.train(False)
    items = run.data.captioned_items("held_out", run.config.evaluation.transcriptions)
    if not items:
        return []
    questions = [run.data.question(item) for item in items]
    starts = torch.tensor([len(question) for question in questions])
    length = int(starts.max()) + _MAX_CAPTION_TOKENS
    length += -length % run.context.tensor_size  # sequence parallelism divides it
    samples = [run.data.pack([question], length)[0] for question in questions]
    batch = batches.collate(samples, run.context.device, images=run.context.first_stage)
    # What is still to be written is padding of another document until then: nothing sees it.
    batch.documents.zero_()
    (features,) = run.encoder.encode([(batch.patches, batch.grids)])
    rows = torch.arange(len(items))
    for written in range(_MAX_CAPTION_TOKENS):
        here = starts + written
        batch.tokens[rows, here] = _next_tokens(run, batch, features, rows, here - 1)
    answers = [
        run.data.tokenizer.decode(row[start:]).split("\n")[0]
        for row, start in zip(batch.tokens.tolist(), starts.tolist(), strict=True)
    ]
    return [(item.caption, answer) for item, answer in zip(items, answers, strict=True)]


def _next_tokens(
    run: Run, batch: MicroBatch, features: Tensor, rows: Tensor, places: Tensor
) -> Tensor:
    """The likeliest token after each place, int64, on all ranks; no placeholder of an image, for
    which there would be none."""
    tokens = torch.zeros(len(rows), dtype=torch.int64, device=run.context.device)

    def take(_batch: MicroBatch, logits: Tensor) -> Tensor:
        likely = logits[rows, places]
        likely[:, run.data.tokenizer.media_pad] = -torch.inf
        tokens.copy_(likely.argmax(-1))
        return logits.new_zeros(())

    # The interleaved schedule takes no less than a micro-batch a stage.
    times = run.config.parallel.pipeline if run.config.parallel.interleave > 1 else 1
    run_schedule(run, [batch] * times, [features] * times, take, forward_only=True, logits=True)
    dist.broadcast(tokens, src=run.context.world_size - 1)  # a rank of the last stage
    return tokens
