"""Repairs of megatron-core where Transformer Engine is missing, on every device.

megatron-core has mistakes that appear only without Transformer Engine: three in 0.16, of which 0.19
has the last one. Importing this file changes nothing: :func:`enable` makes the repairs that the
installed version needs, before a model is built, and :func:`disable` reverts them.
"""

import importlib
import sys
from importlib import util

from pretrain.errors import first_line
from pretrain.runtime import without_cuda
from pretrain.runtime.patches import Patches

_NAME = "transformer_engine"
_patches = Patches()

import_error: str | None = None
"""The reason why an installed Transformer Engine cannot be imported, on one line."""


def hide_if_unusable() -> None:
    """Treat a Transformer Engine that cannot be used as missing, for the whole process.

    To be called before megatron-core is imported, which otherwise fails, too, or calls CUDA on a
    machine without a GPU. Usual reasons why it cannot be imported are another version of torch or
    of CUDA, or a missing library.
    """
    global import_error
    if sys.modules.get(_NAME, ...) is None or util.find_spec(_NAME) is None:
        return
    if without_cuda.USE_CUDA:
        try:
            importlib.import_module(f"{_NAME}.pytorch")
            return
        except Exception as error:  # it raises errors of many types
            import_error = first_line(error)
    for name in [name for name in sys.modules if name.startswith(f"{_NAME}.")]:
        del sys.modules[name]
    sys.modules[_NAME] = None  # type: ignore[assignment]


def enable() -> None:
    """Repair megatron-core; to be called before a model is built.

    Nothing is changed if Transformer Engine can be imported, or if megatron-core needs no repair.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.tensor_parallel import CheckpointWithoutOutput
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
    # The argument `fp8`, whose default asks Transformer Engine whether FP8 is used.
    _patches.replace(CheckpointWithoutOutput.__init__, "__defaults__", (None,))


def disable() -> None:
    """Revert the repairs of :func:`enable`, if any."""
    _patches.undo()
