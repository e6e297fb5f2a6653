"""Held-out evaluation: loss by category, use of images, and transcriptions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain import batches, objective
from pretrain.build import Run
from pretrain.data import PackedSample
from pretrain.data.media.png import png_base64
from pretrain.data.packing import Document, Question
from pretrain.model.multimodal import MicroBatch
from pretrain.reading import Reading, scores
from pretrain.step import by_source, encode_images, run_backbone, run_schedule

_MAX_CAPTION_TOKENS = 24
# Pictures in the report, and their largest width and height.
_MAX_PICTURES = 48
_PICTURE_SIZE = (448, 448)


def held_out(run: Run) -> tuple[dict[str, Any], list[Reading]]:
    """The held-out losses and how well the images are read, and the transcriptions."""
    readings = transcribe(run)
    return {**held_out_losses(run), **scores(readings)}, readings


def held_out_losses(run: Run) -> dict[str, Any]:
    """Held-out losses of text and captions, and of captions after their own or another image.

    A model that uses its images has a much lower caption loss after the right one
    (``right_caption_loss``) than after another caption's (``swapped_caption_loss``). A loss is None
    if the data has no such labels. ``held_out_source_losses`` has the loss of each entry of
    ``data.sources``.
    """
    run.train(False)
    options = run.config.evaluation
    length = run.config.data.seq_length
    count = options.sequences if run.data.has_held_out else 0
    sums = _loss_sums(run, count, lambda indices: run.data.samples("held_out", indices))
    packed = objective.mean_losses(sums)
    right, swapped = run.data.caption_documents("held_out", options.captions)

    def caption_loss(documents: Sequence[Document]) -> float | None:
        samples = run.data.pack(documents, length)
        sums = _loss_sums(run, len(samples), lambda indices: [samples[i] for i in indices])
        return objective.mean_losses(sums)["caption_loss"]

    return {
        "held_out_loss": packed["loss"],
        "held_out_text_loss": packed["text_loss"],
        "held_out_caption_loss": packed["caption_loss"],
        **by_source("held_out_source_losses", sums),
        "right_caption_loss": caption_loss(right),
        "swapped_caption_loss": caption_loss(swapped),
    }


@torch.no_grad()
def _loss_sums(
    run: Run, count: int, read: Callable[[Sequence[int]], Sequence[PackedSample]]
) -> Tensor:
    """The :func:`pretrain.objective.loss_sums` of sequences that all ranks share.

    The same on every rank. Arguments are those of :func:`pretrain.batches.for_evaluation`.
    """
    sums = objective.no_losses(run.context.device, len(run.config.data.sources))
    if count:
        micro_batches = batches.for_evaluation(count, read, run.config, run.context)
        features = encode_images(run, micro_batches)
        sums = run_backbone(run, micro_batches, features, forward_only=True)
        dist.all_reduce(sums)
    return sums


def transcribe(run: Run) -> list[Reading]:
    """Transcribe ``evaluation.transcriptions`` held-out images, or answer as many questions about
    images, by greedy decoding.

    Data-parallel ranks share the images, ``micro_batch_size`` each at a time: the memory of the
    computation does not grow with the number of images. The same on every rank.
    """
    run.train(False)
    items = run.data.questions("held_out", run.config.evaluation.transcriptions)
    size = run.config.micro_batch_size * run.context.data_size
    texts = [
        text
        for start in range(0, len(items), size)
        for text in _read(run, items[start : start + size])
    ]
    pictures = [png_base64(item.picture, _PICTURE_SIZE) for item in items[:_MAX_PICTURES]]
    pictures += [""] * (len(items) - len(pictures))
    return [
        Reading(item.answer, text, picture, item.text)
        for item, text, picture in zip(items, texts, pictures, strict=True)
    ]


@torch.no_grad()
def _read(run: Run, items: Sequence[Question]) -> list[str]:
    """The continuation of each question, on every rank; each data-parallel rank computes its share.

    Ranks compute in lockstep, because they share experts: their shares have the same number of
    rows, of the same length. Rows beyond the last item repeat the first one.
    """
    context, tokenizer = run.context, run.data.tokenizer
    prompts = [item.prompt for item in items]
    ends = torch.tensor([item.end for item in items])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    length = int(lengths.max()) + _MAX_CAPTION_TOKENS
    length += -length % run.config.parallel.sequence_unit
    places = torch.arange(context.data_rank, context.data_rank + len(items), context.data_size)
    is_item = places < len(items)
    places = places.where(is_item, 0)
    batch = batches.collate(
        [run.data.pack([prompts[place]], length)[0] for place in places.tolist()],
        context.device,
        images=context.first_stage,
        share=context.sequence_share,
    )
    # Generated tokens belong to the prompt's document, unlike the padding that they replace.
    batch = replace(batch, documents=torch.zeros_like(batch.documents))
    (features,) = encode_images(run, [batch])
    written = torch.zeros(len(items), 0, dtype=torch.int64)
    ended = torch.zeros(len(items), dtype=torch.bool)
    while written.shape[1] < _MAX_CAPTION_TOKENS and not ended.all():
        columns = lengths[places] + written.shape[1]
        chosen = torch.zeros(len(items), dtype=torch.int64, device=context.device)
        chosen[places[is_item]] = _next_tokens(run, batch, features, columns - 1)[is_item]
        dist.all_reduce(chosen, dist.ReduceOp.MAX)  # zeros from ranks without the token
        batch.tokens[torch.arange(len(places)), columns] = chosen[places]
        written = torch.cat([written, chosen.cpu()[:, None]], 1)
        ended |= written[:, -1] == ends
    rows = zip(written.tolist(), ends.tolist(), strict=True)
    texts = (tokenizer.decode(tokens[: [*tokens, end].index(end)]) for tokens, end in rows)
    return [text.split("\n")[0] for text in texts]


def _next_tokens(run: Run, batch: MicroBatch, features: Tensor, positions: Tensor) -> Tensor:
    """The most likely token after a position of each row, int64 [b]; 0 on ranks without it.

    Image placeholders are excluded: there would be no features for them.
    """
    rows = torch.arange(len(positions))
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
    return tokens
