"""The kernels that the language model computes with, chosen by ``Config.kernels``."""

from typing import Literal

from pretrain.config import KernelsSetting
from pretrain.errors import PretrainError
from pretrain.runtime import without_cuda

Kernels = Literal["torch", "transformer_engine"]


def choose_kernels(setting: KernelsSetting) -> Kernels:
    """Return the kernels of a run on this machine.

    ``auto`` selects Transformer Engine if it can be imported and the model is on a GPU.

    Raises:
        PretrainError: Transformer Engine is requested but cannot be used.
    """
    if setting == "torch" or (setting == "auto" and not without_cuda.USE_CUDA):
        return "torch"
    if not without_cuda.USE_CUDA:
        raise PretrainError(
            "kernels=transformer_engine needs a GPU, but CUDA is not available: set kernels=torch "
            "(or auto)"
        )
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        if setting == "auto":
            return "torch"
        raise PretrainError(
            f"kernels=transformer_engine needs Transformer Engine, which cannot be imported "
            f"({error}): pip install 'transformer-engine[pytorch]', or set kernels=torch"
        ) from error
    return "transformer_engine"
