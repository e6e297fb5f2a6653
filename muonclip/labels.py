"""Names of parameters: components that wrappers add, and labels for error messages."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Components of names added by DDP, torch.compile, FSDP, activation checkpointing and Fabric.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
            "_forward_module"}  # fmt: skip


def label(group: Mapping[str, Any], index: int) -> str:
    """The name of a parameter, or its position in its group."""
    names = group.get("param_names", [])
    if index < len(names):
        return f"parameter {names[index]!r}"
    return f"parameter number {index} of the {group.get('algorithm')} group"


def label_of(group: Mapping[str, Any], param: Tensor) -> str:
    return label(group, next(i for i, p in enumerate(group["params"]) if p is param))
