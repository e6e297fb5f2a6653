"""Weights have the names, shapes and rows of the published checkpoints."""

import torch

from pretrain.config import LanguageConfig, VisionConfig
from pretrain.export.conversion import conversions

LANGUAGE, VISION = LanguageConfig(), VisionConfig(num_layers=1)
KIMI_K25 = LanguageConfig(
    num_layers=61,
    dense_layers=1,
    hidden_size=7168,
    ffn_hidden_size=18432,
    num_heads=64,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_base=50000.0,
    num_experts=384,
    experts_per_token=8,
    expert_ffn_hidden_size=2048,
    shared_expert_ffn_hidden_size=2048,
    router_scaling=2.827,
    norm_eps=1e-5,
)
# The tensors of moonshotai/Kimi-K2.5. Its experts are quantized: their shapes are those in
# weight_shape.
LAYER = "language_model.model.layers.{layer}"
PUBLISHED: list[tuple[str, tuple[int, ...]]] = [
    ("language_model.lm_head.weight", (163840, 7168)),
    ("language_model.model.embed_tokens.weight", (163840, 7168)),
    ("language_model.model.norm.weight", (7168,)),
    (f"{LAYER}.input_layernorm.weight", (7168,)),
    (f"{LAYER}.post_attention_layernorm.weight", (7168,)),
    (f"{LAYER}.self_attn.kv_a_layernorm.weight", (512,)),
    (f"{LAYER}.self_attn.kv_a_proj_with_mqa.weight", (576, 7168)),
    (f"{LAYER}.self_attn.kv_b_proj.weight", (16384, 512)),
    (f"{LAYER}.self_attn.o_proj.weight", (7168, 8192)),
    (f"{LAYER}.self_attn.q_a_layernorm.weight", (1536,)),
    (f"{LAYER}.self_attn.q_a_proj.weight", (1536, 7168)),
    (f"{LAYER}.self_attn.q_b_proj.weight", (12288, 1536)),
    ("language_model.model.layers.0.mlp.down_proj.weight", (7168, 18432)),
    ("language_model.model.layers.0.mlp.gate_proj.weight", (18432, 7168)),
    ("language_model.model.layers.0.mlp.up_proj.weight", (18432, 7168)),
    (f"{LAYER}.mlp.experts.{{expert}}.down_proj.weight", (7168, 2048)),
    (f"{LAYER}.mlp.experts.{{expert}}.gate_proj.weight", (2048, 7168)),
    (f"{LAYER}.mlp.experts.{{expert}}.up_proj.weight", (2048, 7168)),
    (f"{LAYER}.mlp.gate.e_score_correction_bias", (384,)),
    (f"{LAYER}.mlp.gate.weight", (384, 7168)),
    (f"{LAYER}.mlp.shared_experts.down_proj.weight", (7168, 2048)),
    (f"{LAYER}.mlp.shared_experts.gate_proj.weight", (2048, 7168)),
    (f"{LAYER}.mlp.shared_experts.up_proj.weight", (2048, 7168)),
    ("mm_projector.pre_norm.bias", (1152,)),
    ("mm_projector.pre_norm.weight", (1152,)),
    ("mm_projector.proj.0.bias", (4608,)),
    ("mm_projector.proj.0.weight", (4608, 4608)),
    ("mm_projector.proj.2.bias", (7168,)),
    ("mm_projector.proj.2.weight", (7168, 4608)),
    ("vision_tower.encoder.blocks.{block}.mlp.fc0.bias", (4304,)),
    ("vision_tower.encoder.blocks.{block}.mlp.fc0.weight", (4304, 1152)),
    ("vision_tower.encoder.blocks.{block}.mlp.fc1.bias", (1152,)),
    ("vision_tower.encoder.blocks.{block}.mlp.fc1.weight", (1152, 4304)),
    ("vision_tower.encoder.blocks.{block}.norm0.bias", (1152,)),
    ("vision_tower.encoder.blocks.{block}.norm0.weight", (1152,)),
    ("vision_tower.encoder.blocks.{block}.norm1.bias", (1152,)),
    ("vision_tower.encoder.blocks.{block}.norm1.weight", (1152,)),
    ("vision_tower.encoder.blocks.{block}.wo.bias", (1152,)),
    ("vision_tower.encoder.blocks.{block}.wo.weight", (1152, 1152)),
    ("vision_tower.encoder.blocks.{block}.wqkv.bias", (3456,)),
    ("vision_tower.encoder.blocks.{block}.wqkv.weight", (3456, 1152)),
    ("vision_tower.encoder.final_layernorm.bias", (1152,)),
    ("vision_tower.encoder.final_layernorm.weight", (1152,)),
    ("vision_tower.patch_embed.pos_emb.weight", (64, 64, 1152)),
    ("vision_tower.patch_embed.proj.bias", (1152,)),
    ("vision_tower.patch_embed.proj.weight", (1152, 3, 14, 14)),
]


