"""Transformer Engine is selected if it can be used; otherwise one line says why it cannot."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from megatron.core import utils
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding

from pretrain.config import Config, LanguageConfig, ParallelConfig
from pretrain.errors import PretrainError
from pretrain.model import kernels
from pretrain.model.kernels import choose_kernels, transformer_engine_problem
from pretrain.runtime import without_cuda

SUITABLE = Config(precision="bfloat16")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a GPU and a recent Transformer Engine, as far as these functions see."""
    monkeypatch.setattr(without_cuda, "USE_CUDA", True)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(utils, "is_te_min_version", lambda _version: True)
    monkeypatch.setattr(utils, "get_te_version", lambda: "2.9.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(kernels, "attention_error", lambda *_dims: None)
    return monkeypatch


def test_it_is_selected_where_it_can_be_used(engine: pytest.MonkeyPatch) -> None:
    assert choose_kernels(SUITABLE) == "transformer_engine"
    assert choose_kernels(replace(SUITABLE, kernels="torch")) == "torch"
    engine.setattr(without_cuda, "USE_CUDA", False)
    assert choose_kernels(SUITABLE) == "torch"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(), "needs precision=bfloat16, not float32"),
        (
            Config(precision="bfloat16", parallel=ParallelConfig(context=2)),
            "only kernels=torch can share packed sequences, as parallel.context=2",
        ),
        (
            Config(precision="bfloat16", language=LanguageConfig(v_head_dim=20)),
            "multiple of 8 and at most 256 channels, and language has v_head_dim = 20",
        ),
    ],
)
def test_an_unsuitable_configuration_is_refused(
    engine: pytest.MonkeyPatch, config: Config, message: str
) -> None:
    assert choose_kernels(config) == "torch"
    with pytest.raises(PretrainError) as error:
        choose_kernels(replace(config, kernels="transformer_engine"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unsuitable_machine_is_refused(engine: pytest.MonkeyPatch) -> None:
    engine.setattr(kernels, "attention_error", lambda *dims: f"no graph for {dims}")
    problem = transformer_engine_problem(SUITABLE) or ""
    assert "fails on this machine (no graph for (48, 32))" in problem
    engine.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 8.0" in (transformer_engine_problem(SUITABLE) or "")
    engine.setattr(utils, "is_te_min_version", lambda _version: False)
    assert "version 2.9.0 returns no max logits" in (transformer_engine_problem(SUITABLE) or "")
    engine.setitem(sys.modules, "transformer_engine", None)
    engine.setitem(sys.modules, "transformer_engine.pytorch", None)
    assert "cannot be imported" in (transformer_engine_problem(SUITABLE) or "")


@pytest.fixture
def without_gpu() -> Iterator[None]:
    """megatron-core's tables on the CPU."""
    without_cuda.enable()
    yield
    without_cuda.disable()


@pytest.mark.usefixtures("without_gpu")
def test_yarn_with_a_factor_of_one_is_the_plain_rotary_embedding() -> None:
    """The fused kernel knows only YaRN."""
    arguments = {"kv_channels": 16, "rotary_base": 50000.0}
    plain = RotaryEmbedding(rotary_percent=1.0, use_cpu_initialization=True, **arguments)
    yarn = YarnRotaryEmbedding(
        rotary_percent=1.0, use_cpu_initialization=True, scaling_factor=1.0,
        mscale=1.0, mscale_all_dim=0.0, **arguments,
    )  # fmt: skip
    frequencies, scale = yarn.forward(64, packed_seq=True)
    assert scale == 1
    torch.testing.assert_close(frequencies, plain.forward(64, packed_seq=True))
