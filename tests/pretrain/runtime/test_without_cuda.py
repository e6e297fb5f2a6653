"""The patches of torch and megatron-core for a CPU are applied only during training."""

import subprocess
import sys
import textwrap

import pytest
import torch

from pretrain.runtime import without_cuda

NAMES = ("Stream", "current_device", "current_stream", "stream", "synchronize", "get_rng_state")

pytestmark = pytest.mark.skipif(
    without_cuda.USE_CUDA, reason="nothing is replaced where there is a GPU"
)


def test_importing_every_module_changes_nothing_for_other_libraries() -> None:
    """In a new process, since other tests have imported everything."""
    script = """
    import os, pkgutil, importlib
    import torch
    before = {name: vars(torch.cuda).get(name) for name in vars(torch.cuda)}
    environment = dict(os.environ)
    import pretrain
    for module in pkgutil.walk_packages(pretrain.__path__, "pretrain."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    changed = [name for name, value in before.items() if vars(torch.cuda).get(name) is not value]
    assert not changed, changed
    assert {n: v for n, v in os.environ.items() if "TORCH" in n} == {
        n: v for n, v in environment.items() if "TORCH" in n
    }
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    assert compiled(torch.ones(1)).item() == 2
    assert torch._dynamo.utils.counters["frames"]["ok"] == 1, "torch.compile is disabled"
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_patches_have_the_type_of_the_original_and_are_reverted() -> None:
    before = {name: getattr(torch.cuda, name) for name in NAMES}
    without_cuda.enable()
    try:
        without_cuda.enable()
        for name, original in before.items():
            replaced = getattr(torch.cuda, name)
            assert replaced is not original
            assert isinstance(replaced, type) == isinstance(original, type), name
            assert callable(replaced)
        stream = torch.cuda.Stream()
        assert isinstance(stream, torch.cuda.Stream)
        assert isinstance(torch.cuda.current_stream(), torch.cuda.Stream)
        # As transformers annotates its generation code.
        assert torch.cuda.Stream | None
        with torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.current_stream())
    finally:
        without_cuda.disable()
    without_cuda.disable()
    assert before == {name: getattr(torch.cuda, name) for name in NAMES}


def test_transformers_generates_in_a_process_that_trains() -> None:
    """Its generation code is imported while the patches are applied."""
    script = """
    import torch
    from pretrain.runtime import without_cuda
    without_cuda.enable()
    from transformers import LlamaConfig, LlamaForCausalLM
    import transformers.generation.continuous_batching
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    tokens = torch.tensor([[1, 2]])
    assert model.generate(tokens, max_new_tokens=2, do_sample=False).shape[0] == 1
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
