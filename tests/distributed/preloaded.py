"""Imports, done once in the fork server of ``launch.py``.

Otherwise every process would spend seconds on them. Nothing here runs a torch operation.
"""

import matplotlib.pyplot  # noqa: F401

import pretrain.train  # noqa: F401
from tests.distributed import training  # noqa: F401
