"""State that is streamed in batches to where a step computes: same results, one batch there.

Without an accelerator, copies to the "device" are copies on the CPU, which are counted while they
live.
"""

import copy
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonclip import AttentionLayout, MuonClip, QKClip, adamw, muon, optimizer
from muonclip.offload import Devices
from tests.distributed.optimizer_cases import random

SHAPES = (6, 8), (4, 4, 5), (5,), (6, 8), (3, 7), (8, 2)


# Here, all devices are the CPU.
pytestmark = pytest.mark.filterwarnings("ignore:MuonClip.s state_device")


class Copies:
    """Stands in for copies to an accelerator; counts the bytes that live there at once."""

    def __init__(self) -> None:
        self.live = self.peak = self.number = 0

    def fetch(self, tensor: Tensor, device: torch.device) -> Tensor:
        copied = tensor.clone()
        size = copied.untyped_storage().nbytes()
        self.live += size
        self.number += 1
        self.peak = max(self.peak, self.live)
        weakref.finalize(copied, self._free, size)
        return copied

    def _free(self, size: int) -> None:
        self.live -= size


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    found = Copies()
    monkeypatch.setattr(muon, "fetch", found.fetch)
    monkeypatch.setattr(adamw, "fetch", found.fetch)
    return found


def make(dtype: torch.dtype, shapes: Any = SHAPES, **options: Any) -> tuple[list[Any], MuonClip]:
    params = [nn.Parameter(random(shape, i, dtype=dtype)) for i, shape in enumerate(shapes)]
    named = [(f"p{index}", param) for index, param in enumerate(params)]
    return params, MuonClip(named, **{"lr": 0.01, **options})


def train(params: list[Any], clip: MuonClip, steps: range) -> None:
    for step in steps:
        for index, param in enumerate(params):
            param.grad = random(param.shape, index, 10 + step, dtype=param.dtype)
        clip.step()


OPTIONS: list[dict[str, Any]] = [
    {"dtype": torch.float32},
    {"dtype": torch.float32, "momentum_dtype": torch.int8},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "master_weights": True},
    {"dtype": torch.bfloat16, "master_weights": "remainder", "momentum_dtype": torch.int8},
    {"dtype": torch.bfloat16, "master_weights": True, "weight_decay_mode": "l2"},
    {"dtype": torch.bfloat16, "stochastic_rounding": True},
    {"dtype": torch.float32, "nonfinite": "skip", "maximize": True, "nesterov": False},
]


