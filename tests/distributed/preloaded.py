"""Imports, done once in the fork server of ``launch.py``.

Otherwise every process would spend seconds on them. Nothing here runs a torch operation.
"""

import gc

import hypothesis  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import pytest  # noqa: F401
import torch.distributed.checkpoint.state_dict
import torch.distributed.optim  # noqa: F401

import pretrain.train  # noqa: F401
from tests.distributed import training  # noqa: F401

gc.freeze()  # else every rank's first full collection looks at all these modules: 0.3 seconds
