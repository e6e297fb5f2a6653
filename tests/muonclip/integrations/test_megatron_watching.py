"""``for_model`` on megatron-core's GPTModel with its own attention, which is watched."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonclip import for_model
from tests.distributed.launch import launch


def on_cpu() -> None:
    """Let megatron-core's local layers run on a CPU."""
    from megatron.core.fusions import fused_softmax
    from megatron.core.transformer import dot_product_attention

    class Tracker:
        fork = contextlib.nullcontext

    def causal(length: int) -> Tensor:
        return torch.ones(length, length).triu(1).bool()

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    fused_softmax.get_default_causal_mask = causal
    dot_product_attention.tensor_parallel.get_cuda_rng_tracker = Tracker


def gpt(parallel: int, options: dict[str, Any]) -> nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=parallel)
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        num_query_groups=2,
        tensor_model_parallel_size=parallel,
        use_cpu_initialization=True,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        init_method_std=0.3,
        **options,
    )
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm)
    model: nn.Module = GPTModel(config, spec, 32, 16, position_embedding_type="rope")
    return model.train()


def largest(core: Any, query: Tensor, key: Tensor) -> Tensor:
    """The largest logit of each head, [heads], of [length, batch, heads, d]."""
    key = key.repeat_interleave(query.size(2) // key.size(2), 2)
    logits = torch.einsum("qbhd,kbhd->bhqk", query, key) * core.softmax_scale
    logits = logits * (core.scale_mask_softmax.scale or 1.0)
    hidden = torch.ones(logits.shape[-2:]).triu(1).bool()
    return logits.masked_fill(hidden, -torch.inf).amax((0, 2, 3))


def train(parallel: int, options: dict[str, Any]) -> dict[str, Any]:
    """A step of ``for_model``'s optimizer, with the logits of a separate computation."""
    on_cpu()
    model = gpt(parallel, options)
    optimizer = for_model(model, 0.01, qk_clip_threshold=0.01, report=None)
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("core_attention"):

            def note(core: Any, args: Any, kwargs: Any, name: str = name) -> None:
                seen[name.removesuffix(".core_attention")] = largest(core, *args[:2]).detach()

            module.register_forward_pre_hook(note, with_kwargs=True)
    tokens = (torch.arange(12) % 32).view(2, 6)
    positions = torch.arange(6).expand(2, 6)
    model(tokens, positions, None).square().mean().backward()
    optimizer.step()
    result = None if optimizer.qk_clip is None else optimizer.qk_clip.result
    layouts = {str(g["layout"]) for g in optimizer.param_groups if g["layout"] is not None}
    return {
        "report": str(optimizer.report),
        "layouts": layouts,
        "shardings": len(optimizer.shardings),
        "seen": {name: values.tolist() for name, values in seen.items()},
        "observed": result and {n: values.tolist() for n, values in result.max_logits.items()},
        "clipped": result and int(result.num_clipped),
    }


@pytest.mark.parametrize(
    ("processes", "parallel", "options"),
    [(1, 1, {"apply_query_key_layer_scaling": True}), (2, 2, {})],
)
def test_a_gpt_model_is_watched_and_clipped(
    processes: int, parallel: int, options: dict[str, Any]
) -> None:
    pytest.importorskip("megatron.core")
    for result in launch(train, processes, parallel, options):
        assert len(result["seen"]) == 2
        for name, values in result["seen"].items():
            assert result["observed"][name] == pytest.approx(values, rel=1e-5)
        assert result["clipped"] == sum(
            value > 0.01 for values in result["seen"].values() for value in values
        )
        assert result["clipped"] > 0
        assert len(result["layouts"]) == 2  # query, key and value; gate and up
        assert (result["shardings"] > 0) == (processes > 1)


def test_normalized_attention_of_megatron_is_not_clipped() -> None:
    pytest.importorskip("megatron.core")
    (result,) = launch(train, 1, 1, {"qk_layernorm": True})
    assert result["observed"] is None
    assert "2 layers): its queries and keys are normalized" in result["report"]
