"""What the fork server of :mod:`launch` holds ready, since every process would take its time anew:
imports, and a look at all fonts of the machine. Nothing in it runs a torch operation."""

import matplotlib.pyplot  # noqa: F401

import pretrain.train  # noqa: F401
from pretrain.data.builtin.drawing import font_paths
from tests.distributed import training  # noqa: F401

font_paths()
