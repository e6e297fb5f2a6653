"""Floating-point operations of the model, counted from its shapes.

Two for each multiplication and addition in a matrix product; norms, activations and softmax are
small beside them. Model FLOPs as in PaLM (arXiv 2204.02311, appendix B): what the mathematics of a
step needs, so that work done again to save memory (DEP's second forward, activation recompute) is
not counted, and utilisation falls where it is done.
"""

from pretrain.config import LanguageConfig

# A backward pass multiplies each output's gradient with the weights and with the inputs.
FORWARD_AND_BACKWARD = 3


def flops_per_token(config: LanguageConfig, vocab_size: int, seq_length: int) -> float:
    """Of a forward pass of the language model, a token of a full sequence.

    Attention is counted as causal: a token meets itself and those before it, (``seq_length`` + 1)
    / 2 on average. That packed documents do not see each other is not counted.
    """
    hidden, heads = config.hidden_size, config.num_heads
    qk_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    attention = (
        hidden * config.q_lora_rank
        + config.q_lora_rank * heads * qk_dim
        + hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * hidden
        + heads * (qk_dim + config.v_head_dim) * (seq_length + 1) / 2
    )
    # Gate, up and down.
    dense = 3 * hidden * config.ffn_hidden_size
    experts = (
        hidden * config.num_experts
        + 3 * hidden * config.expert_ffn_hidden_size * config.experts_per_token
        + 3 * hidden * config.shared_expert_ffn_hidden_size
    )
    multiplications = (
        config.num_layers * attention
        + config.dense_layers * dense
        + (config.num_layers - config.dense_layers) * experts
        + hidden * vocab_size
    )
    return 2.0 * multiplications
