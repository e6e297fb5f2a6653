"""torch's flex_attention on NVIDIA GPUs: masks in blocks, and one compilation for all lengths."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# Rows of queries and of keys in a block.
BLOCK = 128
_MIN_CAPABILITY, _MIN_WIDTH = (8, 0), 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Variants of flex_attention that may be compiled.
_MAX_VARIANTS = 64


@functools.cache
def flex_problem(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
    """The reason why flex_attention cannot be used; None if it can.

    Args:
        device, dtype: of queries, keys and values.
        widths: channels of a head of the queries and of the values.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return "it needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return f"it needs compute capability 8.0 or later, not {capability[0]}.{capability[1]}"
    if dtype not in _DTYPES:
        return f"it computes in 16 bits or float32, not {dtype}"
    if min(widths) < _MIN_WIDTH:
        return f"it needs heads of at least {_MIN_WIDTH} channels, not {min(widths)}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def attention_and_max_scores(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention, and the largest logit of every query in float32, on a GPU.

    Args:
        query: [b, heads, queries, d].
        key: [b, groups, keys, d]; groups divides heads.
        value: [b, groups, keys, v].
        mask: blocks of queries and keys.
        scale: factor on the products.

    Returns:
        [b, heads, queries, v], and [b, heads, queries] without gradient.
    """
    output, extra = compiled_flex()(
        query,
        key,
        value,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=torch_flex.AuxRequest(max_scores=True),
    )
    return output, extra.max_scores.detach()


def block_mask(
    partial: Tensor,
    full: Tensor,
    allowed: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    lengths: tuple[int, int],
    device: torch.device,
) -> BlockMask:
    """Mask from blocks that are known, without a tensor of all pairs of rows.

    Args:
        partial: bool [b or 1, query blocks, key blocks] on the CPU, blocks in which ``allowed``
            decides.
        full: the same, blocks in which every query attends to every key.
        allowed: function of the indices of sequence, head, query and key.
        lengths: rows of queries and of keys.
        device: of queries and keys.
    """
    return BlockMask.from_kv_blocks(
        *_block_lists(partial, device),
        *_block_lists(full, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=allowed,
        seq_lengths=lengths,
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU without waiting for the kernels of a GPU."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _block_lists(selected: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of selected key blocks of each query block, and the indices, selected ones first."""
    numbers = selected.to(torch.int32)
    indices = numbers.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    counts = numbers.sum(-1, dtype=torch.int32)
    return to_device(counts[:, None], device), to_device(indices[:, None].contiguous(), device)


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    """flex_attention, compiled for all lengths.

    torch compiles again if a size is 1 or equals another one, and with or without gradients. Beyond
    its limit of 8 variants, it would compute all logits in memory, with a warning: with
    ``fullgraph``, it raises an error instead.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _MAX_VARIANTS)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
