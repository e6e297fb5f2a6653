"""transformers' models: layouts select the matrices that attention, MLPs and experts use.

Models are built from small configurations; nothing is downloaded.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from muonclip import MatrixLayout, MuonClip, assign_parameters, param_groups
from muonclip.integrations.transformers import (
    attention_modules,
    matrix_layouts,
    unobserved_modules,
)

transformers = pytest.importorskip("transformers", minversion="5")

VOCABULARY, LENGTH, HIDDEN, FFN, HEADS, GROUPS, DIM = 40, 7, 24, 32, 4, 2, 6
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    **NO_IDS,
}
GQA = SMALL | {"num_key_value_heads": GROUPS}
GPT2 = {"n_embd": HIDDEN, "n_layer": 1, "n_head": HEADS, "n_inner": FFN, "vocab_size": VOCABULARY}
NOPE, ROPE, VALUE, LATENT = 6, 4, 5, 10
MLA = SMALL | {
    "num_key_value_heads": HEADS,
    "q_lora_rank": 12,
    "kv_lora_rank": LATENT,
    "qk_rope_head_dim": ROPE,
    "qk_nope_head_dim": NOPE,
    "v_head_dim": VALUE,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 12,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "attn_layer_indices": [1],
    "num_hidden_layers": 2,
}
VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "image_size": 8,
    "patch_size": 4,
}
QWEN3_NEXT = GQA | EXPERTS | {
    "head_dim": DIM,
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 3,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}  # fmt: skip


def make(kind: str, auto: str = "AutoModelForCausalLM", **options: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**options)
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
            elif name.endswith("bias"):
                parameter.zero_()
    return model.eval()


# ---------------------------------------------------------------------- who goes where

# Every matrix that an expert gives to AdamW, with layers and experts numbered N.
ENDS = {"model.embed_tokens.weight", "lm_head.weight"}
ADAMW: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "Llama": ("Llama", "AutoModelForCausalLM", GQA, ENDS),
    "Qwen2": ("Qwen2", "AutoModelForCausalLM", GQA, ENDS),
    "Qwen3": ("Qwen3", "AutoModelForCausalLM", GQA, ENDS),
    "Mistral": ("Mistral", "AutoModelForCausalLM", GQA, ENDS),
    "Gemma3": (
        "Gemma3Text",
        "AutoModelForCausalLM",
        GQA | {"head_dim": DIM},
        {"model.embed_tokens.weight"},  # and the head, tied to it
    ),
    "Cohere, norms by head": (
        "Cohere",
        "AutoModelForCausalLM",
        GQA | {"use_qk_norm": True},
        {
            "model.embed_tokens.weight",
            "model.layers.N.self_attn.q_norm.weight",
            "model.layers.N.self_attn.k_norm.weight",
        },
    ),
    "GPT-2": (
        "GPT2",
        "AutoModelForCausalLM",
        GPT2,
        {"transformer.wte.weight", "transformer.wpe.weight"},
    ),
    "GPT-NeoX": (
        "GPTNeoX",
        "AutoModelForCausalLM",
        SMALL,
        {"gpt_neox.embed_in.weight", "lm_head.weight"},
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        "AutoModelForCausalLM",
        MLA | {"first_k_dense_replace": 0},
        ENDS | {"model.layers.N.mlp.gate.weight"},
    ),
    "Qwen3-MoE": (
        "Qwen3Moe",
        "AutoModelForCausalLM",
        # As many experts as the model is wide: a router that shape alone would not betray.
        GQA | {"num_experts": HIDDEN, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        ENDS | {"model.layers.N.mlp.gate.weight"},
    ),
    "Qwen2-MoE": (
        "Qwen2Moe",
        "AutoModelForCausalLM",
        GQA | EXPERTS | {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
        ENDS | {
            "model.layers.N.mlp.gate.weight",
            "model.layers.N.mlp.shared_expert_gate.weight",
        },
    ),
    "Mixtral": (
        "Mixtral",
        "AutoModelForCausalLM",
        GQA | EXPERTS,
        ENDS | {"model.layers.N.mlp.gate.weight"},
    ),
    "gpt-oss, biases of experts": (
        "GptOss",
        "AutoModelForCausalLM",
        GQA | EXPERTS | {"head_dim": DIM},
        ENDS | {
            "model.layers.N.mlp.router.weight",
            "model.layers.N.mlp.experts.gate_up_proj_bias",
            "model.layers.N.mlp.experts.down_proj_bias",
        },
    ),
    "Mamba": (
        "Mamba",
        "AutoModelForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "state_size": 4, "num_hidden_layers": 1},
        {
            "backbone.embeddings.weight",
            "backbone.layers.N.mixer.A_log",
            "backbone.layers.N.mixer.conv1d.weight",  # maxtext#4843
        },
    ),
    "Bamba": (
        "Bamba",
        "AutoModelForCausalLM",
        GQA | MAMBA2,
        ENDS | {
            "model.layers.N.mamba.conv1d.weight",
        },
    ),
    "Qwen3-Next": (
        "Qwen3Next",
        "AutoModelForCausalLM",
        QWEN3_NEXT,
        ENDS | {
            "model.layers.N.linear_attn.conv1d.weight",
            "model.layers.N.mlp.gate.weight",
            "model.layers.N.mlp.shared_expert_gate.weight",
        },
    ),
    "RWKV": (
        "Rwkv",
        "AutoModelForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 1},
        {
            "rwkv.embeddings.weight",
            "head.weight",
            "rwkv.blocks.N.attention.time_mix_key",
            "rwkv.blocks.N.attention.time_mix_value",
            "rwkv.blocks.N.attention.time_mix_receptance",
            "rwkv.blocks.N.feed_forward.time_mix_key",
            "rwkv.blocks.N.feed_forward.time_mix_receptance",
        },
    ),
    "ViT": (
        "ViT",
        "AutoModelForImageClassification",
        VISION,
        {
            "vit.embeddings.cls_token",
            "vit.embeddings.position_embeddings",
            "vit.embeddings.patch_embeddings.projection.weight",
            "classifier.weight",
        },
    ),
    "SigLIP": (
        "SiglipVision",
        "AutoModel",
        VISION,
        {
            "embeddings.patch_embedding.weight",
            "embeddings.position_embedding.weight",
            "head.probe",
        },
    ),
    "SAM": (
        "SamVision",
        "AutoModel",
        {
            "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": HEADS,
            "mlp_dim": FFN, "image_size": 8, "patch_size": 4, "output_channels": 8,
            "global_attn_indexes": [0],
        },
        {
            "vision_encoder.pos_embed",
            "vision_encoder.patch_embed.projection.weight",
            "vision_encoder.layers.N.attn.rel_pos_h",
            "vision_encoder.layers.N.attn.rel_pos_w",
            "vision_encoder.neck.conv1.weight",
            "vision_encoder.neck.conv2.weight",
        },
    ),
    "Whisper": (
        "Whisper",
        "AutoModelForSpeechSeq2Seq",
        {
            "vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": FFN, "decoder_ffn_dim": FFN, "max_source_positions": 8,
            "pad_token_id": 0, "decoder_start_token_id": 1, "tie_word_embeddings": False,
        },
        {
            "model.encoder.conv1.weight",
            "model.encoder.conv2.weight",
            "model.decoder.embed_tokens.weight",
            "model.decoder.embed_positions.weight",
            "proj_out.weight",
        },
    ),
    "T5": (
        "T5",
        "AutoModelForSeq2SeqLM",
        {
            "vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": DIM, "d_ff": FFN, "num_layers": 1,
            "num_heads": HEADS, "decoder_start_token_id": 0, "pad_token_id": 0,
        },
        {
            "shared.weight",
            "encoder.block.N.layer.N.SelfAttention.relative_attention_bias.weight",
            "decoder.block.N.layer.N.SelfAttention.relative_attention_bias.weight",
        },
    ),
    "BERT": (
        "Bert",
        "AutoModelForMaskedLM",
        SMALL | {"pad_token_id": 0},
        {
            "bert.embeddings.word_embeddings.weight",
            "bert.embeddings.position_embeddings.weight",
            "bert.embeddings.token_type_embeddings.weight",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAMW)
def test_assignments_match_those_made_by_hand(case: str) -> None:
    kind, auto, options, expected = ADAMW[case]
    config = getattr(transformers, f"{kind}Config")(**options)
    with torch.device("meta"):
        model = getattr(transformers, auto).from_config(config)
    items = assign_parameters(model, layouts=matrix_layouts(model))
    matrices = [item for item in items if item.parameter.ndim > 1 and item.algorithm == "adamw"]
    assert {re.sub(r"\.\d+(?=\.)", ".N", item.name) for item in matrices} == expected
    assert all(item.algorithm == "adamw" for item in items if item.parameter.ndim < 2)
    assert sum(item.algorithm == "muon" for item in items) > 3


def test_kimi_k25() -> None:
    config = transformers.Kimi_K25Config(
        text_config={"model_type": "deepseek_v3", **MLA, "first_k_dense_replace": 0},
        tie_word_embeddings=False,
        vision_config={
            "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 1,
            "num_attention_heads": HEADS, "pos_emb_height": 4, "pos_emb_width": 4,
        },
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    items = assign_parameters(model, layouts=matrix_layouts(model))
    adamw = {
        re.sub(r"\.\d+(?=\.)", ".N", item.name)
        for item in items
        if item.parameter.ndim > 1 and item.algorithm == "adamw"
    }
    assert adamw == {
        "model.vision_tower.patch_embed.proj.weight",
        "model.vision_tower.patch_embed.pos_emb.position_embeddings",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.N.mlp.gate.weight",
        "lm_head.weight",
    }
    layouts = {item.name: item.layout for item in items if item.layout}
    assert layouts["model.language_model.layers.0.mlp.experts.gate_up_proj"] == MatrixLayout((8, 8))


# ---------------------------------------------------------------------- attention's matrices


class Inputs(TorchFunctionMode):
    """Stores query, key and value, [batch, heads, tokens, dim], of the first attention.

    From torch's attention function, or from the two products of one that is spelled out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention" and not self.kept:
            self.kept = [x.detach() for x in args[:3]]
        elif name == "matmul" and args[0].ndim == 4 and args[1].ndim == 4 and len(self.kept) < 3:
            if not self.kept:
                self.kept = [args[0].detach(), args[1].detach().mT]
            else:
                self.kept.append(args[1].detach())
        return func(*args, **(kwargs or {}))


