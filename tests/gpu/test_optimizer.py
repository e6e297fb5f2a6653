"""The optimizer in a CUDA graph."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from muonclip import MuonClip, param_groups
from tests.gpu.devices import DEVICES


def replayable(step: Callable[[], object], device: str) -> Callable[[], object]:
    """The step as a CUDA graph; on a CPU the step itself."""
    if device == "cpu":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records the step without running it
        step()
    return graph.replay


def trained(device: str, *, captured: bool, dtype: torch.dtype) -> list[Tensor]:
    """Parameters after steps with given gradients and a learning rate that changes."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    model = nn.ModuleDict({"up": nn.Linear(64, 256), "down": nn.Linear(256, 64)}).to(device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(drawn(*parameter.shape))
            parameter.grad = torch.zeros_like(parameter)
    rate = torch.tensor(0.0, device=device)
    options = {"capturable": True, "nonfinite": "skip", "master_weights": True}
    optimizer = MuonClip(param_groups(model), lr=rate, **options)

    def with_new_gradients(step: Callable[[], object], number: int) -> None:
        rate.fill_(0.1 / number)
        for parameter in model.parameters():
            parameter.grad.copy_(drawn(*parameter.shape))
        step()

    step: Callable[[], object] = optimizer.step
    stream = torch.cuda.Stream() if device == "cuda" else None
    with torch.cuda.stream(stream):  # does nothing without a stream
        for number in (1, 2, 3):  # allocates the state
            with_new_gradients(step, number)
    if stream is not None:
        torch.cuda.current_stream().wait_stream(stream)
    if captured:
        step = replayable(step, device)
    for number in (4, 5, 6, 7):
        with_new_gradients(step, number)
    parameters = [parameter.detach().cpu() for parameter in model.parameters()]
    assert all(parameter.isfinite().all() for parameter in parameters)
    return parameters


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_equals_an_eager_one(device: str, dtype: torch.dtype) -> None:
    eager = trained(device, captured=False, dtype=dtype)
    replayed = trained(device, captured=True, dtype=dtype)
    for ours, expected in zip(replayed, eager, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
