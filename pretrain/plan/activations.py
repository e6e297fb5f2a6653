"""Activations and temporary tensors of a rank.

Activations are the tensors that autograd keeps until the backward pass, for experts with balanced
loads and norms that keep their input and its root mean square, as fused ones do. Temporary tensors
exist at the fullest moment of a backward pass: gradients of activations and of one weight, and
results that are computed again.
"""

from typing import NamedTuple

from pretrain.config import Config
from pretrain.encoder_process.cost import activation_bytes
from pretrain.plan.itemsize import FLOAT32, INT64, ITEMSIZE
from pretrain.plan.ranks import Ranks
from pretrain.plan.workload import recomputed_layers, recomputed_parts


class Chunk(NamedTuple):
    """Bytes of a model chunk for one micro-batch.

    Attributes:
        kept: activations from forward to backward.
        recomputed: activations that are recomputed at once, at most.
        temporary: temporary tensors of a layer's backward pass, at most.
    """

    kept: float
    recomputed: float
    temporary: float


def chunk_activations(config: Config, chunk: range, ranks: Ranks) -> Chunk:
    """Activations of a model chunk's layers."""
    recompute, whole_layers = config.recompute, recomputed_layers(config, chunk)
    tokens = ranks.tokens(config) / ranks.tensor
    layers_at_once = recompute.num_layers if recompute.method == "uniform" else 1
    inputs = tokens * config.language.hidden_size * ITEMSIZE[config.precision] / layers_at_once
    recomputed_in_all = recomputed_parts(config)
    kept = recomputed = temporary = 0.0
    for layer in chunk:
        parts = layer_activations(config, layer, ranks)
        temporary = max(temporary, *layer_temporaries(config, layer, ranks).values())
        if layer in whole_layers:
            kept += inputs
            recomputed = max(recomputed, sum(parts.values()) * layers_at_once)
        else:
            dropped = sum(size for part, size in parts.items() if part in recomputed_in_all)
            kept += sum(parts.values()) - dropped
            recomputed = max(recomputed, dropped)
    return Chunk(kept, recomputed, temporary)


def layer_activations(config: Config, layer: int, ranks: Ranks) -> dict[str, float]:
    """Bytes that autograd keeps of one layer and micro-batch on a rank, by part.

    With sequence parallelism, tensors between the split matrices are kept for the rank's part of
    the sequence. With context parallelism, keys and values are those of whole sequences.
    """
    language, itemsize = config.language, ITEMSIZE[config.precision]
    local_tokens = ranks.tokens(config) / ranks.tensor
    parts = {
        "norms": local_tokens * 2 * _norm(language.hidden_size, itemsize),
        **(_mla if language.attention == "mla" else _gqa)(config, ranks),
    }
    if layer < language.dense_layers:
        return {**parts, "dense MLP": _gated_mlp(config, ranks, language.ffn_hidden_size)}
    experts, per_token = language.num_experts, language.experts_per_token
    routed_tokens = local_tokens * per_token * ranks.expert_tensor
    width = language.expert_ffn_hidden_size / ranks.expert_tensor
    # Inputs, gate and up; for Transformer Engine, also their product.
    channels = language.hidden_size + (3 if _uses_transformer_engine(config) else 2) * width
    return {
        **parts,
        "shared experts": _gated_mlp(config, ranks, language.shared_expert_ffn_hidden_size),
        # Scores of all experts, and those and the numbers of the chosen ones, with their order.
        "router": local_tokens
        * (experts * (2 * FLOAT32 + 1) + per_token * (FLOAT32 + 2 * INT64) + FLOAT32),
        "experts": routed_tokens * (channels * itemsize + FLOAT32),
    }


def _mla(config: Config, ranks: Ranks) -> dict[str, float]:
    language, itemsize = config.language, ITEMSIZE[config.precision]
    heads, tokens = language.num_heads / ranks.tensor, ranks.tokens(config)
    shared = language.kv_lora_rank + language.qk_rope_head_dim
    # Sines and cosines for queries and for the rotary key, one for each position.
    table = 2 * language.qk_rope_head_dim / 2 * (1 + 1 / ranks.tensor) / config.micro_batch_size
    queries = 0.0 if language.q_lora_rank is None else _norm(language.q_lora_rank, itemsize)
    return {
        "latents": tokens / ranks.tensor * (queries + shared * itemsize + FLOAT32)
        + tokens * table * itemsize,
        "gathered latents": tokens * ranks.context * shared * itemsize,
        "queries": tokens * heads * language.query_key_dim * itemsize,
        "keys and values": tokens
        * ranks.context
        * heads
        * (language.query_key_dim + language.value_dim)
        * itemsize,
        **_attention_results(config, ranks),
    }


