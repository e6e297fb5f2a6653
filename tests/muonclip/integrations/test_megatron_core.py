"""megatron-core's modules, recognized by name: stand-ins with the attributes that are read.

With the stand-ins these tests do not need megatron-core. If it is installed,
``test_layouts_clip_real_modules_exactly`` tests its classes.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonclip import MatrixLayout, QKClip, assign_parameters, max_logits
from muonclip.integrations import megatron_core
from tests.distributed.launch import launch


class MLASelfAttention(nn.Module):
    def __init__(self, q_lora_rank: int | None, kv_down_rows: int = 8 + 2) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            q_lora_rank=q_lora_rank,
            kv_lora_rank=8,
            qk_head_dim=4,
            qk_pos_emb_head_dim=2,
            v_head_dim=3,
            num_attention_heads=3,
        )
        self.num_attention_heads_per_partition = 3
        if q_lora_rank is None:
            self.linear_q_proj = nn.Linear(16, 3 * 6, bias=False)
        else:
            self.linear_q_down_proj = nn.Linear(16, q_lora_rank, bias=False)
            self.linear_q_up_proj = nn.Linear(q_lora_rank, 3 * 6, bias=False)
        self.linear_kv_down_proj = nn.Linear(16, kv_down_rows, bias=False)
        self.linear_kv_up_proj = nn.Linear(8, 3 * 7, bias=False)


class SelfAttention(nn.Module):
    def __init__(self, *, world_size: int = 1, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            num_query_groups=2, num_attention_heads=4, kv_channels=4, attention_output_gate=False
        )
        self.world_size = world_size
        self.num_attention_heads_per_partition = 4
        self.num_query_groups_per_partition = 2
        self.linear_qkv = nn.Linear(16, (4 + 2 + 2) * 4)
        self.q_layernorm = norm


class IdentityOp(nn.Identity):
    """Stands for a missing norm in megatron-core's specs."""


