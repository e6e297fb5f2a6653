"""MuonClip: the Muon optimizer, AdamW for everything but matrices, and QK-Clip for attention.

In a custom training loop, with a custom attention module:

>>> from functools import partial
>>> import torch
>>> import torch.nn.functional as F
>>> from torch import nn
>>> from muonclip import AttentionLayout, MuonClip, QKClip, param_groups
>>> class Attention(nn.Module):
...     def __init__(self, dim, heads):
...         super().__init__()
...         self.heads, self.observe = heads, None
...         self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
...     def forward(self, x):
...         q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
...                    for f in (self.q, self.k, self.v))
...         if self.training and self.observe:
...             self.observe(q, k, causal=True)  # QK-Clip watches here
...         x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
...         return self.out(x.transpose(1, 2).flatten(2))
>>> model = nn.ModuleDict({"embed": nn.Embedding(256, 64), "attention": Attention(64, heads=4),
...                        "head": nn.Linear(64, 256)})
>>> optimizer = MuonClip(param_groups(model), lr=2e-3, weight_decay=0.1)
>>> attention = model["attention"]
>>> layout = AttentionLayout.separate(attention.q, attention.k, num_heads=4)
>>> clip = QKClip({"attention": layout}, threshold=100.0)
>>> attention.observe = partial(clip.observe_attention, "attention")
>>> handle = clip.attach(optimizer)  # from here on optimizer.step() also clips
>>> for _ in range(3):
...     tokens = torch.randint(256, (8, 33))
...     logits = model["head"](attention(model["embed"](tokens[:, :-1])))
...     F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
...     optimizer.step()
...     optimizer.zero_grad()
>>> int(clip.result.num_clipped)
0
"""

from muonclip.attention_layouts import AttentionLayout, HeadRows
from muonclip.matrix_layouts import MatrixLayout
from muonclip.max_logits import max_logits, max_logits_bound, screened_max_logits
from muonclip.model_optimizer import for_model
from muonclip.model_report import ModelReport
from muonclip.monitor import MaxLogitMonitor
from muonclip.optimizer import MuonClip
from muonclip.orthogonalize import COEFFICIENTS, orthogonalize, update_scale
from muonclip.param_groups import (
    Assignment,
    assign_parameters,
    choose_algorithm,
    describe_assignment,
    param_groups,
)
from muonclip.qk_clip import ClipFactors, ClipResult, QKClip, clip_factors
from muonclip.trainer_factory import for_trainer

__version__ = "0.1.0"

__all__ = [
    "COEFFICIENTS",
    "Assignment",
    "AttentionLayout",
    "ClipFactors",
    "ClipResult",
    "HeadRows",
    "MatrixLayout",
    "MaxLogitMonitor",
    "ModelReport",
    "MuonClip",
    "QKClip",
    "assign_parameters",
    "choose_algorithm",
    "clip_factors",
    "describe_assignment",
    "for_model",
    "for_trainer",
    "max_logits",
    "max_logits_bound",
    "orthogonalize",
    "param_groups",
    "screened_max_logits",
    "update_scale",
]