def _gqa(config: Config, ranks: Ranks) -> dict[str, float]:
    language, itemsize = config.language, ITEMSIZE[config.precision]
    dim, tokens = language.gqa_head_dim, ranks.tokens(config)
    heads, key_heads = language.num_heads / ranks.tensor, language.gqa_kv_heads / ranks.tensor
    # Sines and cosines for queries and keys, one for each position.
    tables = tokens * 4 * dim * itemsize / config.micro_batch_size
    # The norms' input is the projection, of which queries are copied.
    norms = tokens * ((heads + key_heads) * FLOAT32 + heads * dim * itemsize)
    # Keys and values, gathered; or rotated keys, and the projection, a part of which are values.
    channels = 2 * key_heads * ranks.context if ranks.context > 1 else key_heads
    if ranks.context == 1 or language.qk_norm:
        channels += heads + 2 * key_heads
    return {
        "norms of heads": norms if language.qk_norm else 0.0,
        "queries": tokens * heads * dim * itemsize + tables,
        "keys and values": tokens * channels * dim * itemsize,
        **_attention_results(config, ranks),
    }


def _attention_results(config: Config, ranks: Ranks) -> dict[str, float]:
    heads = ranks.tokens(config) * config.language.num_heads / ranks.tensor
    return {
        "scores": heads * FLOAT32,  # the log-sum-exp of every query
        "context": heads * config.language.value_dim * ITEMSIZE[config.precision],
    }


def _gated_mlp(config: Config, ranks: Ranks, width: int) -> float:
    """Gate and up, the gate's SiLU, up again, and their product; only the last if it is fused."""
    channels = (3 if _uses_transformer_engine(config) else 5) * width / ranks.tensor
    return ranks.tokens(config) * channels * ITEMSIZE[config.precision]


def head_activations(config: Config, ranks: Ranks) -> float:
    """Bytes kept of a micro-batch after the last layer: the final norm, and the softmax of the
    logits in float32, or their gradient if the cross entropy is fused."""
    tokens, itemsize = ranks.tokens(config), ITEMSIZE[config.precision]
    norm = tokens / ranks.tensor * _norm(config.language.hidden_size, itemsize)
    return norm + tokens * _local_vocabulary(config, ranks) * (
        itemsize if _uses_transformer_engine(config) else FLOAT32
    )


def head_temporaries(config: Config, ranks: Ranks) -> float:
    """Bytes of the logits, or of their gradient, and of the output head's gradient."""
    rows, itemsize = _local_vocabulary(config, ranks), ITEMSIZE[config.precision]
    wide = config.precision != "float32" and not _uses_transformer_engine(config)
    logits = ranks.tokens(config) * rows * (itemsize if wide else 0)
    return logits + rows * config.language.hidden_size * itemsize


def _local_vocabulary(config: Config, ranks: Ranks) -> float:
    return config.language.vocab_rows(config.data.vocab_size) / ranks.tensor


def layer_temporaries(config: Config, layer: int, ranks: Ranks) -> dict[str, float]:
    """Bytes of temporary tensors of a layer's backward pass, by the part that is its fullest."""
    language, itemsize = config.language, ITEMSIZE[config.precision]
    tokens, tensor = ranks.tokens(config), ranks.tensor
    hidden, heads = language.hidden_size, language.num_heads / tensor
    keys = tokens * ranks.context * heads
    if language.attention == "gqa":
        keys *= language.gqa_kv_heads / language.num_heads
    widths = language.query_key_dim + language.value_dim
    # The residual stream's gradients.
    residual = tokens / tensor * 4 * hidden * itemsize
    # Gradients of queries, keys and values, and of the context.
    parts = {"attention": residual + (tokens * heads + keys) * widths * itemsize}
    if layer < language.dense_layers:
        width = language.ffn_hidden_size / tensor
        parts["dense MLP"] = residual + (tokens * 4 * width + 2 * width * hidden) * itemsize
        return parts
    routed_tokens = tokens / tensor * language.experts_per_token * ranks.expert_tensor
    width = language.expert_ffn_hidden_size / ranks.expert_tensor
    # Gradients of outputs, gate, up, their product and inputs; the product and SiLU again; and the
    # gradients of all experts' weights.
    activations = routed_tokens * ((2 * hidden + 6 * width) * itemsize + 2 * width * FLOAT32)
    weights = ranks.local_experts * 3 * width * hidden * itemsize
    parts["experts"] = residual + activations + weights
    return parts


def encoder_activations(config: Config, patches: float) -> float:
    """Bytes that autograd keeps of this many patches in encoder and projector."""
    return patches * activation_bytes(config.vision, ITEMSIZE[config.precision])


def kept_by_encoder(config: Config, patches: float) -> float:
    """Bytes of activations, of the patches that a rank encodes, that are kept during the backbone's
    passes, at most. 0 if the memory for them depends on the device."""
    process, every = config.encoder_process, encoder_activations(config, patches)
    if not process.recompute:
        return every
    return min(every, (process.activation_memory_gib or 0.0) * 2**30)


def _uses_transformer_engine(config: Config) -> bool:
    return config.kernels == "transformer_engine"


def _norm(width: int, itemsize: int) -> float:
    """Bytes per token of a norm and its consumer: input, root mean square, and result."""
    return 2 * width * itemsize + FLOAT32
