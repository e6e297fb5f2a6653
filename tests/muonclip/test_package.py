"""The package as a whole: its example runs, and importing it is quick."""

import doctest
import subprocess
import sys

import torch

import muonclip


def test_package_example_runs() -> None:
    torch.manual_seed(0)
    result = doctest.testmod(muonclip)
    assert result.attempted > 10
    assert result.failed == 0


def test_import_needs_torch_only() -> None:
    """`import muonclip`, with integrations, imports neither the trainer nor megatron-core, nor
    torch's compiler, which takes seconds."""
    code = (
        "import sys, muonclip, muonclip.integrations.megatron_core\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('megatron', 'pretrain')\n"
        "    or m == 'torch._dynamo'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    assert all(hasattr(muonclip, name) for name in muonclip.__all__)
