"""Early fusion: image features replace the embeddings of placeholder tokens."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from pretrain.model.context_parallel import WHOLE_SEQUENCE, SequenceShare
from pretrain.model.flex import to_device
from pretrain.model.packed_documents import PackedDocuments
from pretrain.model.vision import num_features


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences and their images: the input of one forward pass on one rank.

    Attributes:
        tokens: [b, s] int64.
        host_tokens: the same on the CPU, where work is planned: no kernel of a GPU is waited for.
        labels: [b, s] int64, the next token; 0 where the weight is 0.
        weights: [b, s] float32 on the CPU, the weight of each label in the loss
            (:mod:`pretrain.objective`).
        categories: [b, s] uint8, the category under which each label's loss is reported.
        documents: [b, s] int32 on the CPU, the document of each token, within which it attends.
        sources: [b, s] int16 on the CPU, the index in ``data.sources`` of each token's source; -1:
            padding.
        patches: [P, 3 * patch * patch] uint8, the patches of all images in order; none on a rank
            whose encoder does not read them.
        grids: [n, 3] int64, (frames, rows, columns) of each image, in patches; on the CPU, where
            work is planned.
        left_out: (source, number) of documents that could not be read and are left out.
        share: the tokens that this rank computes; the other fields are the same on all
            context-parallel ranks.
    """

    tokens: Tensor
    host_tokens: Tensor
    labels: Tensor
    weights: Tensor
    categories: Tensor
    documents: Tensor
    sources: Tensor
    patches: Tensor
    grids: Tensor
    share: SequenceShare = WHOLE_SEQUENCE
    left_out: tuple[tuple[int, int], ...] = ()

    @functools.cached_property
    def packed_documents(self) -> PackedDocuments:
        """The documents for the attention of all layers."""
        return PackedDocuments.of(self.documents, self.tokens.device, self.share)

    @functools.cached_property
    def learned(self) -> Tensor:
        """int64 [n], the indices of the labels of this rank's tokens whose weight is not 0, in
        [b, s / context], flattened."""
        learned = self.share.take(self.weights, 1).flatten().nonzero().squeeze(1)
        return to_device(learned, self.tokens.device)


def merge_features(embeddings: Tensor, placeholders: Tensor, features: Tensor) -> Tensor:
    """Replace embeddings [s, b, h] by features [N, h], in order, where placeholders [b, s] is True.

    If the placeholders are on the CPU, kernels of a GPU are not waited for.

    Raises:
        ValueError: the numbers of placeholders and features differ.
    """
    # Batch first: images are listed sequence by sequence.
    positions = placeholders.flatten().nonzero().squeeze(1)
    if len(positions) != len(features):
        counts = f"{len(positions)} image placeholder tokens but {len(features)} image features"
        raise ValueError(counts)
    length, batch, _ = embeddings.shape
    rows = positions % length * batch + positions // length
    if rows.device != embeddings.device:
        rows = to_device(rows, embeddings.device)
    merged = embeddings.flatten(0, 1).index_copy(0, rows, features.to(embeddings.dtype))
    return merged.view_as(embeddings)


def image_error(micro_batches: Sequence[MicroBatch], placeholder: int) -> str | None:
    """Describe the first micro-batch whose images do not match its placeholder tokens, if any."""
    for number, batch in enumerate(micro_batches):
        tokens = int((batch.host_tokens == placeholder).sum())
        features = int(num_features(batch.grids).sum())
        if tokens != features:
            return (
                f"micro-batch {number} has {tokens} image placeholder tokens, but its "
                f"{len(batch.grids)} images give {features} features"
            )
    return None


def feature_ranks(batch: MicroBatch, placeholder: int) -> Tensor:
    """int64 [N] on the CPU, the context-parallel rank that has the placeholder token of each image
    feature."""
    ranks = batch.share.ranks(batch.host_tokens.shape[1])
    return ranks.expand_as(batch.host_tokens)[batch.host_tokens == placeholder]


def forward(
    model: nn.Module, batch: MicroBatch, features: Tensor, placeholder: int, *, logits: bool = False
) -> Tensor:
    """Run the language model over text and image features.

    Args:
        model: the GPTModel, or megatron-core's data-parallel wrapper of it; in a pipeline, one of
            this rank's model chunks.
        features: [N, h], one row per placeholder token that this rank has, in order; used by the
            first chunk only.
        placeholder: id of the placeholder token.
        logits: return next-token logits instead of losses.

    Returns:
        [b, s / context] float32, the cross entropy of each label of this rank's tokens (0, or
        meaningless, where its weight is 0), or [b, s / context, vocabulary], the logits. From all
        but the last model chunk: hidden states.
    """
    language: Any = getattr(model, "module", model)
    share = batch.share
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    tokens, positions, labels = (
        share.take(x, 1) for x in (batch.tokens, positions.expand_as(batch.tokens), batch.labels)
    )
    documents: PackedSeqParams = batch.packed_documents
    shape = tokens.shape
    if is_packed(language.config):
        documents = batch.packed_documents.thd
        tokens, positions, labels = (x.reshape(1, -1) for x in (tokens, positions, labels))
    inputs = None
    if language.pre_process:
        embeddings = language.embedding(tokens, positions)
        placeholders = share.take(batch.host_tokens, 1) == placeholder
        inputs = merge_features(embeddings, placeholders, features)
        if language.config.sequence_parallel:
            inputs = scatter_to_sequence_parallel_region(inputs)
    output: Tensor = model(
        tokens,
        positions,
        None,
        decoder_input=inputs,
        labels=None if logits else labels,
        # With sequence parallelism, the output layer gathers the tokens of all ranks.
        loss_mask=None if language.config.sequence_parallel else batch.learned,
        packed_seq_params=documents,
        runtime_gather_output=True if logits else None,
    )
    return output.view(*shape, *output.shape[2:]) if language.post_process else output


def is_packed(settings: TransformerConfig) -> bool:
    """Whether the activations of a model are [b * s, 1, ...] instead of [s, b, ...]."""
    return bool(settings.transformer_impl == "transformer_engine")