def test_kimi_k25_has_the_published_names_and_shapes() -> None:
    expected = {}
    for name, shape in PUBLISHED:
        layers = range(1 if ".mlp." in name else 0, 61) if "{layer}" in name else [0]
        for layer in layers:
            for expert in range(384) if "{expert}" in name else [0]:
                for block in range(27) if "{block}" in name else [0]:
                    expected[name.format(layer=layer, expert=expert, block=block)] = shape
    converted = {
        name: shape
        for item in conversions(KIMI_K25, VisionConfig(), 163840)
        for name, shape in item.published.items()
    }
    assert converted == expected


def test_deepseek_v3_has_the_names_of_kimi_k25_without_the_prefix() -> None:
    both = list(conversions(LANGUAGE, VISION, 300))
    text_only = list(conversions(LANGUAGE, None, 300))
    prefix = "language_model."
    assert [item.published for item in text_only] == [
        {name.removeprefix(prefix): shape for name, shape in item.published.items()}
        for item in both
        if next(iter(item.published)).startswith(prefix)
    ]


def test_a_round_trip_keeps_every_value() -> None:
    for item in conversions(LANGUAGE, VISION, 300):
        tensors = {name: torch.randn(shape) for name, shape in item.ours.items()}
        published = item.to_published(tensors)
        assert {name: tuple(tensor.shape) for name, tensor in published.items()} == item.published
        back = item.to_ours(published)
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_stacked_tensors_keep_the_order_of_rows() -> None:
    by_published = {
        name: item for item in conversions(LANGUAGE, VISION, 300) for name in item.published
    }
    item = by_published["vision_tower.encoder.blocks.0.wqkv.bias"]
    attention = "vision.encoder.blocks.0.attention"
    tensors = {
        f"{attention}.{name}_proj.bias": torch.full((VISION.hidden_size,), value)
        for name, value in (("q", 1.0), ("k", 2.0), ("v", 3.0))
    }
    (fused,) = item.to_published(tensors).values()
    assert torch.equal(fused, torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(VISION.hidden_size))
    item = by_published["language_model.model.layers.0.mlp.up_proj.weight"]
    width, hidden = LANGUAGE.ffn_hidden_size, LANGUAGE.hidden_size
    (name,) = item.ours
    gate_and_up = torch.arange(2.0 * width * hidden).view(2 * width, hidden)
    gate, up = item.to_published({name: gate_and_up}).values()
    assert torch.equal(gate, gate_and_up[:width]) and torch.equal(up, gate_and_up[width:])


def test_queries_keys_and_values_alternate_by_key_head() -> None:
    """Our rows are the queries, the key and the value of the first key head, then the second's."""
    grouped = LanguageConfig(
        num_layers=1, dense_layers=1, num_heads=4, head_dim=2, num_kv_heads=2, attention="gqa",
        num_experts=8, hidden_size=4,
    )  # fmt: skip
    items = [i for i in conversions(grouped, None, 300) if any("linear_qkv" in n for n in i.ours)]
    (item,) = items
    prefix = "model.layers.0.self_attn"
    queries, keys, values = (torch.randn(rows, 4) for rows in (8, 4, 4))
    published = {
        f"{prefix}.{x}_proj.weight": t for x, t in zip("qkv", (queries, keys, values), strict=True)
    }
    (ours,) = item.to_ours(published).values()
    expected = [queries[:4], keys[:2], values[:2], queries[4:], keys[2:], values[2:]]
    assert torch.equal(ours, torch.cat(expected))
    (name,) = item.ours
    back = item.to_published({name: ours})
    assert list(back) == list(published)
    assert all(torch.equal(back[name], tensor) for name, tensor in published.items())
