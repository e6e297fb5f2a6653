"""Updates write only to the parameter, for any strides of it, its gradient and its state."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonclip import MuonClip
from muonclip.adamw import AdamWRow, adamw_step

LAYOUTS = ("contiguous", "transposed", "every second", "a column", "middle", "padded")
GRADIENTS = (*LAYOUTS, "expanded", "one number")
SHAPE = (4, 6)


def laid_out(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """A view with these values in a larger tensor of sevens, and that tensor."""
    n, m = values.shape
    sevens = torch.full((2 * n + 2, 2 * m + 2, 2), 7.0, dtype=values.dtype)
    if layout == "contiguous":
        view = sevens.flatten()[: n * m].view(n, m)
    elif layout == "transposed":
        view = sevens.flatten()[: n * m].view(m, n).T
    elif layout == "every second":
        view = sevens[: 2 * n : 2, : 2 * m : 2, 0]
    elif layout == "a column":
        view = sevens[:n, :m, 1]
    elif layout == "middle":
        view = sevens[1 : n + 1, 1 : m + 1, 0]
    else:
        view = sevens.flatten()[1 : n * (m + 1) + 1].view(n, m + 1)[:, :m]
    view.copy_(values)
    return view, sevens


def gradient(layout: str, seed: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "expanded":
        return values[:1].expand(SHAPE)
    if layout == "one number":
        return values[0, 0].expand(SHAPE)
    return laid_out(values, layout)[0]


def untouched(view: Tensor, whole: Tensor) -> bool:
    """Whether the memory around a view is still as ``laid_out`` filled it."""
    whole = whole.clone().as_strided(whole.shape, whole.stride())
    whole.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(7.0)
    return bool((whole == 7.0).all())


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    gradients=st.lists(st.sampled_from(GRADIENTS), min_size=2, max_size=3),
    moments=st.sampled_from(LAYOUTS),
    algorithm=st.sampled_from(["muon", "adamw"]),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    options=st.sampled_from(
        [{}, {"master_weights": True}, {"stochastic_rounding": True}, {"maximize": True},
         {"weight_decay_mode": "cautious"}, {"weight_decay_mode": "l2"}]
    ),
)  # fmt: skip
def test_only_the_parameter_changes_as_if_it_were_contiguous(
    layout: str,
    gradients: list[str],
    moments: str,
    algorithm: str,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    start = gradient("contiguous", 0, dtype)
    view, memory = laid_out(start, layout)
    ours, plain = (
        nn.Parameter(view),
        nn.Parameter(start.clone(memory_format=torch.contiguous_format)),
    )
    assert ours.data_ptr() == view.data_ptr()
    common = {"lr": 0.1, "ns_dtype": torch.float64, **options}
    first, second = (
        MuonClip([{"params": [p], "algorithm": algorithm}], **common) for p in (ours, plain)
    )
    for step, kind in enumerate(gradients):
        ours.grad = gradient(kind, step + 1, dtype)
        plain.grad = ours.grad.clone(memory_format=torch.contiguous_format)
        first.step()
        second.step()
        if step == 0:  # as loaded from a checkpoint of another memory format
            for name, value in first.state[ours].items():
                if value.shape == SHAPE:
                    first.state[ours][name] = laid_out(value, moments)[0]
            if "master" in first.state[ours]:
                ours.main_param = first.state[ours]["master"]  # type: ignore[attr-defined]
    assert untouched(ours.detach(), memory)
    # A kernel may round the last elements of memory otherwise than the ones before.
    spacing = 0 if dtype == torch.float64 else 2.0**-7
    assert torch.allclose(ours, plain, atol=1e-12, rtol=spacing)


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (2, 3, 2, 2, 2), (1, 3, 1, 1)])
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_memory_format_changed_during_training(shape: tuple[int, ...], algorithm: str) -> None:
    """model.to(memory_format=...) replaces parameters' memory; gradients follow, moments do not."""
    from muonclip import MatrixLayout

    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    start = torch.randn(shape, dtype=torch.float64)
    changed, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    layout = MatrixLayout(flatten=True) if algorithm == "muon" else None
    optimizers = [
        MuonClip(
            [{"params": [p], "algorithm": algorithm, "layout": layout}], ns_dtype=torch.float64
        )
        for p in (changed, plain)
    ]
    for step in range(4):
        if step == 2:
            changed.data = changed.data.to(memory_format=formats[len(shape)])
        plain.grad = torch.randn(shape, dtype=torch.float64)
        changed.grad = plain.grad.clone().to(memory_format=formats[len(shape)])
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(changed, plain, atol=1e-12)


def test_parameters_that_overlap_themselves_are_refused() -> None:
    for view in (torch.zeros(1, 4).expand(3, 4), torch.zeros(9).as_strided((4, 3), (1, 1))):
        with pytest.raises(ValueError, match="elements that share memory"):
            MuonClip([nn.Parameter(view)])


@pytest.mark.parametrize("found", [0.0, 1.0])
@pytest.mark.parametrize("fused", [True, False])
def test_found_inf_skips_copied_tensors_too(
    monkeypatch: pytest.MonkeyPatch, fused: bool, found: float
) -> None:
    """As on an accelerator, with and without a fused kernel."""
    import muonclip.adamw

    devices = ["cpu"] if fused else []
    monkeypatch.setattr(muonclip.adamw, "_get_fused_kernels_supported_devices", lambda: devices)
    view, _ = laid_out(torch.randn(SHAPE), "every second")
    row = AdamWRow(
        view, torch.ones(SHAPE), torch.zeros(SHAPE), torch.zeros(SHAPE), torch.tensor(0.0)
    )
    before = copy.deepcopy([t.clone() for t in row])
    adamw_step(
        [row], lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.1, eps=1e-8, maximize=False,
        found_inf=torch.tensor(found),
    )  # fmt: skip
    same = [torch.equal(a, b) for a, b in zip(row, before, strict=True)]
    assert same == ([True] * 5 if found else [False, True, False, False, False])


def test_stochastic_rounding_does_not_depend_on_strides() -> None:
    from muonclip.precision import round_stochastically

    source = torch.randn(5, 8)
    targets = [torch.empty(5, 8, dtype=torch.bfloat16) for _ in range(2)]
    round_stochastically(source, targets[0], (3,))
    round_stochastically(source.T.contiguous().T, targets[1], (3,))
    assert torch.equal(*targets)
