"""Master copies as weight and remainder equal float32 master copies bit for bit."""

import copy
import pickle
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonclip import AttentionLayout, MuonClip, QKClip
from muonclip.distributed.remainder_master import RemainderMaster
from muonclip.remainders import join, split_
from tests.distributed.optimizer_cases import random

SHAPES = (6, 8), (3, 4, 5), (5,)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.int32)


def float32_of(pattern: int) -> float:
    """The float32 with these bits."""
    return struct.unpack("<f", struct.pack("<I", pattern))[0]


# Ties between two bfloat16 numbers, the largest float32, infinities, NaN, subnormals and zeros.
EDGES = (0x3F808000, 0x3F818000, 0xBF808000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FFFFFFF)
EDGES += (0xFFFFFFFF, 0x7F800001, 0x00000001, 0x00008000, 0x80007FFF, 0x80000000, 0)


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.sampled_from(EDGES), st.integers(0, 2**32 - 1)))
def test_every_float32_is_kept(pattern: int) -> None:
    signed = pattern - 2**32 if pattern >= 2**31 else pattern
    master = torch.tensor([signed], dtype=torch.int32).view(torch.float32)
    weight, remainder = torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int16)
    split_(master, weight, remainder)
    if master.isnan():
        assert weight.isnan() and join(weight, remainder).isnan()
        return
    assert torch.equal(bits(join(weight, remainder)), bits(master))
    if pattern % 2**16 != 2**15:
        assert torch.equal(weight, master.bfloat16())
    else:  # a tie: the neighbour that is farther from zero
        assert weight.item() == float32_of((pattern + 2**15) % 2**32)


def test_strided_tensors() -> None:
    master = random((5, 3), 0).mT
    weight = torch.empty(5, 3, dtype=torch.bfloat16).mT
    remainder = torch.empty(3, 5, dtype=torch.int16)
    split_(master, weight, remainder)
    assert torch.equal(join(weight, remainder), master)


def make(master_weights: Any, **options: Any) -> tuple[list[nn.Parameter], MuonClip]:
    params = [
        nn.Parameter(random(shape, index, dtype=torch.bfloat16))
        for index, shape in enumerate(SHAPES)
    ]
    named = [(f"p{index}", param) for index, param in enumerate(params)]
    return params, MuonClip(named, **{"lr": 1e-3, "master_weights": master_weights, **options})


def train(params: list[nn.Parameter], optimizer: MuonClip, steps: range) -> None:
    for step in steps:
        for index, param in enumerate(params):
            param.grad = random(param.shape, index, 10 + step, dtype=param.dtype)
        optimizer.step()