def text(model: nn.Module) -> None:
    ids = torch.arange(LENGTH)[None] % VOCABULARY
    model(input_ids=ids)


def patches(model: nn.Module) -> None:
    model(torch.ones(4, 3 * 2 * 4 * 4) / 7 + torch.arange(4)[:, None], torch.tensor([[1, 2, 2]]))


def image(model: nn.Module) -> None:
    model(torch.arange(3 * 64.0).view(1, 3, 8, 8) / 100)


# kind, options, how to run it, the fused weight, whether it has an output gate
FUSED: dict[str, tuple[str, str, dict[str, Any], Callable[[nn.Module], None], str, bool]] = {
    "Phi-3": ("Phi3", "AutoModelForCausalLM", GQA, text, "*.qkv_proj.weight", False),
    "GPT-2": ("GPT2", "AutoModelForCausalLM", GPT2, text, "*.attn.c_attn.weight", False),
    "GPT-NeoX": (
        "GPTNeoX", "AutoModelForCausalLM", SMALL, text, "*.query_key_value.weight", False
    ),
    "Falcon": (
        "Falcon", "AutoModelForCausalLM",
        SMALL | {"new_decoder_architecture": True, "num_kv_heads": GROUPS},
        text, "*.query_key_value.weight", False,
    ),
    "Falcon, one key head": (
        "Falcon", "AutoModelForCausalLM", SMALL, text, "*.query_key_value.weight", False
    ),
    "Falcon, MHA": (
        "Falcon", "AutoModelForCausalLM", SMALL | {"multi_query": False},
        text, "*.query_key_value.weight", False,
    ),
    "StarCoder": ("GPTBigCode", "AutoModelForCausalLM", GPT2, text, "*.c_attn.weight", False),
    "StarCoder, MHA": (
        "GPTBigCode", "AutoModelForCausalLM", GPT2 | {"multi_query": False},
        text, "*.c_attn.weight", False,
    ),
    "CodeGen": (
        "CodeGen", "AutoModelForCausalLM", GPT2 | {"rotary_dim": 4},
        text, "*.qkv_proj.weight", False,
    ),
    "MPT": (
        "Mpt", "AutoModelForCausalLM",
        {"d_model": HIDDEN, "n_heads": HEADS, "n_layers": 1, "vocab_size": VOCABULARY,
         "max_seq_len": 16},
        text, "*.Wqkv.weight", False,
    ),
    "Persimmon": (
        "Persimmon", "AutoModelForCausalLM", SMALL | {"qk_layernorm": False, "hidden_size": 32},
        text, "*.query_key_value.weight", False,
    ),
    "ModernBERT": (
        "ModernBert", "AutoModelForMaskedLM",
        SMALL | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
        text, "*.Wqkv.weight", False,
    ),
    "Qwen2-VL's vision": (
        "Qwen2VLVision", "vision",
        {"depth": 1, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": HEADS, "patch_size": 4,
         "mlp_ratio": 2},
        patches, "*.qkv.weight", False,
    ),
    "SAM's vision": (
        "SamVision", "AutoModel",
        {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": HEADS,
         "mlp_dim": FFN, "image_size": 8, "patch_size": 4, "output_channels": 8,
         "global_attn_indexes": [0]},
        image, "*.qkv.weight", False,
    ),
    "Qwen3-Next's output gate": (
        "Qwen3Next", "AutoModelForCausalLM",
        QWEN3_NEXT | {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
        text, "*.q_proj.weight", True,
    ),
    "DeepSeek-V2": ("DeepseekV2", "AutoModelForCausalLM", MLA, text, "*.kv_b_proj.weight", False),
    "DeepSeek-V3": ("DeepseekV3", "AutoModelForCausalLM", MLA, text, "*.kv_b_proj.weight", False),
    "DeepSeek-V3's queries": (
        "DeepseekV3", "AutoModelForCausalLM", MLA, text, "*.q_b_proj.weight", False
    ),
    "DeepSeek-V3's queries in one layer": (
        "DeepseekV3", "AutoModelForCausalLM", MLA | {"q_lora_rank": None},
        text, "*.q_proj.weight", False,
    ),
    "Llama's queries": ("Llama", "AutoModelForCausalLM", GQA, text, "*.q_proj.weight", False),
    "Llama's keys": ("Llama", "AutoModelForCausalLM", GQA, text, "*.k_proj.weight", False),
    "T5's values": (
        "T5", "encoder",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": DIM, "d_ff": FFN, "num_layers": 1,
         "num_heads": HEADS},
        text, "*.v.weight", False,
    ),
}  # fmt: skip


