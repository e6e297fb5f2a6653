"""Repairs of megatron-core 0.16 where Transformer Engine is missing, on every device.

megatron-core 0.16 has two mistakes that appear only without Transformer Engine; 0.19 does not have
them. Importing this file changes nothing: :func:`enable` makes the repairs that the installed
version needs, before a model is built, and :func:`disable` reverts them.
"""

from pretrain.runtime.patches import Patches

_patches = Patches()


def enable() -> None:
    """Repair megatron-core; to be called before a model is built.

    Nothing is changed if Transformer Engine can be imported, or if megatron-core needs no repair.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if HAVE_TE:
        return
    # True, because the import of names that are then None succeeds.
    if multi_latent_attention.HAVE_TE:
        _patches.replace(multi_latent_attention, "HAVE_TE", False)
    # The router reads it, but it is only defined with Transformer Engine.
    if not hasattr(moe_utils, "te_general_gemm"):
        _patches.replace(moe_utils, "te_general_gemm", None)


def disable() -> None:
    """Revert the repairs of :func:`enable`, if any."""
    _patches.undo()