class MLP(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(gated_linear_unit=gated)
        self.linear_fc1 = nn.Linear(16, 24)
        self.linear_fc2 = nn.Linear(12, 16)


class GroupedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(gated_linear_unit=True)
        self.num_local_experts = 3
        self.weight1 = nn.Parameter(torch.zeros(16, 3 * 12))
        self.weight2 = nn.Parameter(torch.zeros(3 * 6, 16))


class Mamba(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(16, 16)


class MambaMixer(nn.Module):
    """On two tensor-parallel ranks: 4 heads of 8, 2 groups, state 3."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.nheads, self.nheads_local_tp = 4, 2
        self.d_inner_local_tp, self.ngroups_local_tp, self.d_state = 16, 1, 3
        self.in_proj = nn.Linear(16, 16 + 16 + 3 + 3 + 2)


class GatedDeltaNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.tp_size, self.qk_dim, self.v_dim, self.num_value_heads = 2, 8, 16, 4
        self.in_proj = nn.Linear(16, (8 + 8 + 16 + 16 + 4 + 4) // 2)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=4, kv_channels=4)
        self.linear_q = nn.Linear(16, 16)
        self.linear_kv = nn.Linear(16, 32)


def test_layouts_of_a_hybrid_model() -> None:
    """Megatron-LM#7382: layers without attention are skipped."""
    model = nn.ModuleList(
        [MLASelfAttention(None), Mamba(), MLASelfAttention(6), SelfAttention(norm=IdentityOp())]
    )
    layouts = megatron_core.attention_layouts(model)
    assert list(layouts) == ["0", "2", "3"]
    assert layouts["0"].query.weight is model[0].linear_q_proj.weight
    assert layouts["2"].query.weight is model[2].linear_q_up_proj.weight
    assert layouts["2"].key.weight is model[2].linear_kv_up_proj.weight
    assert layouts["3"].key.bias is model[3].linear_qkv.bias
    assert (layouts["3"].num_heads, layouts["3"].num_kv_groups) == (4, 2)
    QKClip(layouts).step()


class AbsorbedMLASelfAttention(nn.Module):
    """megatron-core's absorbed MLA, with joint or separate projections of keys and values."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        twin = MLASelfAttention(6)
        self.config = twin.config
        self.num_attention_heads_per_partition = 3
        self.linear_q_down_proj = twin.linear_q_down_proj
        self.linear_q_up_proj = twin.linear_q_up_proj
        self.linear_kv_down_proj = twin.linear_kv_down_proj
        if apart:
            self.linear_k_up_proj = nn.Linear(8, 3 * 4, bias=False)
            self.linear_v_up_proj = nn.Linear(8, 3 * 3, bias=False)
        else:
            self.linear_kv_up_proj = twin.linear_kv_up_proj


def test_absorbed_mla_is_clipped_as_mla_is() -> None:
    """Keys without position take the square root, rotary queries the whole factor."""
    for apart in (False, True):
        model = AbsorbedMLASelfAttention(apart)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        clip = QKClip(megatron_core.attention_layouts(nn.ModuleDict({"a": model})), threshold=1.0)
        clip.observe("a", torch.tensor([0.5, 4.0, 0.5]))
        clip.step()
        factor = {name: (p / before[name])[:, 0] for name, p in model.named_parameters()}
        query, key = factor["linear_q_up_proj.weight"].view(3, 6), "linear_k_up_proj.weight"
        keys = factor[key].view(3, 4) if apart else factor["linear_kv_up_proj.weight"].view(3, 7)
        expected = torch.tensor([1.0, 0.5, 1.0])
        assert torch.allclose(query[:, :4], expected[:, None].expand(3, 4))
        assert torch.allclose(query[:, 4:], expected[:, None].square().expand(3, 2))
        assert torch.allclose(keys[:, :4], expected[:, None].expand(3, 4))
        for name in factor.keys() - {"linear_q_up_proj.weight", key, "linear_kv_up_proj.weight"}:
            assert torch.equal(factor[name], torch.ones_like(factor[name]))


def test_absorbed_mla_stores_the_matrices_of_mla() -> None:
    model = nn.ModuleList([AbsorbedMLASelfAttention(False), AbsorbedMLASelfAttention(True)])
    q, down = MatrixLayout((4, 2), 3), MatrixLayout((8, 2))
    assert megatron_core.matrix_layouts(model) == {
        "0.linear_q_up_proj.weight": q,
        "0.linear_kv_down_proj.weight": down,
        "0.linear_kv_up_proj.weight": MatrixLayout((4, 3), 3),
        "1.linear_q_up_proj.weight": q,
        "1.linear_kv_down_proj.weight": down,
    }
    apart = megatron_core.matrix_layouts(model[1], per_head=True)
    assert apart["linear_k_up_proj.weight"] == MatrixLayout((4,), 3, separate=True)
    assert apart["linear_v_up_proj.weight"] == MatrixLayout((3,), 3, separate=True)


class GatedSparseAttention(nn.Module):
    """An attention of an unknown class."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.linear_qkvg = nn.Linear(16, 32)


class DotProductAttention(nn.Module):
    """Multiplies queries and keys; has a sink per head and no matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.zeros(4))


def test_attention_of_an_unknown_class_is_not_skipped() -> None:
    """QK-Clip would silently do nothing there."""
    known = SelfAttention(norm=IdentityOp())
    known.core_attention = DotProductAttention()
    model = nn.ModuleDict({"known": known, "odd": GatedSparseAttention()})
    for find in (megatron_core.attention_layouts, megatron_core.matrix_layouts):
        with pytest.raises(ValueError, match=r"odd is GatedSparseAttention.*exclude"):
            find(model)
        for exclude in ("odd", ["*dd"]):
            assert all(name.startswith("known") for name in find(model, exclude=exclude))
    with pytest.raises(ValueError, match="cross is CrossAttention"):
        megatron_core.attention_layouts(nn.ModuleDict({"cross": CrossAttention()}))
    assert "cross.linear_kv.weight" in megatron_core.matrix_layouts(
        nn.ModuleDict({"cross": CrossAttention()})
    )


def test_shards_of_generalized_tensor_parallelism_are_refused() -> None:
    """megatron-core 0.19 stores a part of the rows on each rank."""
    model = MLP(True)
    model.linear_fc1.weight.is_gtp_weight_remat = True
    for call in (megatron_core.shardings, assign_parameters):
        with pytest.raises(ValueError, match="generalized tensor parallelism"):
            call(model)


def test_fused_matrices_feed_param_groups() -> None:
    """Megatron-LM#7077, #4731: gate and up, or query, key and value, in one Newton-Schulz."""
    model = nn.ModuleDict(
        {
            "mla": MLASelfAttention(6),
            "gqa": SelfAttention(),
            "cross": CrossAttention(),
            "gated": MLP(True),
            "plain": MLP(False),
            "grouped": GroupedMLP(),
        }
    )
    layouts = megatron_core.matrix_layouts(model)
    assert layouts == {
        "mla.linear_q_up_proj.weight": MatrixLayout((4, 2), 3),
        "mla.linear_kv_down_proj.weight": MatrixLayout((8, 2)),
        "mla.linear_kv_up_proj.weight": MatrixLayout((4, 3), 3),
        "gqa.linear_qkv.weight": MatrixLayout((8, 4, 4), 2),
        "cross.linear_kv.weight": MatrixLayout((4, 4), 4),
        "gated.linear_fc1.weight": MatrixLayout((12, 12)),
        "grouped.weight1": MatrixLayout((6, 6), transposed=True, view=(3, 16, 12)),
        "grouped.weight2": MatrixLayout(transposed=True, view=(3, 6, 16)),
    }
    placed = {item.name: item.layout for item in assign_parameters(model, layouts=layouts)}
    assert placed["gated.linear_fc1.weight"] == MatrixLayout((12, 12))
    assert placed["plain.linear_fc1.weight"] is None


class FusedMLASelfAttention(MLASelfAttention):
    """megatron-core 0.19's MLA with one down-projection."""

    def __init__(self, tensor_ranks: int) -> None:
        super().__init__(6)
        del self.linear_q_down_proj, self.linear_kv_down_proj
        self.config.tensor_model_parallel_size = tensor_ranks
        self.linear_qkv_down_proj = nn.Linear(16, (6 + 8 + 2) // tensor_ranks, bias=False)
        self.linear_qkv_down_proj.weight.tensor_model_parallel = tensor_ranks > 1


def test_a_fused_down_projection_of_mla_stores_three_matrices() -> None:
    """Rows of a tensor-parallel rank are a part of each: the layout cannot describe them."""
    layouts = megatron_core.matrix_layouts(FusedMLASelfAttention(1))
    assert layouts == {
        "linear_q_up_proj.weight": MatrixLayout((4, 2), 3),
        "linear_qkv_down_proj.weight": MatrixLayout((6, 8, 2)),
        "linear_kv_up_proj.weight": MatrixLayout((4, 3), 3),
    }
    assert list(megatron_core.attention_layouts(FusedMLASelfAttention(2))) == [""]
    with pytest.raises(ValueError, match=r"split over 2 .* set mla_down_proj_fusion=False"):
        megatron_core.matrix_layouts(FusedMLASelfAttention(2))


def test_tensor_parallelism_splits_each_projection_of_recurrent_layers() -> None:
    model = nn.ModuleDict({"mamba": MambaMixer(), "delta": GatedDeltaNet()})
    assert megatron_core.matrix_layouts(model) == {
        "mamba.in_proj.weight": MatrixLayout((16, 16, 3, 3, 2), 2),
        "delta.in_proj.weight": MatrixLayout((4, 4, 8, 8, 2, 2), 2),
    }


def test_heads_can_be_orthogonalized_separately() -> None:
    model = nn.ModuleDict(
        {"mla": MLASelfAttention(None), "gqa": SelfAttention(), "cross": CrossAttention()}
    )
    layouts = megatron_core.matrix_layouts(model, per_head=True)
    assert layouts == {
        "mla.linear_q_proj.weight": MatrixLayout((4, 2), 3, separate=True),
        "mla.linear_kv_down_proj.weight": MatrixLayout((8, 2)),
        "mla.linear_kv_up_proj.weight": MatrixLayout((4, 3), 3, separate=True),
        "gqa.linear_qkv.weight": MatrixLayout((4, 4, 4, 4), 2, separate=True),
        "cross.linear_q.weight": MatrixLayout((4,), 4, separate=True),
        "cross.linear_kv.weight": MatrixLayout((4, 4), 4, separate=True),
    }


@pytest.mark.parametrize(
    ("function", "module", "message"),
    [
        (
            megatron_core.attention_layouts,
            SelfAttention(norm=nn.LayerNorm(4)),
            "0 has a q_layernorm, which undoes any scaling",
        ),
        (
            megatron_core.attention_layouts,
            SelfAttention(world_size=4),
            "0 has 2 key groups on 4 tensor-parallel ranks",
        ),
    ],
)
def test_unsupported_modules_are_refused(function: Any, module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(nn.ModuleList([module]))


def test_layers_can_be_excluded() -> None:
    model = nn.ModuleList([SelfAttention(norm=nn.LayerNorm(4)), SelfAttention()])
    assert list(megatron_core.attention_layouts(model, exclude="0")) == ["1"]
    assert megatron_core.attention_layouts(model, exclude=["0", "1*"]) == {}


class CoreAttention(nn.Module):
    """Stores queries, keys and values, [s, b, heads, d], and their largest logits per head."""

    def __init__(
        self, *, softmax_scale: float | None = None, v_channels: int | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.softmax_scale, self.v_channels = softmax_scale, v_channels
        self.seen = torch.zeros(0)
        self.inputs: tuple[Any, ...] = ()

    def forward(self, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        if value is None:  # absorbed MLA: the latent of the keys, which all heads share
            value = key[..., : self.v_channels]
        self.inputs = query, key, value
        query, key = query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3)
        self.seen = max_logits(query, key, scale=self.softmax_scale)
        return value.repeat_interleave(query.size(1) // value.size(2), 2).flatten(2)


def real_attentions() -> nn.ModuleDict:
    """megatron-core's own attention layers; sets up its parallel state."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer import (
        MLATransformerConfig,
        TransformerConfig,
        attention,
        multi_latent_attention,
    )
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp

    multi_latent_attention.HAVE_TE = False  # true upstream although TELinear is missing
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "use_cpu_initialization": True,
        "add_bias_linear": False,
        "init_method_std": 2.0,
    }
    column, row = tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear
    mla_parts = {
        "linear_kv_down_proj": column,
        "linear_kv_up_proj": column,
        "core_attention": CoreAttention,
        "linear_proj": row,
        "q_layernorm": IdentityOp,
        "kv_layernorm": IdentityOp,
    }
    model = nn.ModuleDict()
    for name, rank in (("mla", None), ("mla_q_lora", 6)):
        config = MLATransformerConfig(
            **common,
            q_lora_rank=rank,
            kv_lora_rank=8,
            qk_head_dim=4,
            qk_pos_emb_head_dim=2,
            v_head_dim=3,
            rope_type="rope",
        )
        q_parts = (
            {"linear_q_proj": column}
            if rank is None
            else {"linear_q_down_proj": column, "linear_q_up_proj": column}
        )
        model[name] = multi_latent_attention.MLASelfAttention(
            config,
            multi_latent_attention.MLASelfAttentionSubmodules(**mla_parts, **q_parts),
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
        )
        if rank is not None and hasattr(multi_latent_attention, "FusedMLASelfAttention"):
            model["mla_fused"] = multi_latent_attention.FusedMLASelfAttention(
                config,
                multi_latent_attention.MLASelfAttentionSubmodules(
                    linear_qkv_down_proj=column, linear_q_up_proj=column, **mla_parts
                ),
                layer_number=1,
                attn_mask_type=AttnMaskType.causal,
            )
            from megatron.core.transformer.experimental_attention_variant import absorbed_mla

            model["mla_absorbed"] = absorbed_mla.AbsorbedMLASelfAttention(
                config,
                absorbed_mla.AbsorbedMLASelfAttentionSubmodules(**mla_parts, **q_parts),
                layer_number=1,
                attn_mask_type=AttnMaskType.causal,
            )
    for name, gate in (("gqa", False), ("gqa_gated", True)):
        model[name] = attention.SelfAttention(
            TransformerConfig(**common, num_query_groups=2, attention_output_gate=gate),
            attention.SelfAttentionSubmodules(
                linear_qkv=column, core_attention=CoreAttention, linear_proj=row
            ),
            layer_number=1,
        )
    return model


def clip_real_modules() -> dict[str, tuple[Any, Any]]:
    """Largest logits before and after a clip, of megatron-core's own attention layers."""
    from megatron.core.models.common.embeddings import RotaryEmbedding

    model = real_attentions()
    clip = QKClip(megatron_core.attention_layouts(model), threshold=500.0)
    hidden = torch.randn(6, 2, 16)
    rotary = RotaryEmbedding(4, 1.0, use_cpu_initialization=True)(6)

    def largest() -> dict[str, Any]:
        for name, module in model.items():
            options = {"rotary_pos_emb": rotary} if name.startswith("gqa") else {}
            module(hidden, attention_mask=None, **options)
        return {name: module.core_attention.seen for name, module in model.items()}

    before = largest()
    for name, seen in before.items():
        clip.observe(name, seen)
    clip.step()
    after = largest()
    return {name: (before[name].tolist(), after[name].tolist()) for name in model}


def test_layouts_clip_real_modules_exactly() -> None:
    """In megatron-core's layers each head above τ reaches it, and others do not change."""
    pytest.importorskip("megatron.core")
    (results,) = launch(clip_real_modules, 1)
    assert results.keys() - {"mla_fused", "mla_absorbed"} == {  # of megatron-core 0.19
        "mla", "mla_q_lora", "gqa", "gqa_gated"
    }  # fmt: skip
    largest = [value for before, _ in results.values() for value in before]
    assert min(largest) < 500 < max(largest)
    for before, after in results.values():
        assert after == pytest.approx([min(value, 500) for value in before], rel=1e-4)


def attention_by_its_matrices(per_head: bool) -> None:
    """Inputs of the core attention are products with the matrices of the layouts."""
    model = real_attentions()
    layouts = megatron_core.matrix_layouts(model, per_head=per_head)
    hidden = torch.randn(6, 2, 16)

    def products(name: str, x: Tensor) -> list[Tensor]:
        """[s, b, heads, d] of each block; a layout of whole matrices has all heads in one."""
        weight = model.get_parameter(f"{name}.weight")
        layout = layouts[f"{name}.weight"]
        assert layout.blocks is not None
        return [
            torch.cat([(x @ matrix.T).unflatten(-1, (-1, rows)) for matrix in stack], -2)
            for stack, rows in zip(layout.split(weight), layout.blocks, strict=True)
        ]

    for name in model.keys() & {"mla", "mla_q_lora", "mla_fused"}:
        module = model[name]
        module(hidden, attention_mask=None)
        query, key, value = module.core_attention.inputs
        up = "linear_q_proj" if name == "mla" else "linear_q_up_proj"
        if name == "mla_fused":
            x, latent, _ = products(f"{name}.linear_qkv_down_proj", hidden)
            x = x[..., 0, :]
        else:
            x = hidden if name == "mla" else module.linear_q_down_proj(hidden)[0]
            latent, _ = products(f"{name}.linear_kv_down_proj", hidden)
        query_nope, _ = products(f"{name}.{up}", x)
        key_nope, values = products(f"{name}.linear_kv_up_proj", latent[..., 0, :])
        for actual, expected in (
            (query_nope, query[..., :4]),
            (key_nope, key[..., :4]),
            (values, value),
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    for name, gated in (("gqa", False), ("gqa_gated", True)):
        found = model[name].get_query_key_value_tensors(hidden, output_gate=gated)
        query, key, value = found[:3]
        blocks = products(f"{name}.linear_qkv", hidden)
        # A block is a head of each group, or without per_head all heads of each group.
        heads = [block.unflatten(-1, (-1, 4)) for block in blocks]  # [s, b, groups, heads, d]
        queries = 2 if per_head else 1
        pairs = [
            (torch.cat(heads[:queries], -2), query.unflatten(-2, (2, 2))),
            (heads[-2], key.unsqueeze(-2)),
            (heads[-1], value.unsqueeze(-2)),
        ]
        if gated:
            gates = torch.cat(heads[queries : 2 * queries], -2)
            pairs.append((gates, found[3].unflatten(-2, (2, 2))))
        for actual, expected in pairs:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("per_head", [False, True])
def test_the_matrices_are_those_that_real_attention_uses(per_head: bool) -> None:
    pytest.importorskip("megatron.core")
    launch(attention_by_its_matrices, 1, per_head)


def grouped_experts_by_their_matrices() -> None:
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import experts

    class GroupedGemm:
        """The product that the package grouped_gemm documents; it has no build for a CPU."""

        @staticmethod
        def assert_grouped_gemm_is_available() -> None: ...

        class ops:
            @staticmethod
            def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool) -> Tensor:
                assert not trans_b
                parts = a.split(batch_sizes.tolist())
                return torch.cat([x @ w for x, w in zip(parts, b, strict=True)])

    experts.gg = GroupedGemm
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1, hidden_size=6, num_attention_heads=2, num_moe_experts=3,
        moe_ffn_hidden_size=4, use_cpu_initialization=True, add_bias_linear=False,
        gated_linear_unit=True, activation_func=nn.functional.silu, bf16=True, init_method_std=1.0,
    )  # fmt: skip
    module = experts.GroupedMLP(3, config, ProcessGroupCollection.use_mpu_process_groups())
    layouts = megatron_core.matrix_layouts(nn.ModuleDict({"experts": module}))
    gate, up = layouts["experts.weight1"].split(module.weight1)
    (down,) = layouts["experts.weight2"].split(module.weight2)
    tokens, counts = torch.randn(7, 6), torch.tensor([2, 1, 4])
    expected, _ = module(tokens, counts, torch.ones(7))
    actual = [
        (nn.functional.silu(x @ gate[e].T) * (x @ up[e].T)) @ down[e].T
        for e, x in enumerate(tokens.split(counts.tolist()))
    ]
    torch.testing.assert_close(torch.cat(actual), expected)


def test_grouped_experts_read_their_storage_as_a_stack() -> None:
    """maxtext#4798: an expert axis was taken for an axis of a matrix; these shapes allow it."""
    experts = pytest.importorskip("megatron.core.transformer.moe.experts")
    if not hasattr(experts, "GroupedMLP"):
        pytest.skip("this megatron-core has no GroupedMLP")
    launch(grouped_experts_by_their_matrices, 1)