def make_attention(case: str) -> Any:
    kind, auto, options, _, _, _ = FUSED[case]
    options = options | (NO_IDS if "vocab_size" in options else {})
    if auto == "vision":
        config = transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(**options)
        torch.manual_seed(0)
        model = (
            transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(
                config
            )
        )
        return model.eval()
    if auto == "encoder":
        torch.manual_seed(0)
        return transformers.T5EncoderModel(transformers.T5Config(**options)).eval()
    return make(kind, auto, **options)


def attention_inputs(model: nn.Module, run: Callable[[nn.Module], None]) -> list[Tensor]:
    with Inputs() as inputs, torch.no_grad():
        run(model)
    assert len(inputs.kept) == 3
    return inputs.kept


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("case", FUSED)
def test_each_matrix_is_one_of_queries_keys_or_values(case: str, per_head: bool) -> None:
    """Setting it to zero zeroes that part of the attention's inputs and changes no other part.

    MLM#4731: query, key and value, and an output gate, in one Newton-Schulz.
    """
    _, _, _, run, pattern, gated = FUSED[case]
    model = make_attention(case)
    layouts = matrix_layouts(model, per_head=per_head)
    name = next(n for n, _ in model.named_parameters() if n.endswith(pattern[1:]))
    parameter = model.get_parameter(name)
    layout = layouts.get(name, MatrixLayout())
    before = attention_inputs(model, run)
    whole = parameter.detach().clone()
    matrices = layout.split(whole)
    seen, untouched = set(), 0
    for block, stack in enumerate(matrices):
        for index in range(len(stack)):
            changed = [matrix.clone() for matrix in matrices]
            changed[block][index] = 0
            parameter.data.copy_(layout.join(changed, whole.shape))
            after = attention_inputs(model, run)
            parts = []
            for which, (old, new) in enumerate(zip(before, after, strict=True)):
                # Elements of [heads, dim] that are no longer what they were.
                moved = (old != new).any(2)[0]
                if not moved.any():
                    continue
                assert (new.transpose(1, 2)[0][:, moved] == 0).all(), "changed, but not to zero"
                heads = frozenset(moved.any(-1).nonzero().flatten().tolist())
                dims = frozenset(moved.any(0).nonzero().flatten().tolist())
                assert moved.sum() == len(heads) * len(dims)
                parts.append((which, heads, dims))
            assert len(parts) <= 1, "a matrix of queries, keys or values alone"
            if not parts:
                untouched += 1
                continue
            seen.add(parts[0])
            which, heads, _ = parts[0]
            all_heads = before[which].size(1)
            if per_head:  # one; a key head may come repeated for each of its query heads
                assert len(heads) == 1 or (which > 0 and all_heads % len(heads) == 0)
            else:
                assert len(heads) == all_heads
    parameter.data.copy_(whole)
    assert len(seen) + untouched == sum(len(stack) for stack in matrices)
    assert untouched == (sum(len(stack) for stack in matrices) // 2 if gated else 0)


def test_latent_and_rotary_key() -> None:
    model = make("DeepseekV3", **MLA)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    layout = matrix_layouts(model)[name]
    parameter = model.get_parameter(name)
    latent, rotary = layout.split(parameter.detach().clone())
    parameter.data.copy_(layout.join([latent, torch.zeros_like(rotary)], parameter.shape))
    _, key, value = attention_inputs(model, text)
    assert (key[..., NOPE:] == 0).all() and (key[..., :NOPE] != 0).any() and (value != 0).any()
    parameter.data.copy_(layout.join([torch.zeros_like(latent), rotary], parameter.shape))
    _, key, value = attention_inputs(model, text)
    assert (key[..., NOPE:] != 0).any() and (key[..., :NOPE] == 0).all() and (value == 0).all()


# ---------------------------------------------------------------------- gated units and experts

GATED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "Phi-3": ("Phi3", "AutoModelForCausalLM", GQA, "*.mlp.gate_up_proj.weight"),
    "GLM-4": ("Glm4", "AutoModelForCausalLM", GQA | {"head_dim": DIM}, "*.gate_up_proj.weight"),
    "ModernBERT": (
        "ModernBert",
        "AutoModelForMaskedLM",
        SMALL | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
        "*.mlp.Wi.weight",
    ),
    "Granite's shared expert": (
        "GraniteMoeShared",
        "AutoModelForCausalLM",
        GQA | EXPERTS | {"shared_intermediate_size": 8},
        "*.shared_mlp.input_linear.weight",
    ),
    "Mixtral": ("Mixtral", "AutoModelForCausalLM", GQA | EXPERTS, "*.experts.gate_up_proj"),
    "Qwen3-MoE": (
        "Qwen3Moe",
        "AutoModelForCausalLM",
        GQA | EXPERTS | {"moe_intermediate_size": 8},
        "*.experts.gate_up_proj",
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        "AutoModelForCausalLM",
        MLA | {"first_k_dense_replace": 0},
        "*.experts.gate_up_proj",
    ),
    "Llama 4": (
        "Llama4Text",
        "AutoModelForCausalLM",
        GQA | EXPERTS | {"head_dim": DIM, "intermediate_size_mlp": FFN, "moe_layers": [0]},
        "*.experts.gate_up_proj",
    ),
    "gpt-oss": (
        "GptOss",
        "AutoModelForCausalLM",
        GQA | EXPERTS | {"head_dim": DIM},
        "*.experts.gate_up_proj",
    ),
}


