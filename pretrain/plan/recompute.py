"""Scope of activation recomputation, for FLOPs and for memory."""

from pretrain.config import Config

# Parts of a layer that each module of selective recompute computes again.
_PARTS = {
    "core_attn": ("scores",),
    "mlp": ("dense MLP",),
    "moe": ("router", "experts", "shared experts"),
    "shared_experts": ("shared experts",),
}


def recomputed_layers(config: Config, chunk: range) -> range:
    """Return the layers of a model chunk that are recomputed as a whole."""
    recompute = config.recompute
    if recompute.granularity != "full":
        return chunk[:0]
    return chunk if recompute.method == "uniform" else chunk[: recompute.num_layers]


def recomputed_parts(config: Config) -> set[str]:
    """Return the parts that are recomputed in every layer."""
    if config.recompute.granularity != "selective":
        return set()
    return {part for module in config.recompute.modules for part in _PARTS[module]}
