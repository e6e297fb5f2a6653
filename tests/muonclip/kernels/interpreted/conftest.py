"""Tests that run kernels, in Triton's interpreter or on a GPU.

The interpreter is chosen for a whole process, before Triton is imported. The ordinary run therefore
skips these files, and `../test_triton.py` runs them in a separate process. By hand:
TRITON_INTERPRET=1 pytest tests/muonclip/kernels/interpreted
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_itemcollected(item: pytest.Item) -> None:
    """On a GPU, `make gpu` runs them."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        item.add_marker("gpu")


@pytest.fixture(autouse=True, scope="session")
def interpreter_multiplies_bfloat16() -> Iterator[None]:
    """The interpreter keeps bfloat16 as integers and, as of Triton 3.9, multiplies those."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def create_dot_of_floats(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return create_dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot_of_floats)
        yield