@pytest.mark.parametrize("case", GATED)
def test_gate_and_up_are_separate_matrices(case: str) -> None:
    """Megatron-LM#7077, torchtitan#4532. The output is act(gate) * f(up), so that zeroing the gate
    zeroes it; zeroing the same half under the other order would not."""
    kind, auto, options, pattern = GATED[case]
    model = make(kind, auto, **options)
    name = next(n for n, _ in model.named_parameters() if n.endswith(pattern[1:]))
    path = name.removesuffix(".weight").rpartition(".")[0]
    module, parameter = model.get_submodule(path), model.get_parameter(name)
    layout = matrix_layouts(model)[name]
    experts = name.endswith("gate_up_proj")
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _m, _a, output: outputs.append(output.detach()))
    gate, up = layout.split(parameter.detach().clone())
    for biased in ("gate_up_proj_bias", "down_proj_bias"):
        if biased in module._parameters:
            module.get_parameter(biased).data.zero_()
    with torch.no_grad():
        text(model)
        parameter.copy_(layout.join([torch.zeros_like(gate), up], parameter.shape))
        text(model)
        assert outputs[0].abs().sum() > 0 and (outputs[1] == 0).all()
        if experts:  # the second expert alone gives nothing
            some = gate.clone()
            some[1] = 0
            parameter.copy_(layout.join([some, up], parameter.shape))
            text(model)
            assert (outputs[2] != outputs[0]).any() and (outputs[2] != 0).any()
    handle.remove()


