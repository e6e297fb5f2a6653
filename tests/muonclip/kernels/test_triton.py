"""The Triton kernels on a machine without a GPU: interpreted, and compiled for those we mean."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason='the kernels need Triton: pip install ".[test]"')
interpreting = os.environ.get("TRITON_INTERPRET") == "1"


def test_in_the_interpreter() -> None:
    """The tests in interpreted/, in a separate process: Triton reads the setting on import."""
    folder = Path(__file__).parent / "interpreted"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(folder)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout


def compile_for(capability: int, kernel: Any, pointers: str, **constants: Any) -> Any:
    """Through to machine code, as for arguments that are multiples of 16, and bfloat16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    floats = ("alpha", "beta", "scale", "threshold")
    signature = {
        name: "constexpr"
        if name in constants
        else "fp32"
        if name in floats
        else {"partial": "*fp32", "bound": "*fp32"}.get(name, "*bf16")
        if name in pointers.split()
        else "i32"
        for name in kernel.arg_names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name] not in ("constexpr", "fp32")
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assert_fast(compiled: Any, capability: int, shared_limit: int) -> None:
    """On tensor cores, copying ahead in units of 16 bytes, within the shared memory."""
    ptx = compiled.asm["ptx"]
    assert ("wgmma" if capability == 90 else "mma.sync") in ptx
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x[0-9a-f]+)", ptx)
    assert sizes
    assert set(sizes) == {"0x10"}
    assert compiled.metadata.shared <= shared_limit
    assert compiled.asm["cubin"]


needs_compiler = pytest.mark.skipif(interpreting, reason="TRITON_INTERPRET=1: nothing is compiled")
each_capability = pytest.mark.parametrize("capability", [80, 90], ids=["ampere", "hopper"])


@needs_compiler
@each_capability
@pytest.mark.parametrize(
    ("tiling", "contiguous", "kibibytes"), [(0, "column", 99), (2, "row", 163)]
)
def test_symmetric_product_compiles(
    capability: int, tiling: int, contiguous: str, kibibytes: int
) -> None:
    """Row-major and column-major; the default tiling also fits smaller GPUs than A100 and H100."""
    from muonclip.kernels.symmetric_product_triton import TILINGS, _kernel

    tile = TILINGS[tiling]
    compiled = compile_for(
        capability, _kernel, "a b c out",
        ADD=True, PRECISION="ieee", ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        c_column=1, **{f"a_{contiguous}": 1, f"b_{contiguous}": 1},
    )  # fmt: skip
    assert_fast(compiled, capability, kibibytes * 1024)


@needs_compiler
@each_capability
def test_max_logits_compiles(capability: int) -> None:
    """For MLA's heads; an argument of 1, as a single query, becomes a constant."""
    from muonclip.kernels.max_logits_triton import _kernel, tiling

    tile = tiling(192, itemsize=2)
    compiled = compile_for(
        capability, _kernel, "query key partial bound",
        CAUSAL=True, BOUNDED=True, NEGATE=False,
        QUERIES=tile.queries, KEYS=tile.keys, DIM=tile.dim, num_warps=8, num_stages=2,
        q_column=1, k_column=1, **({"queries": 1, "batches": 1} if capability == 90 else {}),
    )  # fmt: skip
    assert_fast(compiled, capability, 99 * 1024)
