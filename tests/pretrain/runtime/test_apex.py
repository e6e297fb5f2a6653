"""Only NVIDIA's compiled apex is used, and without it torch computes the same.

Its kernels cannot run here: stand-ins show which of them would be chosen, nothing more.
"""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from pretrain.runtime import apex

_PARTS = {
    "fused_layer_norm_cuda": (),
    "amp_C": ("multi_tensor_l2norm", "multi_tensor_scale"),
    "apex": (),
    "apex.normalization": (),
    "apex.normalization.fused_layer_norm": ("fused_rms_norm_affine",),
    "apex.multi_tensor_apply": ("multi_tensor_applier",),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    apex.find.cache_clear()
    yield
    apex.find.cache_clear()


def _install(monkeypatch: pytest.MonkeyPatch, left_out: str = "") -> None:
    for name, contents in _PARTS.items():
        module: ModuleType | None = ModuleType(name)
        for item in contents:
            if item != left_out:
                setattr(module, item, f"{name}.{item}")
        # None in sys.modules is how an import is made to fail.
        monkeypatch.setitem(sys.modules, name, None if name == left_out else module)


def test_nvidia_apex_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch)
    found = apex.find()
    assert found is not None
    assert found.rms_norm == "apex.normalization.fused_layer_norm.fused_rms_norm_affine"
    assert found.l2_norm == "amp_C.multi_tensor_l2norm"


@pytest.mark.parametrize(
    "left_out",
    ["fused_layer_norm_cuda", "amp_C", "apex.multi_tensor_apply", "fused_rms_norm_affine"],
)
def test_an_unrelated_or_uncompiled_apex_is_ignored(
    monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    """Such as the apex on PyPI, which is unrelated."""
    _install(monkeypatch, left_out)
    assert apex.find() is None


def test_a_cpu_uses_torch_even_with_apex_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch)
    x, weight = torch.randn(3, 8), torch.rand(8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(apex.rms_norm(x, weight, 1e-5), expected)
    tensors = [torch.randn(4), torch.randn(2, 3)]
    flat = torch.cat([t.flatten() for t in tensors])
    torch.testing.assert_close(apex.total_norm(tensors), flat.norm())
    apex.scale_(tensors, torch.tensor(0.5))
    torch.testing.assert_close(torch.cat([t.flatten() for t in tensors]), flat / 2)