# ---------------------------------------------------------------------- one step

Slices = Callable[[Tensor], Sequence[Tensor]]


def heads(*sizes: int) -> Slices:
    """Rows of each head, or group, one block after another; each block of all heads together."""
    return lambda w: [
        part.reshape(-1, w.size(-1)) for part in w.unflatten(0, (-1, sum(sizes))).split(sizes, 1)
    ]


def each(*sizes: int) -> Slices:
    """The same for each head separately."""
    return lambda w: [
        part for head in w.unflatten(0, (-1, sum(sizes))) for part in head.split(sizes)
    ]


def rows(*sizes: int) -> Slices:
    return lambda w: list(w.split(sizes))


def of_experts(slices: Slices) -> Slices:
    return lambda w: [part for expert in w for part in slices(expert)]


def transposed(slices: Slices) -> Slices:
    return lambda w: slices(w.mT)


def alternate(w: Tensor) -> list[Tensor]:
    return [w[0::2], w[1::2]]


# The matrices of every fused parameter, by hand: merged, and each head on its own.
STEPS: dict[str, tuple[str, dict[str, Any], dict[str, Slices], dict[str, Slices]]] = {
    "Phi-3": (
        "Phi3",
        GQA,
        {
            "qkv_proj.weight": rows(HEADS * DIM, GROUPS * DIM, GROUPS * DIM),
            "gate_up_proj.weight": rows(FFN, FFN),
        },
        {"qkv_proj.weight": each(DIM)},
    ),
    "GPT-2": (
        "GPT2",
        GPT2 | NO_IDS,
        {"c_attn.weight": transposed(rows(HIDDEN, HIDDEN, HIDDEN))},
        {"c_attn.weight": transposed(each(DIM))},
    ),
    "GPT-NeoX": (
        "GPTNeoX",
        SMALL,
        {"query_key_value.weight": heads(DIM, DIM, DIM)},
        {"query_key_value.weight": each(DIM, DIM, DIM)},
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        MLA | {"first_k_dense_replace": 0},
        {
            "q_b_proj.weight": heads(NOPE, ROPE),
            "kv_a_proj_with_mqa.weight": rows(LATENT, ROPE),
            "kv_b_proj.weight": heads(NOPE, VALUE),
            "experts.gate_up_proj": of_experts(rows(8, 8)),
            "experts.down_proj": list,
        },
        {"q_b_proj.weight": each(NOPE, ROPE), "kv_b_proj.weight": each(NOPE, VALUE)},
    ),
    "Mixtral": (
        "Mixtral",
        GQA | EXPERTS,
        {"experts.gate_up_proj": of_experts(rows(FFN, FFN)), "experts.down_proj": list},
        {
            "q_proj.weight": each(DIM),
            "k_proj.weight": each(DIM),
            "v_proj.weight": each(DIM),
        },
    ),
    "gpt-oss": (
        "GptOss",
        GQA | EXPERTS | {"head_dim": DIM},
        {
            "experts.gate_up_proj": of_experts(transposed(alternate)),
            "experts.down_proj": of_experts(transposed(lambda w: [w])),
        },
        {"q_proj.weight": each(DIM), "k_proj.weight": each(DIM), "v_proj.weight": each(DIM)},
    ),
    "Qwen3-Next": (
        "Qwen3Next",
        QWEN3_NEXT,
        {
            "q_proj.weight": heads(DIM, DIM),
            "in_proj_qkvz.weight": heads(5, 5, 6, 6),
            "in_proj_ba.weight": heads(2, 2),
            "experts.gate_up_proj": of_experts(rows(8, 8)),
            "experts.down_proj": list,
        },
        {
            "q_proj.weight": each(DIM, DIM),
            "in_proj_qkvz.weight": each(5, 5, 3, 3, 3, 3),
            "k_proj.weight": each(DIM),
            "v_proj.weight": each(DIM),
        },
    ),
    "Qwen3.5": (
        "Qwen3_5Text",
        QWEN3_NEXT,
        {
            "q_proj.weight": heads(DIM, DIM),
            "in_proj_qkv.weight": rows(10, 10, 12),
        },
        {
            "q_proj.weight": each(DIM, DIM),
            "in_proj_qkv.weight": rows(5, 5, 5, 5, 3, 3, 3, 3),
            "k_proj.weight": each(DIM),
            "v_proj.weight": each(DIM),
        },
    ),
    "Bamba": (
        "Bamba",
        GQA | MAMBA2,
        {"mamba.in_proj.weight": rows(48, 48, 16, 16, 4)},
        {"q_proj.weight": each(DIM), "k_proj.weight": each(DIM), "v_proj.weight": each(DIM)},
    ),
}


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("case", STEPS)
def test_a_step_equals_that_of_an_unfused_model(case: str, per_head: bool) -> None:
    kind, options, by_hand, by_head = STEPS[case]
    by_hand = by_hand | (by_head if per_head else {})
    model = make(kind, **options).double()
    model.set_experts_implementation("eager")
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCABULARY
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer_options: dict[str, Any] = {
        "lr": 0.1, "ns_dtype": torch.float64, "adjust_lr": "original"
    }  # fmt: skip
    layouts = matrix_layouts(model, per_head=per_head)
    optimizer = MuonClip(param_groups(model, layouts=layouts), **optimizer_options)

    def matrices(name: str, tensor: Tensor) -> Sequence[Tensor]:
        for end, slices in by_hand.items():
            if name.endswith(end):
                return slices(tensor)
        conv1d = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
        return [tensor.mT if conv1d else tensor]

    muon = [
        name
        for group in optimizer.param_groups
        if group["algorithm"] == "muon"
        for name in group["param_names"]
    ]
    for end in by_hand:
        assert any(name.endswith(end) for name in muon), end
    apart = []
    for name in muon:
        parameter = model.get_parameter(name)
        if parameter.grad is None:  # experts that saw no token
            continue
        for matrix, gradient in zip(
            matrices(name, parameter.detach()), matrices(name, parameter.grad), strict=True
        ):
            copy = nn.Parameter(matrix.clone())
            copy.grad = gradient.clone()
            apart.append((name, copy))
    MuonClip(
        [{"params": [copy for _, copy in apart], "algorithm": "muon"}], **optimizer_options
    ).step()
    optimizer.step()
    stepped = [
        matrix
        for name in muon
        if model.get_parameter(name).grad is not None
        for matrix in matrices(name, model.get_parameter(name).detach())
    ]
    for (name, expected), found in zip(apart, stepped, strict=True):
        torch.testing.assert_close(found, expected.data, rtol=0, atol=1e-12, msg=name)


