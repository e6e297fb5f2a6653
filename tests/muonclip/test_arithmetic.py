"""The arithmetic of Newton-Schulz that MuonClip chooses for a processor."""

import platform
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from muonclip import (
    MatrixLayout,
    MuonClip,
    assign_parameters,
    describe_assignment,
    orthogonalize,
    param_groups,
    reference,
)
from muonclip.kernels import support
from muonclip.orthogonalize import coefficient_steps, default_ns_dtype

detect = support._prefers_bfloat16.__wrapped__  # before a fixture replaces it
detect_fast = support._multiplies_fast.__wrapped__
# Both choices: whether the processor has bfloat16 products, and the dtype.
CHOICES = [(False, torch.float32), (True, torch.bfloat16)]
# Roundings of a relative 2^-24 or 2^-9, which five steps, and the Gram form, magnify.
ERROR = {torch.float32: 2.0**-24 * 80, torch.bfloat16: 2.0**-9 * 20}
# The first two are in float32 by default; the last is in blocks.
SHAPES = [(32, 32), (64, 192), (96, 96), (96, 192), (112, 92), (520, 540)]


def processor(monkeypatch: pytest.MonkeyPatch, has_products: bool) -> None:
    monkeypatch.setattr(support, "_prefers_bfloat16", lambda: has_products)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


AVX512 = {"_is_avx512_bf16_supported": True}
AMX = {"_is_amx_tile_supported": True}


@pytest.mark.parametrize(
    ("machine", "vendor", "functions", "onednn", "speedup", "is_fast", "expected"),
    [
        ("x86_64", "AuthenticAMD", AVX512, True, 2.3, True, True),
        ("x86_64", "AuthenticAMD", AVX512, True, 1.1, True, False),
        # Intel's, where a virtual machine hides AMX.
        ("x86_64", "GenuineIntel", AVX512, True, None, False, False),
        ("aarch64", "", {}, True, 2.0, True, True),
        ("aarch64", "", {}, True, 0.9, True, False),
        # Nothing is measured where the instructions decide.
        ("x86_64", "GenuineIntel", AMX, True, None, True, True),
        ("AMD64", "GenuineIntel", AVX512 | AMX, True, None, True, True),
        # AVX-512 and AVX2 without bfloat16: oneDNN converts to float32.
        ("x86_64", "AuthenticAMD", dict.fromkeys(AVX512, False), True, None, False, False),
        ("x86_64", "GenuineIntel", {}, True, None, False, False),  # a torch without the functions
        ("x86_64", "AuthenticAMD", AVX512, False, None, False, False),
        ("arm64", "", {}, False, None, False, False),
    ],
)
def test_the_processor_is_recognized(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    vendor: str,
    functions: dict[str, bool],
    onednn: bool,
    speedup: float | None,
    is_fast: bool,
    expected: bool,
) -> None:
    def measure() -> float:
        assert speedup is not None, "measured"
        return speedup

    monkeypatch.setattr(support, "_bfloat16_speedup", measure)
    monkeypatch.setattr(support, "_multiplies_fast", detect_fast)
    on_processor(monkeypatch, machine, vendor, functions, onednn)
    assert detect_fast(torch.bfloat16) is is_fast
    assert detect() is expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not detect_fast(torch.bfloat16)
    assert not detect()


@pytest.mark.parametrize(
    ("machine", "functions", "onednn", "expected"),
    [
        ("x86_64", {"_is_amx_fp16_supported": True}, True, True),
        ("x86_64", {"_is_amx_fp16_supported": True}, False, False),
        ("x86_64", AMX | {"_is_amx_fp16_supported": False}, True, False),
        ("x86_64", AMX | AVX512, True, False),
        ("aarch64", {}, True, False),
    ],
)
def test_fast_products_in_float16_are_recognized(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    functions: dict[str, bool],
    onednn: bool,
    expected: bool,
) -> None:
    on_processor(monkeypatch, machine, "", functions, onednn)
    assert detect_fast(torch.float16) is expected


