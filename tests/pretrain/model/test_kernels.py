"""Transformer Engine is refused, or not selected, where it cannot compute a configuration."""

from dataclasses import replace

import pytest

from pretrain.config import Config, ParallelConfig
from pretrain.errors import PretrainError
from pretrain.model.kernels import choose_kernels


def test_context_parallelism_needs_the_torch_kernels() -> None:
    config = Config(parallel=ParallelConfig(context=2))
    for setting in ("auto", "torch"):
        assert choose_kernels(replace(config, kernels=setting)) == "torch"  # type: ignore[arg-type]
    with pytest.raises(PretrainError, match="only kernels=torch can share packed"):
        choose_kernels(replace(config, kernels="transformer_engine"))