# ---------------------------------------------------------------------- other storage


def test_storage_that_shapes_do_not_reveal() -> None:
    with torch.device("meta"):
        xlnet = transformers.XLNetModel(
            transformers.XLNetConfig(d_model=HIDDEN, n_layer=1, n_head=HEADS, d_inner=FFN)
        )
        zamba = transformers.models.zamba.modeling_zamba.ZambaMambaMixer(
            transformers.ZambaConfig(hidden_size=HIDDEN, mamba_dt_rank=3, mamba_d_state=4), 0
        )
        mamba = transformers.models.mamba.modeling_mamba.MambaMixer(
            transformers.MambaConfig(hidden_size=HIDDEN, state_size=4, time_step_rank=3), 0
        )
        dbrx = transformers.models.dbrx.modeling_dbrx.DbrxExpertGLU(
            transformers.models.dbrx.configuration_dbrx.DbrxFFNConfig(
                hidden_size=HIDDEN, ffn_hidden_size=FFN, moe_num_experts=3
            )
        )
    found = matrix_layouts(xlnet)
    wide = MatrixLayout(transposed=True, view=(HIDDEN, HIDDEN))
    assert found["layer.0.rel_attn.q"] == wide
    assert found["layer.0.rel_attn.o"] == MatrixLayout(view=(HIDDEN, HIDDEN))
    assert matrix_layouts(xlnet, per_head=True)["layer.0.rel_attn.k"] == MatrixLayout(
        (DIM,), HEADS, separate=True, transposed=True, view=(HIDDEN, HIDDEN)
    )
    assert matrix_layouts(zamba) == {
        "in_proj.weight": MatrixLayout((1, 1), 2 * HIDDEN),
        "x_proj_weight": MatrixLayout((3, 4, 4)),
    }
    assert matrix_layouts(mamba) == {
        "in_proj.weight": MatrixLayout((2 * HIDDEN, 2 * HIDDEN)),
        "x_proj.weight": MatrixLayout((3, 4, 4)),
    }
    assert matrix_layouts(dbrx) == {
        "w1": MatrixLayout((FFN,), 3, separate=True),
        "v1": MatrixLayout((FFN,), 3, separate=True),
        "w2": MatrixLayout(transposed=True, view=(3, FFN, HIDDEN)),
    }