def assert_same_masters(ours: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    for param, other in zip(ours, expected, strict=True):
        masters = []
        for tensor in (param, other):
            master = tensor.main_param
            is_remainder = isinstance(master, RemainderMaster)
            masters.append(master.float32() if is_remainder else master)
        assert torch.equal(*map(bits, masters))
        # They differ at most in ties.
        is_tie = bits(masters[0]) % 2**16 == 2**15
        assert torch.equal(param[~is_tie], other[~is_tie])


OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay_mode": "l2", "weight_decay": 0.5},
    {"weight_decay_mode": "cautious", "maximize": True},
    {"momentum_dtype": torch.int8},
    {"lr": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_equals_float32_masters(options: dict[str, Any]) -> None:
    ours, optimizer = make("remainder", **options)
    expected, reference = make(True, **options)
    train(ours, optimizer, range(20))
    train(expected, reference, range(20))
    assert_same_masters(ours, expected)
    for param in ours:
        master = optimizer.state[param]["master"]
        assert master is param.main_param and isinstance(master, RemainderMaster)
        assert master.remainder_bits.dtype == torch.int16


def test_a_skipped_step_changes_nothing() -> None:
    params, optimizer = make("remainder", nonfinite="skip")
    train(params, optimizer, range(2))
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    for param in params:
        param.grad[0] = torch.nan
    optimizer.step()
    after = optimizer.state_dict()["state"]
    assert all(map(torch.equal, params, before[0]))
    for key, entries in before[1].items():
        assert all(torch.equal(value, after[key][name]) for name, value in entries.items())


@pytest.mark.parametrize("saved_as", [True, "remainder"])
@pytest.mark.parametrize("loaded_as", [True, "remainder"])
@pytest.mark.parametrize("weights_first", [True, False])
def test_saved_and_loaded_in_either_form(
    saved_as: Any, loaded_as: Any, weights_first: bool
) -> None:
    """In a checkpoint, both are float32; the form is that of the optimizer that loads it."""
    params, optimizer = make(saved_as)
    train(params, optimizer, range(8))
    weights, saved = [p.detach().clone() for p in params], optimizer.state_dict()
    assert all(entries["master"].dtype == torch.float32 for entries in saved["state"].values())
    others, other = make(loaded_as)
    if not weights_first:
        other.load_state_dict(copy.deepcopy(saved))
        other.state_dict()  # reads the masters as they were loaded, whatever the weights
    for param, weight in zip(others, weights, strict=True):
        param.data.copy_(weight)
    if weights_first:
        other.load_state_dict(copy.deepcopy(saved))
    assert other.param_groups[0]["master_weights"] == loaded_as
    train(params, optimizer, range(8, 12))
    train(others, other, range(8, 12))
    assert_same_masters(others, params)


def test_named_state_and_copies_of_the_optimizer() -> None:
    params, optimizer = make("remainder")
    train(params, optimizer, range(3))
    names = [f"p{index}" for index in range(len(params))]
    others, other = make("remainder")
    for param, trained in zip(others, params, strict=True):
        param.data.copy_(trained)
    saved = copy.deepcopy(optimizer.named_state(zip(names, params, strict=True)))
    other.load_named_state(saved, list(zip(names, others, strict=True)))
    for group in other.param_groups:
        group["updates"] = 3
    copied = pickle.loads(pickle.dumps(optimizer))
    copies = [param for group in copied.param_groups for param in group["params"]]
    originals = [param for group in optimizer.param_groups for param in group["params"]]
    gradients = {param: random(param.shape, 99, dtype=param.dtype) for param in originals}
    for param, duplicate in zip(originals, copies, strict=True):
        param.grad = duplicate.grad = gradients[param]
    for param, duplicate in zip(params, others, strict=True):
        duplicate.grad = gradients[param]
    for each in (optimizer, other, copied):
        each.step()
    assert_same_masters(copies, originals)
    assert_same_masters(others, params)


def test_main_param_is_read_and_written_like_a_tensor() -> None:
    params, optimizer = make("remainder")
    train(params, optimizer, range(2))
    master, values = params[0].main_param, params[0].main_param.float32()
    assert (master.shape, master.dtype) == (values.shape, torch.float32)
    assert torch.equal(master, values)
    assert torch.equal(master.norm(), values.norm())
    assert torch.equal(master.flatten()[::3], values.flatten()[::3])
    master.mul_(0.3)
    master[1:3].add_(1)
    master.data[0].copy_(torch.ones(8))
    values.mul_(0.3)[1:3].add_(1)
    values[0] = 1
    assert torch.equal(master, values)
    assert torch.equal(params[0], values.bfloat16())
    assert torch.equal(copy.deepcopy(master), values)


def test_qk_clip_scales_it_as_a_float32_master() -> None:
    found = []
    for master_weights in (True, "remainder"):
        torch.manual_seed(0)
        model = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)}).bfloat16()
        layout = AttentionLayout.separate(model["q"], model["k"], num_heads=2)
        clip = QKClip({"layer": layout}, threshold=1.0)
        params = list(model.parameters())
        optimizer = MuonClip(model.named_parameters(), lr=1e-3, master_weights=master_weights)
        for step in range(4):
            train(params, optimizer, range(step, step + 1))
            clip.observe("layer", torch.tensor([3.0, 0.5]))  # the first head only
            clip.step()
        found.append(params)
    assert_same_masters(found[1], found[0])


