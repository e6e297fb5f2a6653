"""Held-out evaluation: loss by category, use of images, and transcriptions."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain import batches, objective
from pretrain.build import Run
from pretrain.data import PackedSample
from pretrain.data.packing import Document
from pretrain.model.multimodal import MicroBatch
from pretrain.step import encode_images, run_backbone, run_schedule

_MAX_CAPTION_TOKENS = 24


def held_out_losses(run: Run) -> dict[str, float | None]:
    """Held-out losses of text and captions, and of captions after their own or another image.

    A model that uses its images has a much lower caption loss after the right one
    (``right_caption_loss``) than after another caption's (``swapped_caption_loss``). A loss is None
    if the data has no such labels.
    """
    run.train(False)
    options = run.config.evaluation
    length = run.config.data.seq_length
    count = options.sequences if run.data.has_held_out else 0
    packed = _mean_losses(run, count, lambda indices: run.data.samples("held_out", indices))
    right, swapped = run.data.caption_documents("held_out", options.captions)

    def caption_loss(documents: Sequence[Document]) -> float | None:
        samples = run.data.pack(documents, length)
        return _mean_losses(run, len(samples), lambda indices: [samples[i] for i in indices])[
            "caption_loss"
        ]

    return {
        "held_out_loss": packed["loss"],
        "held_out_text_loss": packed["text_loss"],
        "held_out_caption_loss": packed["caption_loss"],
        "right_caption_loss": caption_loss(right),
        "swapped_caption_loss": caption_loss(swapped),
    }


@torch.no_grad()
def _mean_losses(
    run: Run, count: int, read: Callable[[Sequence[int]], Sequence[PackedSample]]
) -> dict[str, float | None]:
    """Mean losses over sequences that all ranks share; see :func:`pretrain.objective.mean_losses`.

    The same on every rank. Arguments are those of :func:`pretrain.batches.for_evaluation`.
    """
    sums = objective.no_losses(run.context.device)
    if count:
        micro_batches = batches.for_evaluation(count, read, run.config, run.context)
        features = encode_images(run, micro_batches)
        sums = run_backbone(run, micro_batches, features, forward_only=True)
        dist.all_reduce(sums)
    return objective.mean_losses(sums)


@torch.no_grad()
def transcribe(run: Run) -> list[tuple[str, str]]:
    """Transcribe held-out images by greedy decoding.

    Every rank computes the same batch, because ranks share experts.

    Returns:
        (caption, transcription) of each of ``evaluation.transcriptions`` images.
    """
    run.train(False)
    items = run.data.captioned_items("held_out", run.config.evaluation.transcriptions)
    if not items:
        return []
    prompts = [run.data.question(item) for item in items]
    starts = torch.tensor([len(prompt) for prompt in prompts])
    length = int(starts.max()) + _MAX_CAPTION_TOKENS
    length += -length % run.config.parallel.sequence_unit
    samples = [run.data.pack([prompt], length)[0] for prompt in prompts]
    context = run.context
    batch = batches.collate(
        samples, context.device, images=context.first_stage, share=context.sequence_share
    )
    # Generated tokens belong to the prompt's document, unlike the padding that they replace.
    batch = replace(batch, documents=torch.zeros_like(batch.documents))
    (features,) = encode_images(run, [batch])
    rows = torch.arange(len(items))
    for generated in range(_MAX_CAPTION_TOKENS):
        positions = starts + generated
        batch.tokens[rows, positions] = _next_tokens(run, batch, features, rows, positions - 1)
    transcriptions = [
        run.data.tokenizer.decode(tokens[start:]).split("\n")[0]
        for tokens, start in zip(batch.tokens.tolist(), starts.tolist(), strict=True)
    ]
    return [(item.caption, text) for item, text in zip(items, transcriptions, strict=True)]


def _next_tokens(
    run: Run, batch: MicroBatch, features: Tensor, rows: Tensor, positions: Tensor
) -> Tensor:
    """The most likely token after each position, int64 [rows], on all ranks.

    Image placeholders are excluded: there would be no features for them.
    """
    tokens = torch.zeros(len(rows), dtype=torch.int64, device=run.context.device)

    def choose(batch: MicroBatch, logits: Tensor) -> Tensor:
        local = batch.share.take(torch.arange(batch.tokens.shape[1]), 0)
        has_token, columns = (local == positions[:, None]).max(1)
        last = logits[rows, columns]
        last[:, run.data.tokenizer.media_pad] = -torch.inf
        tokens.copy_(last.argmax(-1) * has_token.to(tokens.device))
        return logits.new_zeros(())

    # The interleaved schedule needs at least one micro-batch per stage.
    times = run.config.parallel.pipeline if run.config.parallel.interleave > 1 else 1
    run_schedule(run, [batch] * times, [features] * times, choose, forward_only=True, logits=True)
    dist.all_reduce(tokens, dist.ReduceOp.MAX)  # zeros where a rank does not have the position
    return tokens