# ---------------------------------------------------------------------- attention by name


@pytest.mark.parametrize("case", [*FUSED, *STEPS])
def test_attention_calls_the_registry_or_is_found_by_its_names(case: str) -> None:
    if case in FUSED:
        model = make_attention(case)
    else:
        kind, options, _, _ = STEPS[case]
        model = make(kind, **options)
    assert bool(attention_modules(model)) != bool(unobserved_modules(model))
    assert unobserved_modules(model.requires_grad_(False)) == {}


def test_linear_attention_is_not_found_by_its_names() -> None:
    """It has no softmax."""
    models = transformers.models
    with torch.device("meta"):
        lightning = models.minimax.modeling_minimax.MiniMaxLightningAttention(
            transformers.MiniMaxConfig(**GQA), 0
        )
        delta = models.olmo_hybrid.modeling_olmo_hybrid.OlmoHybridGatedDeltaNet(
            transformers.OlmoHybridConfig(**GQA | {"num_hidden_layers": 4}), 0
        )
    assert unobserved_modules(nn.ModuleList([lightning, delta])) == {}


# ---------------------------------------------------------------------- adapters, frozen layers


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("case", [*FUSED, *STEPS])
def test_wrapped_layers_have_the_layouts_of_the_model(case: str, per_head: bool) -> None:
    """Copies that PEFT trains (modules_to_save), and weights inside its adapters."""
    peft = pytest.importorskip("peft")
    if case in FUSED:
        model = make_attention(case)
    else:
        kind, options, _, _ = STEPS[case]
        model = make(kind, **options)
    expected = matrix_layouts(model, per_head=per_head)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D)
    }
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        adapted = nn.Module()
        adapted.base_layer, adapted.lora_A = layer, nn.ModuleDict({"default": nn.Linear(4, 2)})
        wrapper = peft.utils.ModulesToSaveWrapper(adapted, "default")
        setattr(model.get_submodule(parent), child, wrapper)
    model.requires_grad_(True)
    found = matrix_layouts(model, per_head=per_head)
    for wrapping in ("original_module", "modules_to_save.default"):
        other = {"original_module", "modules_to_save"} - {wrapping.split(".")[0]}
        assert expected == {
            name.replace(f".{wrapping}.base_layer", ""): layout
            for name, layout in found.items()
            if other.isdisjoint(name.split("."))
        }
    assert expected.keys() == set(
        re.sub(r"\.(original_module|modules_to_save\.default)\.base_layer", "", name)
        for name in found
    )