def assert_equal_state(ours: MuonClip, expected: MuonClip) -> None:
    saved = ours.state_dict()["state"]
    for key, entries in expected.state_dict()["state"].items():
        for name, value in entries.items():
            assert torch.equal(saved[key][name], value), (key, name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("devices", [{"state_device": "cpu"}, {"compute_device": "cpu"}], ids=str)
@pytest.mark.parametrize("batch", [1, 50, 2**19])
def test_equals_a_step_in_place(
    options: dict[str, Any],
    devices: dict[str, str],
    batch: int,
    copies: Copies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, reference = make(**options)
    train(expected, reference, range(4))
    monkeypatch.setitem(muon._BATCH_ELEMENTS, "cpu", batch)
    monkeypatch.setattr(optimizer, "BATCH_ELEMENTS_ELSEWHERE", batch)
    reference_in_batches = make(**options)
    train(*reference_in_batches, range(4))  # other batches round Newton-Schulz differently
    copies.number = 0
    params, clip = make(**options, **devices)
    train(params, clip, range(4))
    assert copies.number > 0 and copies.live == 0
    assert all(map(torch.equal, params, reference_in_batches[0]))
    assert_equal_state(clip, reference_in_batches[1])


@pytest.mark.parametrize("number", [4, 16])
def test_two_batches_are_on_the_device_at_once(
    number: int, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is computed on and the next; whatever the number of parameters."""
    monkeypatch.setitem(muon._BATCH_ELEMENTS, "cpu", 64)
    monkeypatch.setattr(optimizer, "BATCH_ELEMENTS_ELSEWHERE", 64)
    params, clip = make(torch.float32, ((8, 8),) * number + ((64,),) * number, state_device="cpu")
    train(params, clip, range(2))
    # Of each batch: momentum, gradient and weight; the last two are not copied to another device
    # if they are there already. AdamW has two moments.
    assert copies.peak <= 4 * 64 * max(2 * 3, 4)


def test_master_copies_elsewhere_follow_written_weights_and_qk_clip(copies: Copies) -> None:
    found = []
    for devices in ({}, {"state_device": "cpu"}):
        torch.manual_seed(0)
        model = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)}).bfloat16()
        layout = AttentionLayout.separate(model["q"], model["k"], num_heads=2)
        qk_clip = QKClip({"layer": layout}, threshold=1.0)
        params = list(model.parameters())
        clip = MuonClip(model.named_parameters(), lr=1e-3, master_weights=True, **devices)
        for step in range(4):
            train(params, clip, range(step, step + 1))
            qk_clip.observe("layer", torch.tensor([3.0, 0.5]))
            qk_clip.step()
            if step == 1:
                params[0].data[2:4] = 0.5
        found.append((params, clip))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert_equal_state(found[1][1], found[0][1])


def test_saved_and_loaded(copies: Copies) -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "master_weights": True}
    params, clip = make(**options, state_device="cpu")
    train(params, clip, range(3))
    others, other = make(**options)
    for param, trained in zip(others, params, strict=True):
        param.data.copy_(trained)
    other.load_state_dict(copy.deepcopy(clip.state_dict()))
    again = copy.deepcopy(other)
    assert again.devices == Devices()
    assert copy.deepcopy(clip).devices == clip.devices
    train(params, clip, range(3, 5))
    train(others, other, range(3, 5))
    assert all(map(torch.equal, params, others))
    assert_equal_state(clip, other)


@pytest.mark.parametrize("loads", [False, True])
def test_all_streamed_state_is_pinned(loads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor that is not would hold up the stream. Also state that was loaded."""
    pinned: list[Tensor] = []

    def pin(_: Devices, tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(Devices, "pin", pin)
    options: dict[str, Any] = {"momentum_dtype": torch.int8, "state_device": "cpu"}
    for master_weights in (True, "remainder"):
        params, clip = make(torch.bfloat16, **options, master_weights=master_weights)
        train(params, clip, range(1))
        if loads:
            clip.load_state_dict(copy.deepcopy(clip.state_dict()))
            train(params, clip, range(1, 2))
        found = {id(tensor) for tensor in pinned}
        for param in params:
            entries = {**clip.state[param], "scale": clip.momentum_scales.get(param)}
            for name, value in entries.items():
                stored = getattr(value, "remainder_bits", value)
                assert name == "step" or stored is None or id(stored) in found, name


@pytest.mark.parametrize("devices", [{"state_device": "cpu"}, {"compute_device": "cpu"}], ids=str)
def test_devices_without_effect_are_reported_once(devices: dict[str, str]) -> None:
    params, clip = make(torch.float32, **devices)
    with pytest.warns(UserWarning, match="have no effect: .* are all on cpu. Leave them out") as w:
        train(params, clip, range(1))
    assert w[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(params, clip, range(1, 2))


def test_what_differs_from_the_parameters_device() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert not Devices(cpu, cpu).differ_from(cpu)
    assert all(Devices(*pair).differ_from(cpu) for pair in ((meta, None), (None, meta)))
    assert Devices(cpu).differ_from(meta)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_device": "meta"}, r"state_device must be 'cpu', or None .* got 'meta'"),
        ({"compute_device": "xla:3"}, r"compute_device='xla:3' is missing: torch finds"),
        ({"compute_device": "cuda:99"}, r"compute_device='cuda:99' is missing: torch finds"),
        ({"compute_device": "gpu"}, r"compute_device must be a device such as 'cuda', got 'gpu'"),
        ({"compute_device": 1.5}, r"compute_device must be a device such as 'cuda', got 1.5"),
        ({"state_device": "cpu", "shard_state": True}, r"cannot be combined with shard_state=True"),
        (
            {"compute_device": "cpu", "capturable": True, "nonfinite": "skip"},
            r"cannot be combined with capturable=True",
        ),
    ],
)
def test_devices_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(torch.float32, **options)
