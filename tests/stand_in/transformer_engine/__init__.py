"""A stand-in for NVIDIA's Transformer Engine, which cannot be installed without a GPU.

It has the names of the modules, classes, arguments and parameters that megatron-core uses for
training, and computes in plain torch on any device and in any floating dtype. It shows that the
trainer builds, names, splits and steps these layers correctly; it says nothing about Transformer
Engine's kernels. Tests that need it start a process with ``tests/stand_in`` in PYTHONPATH.

Names and semantics are those of Transformer Engine 2.12 (github.com/NVIDIA/TransformerEngine).
"""

from transformer_engine import common as common
from transformer_engine import pytorch as pytorch

__version__ = "2.12.0"