def test_frozen_layers_have_no_layout() -> None:
    """They may be unknown, or packed by a quantization: nothing is done to them."""
    model = make("Phi3", **GQA).requires_grad_(False)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    packed = torch.zeros(attention.qkv_proj.weight.numel() // 2, 1, dtype=torch.uint8)
    attention.qkv_proj.weight = nn.Parameter(packed, requires_grad=False)
    attention.qkv_and_more = nn.Linear(8, 40).requires_grad_(False)
    assert matrix_layouts(model) == matrix_layouts(model, per_head=True) == {}
    mlp.gate_up_proj.requires_grad_(True)
    # Its partner's shape is that of a matrix, whatever its storage.
    down = mlp.down_proj.weight
    mlp.down_proj.weight = nn.Parameter(
        torch.zeros(down.numel() // 2, 1, dtype=torch.uint8), requires_grad=False
    )
    assert matrix_layouts(model) == {
        "model.layers.0.mlp.gate_up_proj.weight": MatrixLayout((FFN, FFN))
    }


# ---------------------------------------------------------------------- what is not known


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_and_more = nn.Linear(8, 40)


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))


class Wrong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 3
        self.qkv = nn.Linear(8, 24)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (
            Strange(),
            {},
            "0.qkv_and_more.weight of Strange: the matrices .* not known",
        ),
        (Headless(), {"per_head": True}, "0.q_proj.weight of Headless: .* size of its heads"),
        (Wrong(), {}, r"24 rows are not 4 \+ 2 x 4 heads of 3"),
    ],
)
def test_errors_name_the_remedy(module: nn.Module, options: dict[str, Any], message: str) -> None:
    model = nn.ModuleList([module])
    with pytest.raises(ValueError, match=message) as error:
        matrix_layouts(model, **options)
    assert "exclude=" in str(error.value)
    assert matrix_layouts(model, exclude="0.*", **options) == {}
