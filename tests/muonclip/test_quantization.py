"""Int8 momentum: rounding of rows, steps against a definition, and saved states."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonclip import MatrixLayout, MuonClip, orthogonalize
from muonclip.distributed.int8_state import new_scale
from muonclip.matrix_layouts import WHOLE
from muonclip.quantization import dequantize, quantize_
from tests.distributed.optimizer_cases import random

LR = 0.01


def encode(values: Tensor, layout: MatrixLayout = WHOLE) -> tuple[Tensor, Tensor]:
    codes = torch.empty(values.shape, dtype=torch.int8)
    scale = new_scale(codes, layout)
    quantize_(codes, scale, values)
    return codes, scale


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=3),
    st.integers(0, 2**31),
    st.integers(-149, 120),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_errors_are_half_a_code_and_decoded_rows_keep_their_bits(
    shape: list[int], seed: int, exponent: int, dtype: torch.dtype
) -> None:
    """Also of rows whose scale would not be a normal number."""
    values = (random(shape, seed, dtype=torch.float64) * 2.0**exponent).to(dtype)
    values[0, ..., 0] = 0
    codes, scale = encode(values)
    decoded = dequantize(codes, scale, torch.float64)
    largest = values.double().abs().amax(-1, keepdim=True)
    assert (scale.double() >= largest / 127).all()
    assert (scale.double() <= (largest / 127 * (1 + 2**-15)).clamp(min=2**-126)).all()
    assert ((decoded - values.double()).abs() <= scale.double() * 0.5000001).all()
    assert torch.equal(dequantize(codes, scale).double(), decoded)  # exact in float32
    for ours, again in zip((codes, scale), encode(dequantize(codes, scale)), strict=True):
        assert torch.equal(ours, again)


def test_a_row_of_a_kernel_is_all_of_an_output() -> None:
    codes, scale = encode(random((4, 3, 2, 2), 0), MatrixLayout(flatten=True))
    assert scale.shape == (4, 1, 1, 1)
    assert (codes.flatten(1).abs().amax(1) == 127).all()


# The NaN of CUDA, and one with all bits.
@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0x7FFFFFFF, -1])
def test_a_value_that_is_not_finite_spoils_a_row(bits: int) -> None:
    values = random((3, 4), 0)
    values.view(torch.int32)[1, 2] = bits
    decoded = dequantize(*encode(values))
    assert decoded[1].isnan().all()
    assert decoded[[0, 2]].isfinite().all()


SHAPES = (6, 8), (3, 4, 5), (5,)


def make(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[list[nn.Parameter], MuonClip]:
    params = [nn.Parameter(random(shape, i, dtype=dtype)) for i, shape in enumerate(SHAPES)]
    named = [(f"p{index}", param) for index, param in enumerate(params)]
    return params, MuonClip(named, lr=LR, **options)


def train(params: list[nn.Parameter], optimizer: MuonClip, steps: range) -> None:
    for step in steps:
        for index, param in enumerate(params):
            param.grad = random(param.shape, index, 10 + step, dtype=param.dtype)
        optimizer.step()


def test_steps_equal_their_definition() -> None:
    """The update has the exact new momentum; the next step, the rounded one."""
    params, optimizer = make(momentum_dtype=torch.int8, weight_decay=0.0, ns_dtype=torch.float64)
    matrix, momentum = random((6, 8), 0).double(), torch.zeros(6, 8, dtype=torch.float64)
    for step in range(4):
        train(params, optimizer, range(step, step + 1))
        gradient = random((6, 8), 0, 10 + step, dtype=torch.float64)
        momentum = momentum.lerp(gradient, 0.05)
        update = orthogonalize(gradient.lerp(momentum, 0.95), dtype=torch.float64)
        matrix -= LR * 0.2 * 8**0.5 * update
        scale = momentum.abs().amax(1, keepdim=True) / 127
        momentum = (momentum / scale).round() * scale
        assert (params[0] - matrix).abs().max() < 1e-5  # the scale is rounded to 17 bits
    codes, scale = (
        optimizer.state[params[0]]["momentum_buffer"],
        optimizer.momentum_scales[params[0]],
    )
    assert (codes.dtype, scale.shape) == (torch.int8, (6, 1))
    error = dequantize(codes, scale) - momentum
    assert error.abs().max() < 0.02 * momentum.abs().max()


def test_state_has_one_byte_an_element_and_four_a_row() -> None:
    params, optimizer = make(torch.float32, momentum_dtype=torch.int8)
    train(params, optimizer, range(1))
    for param in params[:2]:
        (codes,), scale = optimizer.state[param].values(), optimizer.momentum_scales[param]
        assert codes.nbytes + scale.nbytes == param.numel() + 4 * param.numel() // param.size(-1)
    assert optimizer.state[params[2]]["exp_avg"].dtype == torch.float32  # AdamW's are as they were


def test_a_skipped_step_changes_nothing() -> None:
    params, optimizer = make(momentum_dtype=torch.int8, nonfinite="skip")
    train(params, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    for param in params:
        assert param.grad is not None
        param.grad[0] = torch.nan
    optimizer.step()
    after = optimizer.state_dict()["state"]
    for key, entries in before.items():
        assert all(torch.equal(value, after[key][name]) for name, value in entries.items())


def state_of(optimizer: MuonClip, params: list[nn.Parameter]) -> list[Tensor]:
    entries = [value for param in params for value in optimizer.state[param].values()]
    return entries + [optimizer.momentum_scales[param] for param in params[:2]]


@pytest.mark.parametrize("way", ["state_dict", "full_state_dict", "named_state", "pickle"])
def test_saved_and_loaded_bit_for_bit(way: str) -> None:
    params, optimizer = make(momentum_dtype=torch.int8)
    train(params, optimizer, range(3))
    others, other = make(momentum_dtype=torch.int8)
    for param, trained in zip(others, params, strict=True):
        param.data.copy_(trained)
    if way == "named_state":
        names = [f"p{index}" for index in range(len(params))]
        saved = copy.deepcopy(optimizer.named_state(zip(names, params, strict=True)))
        other.load_named_state(saved, list(zip(names, others, strict=True)))
        for group, trained_group in zip(other.param_groups, optimizer.param_groups, strict=True):
            group["updates"] = trained_group["updates"]
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
        others = [param for group in other.param_groups for param in group["params"]]
        params = [param for group in optimizer.param_groups for param in group["params"]]
    else:
        other.load_state_dict(copy.deepcopy(getattr(optimizer, way)()))
    for trained_optimizer, trained in ((optimizer, params), (other, others)):
        for index, param in enumerate(trained):
            param.grad = random(param.shape, index, 99, dtype=param.dtype)
        trained_optimizer.step()
    for ours, expected in zip(state_of(other, others), state_of(optimizer, params), strict=True):
        assert torch.equal(ours, expected)
    assert all(map(torch.equal, others, params))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saves_int8", [False, True])
def test_another_dtype_is_converted_with_a_warning(
    dtype: torch.dtype | None, saves_int8: bool
) -> None:
    """The option of this optimizer decides, unlike others: its memory was planned with it."""
    pair = (torch.int8, dtype) if saves_int8 else (dtype, torch.int8)
    params, optimizer = make(torch.float32, momentum_dtype=pair[0])
    train(params, optimizer, range(3))
    others, other = make(torch.float32, momentum_dtype=pair[1])
    with pytest.warns(UserWarning, match=r"momentum_dtype=\S+, and this optimizer has momentum_dt"):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["momentum_dtype"] == pair[1]
    saved, loaded = optimizer.state_dict()["state"], other.state_dict()["state"]
    for key in range(2):
        ours, expected = loaded[key]["momentum_buffer"], saved[key]["momentum_buffer"]
        assert (ours.float() - expected.float()).abs().max() <= expected.abs().max() / 200
    train(others, other, range(3, 4))


def test_the_same_dtype_is_loaded_without_a_warning() -> None:
    params, optimizer = make(momentum_dtype=torch.int8)
    train(params, optimizer, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(momentum_dtype=torch.int8)[1].load_state_dict(optimizer.state_dict())


def test_hooks_of_users_see_and_rename_what_is_saved() -> None:
    params, optimizer = make(momentum_dtype=torch.int8)
    train(params, optimizer, range(1))
    expected = optimizer.state_dict()["state"]

    def rename(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        assert saved["state"][0]["momentum_buffer"].dtype == torch.float32
        return {**saved, "state": {f"p{key}": value for key, value in saved["state"].items()}}

    optimizer.register_state_dict_post_hook(rename)
    renamed = optimizer.state_dict()["state"]
    assert renamed.keys() == {"p0", "p1", "p2"}
    assert torch.equal(renamed["p0"]["momentum_buffer"], expected[0]["momentum_buffer"])


def test_codes_without_scales_are_refused() -> None:
    params, optimizer = make(momentum_dtype=torch.int8)
    train(params, optimizer, range(1))
    saved = optimizer.state_dict()
    saved["state"][0]["momentum_buffer"] = optimizer.state[params[0]]["momentum_buffer"]
    with pytest.raises(ValueError, match=r"'p0'.*momentum_buffer has dtype torch.int8"):
        optimizer.load_state_dict(saved)
