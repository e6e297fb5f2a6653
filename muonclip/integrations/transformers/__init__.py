"""Hugging Face transformers: QK-Clip and Muon for its models.

``muonclip.for_model`` does all of this:

>>> groups = param_groups(model, layouts=transformers.matrix_layouts(model))  # doctest: +SKIP
>>> clip = transformers.qk_clip(model, threshold=100.0)  # doctest: +SKIP
>>> optimizer = MuonClip(groups, qk_clip=clip)  # doctest: +SKIP

``structure`` is the table of the names that models give to queries, keys and heads. ``matrices``
and ``attention`` derive the layouts from it. ``watching`` observes queries and keys where a model
calls the registry of attention functions (eager, sdpa, flex_attention, flash attention), whose
masks ``masks`` translates. ``trial`` tests each attention layout in the first forward pass.
"""

from muonclip.integrations.transformers.attention import (
    attention_layout,
    attention_layouts,
    attention_modules,
    unobserved_modules,
)
from muonclip.integrations.transformers.matrices import UnknownMatricesError, matrix_layouts
from muonclip.integrations.transformers.watching import qk_clip, watch

__all__ = [
    "UnknownMatricesError",
    "attention_layout",
    "attention_layouts",
    "attention_modules",
    "matrix_layouts",
    "qk_clip",
    "unobserved_modules",
    "watch",
]