def on_processor(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    vendor: str,
    functions: dict[str, bool],
    onednn: bool,
) -> None:
    """Let torch and Python describe a processor."""
    known = {name: (lambda value=value: value) for name, value in functions.items()}
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(**known))
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", lambda path: f"vendor_id: {vendor}")
    names = ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported")
    ops = SimpleNamespace(**dict.fromkeys(names, lambda: onednn))
    monkeypatch.setattr(torch.ops, "mkldnn", ops)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


@pytest.mark.parametrize("name", ["Intel64 Family 6 Model 207 Stepping 2, GenuineIntel", "arm", ""])
def test_the_vendor_is_recognized_without_proc(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def absent(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(platform, "processor", lambda: name)
    assert support._is_intel() is name.endswith("GenuineIntel")


def test_products_are_timed_whatever_modes_of_torch_are_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Autocast would multiply float32 in bfloat16, and fake tensors nothing at all."""
    timed = []

    class Calls(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            raise AssertionError("a mode of the caller is on")

    def products() -> float:
        x = torch.ones(4, 4)
        timed.append((type(x), x.device.type, (x @ x).dtype, torch.is_inference_mode_enabled()))
        return time_products()

    time_products = support._time_products
    monkeypatch.setattr(support, "_time_products", products)
    state = torch.get_rng_state()
    modes = FakeTensorMode(), torch.device("meta"), torch.autocast("cpu"), torch.inference_mode()
    with ExitStack() as stack:
        for mode in (*modes, Calls()):
            stack.enter_context(mode)
        speedup = support._bfloat16_speedup()
    assert 0 < speedup < 1000
    assert timed == [(torch.Tensor, "cpu", torch.float32, False)]
    assert torch.equal(torch.get_rng_state(), state)


def test_products_are_timed_in_float32_whatever_the_default_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    created, ones = [], torch.ones

    def recorded(*shape: int, **options: Any) -> torch.Tensor:
        created.append(ones(*shape, **options))
        return created[-1]

    monkeypatch.setattr(torch, "ones", recorded)
    torch.set_default_dtype(torch.float64)
    try:
        support._bfloat16_speedup()
    finally:
        torch.set_default_dtype(torch.float32)
    assert [x.dtype for x in created] == [torch.float32]


@pytest.mark.parametrize(
    "late", ["threading.Thread(target=in_a_thread).start()", "atexit.register(first_use)"]
)
def test_products_are_timed_after_the_main_thread_has_ended(late: str) -> None:
    script = f"""
import atexit, threading
from muonclip.kernels import support

def first_use():
    print(support._bfloat16_speedup() > 0)

def in_a_thread():
    threading.main_thread().join()
    first_use()

{late}
"""
    run = [sys.executable, "-c", script]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "True\n"


@given(
    st.sampled_from([(), (1,), (4,), (40,)]),
    st.integers(1, 130),
    st.integers(1, 130),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from(["auto", "direct", "gram"]),
    st.sampled_from([torch.bfloat16, torch.float16]),
)
@settings(max_examples=40, deadline=None)
def test_autocast_has_no_effect(
    batch: tuple[int, ...], n: int, m: int, dtype: torch.dtype, form: Any, autocast: torch.dtype
) -> None:
    """It would multiply float32 matrices in 16 bits."""
    form = "direct" if dtype == torch.bfloat16 else form
    matrices = random(*batch, n, m)
    expected = orthogonalize(matrices, dtype=dtype, form=form)
    with torch.autocast("cpu", dtype=autocast):
        result = orthogonalize(matrices, dtype=dtype, form=form)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


@pytest.mark.parametrize("variant", ["muon", "normuon"])
@pytest.mark.parametrize("shape", SHAPES)
def test_autocast_has_no_effect_on_a_step(shape: tuple[int, ...], variant: str) -> None:
    expected = update(shape, None, variant=variant)
    with torch.autocast("cpu"):
        assert torch.equal(update(shape, None, variant=variant), expected)


@pytest.mark.parametrize(("has_products", "dtype"), CHOICES)
def test_the_default_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, has_products: bool, dtype: torch.dtype
) -> None:
    processor(monkeypatch, has_products)
    matrix = random(91, 93)
    assert orthogonalize(matrix).dtype == dtype
    assert orthogonalize(matrix.bfloat16()).dtype == dtype
    assert orthogonalize(matrix.double()).dtype == torch.float32
    assert orthogonalize(matrix, form="gram").dtype == torch.float32
    assert orthogonalize(random(90, 93)).dtype == torch.float32
    text = describe_assignment(assign_parameters(nn.Linear(91, 93)))
    assert f"Newton-Schulz in {str(dtype).removeprefix('torch.')}" in text
    text = describe_assignment(assign_parameters(nn.Linear(90, 93)))
    assert "Newton-Schulz in float32" in text
    pinned = describe_assignment(assign_parameters(nn.Linear(3, 4)), ns_dtype=torch.float16)
    assert "Newton-Schulz in float16" in pinned


@given(st.integers(1, 300), st.integers(1, 150), st.integers(1, 150))
def test_small_matrices_are_in_float32(count: int, n: int, m: int) -> None:
    """Calls take longer in bfloat16 than few products of small matrices save."""
    with pytest.MonkeyPatch.context() as patch:
        processor(patch, True)
        is_large = min(n, m) >= 64 and count * min(n, m) ** 2 >= 8192
        expected = torch.bfloat16 if is_large else torch.float32
        assert default_ns_dtype(torch.device("cpu"), torch.float32, [(count, n, m)]) == expected


def update(shape: tuple[int, ...], dtype: torch.dtype | None, **options: Any) -> torch.Tensor:
    """The change of a parameter in one step of learning rate 1."""
    p = nn.Parameter(torch.zeros(shape))
    p.grad = random(*shape)
    groups = [{"params": [p], "algorithm": "muon"}]
    MuonClip(
        groups, lr=1.0, weight_decay=0.0, adjust_lr="none", momentum=0.0, ns_dtype=dtype, **options
    ).step()
    return p.detach()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("has_products", "dtype"), CHOICES)
def test_updates_are_exact_to_the_rounding_of_each_choice(
    monkeypatch: pytest.MonkeyPatch, has_products: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    processor(monkeypatch, has_products)
    if min(shape) < 91:
        dtype = torch.float32
    exact = -reference.orthogonalize(random(*shape))
    error = (update(shape, None).double() - exact).norm() / exact.norm()
    assert error < ERROR[dtype]
    if dtype == torch.bfloat16:  # the choice has an effect
        assert error > ERROR[torch.float32]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_given_dtype_has_the_same_bits_in_every_run(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    results = []
    for has_products in (False, True, False):
        processor(monkeypatch, has_products)
        results.append(update(shape, dtype))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@given(
    st.integers(1, 3),
    st.integers(1, 300),
    st.integers(1, 600),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.sampled_from(["quintic", "you", "cubic"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_products_in_float32_are_rounded_as_those_in_16_bits(
    count: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    coefficients: Any,
    given_in: torch.dtype,
    transposed: bool,
    seed: int,
) -> None:
    """A given dtype has its rounding on CPUs without fast products in it too, and no more."""
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(count, n, m, generator=generator).to(given_in)
    matrices = matrices.mT if transposed else matrices
    exact = torch.stack(
        [reference.orthogonalize(matrix, coefficients=coefficients) for matrix in matrices]
    )
    errors = []
    for is_fast in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(support, "_multiplies_fast", lambda dtype, is_fast=is_fast: is_fast)
            result = orthogonalize(matrices, dtype=dtype, coefficients=coefficients)
        assert result.dtype == dtype
        assert result.is_contiguous()
        errors.append(((result.double() - exact).norm() / exact.norm()).item())
    # Few singular values may be rounded to where a step is steep; the error of many is an average.
    assert max(errors) < (0.5 if dtype == torch.bfloat16 else 0.05)
    if min(n, m) >= 16:
        assert max(errors) < (0.04 if dtype == torch.bfloat16 else 0.01)
        assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coefficients", ["quintic", "cubic"])
@pytest.mark.parametrize("shape", [(3, 20, 60), (2, 200, 300), (1, 96, 160)], ids=str)
def test_each_product_in_float32_is_rounded_once(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], coefficients: Any, dtype: torch.dtype
) -> None:
    matrices = random(*shape)
    monkeypatch.setattr(support, "_multiplies_fast", lambda dtype: False)
    result = orthogonalize(matrices, dtype=dtype, coefficients=coefficients, form="direct")

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return values.to(dtype).double()

    x = rounded(matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True))
    for a, b, c in coefficient_steps(coefficients, 5):
        gram = rounded(x @ x.mT)
        x = rounded(a * x + rounded(b * gram + c * gram @ gram) @ x)
    exact = torch.stack(
        [reference.orthogonalize(matrix, coefficients=coefficients) for matrix in matrices]
    )
    # Without the rounding of one of the products it would be 0.3 to 0.94.
    assert 0.95 < (result.double() - exact).norm() / (x - exact).norm() < 1.05


@pytest.mark.parametrize("shape", [(3, 20, 60), (2, 300, 200)], ids=str)
def test_products_in_float32_do_not_depend_on_the_matmul_precision(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    """With AMX, "medium" would round factors in float16 to bfloat16."""

    class Products(TorchDispatchMode):
        precisions: ClassVar[set[str]] = set()

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "mm" in function.overloadpacket.__name__:
                self.precisions.add(torch.backends.mkldnn.matmul.fp32_precision)
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(support, "_multiplies_fast", lambda dtype: False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with Products() as products:
            orthogonalize(random(*shape), dtype=torch.float16)
        assert products.precisions == {"ieee"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 40, 120), (1, 320, 320)], ids=str)
def test_products_in_float32_compile(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(support, "_multiplies_fast", lambda dtype: False)
    function: Any = torch.compile(
        lambda x: orthogonalize(x, dtype=dtype), backend="aot_eager", fullgraph=True
    )
    matrices = random(*shape)
    result, expected = function(matrices), orthogonalize(matrices, dtype=dtype)
    assert result.dtype == dtype
    assert (result - expected).double().norm() < ERROR[torch.bfloat16] * expected.double().norm()


def test_a_saved_default_is_chosen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without ``ns_dtype`` resumes on another processor with that processor's choice."""
    model = nn.Linear(100, 96)
    model.weight.grad, model.bias.grad = random(96, 100), random(96)
    first = MuonClip(param_groups(model))
    first.step()
    processor(monkeypatch, True)
    second = MuonClip(param_groups(model))
    second.load_state_dict(first.state_dict())
    (param,) = second._muon_params(second._work()[:1])
    assert param.ns_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layout", "shape", "dtype"),
    [
        (MatrixLayout.per_head(128, 4), (128, 96), torch.float32),
        (MatrixLayout.per_head(128, 2), (128, 96), torch.bfloat16),
        (MatrixLayout((16, 16), 4), (128, 96), torch.bfloat16),  # two matrices of 64 rows
        (MatrixLayout((96, 8), 1), (104, 112), torch.bfloat16),  # the largest counts
        (MatrixLayout((32, 32), transposed=True), (96, 64), torch.float32),
        (MatrixLayout(flatten=True), (96, 32, 3, 3), torch.bfloat16),
        (MatrixLayout(view=(96, 96)), (96, 4, 24), torch.bfloat16),
        (None, (3, 64, 80), torch.bfloat16),
    ],
)
def test_the_matrices_of_a_layout_count(
    monkeypatch: pytest.MonkeyPatch,
    layout: MatrixLayout | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    processor(monkeypatch, True)
    p = nn.Parameter(torch.zeros(shape))
    p.grad = random(*shape)
    optimizer = MuonClip([{"params": [("p", p)], "algorithm": "muon", "layout": layout}])
    (param,) = optimizer._muon_params(optimizer._work())
    assert param.ns_dtype == dtype
    matrices = (layout or MatrixLayout()).split(p.detach())
    shapes = (layout or MatrixLayout()).matrix_shapes(shape)
    assert shapes == [tuple(matrix.shape) for matrix in matrices]
