"""The optimizer in a CUDA graph."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from muonclip import MuonClip, orthogonalize, param_groups, reference
from muonclip.distributed.scaled_float16 import decode_, encode
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


@DEVICES
def test_a_compiled_step_has_the_default_options(device: str) -> None:
    """torch.compile makes groups of parameters on GPUs ``capturable``, which 'raise' excludes."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [
            nn.Parameter(torch.randn(shape, generator=generator).to(device))
            for shape in ((64, 64), (64, 256), (64,))
        ]
        optimizer = MuonClip([{"params": params}], ns_dtype=torch.float32)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            step()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        results.append([p.detach() for p in params])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@DEVICES
@pytest.mark.parametrize(("n", "m"), [(256, 1024), (1536, 512), (512, 512), (32, 64)])
def test_the_default_arithmetic_has_its_rounding_error(device: str, n: int, m: int) -> None:
    """On a GPU float16 for rectangular matrices that are not small, otherwise bfloat16."""
    matrix = torch.randn(n, m, generator=torch.Generator().manual_seed(0))
    dtype = None
    if device == "cpu":
        dtype = torch.float16 if max(n, m) > 512 else torch.bfloat16
    result = orthogonalize(matrix.to(device), dtype=dtype).cpu()
    assert result.dtype == (torch.float16 if max(n, m) > 512 else torch.bfloat16)
    exact = reference.orthogonalize(matrix)
    error = (result.double() - exact).norm() / exact.norm()
    assert error < (1e-2 if result.dtype == torch.float16 else 3e-2)


@DEVICES
def test_messages_in_scaled_float16_have_the_bits_of_a_cpu(device: str) -> None:
    """Also of denormal numbers, which a device must not set to zero."""
    scales = torch.tensor([1e-44, 1e-39, 1e-30, 0.0, 1.0, 1e30, 1e38])[:, None]
    sent = torch.randn(7, 16, generator=torch.Generator().manual_seed(0)).clamp(-2, 2) * scales
    received = []
    for place in ("cpu", device):
        message = encode([sent.to(place)], [(1,)], torch.device(place))
        target = torch.empty(7, 16, device=place)
        decode_(message, [target], [(1,)])
        received += [message.cpu(), target.cpu()]
    assert torch.equal(received[0], received[2]) and torch.equal(received[1], received[3])
    assert torch.allclose(received[1], sent, rtol=2**-11, atol=0)


def offloaded(
    device: str, state_device: str | None, *, on_device: bool
) -> tuple[list[Tensor], int]:
    """Trained weights, and the bytes on the device that a step adds to those of the model.

    Args:
        on_device: whether parameters and gradients are on the device; otherwise on the CPU, as
            with FSDP2's ``CPUOffloadPolicy``.
    """
    generator = torch.Generator().manual_seed(0)
    home = torch.device(device if on_device else "cpu")
    params = [
        nn.Parameter(torch.randn(SIDE, SIDE, generator=generator).to(home, torch.bfloat16))
        for _ in range(12)
    ]
    optimizer = MuonClip(
        [{"params": params, "algorithm": "muon"}], ns_dtype=torch.float32, master_weights=True,
        state_device=state_device, compute_device=device,
    )  # fmt: skip
    is_cuda = device == "cuda"
    peak = 0
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(SIDE, SIDE, generator=generator).to(home, torch.bfloat16)
        if is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if is_cuda else 0
        optimizer.step()
        peak = torch.cuda.max_memory_allocated() - before if is_cuda else 0
    entries = [value for state in optimizer.state.values() for value in state.values()]
    where = "cpu" if state_device or not on_device else device
    assert all(value.device.type == where for value in entries)
    return [param.detach().cpu() for param in params], peak


SIDE = 1024


@DEVICES
@pytest.mark.parametrize("on_device", [True, False])
def test_offloaded_state_gives_the_same_weights_in_the_memory_of_two_batches(
    device: str, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is one matrix: momentum, master, and what Newton-Schulz needs."""
    if device == "cpu":
        monkeypatch.setattr("tests.gpu.test_optimizer.SIDE", 64)
    monkeypatch.setattr("muonclip.muon.BATCH_ELEMENTS_ELSEWHERE", SIDE**2)
    expected, _ = offloaded(device, None, on_device=True)
    found, peak = offloaded(device, "cpu", on_device=on_device)
    for ours, weights in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, weights, rtol=0, atol=0)
    if device == "cuda":  # of each of two batches 12 bytes an element, and some for the products
        assert peak <= (2 * 12 + 4 * 12) * SIDE**2