def test_an_entry_that_is_written_keeps_its_remainder() -> None:
    """The master rounds to the new weight: it is within half a unit in its last place."""
    params, optimizer = make("remainder", lr=0.0)
    train(params, optimizer, range(2))
    written = random((6, 8), 50, dtype=torch.bfloat16)
    params[0].data.copy_(written)
    assert torch.equal(params[0].main_param.bfloat16(), written)
    train(params, optimizer, range(2, 3))
    assert torch.equal(params[0], written)


def test_zeros_and_infinities_that_are_written_have_no_remainder() -> None:
    """Those of other weights would make them NaN: pruned weights and padding rows."""
    weight = torch.tensor([0.0, -0.0, torch.inf, -torch.inf]).bfloat16()
    master = join(weight, torch.tensor([-1, -(2**15), 1, 2**15 - 1], dtype=torch.int16))
    assert torch.equal(bits(master), bits(weight.float()))
    params, optimizer = make("remainder", weight_decay=0.5)
    for step in range(4):
        train(params, optimizer, range(step, step + 1))
        for param in params:
            assert param.isfinite().all() and param.main_param.isfinite().all()
            param.data[:2] = 0
            param.data[:1].neg_()
        assert params[0].main_param[:2].abs().max() < 1e-40


def test_a_master_has_the_strides_of_its_parameter() -> None:
    for values in (random((8, 6), 0).mT, random((6, 16), 0)[:, ::2]):
        param = nn.Parameter(torch.empty_strided((6, 8), values.stride(), dtype=torch.bfloat16))
        param.data.copy_(values)
        optimizer = MuonClip([("p", param)], master_weights="remainder")
        param.grad = random((6, 8), 1, dtype=torch.bfloat16)
        optimizer.step()
        master = param.main_param
        assert master.stride() == param.stride()
        assert torch.equal(master.flatten(), master.float32().flatten())


def test_remainders_load_into_sharded_state_as_whole_masters() -> None:
    params, optimizer = make("remainder")
    train(params, optimizer, range(2))
    with pytest.warns(UserWarning, match="shard_state=True has no effect"):
        others, other = make(True, shard_state=True)
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["master_weights"] is True
    for param, trained in zip(others, params, strict=True):
        param.data.copy_(trained)
    for each in ((params, optimizer), (others, other)):
        train(*each, range(2, 4))
    assert_same_masters(others, params)


def test_a_model_that_is_converted_between_steps() -> None:
    params, optimizer = make("remainder")
    for step, dtype in enumerate((torch.bfloat16, torch.float32, torch.bfloat16, torch.float16)):
        for param in params:
            param.data = param.data.to(dtype)
        train(params, optimizer, range(step, step + 1))
        kind = {torch.bfloat16: RemainderMaster, torch.float16: Tensor}.get(dtype)
        for param in params:
            assert type(optimizer.state[param].get("master")) in (kind, type(None))
            assert hasattr(param, "main_param") == (kind is not None)


def test_parameters_without_a_remainder_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bfloat16 parameters, but parameter 'w' .* is float16"):
        MuonClip([("w", nn.Parameter(torch.ones(4, 4).half()))], master_weights="remainder")
    param = nn.Parameter(torch.ones(4, 4).bfloat16())
    with pytest.raises(ValueError, match=r"'remainder' cannot be combined with shard_state=True"):
        MuonClip([("w", param)], master_weights="remainder", shard_state=True)
    with pytest.raises(ValueError, match=r"master_weights must be one of"):
        MuonClip([("w", param)], master_weights="remainders")
    with pytest.raises(ValueError, match=r"master_weights and stochastic_rounding exclude"):
        MuonClip([("w", param)], master_weights="remainder", stochastic_rounding=True)
