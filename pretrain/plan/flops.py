"""Floating-point operations of the model, counted from the shapes of its weights.

A matrix product has two for each multiplication and addition; norms, activations and softmax are
small in comparison and not counted. Model FLOPs are those that the mathematics of a step needs, as
in PaLM (arXiv 2204.02311, appendix B): work that is repeated to save memory (the second forward of
the encoder process, activation recomputation) does not count, and lowers the utilisation.
"""

import itertools
import math

from pretrain.config import Config, LanguageConfig
from pretrain.encoder_process.cost import CostModel, analytic_cost
from pretrain.model.packed_documents import keys_per_query
from pretrain.model.weights import language_weights
from pretrain.plan.activations import encoder_activations, kept_by_encoder
from pretrain.plan.parameters import active_numel
from pretrain.plan.ranks import Ranks
from pretrain.plan.workload import Images, recomputed_layers, recomputed_parts, tokens_per_step

# A backward pass multiplies every output's gradient by the weights and by the inputs.
FORWARD_AND_BACKWARD = 3


def forward_flops(
    config: LanguageConfig, vocab_size: int, keys_per_query: float
) -> dict[tuple[int, str], float]:
    """FLOPs per token of a forward pass of the language model.

    Returns:
        FLOPs by (layer, part). The parts are the components of the catalogue of weights, and
        ``scores``: the products of queries with keys and of attention weights with values.
    """
    widths = config.num_heads * (config.query_key_dim + config.value_dim)
    flops = {(layer, "scores"): 2.0 * widths * keys_per_query for layer in range(config.num_layers)}
    for weight in language_weights(config, vocab_size, experts=range(1)):
        if weight.layer is not None and len(weight.shape) == 2:
            key = weight.layer, weight.component
            flops[key] = flops.get(key, 0.0) + 2.0 * active_numel(config, weight)
    if config.tie_embeddings:
        head = 2.0 * vocab_size * config.hidden_size
        flops[config.num_layers, "output head"] = head
    return flops


def flops_per_token(config: LanguageConfig, vocab_size: int, seq_length: float) -> float:
    """Model FLOPs per token of a forward pass of the language model on full sequences.

    Attention is causal: a token attends to (``seq_length`` + 1) / 2 tokens on average. Packed
    documents, which do not attend to each other, are counted as one, and logits of labels without a
    weight, which are not computed, are counted as well.
    """
    return sum(forward_flops(config, vocab_size, (seq_length + 1) / 2).values())


def encoder_forward_flops(cost: CostModel, images: Images) -> float:
    """FLOPs of a forward pass of encoder and projector over the images of a step."""
    linear = cost.per_patch * images.patches + cost.per_feature * images.features
    return linear + cost.per_pair * (images.patches * images.patches_per_image)


def _recomputed_by_encoder(config: Config, ranks: Ranks, images: Images) -> float:
    """Share of the images that the encoder process encodes a second time."""
    share = images.patches / ranks.world
    if not config.encoder_process.enabled or not share:
        return 0.0
    return 1 - kept_by_encoder(config, share) / encoder_activations(config, share)


def step_flops(config: Config, ranks: Ranks, images: Images) -> dict[str, float]:
    """FLOPs of a step on all ranks by purpose: as executed, their ``total``, and ``model`` FLOPs.

    As executed, attention computes the scores of blocks of queries, and their products with keys a
    second time in the backward pass. Sequences are counted as one document each.
    """
    language, tokens = config.language, tokens_per_step(config)
    vocab_size = language.vocab_rows(config.data.vocab_size)
    keys = keys_per_query(config.data.seq_length)
    executed = forward_flops(language, vocab_size, keys)
    forward = sum(executed.values())
    scores = sum(flops for (_, part), flops in executed.items() if part == "scores")
    chunks, parts = itertools.chain(*ranks.stages), recomputed_parts(config)
    whole_layers = {layer for chunk in chunks for layer in recomputed_layers(config, chunk)}
    recomputed = math.fsum(
        flops for (layer, part), flops in executed.items() if layer in whole_layers or part in parts
    )
    vision = config.vision
    cost = analytic_cost(vision, language.hidden_size)
    encoder = encoder_forward_flops(cost, images)
    patch_embedding = 2.0 * 3 * vision.patch_size**2 * vision.hidden_size * images.patches
    logits = 2.0 * language.num_layers * language.num_heads * language.query_key_dim * keys
    flops = {
        "language forward": tokens * (forward - scores),
        "attention forward": tokens * scores,
        "language backward": 2 * tokens * forward,
        "language recompute": tokens * (recomputed + logits),
        "encoder forward": encoder,
        "encoder backward": 2 * encoder - patch_embedding,  # pixels have no gradient
        "encoder recompute": encoder * _recomputed_by_encoder(config, ranks, images),
        # The max logits of all heads, for QK-Clip: one of attention's two products.
        "encoder logits": cost.per_pair / 2 * images.patches * images.patches_per_image,
    }
    per_token = flops_per_token(language, vocab_size, config.data.seq_length)
    return {
        **flops,
        "total": sum(flops.values()),
        "model": FORWARD_AND_BACKWARD * (tokens * per_token + encoder),
    }
