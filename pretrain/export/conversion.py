"""Weights under the names and in the shapes of published checkpoints, and back.

The checkpoints are those of Kimi-K2.5 and of language models as published, which transformers
converts on loading and vLLM and SGLang read directly: every expert has its own tensors, q, k and v
of the vision encoder are stacked in one tensor, and rotary channels have the order of our models.
Converting moves rows and computes nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config import LanguageConfig, VisionConfig
from pretrain.model.weights import Shape, language_weights, vision_weights


@dataclass(frozen=True)
class Conversion:
    """Weights of ours and published tensors that have the same rows.

    Weights of a vocabulary may have more rows than the published ones: the last are zeros.

    Attributes:
        ours, published: shapes by name, stacked in this order. One of the two has one tensor.
        groups: number of groups of rows in which several published tensors alternate in ours, as
            queries, keys and values of each key head do; 1: one tensor after the other.
    """

    ours: dict[str, Shape]
    published: dict[str, Shape]
    groups: int = 1

    def to_published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the published tensors, given ours."""
        return _restack(tensors, self.ours, self.published, self.groups)

    def to_ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return our tensors, given the published ones."""
        return _restack(tensors, self.published, self.ours, self.groups)


def _restack(
    tensors: Mapping[str, Tensor],
    before: Mapping[str, Shape],
    after: Mapping[str, Shape],
    groups: int,
) -> dict[str, Tensor]:
    stack = [tensors[name].reshape(groups, -1, *shape[1:]) for name, shape in before.items()]
    rows = stack[0] if len(stack) == 1 else torch.cat(stack, 1)
    sizes = [shape[0] // groups for shape in after.values()]
    if (missing := sum(sizes) - rows.shape[1]) > 0:
        rows = F.pad(rows, [0, 0] * (rows.ndim - 2) + [0, missing])
    split = torch.split(rows[:, : sum(sizes)], sizes, 1)
    return {
        name: tensor.reshape(shape).contiguous()
        for (name, shape), tensor in zip(after.items(), split, strict=True)
    }


def conversions(
    language: LanguageConfig,
    vision: VisionConfig | None,
    vocab_size: int,
    published_vocab_size: int | None = None,
) -> Iterator[Conversion]:
    """Conversions of all weights of a checkpoint.

    Args:
        vision: the vision encoder of Kimi-K2.5; None for a language model alone.
        vocab_size: rows of the embedding and of the output head.
        published_vocab_size: the published rows, if they are fewer.
    """
    prefix = "language_model." if vision is None else ""
    others = tuple(vision_weights(vision, language.hidden_size)) if vision else ()
    # One after another: an import fails at the first weight that does not fit, however many follow.
    weights = zip(
        chain(language_weights(language, vocab_size), others),
        chain(language_weights(language, published_vocab_size or vocab_size), others),
        strict=True,
    )
    for _, stack in groupby(weights, key=lambda pair: list(pair[0].published)):
        pairs = list(stack)
        published = {name.removeprefix(prefix): s for name, s in pairs[0][1].published.items()}
        ours = {weight.name: weight.shape for weight, _ in pairs}
        yield Conversion(ours, published, pairs[0][0].published_groups)
