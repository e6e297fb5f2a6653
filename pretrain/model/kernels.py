"""The kernels that the language model computes with, chosen by ``Config.kernels``."""

import functools
from typing import Literal

import torch

from pretrain.config import Config
from pretrain.errors import PretrainError, first_line
from pretrain.runtime import without_cuda, without_transformer_engine

Kernels = Literal["torch", "transformer_engine"]

# The first version whose fused attention returns max logits of packed documents (``thd``).
_MIN_VERSION = "2.11.0"
# Limits of cuDNN's fused attention. Transformer Engine's other kernels return no max logits, or
# need memory that grows with the square of the sequence length.
_HEAD_MULTIPLE, _MAX_HEAD, _MIN_CAPABILITY = 8, 256, (8, 0)


def choose_kernels(config: Config) -> Kernels:
    """Return the kernels of a run on this machine.

    ``auto`` selects Transformer Engine if it can be imported, the model is on a GPU, and the
    precision and the sizes of the heads are supported.

    Raises:
        PretrainError: Transformer Engine is requested but cannot be used.
    """
    if config.kernels == "torch":
        return "torch"
    problem = transformer_engine_problem(config)
    if problem is None:
        return "transformer_engine"
    if config.kernels == "auto":
        return "torch"
    raise PretrainError(
        f"kernels=transformer_engine cannot be used: {problem}; or set kernels to torch or auto"
    )


def transformer_engine_problem(config: Config) -> str | None:
    """The reason why Transformer Engine cannot be used, and the remedy; None if it can."""
    if config.parallel.context > 1:
        return configuration_problem(config)
    return _machine_problem() or configuration_problem(config) or _attention_problem(config)


def _machine_problem() -> str | None:
    if not without_cuda.USE_CUDA:
        return "it needs a GPU, and CUDA is not available"
    try:
        import transformer_engine.pytorch  # noqa: F401
        from megatron.core.utils import get_te_version, is_te_min_version
    except ImportError as error:
        reason = without_transformer_engine.import_error or str(error)
        return (
            f"it cannot be imported ({reason}): install it with "
            "pip install --no-build-isolation 'transformer-engine[pytorch]'"
        )
    if not is_te_min_version(_MIN_VERSION):
        return (
            f"version {get_te_version()} returns no max logits of packed documents, which QK-Clip "
            f"needs: install version {_MIN_VERSION} or later"
        )
    capability = torch.cuda.get_device_capability()
    if capability < _MIN_CAPABILITY:
        return (
            f"its attention needs a GPU of compute capability 8.0 or later, and this one has "
            f"{capability[0]}.{capability[1]}"
        )
    return None


def configuration_problem(config: Config) -> str | None:
    """The reason why Transformer Engine cannot be used on any machine; None if it can."""
    if config.parallel.context > 1:
        return (
            f"only kernels=torch can share packed sequences, as parallel.context="
            f"{config.parallel.context} asks for: set parallel.context=1"
        )
    if config.precision != "bfloat16":
        return f"its attention needs precision=bfloat16, not {config.precision}"
    language = config.language
    if language.attention == "mla":
        heads = {
            "qk_nope_head_dim + qk_rope_head_dim": language.query_key_dim,
            "v_head_dim": language.v_head_dim,
        }
    else:
        heads = {"head_dim": language.gqa_head_dim}
    for name, size in heads.items():
        if size % _HEAD_MULTIPLE or size > _MAX_HEAD:
            return (
                f"its attention needs heads of a multiple of {_HEAD_MULTIPLE} and at most "
                f"{_MAX_HEAD} channels, and language has {name} = {size}"
            )
    return None


def _attention_problem(config: Config) -> str | None:
    """The reason why attention with max logits fails on this machine; None if it does not.

    Whether it works depends on the versions of Transformer Engine and of cuDNN, so it is tried.
    """
    error = attention_error(config.language.query_key_dim, config.language.value_dim)
    if error is None:
        return None
    return (
        f"its attention with max logits fails on this machine ({error}): versions from 2.14 on "
        "need cuDNN 9.21 or later; with an older one, install version 2.12"
    )


@functools.cache
def attention_error(query_key_dim: int, value_dim: int) -> str | None:
    """The error of a forward and a backward pass over packed documents with max logits, if any.

    Args:
        query_key_dim, value_dim: channels of a head.
    """
    import transformer_engine.pytorch as te

    heads, length, device = 2, 128, torch.device("cuda", torch.cuda.current_device())
    ends = torch.tensor([0, length], dtype=torch.int32, device=device)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            attention = te.DotProductAttention(
                heads, (query_key_dim, value_dim), qkv_format="thd",
                attn_mask_type="padding_causal", attention_dropout=0.0, return_max_logit=True,
            )  # fmt: skip
            query, key, value = (
                torch.ones(length, heads, width, dtype=torch.bfloat16, device=device)
                for width in (query_key_dim, query_key_dim, value_dim)
            )
            for tensor in (query, key, value):
                tensor.requires_grad_()
            context, max_logits = attention(
                query, key, value, cu_seqlens_q=ends, cu_seqlens_kv=ends,
                max_seqlen_q=length, max_seqlen_kv=length,
            )  # fmt: skip
            context.sum().backward()
            torch.cuda.synchronize()
            return None if max_logits.isfinite().all() else "they are not finite"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of cuDNN, or of its selection
        return first_line(error)
