"""The layers of Transformer Engine that the trainer uses equal torch in float32."""

import pytest
import torch
from torch import Tensor

te = pytest.importorskip("transformer_engine.pytorch", exc_type=ImportError)
pytestmark = pytest.mark.gpu
TOLERANCE = 1e-2  # relative, of bfloat16


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def require_close(found: Tensor, expected: Tensor) -> None:
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error < TOLERANCE


@pytest.mark.parametrize(("query_key_dim", "value_dim"), [(128, 128), (192, 128), (16, 8)])
def test_attention_and_its_max_logits(query_key_dim: int, value_dim: int) -> None:
    heads, lengths = 4, (100, 28, 128)
    total = sum(lengths)
    inputs = [drawn(total, heads, width) for width in (query_key_dim, query_key_dim, value_dim)]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device="cuda", dtype=torch.int32)
    attention = te.DotProductAttention(
        heads, (query_key_dim, value_dim), qkv_format="thd", attn_mask_type="padding_causal",
        attention_dropout=0.0, return_max_logit=True,
    )  # fmt: skip
    found, found_max = attention(
        *inputs, cu_seqlens_q=ends, cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths),
    )  # fmt: skip
    exact = [x.detach().float().requires_grad_() for x in inputs]
    documents, largest = [], []
    for query, key, value in zip(*(x.split(lengths) for x in exact), strict=True):
        logits = torch.einsum("qhd,khd->hqk", query, key) * query_key_dim**-0.5
        later = torch.ones(len(query), len(query), device="cuda").triu(1).bool()
        logits = logits.masked_fill(later, -torch.inf)
        largest.append(logits.detach().amax((1, 2)))
        documents.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), value).flatten(1))
    expected = torch.cat(documents)
    gradient = torch.randn_like(found)
    found.backward(gradient)
    expected.backward(gradient.float())
    require_close(found, expected)
    require_close(found_max, torch.stack(largest).amax(0))
    for ours, theirs in zip(inputs, exact, strict=True):
        require_close(ours.grad, theirs.grad)


def test_a_linear_layer_with_its_norm() -> None:
    layer = te.LayerNormLinear(
        256, 512, normalization="RMSNorm", bias=False, params_dtype=torch.bfloat16
    )
    x = drawn(64, 256)
    gain = layer.layer_norm_weight.float()
    normal = torch.nn.functional.rms_norm(x.float(), (256,), gain, layer.eps)
    require_close(layer(x), normal @ layer.weight.float().T)


def test_grouped_experts_with_an_empty_one() -> None:
    layer = te.GroupedLinear(4, 128, 256, bias=False, params_dtype=torch.bfloat16)
    x, counts = drawn(96, 128), [32, 0, 48, 16]
    parts = [
        part.float() @ getattr(layer, f"weight{expert}").float().T
        for expert, part in enumerate(x.split(counts))
    ]
    require_close(layer(x, counts), torch.cat(parts))


def test_permutation_by_experts() -> None:
    x = drawn(64, 128)
    chosen = torch.rand(64, 8, device="cuda").topk(2).indices
    routing = torch.zeros(64, 8, dtype=torch.bool, device="cuda").scatter(1, chosen, True)
    weights = torch.rand(64, 8, device="cuda") * routing
    rows, _, row_ids = te.moe_permute_with_probs(x, weights, routing, num_out_tokens=128)
    back = te.moe_unpermute(rows, row_ids, merging_probs=weights, restore_shape=x.shape)
    require_close(back, x * weights.sum(1, keepdim=True))


def test_cross_entropy() -> None:
    logits, target = drawn(2, 32, 1000), torch.randint(1000, (2, 32), device="cuda")
    found = te.parallel_cross_entropy(logits.clone(), target, 0.0, False, None)
    expected = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), target.flatten(), reduction="none"
    )
    require_close(found.flatten(), expected)
