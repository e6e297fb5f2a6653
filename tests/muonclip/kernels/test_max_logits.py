"""Inputs that the max-logit kernel accepts and refuses. Its results are tested in interpreted/."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from muonclip.kernels import max_logits as module
from muonclip.kernels.max_logits import max_logits_triton, supports


def test_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    """All other inputs use the torch implementation."""

    def answer(
        shape: tuple[int, ...] = (1, 4, 16, 128),
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
        mask: Tensor | None = None,
    ) -> bool:
        with FakeTensorMode():
            query = torch.empty(shape, dtype=dtype, device=device)
            return supports(query, query, mask)

    assert not answer()  # no GPU here
    monkeypatch.setattr(module, "has_triton", lambda: True)
    assert answer()
    assert not answer(device="cpu")
    assert not answer(mask=torch.ones(1, dtype=torch.bool))
    assert not answer(dtype=torch.float64)
    assert answer((1, 1, 1, 1024))
    assert not answer((1, 1, 1, 1025))
    assert not answer((1, 1, 1, 1024), torch.float32)
    assert not answer((0, 4, 16, 128))


Q = torch.zeros(2, 4, 5, 8)


@pytest.mark.parametrize(
    ("query", "key", "options", "message"),
    [
        (Q, Q[:, :3], {}, "groups dividing heads"),
        (Q, Q[..., :7], {}, r"got \(2, 4, 5, 8\)"),
        (Q, Q[:1], {}, "query must be"),
        (Q, Q[0], {}, "query must be"),
        (Q, Q, {"bound": torch.zeros(4)}, "give both"),
        (Q, Q, {"threshold": 1.0}, "give both"),
        (Q, Q, {"bound": torch.zeros(1, 4), "threshold": 1.0}, r"bound must be \[heads\]"),
    ],
)
def test_errors(query: Tensor, key: Tensor, options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        max_logits_triton(query, key, scale=1.0, causal=False, **options)
