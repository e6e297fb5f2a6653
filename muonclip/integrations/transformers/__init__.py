"""Hugging Face transformers: QK-Clip for its models in two lines, and Muon's matrix layouts.

>>> clip = transformers.qk_clip(model, threshold=100.0)  # doctest: +SKIP
>>> clip.attach(optimizer)  # doctest: +SKIP
>>> groups = param_groups(model, layouts=transformers.matrix_layouts(model))  # doctest: +SKIP
"""

from muonclip.integrations.transformers.matrices import matrix_layouts
from muonclip.integrations.transformers.watching import attention_layouts, qk_clip, watch

__all__ = ["attention_layouts", "matrix_layouts", "qk_clip", "watch"]
