"""Numbers of parameters, from the catalogue of weights."""

import functools
from collections import Counter
from typing import Any

from pretrain.config import Config, LanguageConfig, VisionConfig
from pretrain.model.weights import Weight, language_weights, vision_weights


def trained_weights(config: Config) -> list[Weight]:
    """Trained weights, with the first expert of each layer in place of all."""
    rows = config.language.vocab_rows(config.data.vocab_size)
    return list(_trained_weights(config.language, rows, config.vision))


@functools.lru_cache(maxsize=4)
def _trained_weights(language: LanguageConfig, rows: int, vision: VisionConfig) -> list[Weight]:
    weights = (
        *language_weights(language, rows, experts=range(1)),
        *vision_weights(vision, language.hidden_size),
    )
    return [weight for weight in weights if weight.optimizer is not None]


def active_numel(config: LanguageConfig, weight: Weight) -> int:
    """Parameters of a weight that each token uses: all, or those of the experts it is routed to.

    Of the embedding's table none count, because a token reads a single row.
    """
    if weight.component == "embedding":
        return 0
    return weight.numel * (1 if weight.expert is None else config.experts_per_token)


def count_parameters(config: Config) -> dict[str, Any]:
    """Numbers of parameters: in total, by part of the model, active per token, trained by Muon."""
    by_component: Counter[str] = Counter()
    language = muon = active = 0
    for weight in trained_weights(config):
        experts = 1 if weight.expert is None else config.language.num_experts
        by_component[weight.component] += weight.numel * experts
        if weight.optimizer == "muon":
            muon += weight.numel * experts
        if weight.layer is not None:
            language += weight.numel * experts
            active += active_numel(config.language, weight)
    return {
        "total": by_component.total(),
        "language": language,
        "vision": by_component.total() - language,
        "active": active,
        "muon": muon,
        "by_part": dict(by_component),
    }
