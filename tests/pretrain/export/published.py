"""Tiny random checkpoints with the shapes of published models, made with transformers only."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.data.tokenizer import Tokenizer

TEXT = "No two of 87 are the same, and all of 31 are; whatever happens, these remain. "
TOKENS = 300
"""Tokens of the tokenizer."""
_ANY = {
    **{"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 80, "rope_theta": 500.0},
    **{"max_position_embeddings": 96, "vocab_size": TOKENS, "rms_norm_eps": 1e-3},
    "num_attention_heads": 4,
}
_MLA = _ANY | {
    **{"num_key_value_heads": 4, "kv_lora_rank": 24, "v_head_dim": 10, "q_lora_rank": 16},
    **{"qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "moe_intermediate_size": 20},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    **{"n_routed_experts": 12, "num_experts_per_tok": 3, "num_nextn_predict_layers": 0},
}
_GQA = _ANY | {"num_key_value_heads": 2, "head_dim": 12}
_YARN = {
    **{"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 4.0},
    **{"beta_slow": 0.25, "original_max_position_embeddings": 24},
}


@dataclass(frozen=True)
class Shape:
    """Shape of a published model, and the differences of its files from transformers'.

    Attributes:
        config: name of the configuration class of transformers.
        values: its arguments.
        published: keys of the published config.json that transformers does not write.
        fp8_block: rows and columns of the blocks in which weights of layers are quantized.
        mtp: the files have a layer for multi-token prediction.
        tokens: names of special tokens, by the name in our tokenizers.
        overrides: settings of the import.
        parallel: settings of the training step.
    """

    config: str
    values: dict[str, Any]
    published: dict[str, Any] = field(default_factory=dict)
    fp8_block: tuple[int, int] | None = None
    mtp: bool = False
    tokens: dict[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    parallel: tuple[str, ...] = ("parallel.expert=2",)


# DeepSeek's tokenizers have no tokens for images.
_DEEPSEEK_TOKENS = {
    "<|bos|>": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<|eos|>": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|pad|>": "<\uff5c\u2581pad\u2581\uff5c>",
    "<|media_pad|>": "<|unused|>",
}
_V3_ROUTER = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
SHAPES = {
    "moonlight": Shape(
        "DeepseekV3Config",
        _MLA | {"q_lora_rank": None, "n_shared_experts": 2, "routed_scaling_factor": 2.446},
        _V3_ROUTER,
    ),
    "kimi_k2": Shape(
        "DeepseekV3Config",
        _MLA
        | {"routed_scaling_factor": 2.827}
        | {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        _V3_ROUTER | {"model_type": "kimi_k2"},
    ),
    "deepseek_v3": Shape(
        "DeepseekV3Config",
        _MLA
        | {"n_group": 8, "topk_group": 4, "n_routed_experts": 16, "num_experts_per_tok": 8}
        | {"hidden_size": 40, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1}
        | {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}
        | {"vocab_size": TOKENS + 4},
        _V3_ROUTER,
        fp8_block=(16, 16),
        mtp=True,
        tokens=_DEEPSEEK_TOKENS,
    ),
    "deepseek_v2_lite": Shape(
        "DeepseekV2Config",
        _MLA
        | {"q_lora_rank": None, "n_shared_experts": 2, "routed_scaling_factor": 1.5}
        | {"rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}
        | {"topk_method": "greedy", "norm_topk_prob": False, "vocab_size": TOKENS + 20},
        {"scoring_func": "softmax", "moe_layer_freq": 1},
        tokens=_DEEPSEEK_TOKENS,
    ),
    "no_shared_expert": Shape("DeepseekV3Config", _MLA | {"n_shared_experts": 0}),
    "dense": Shape(
        "DeepseekV3Config", _MLA | {"first_k_dense_replace": 3}, parallel=("parallel.tensor=2",)
    ),
    "qwen3_moe": Shape(
        "Qwen3MoeConfig",
        _GQA
        | {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
        | {"norm_topk_prob": True, "mlp_only_layers": [0]},
    ),
    "qwen3": Shape(
        "Qwen3Config", _GQA | {"tie_word_embeddings": True}, parallel=("parallel.tensor=2",)
    ),
    "llama": Shape(
        "LlamaConfig",
        _GQA | {"vocab_size": TOKENS + 1},
        overrides=(f"language.vocab_size={TOKENS + 4}",),
        parallel=("parallel.tensor=2",),
    ),
}


@dataclass(frozen=True)
class Published:
    """A checkpoint and its model.

    Attributes:
        folder: the files.
        weights: the tensors that an import must read, with fp8 weights as bfloat16.
        tokens: [1, s] int64, a text.
        logits: [s, vocabulary], the logits of transformers after each token.
    """

    folder: Path
    weights: dict[str, Tensor]
    tokens: Tensor
    logits: Tensor


@torch.no_grad()
def publish(shape: Shape, folder: Path) -> Published:
    """Write a checkpoint of random weights in the layout of the published files."""
    import transformers

    config = getattr(transformers, shape.config)(**shape.values)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        _randomize(name, tensor)
    model.save_pretrained(folder)
    tokenizer_file = folder / "tokenizer.json"
    Tokenizer.train([TEXT * 3], TOKENS).save(tokenizer_file)
    for ours, theirs in shape.tokens.items():
        tokenizer_file.write_text(tokenizer_file.read_text().replace(ours, theirs))
    tokenizer = Tokenizer.load(tokenizer_file)

    file = folder / "model.safetensors"
    stored = load_file(file)
    weights = {name: tensor for name, tensor in stored.items() if tensor.numel()}
    changes = dict(shape.published)
    if shape.fp8_block is not None:
        changes["quantization_config"] = {
            **{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"},
            "weight_block_size": list(shape.fp8_block),
        }
        for name, weight in load_file(file).items():
            if ".layers." in name and weight.ndim == 2 and ".gate." not in name:
                stored[name], scales = quantize(weight, shape.fp8_block)
                stored[f"{name}_scale_inv"] = scales
                weights[name] = dequantize(stored[name], scales, shape.fp8_block)
        save_file(weights, file, metadata={"format": "pt"})
    if shape.mtp:
        stored |= _mtp_layer(stored, shape.values["num_hidden_layers"])
    tokens = torch.tensor([[tokenizer.bos, *tokenizer.encode(TEXT)]])
    logits = transformers_logits(folder, tokens)
    save_file(stored, file, metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))
    return Published(folder, weights, tokens, logits)


@torch.no_grad()
def transformers_logits(folder: Path, tokens: Tensor) -> Tensor:
    """[s, vocabulary], the float32 logits of a model that transformers loads completely."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    missing = [name for name in info["missing_keys"] if model.get_parameter(name).numel()]
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"]
    logits: Tensor = model.eval()(tokens).logits[0]
    return logits


def _randomize(name: str, tensor: Tensor) -> None:
    """Draw weights that give attention, routers and logits a large spread."""
    if name.endswith("inv_freq"):
        return
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    noise = torch.empty(tensor.shape).normal_(generator=torch.Generator().manual_seed(seed))
    if name.endswith("e_score_correction_bias"):
        tensor.copy_(0.2 * noise)
    elif tensor.ndim < 2:
        tensor.copy_(1 + 0.2 * noise)
    else:
        tensor.copy_(1.5 * noise / math.sqrt(tensor.shape[-1]))


def quantize(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Quantize a matrix as DeepSeek-V3's files: the largest entry of each block becomes 448.

    Returns:
        float8_e4m3fn of the weight's shape, and the float32 scale of each block, the last ones
        partial.
    """
    rows, columns = block
    grid = [part.split(columns, dim=1) for part in weight.split(rows)]
    scales = torch.stack([torch.stack([tile.abs().max() / 448 for tile in row]) for row in grid])
    scaled = [
        torch.cat([tile / scales[i, j] for j, tile in enumerate(row)], dim=1)
        for i, row in enumerate(grid)
    ]
    return torch.cat(scaled).to(torch.float8_e4m3fn), scales


def dequantize(quantized: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The bfloat16 weight: each block times its scale."""
    weight = quantized.float()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows, columns = (
                slice(n * size, (n + 1) * size) for n, size in zip((i, j), block, strict=True)
            )
            weight[rows, columns] *= scales[i, j]
    return weight.bfloat16()


def _mtp_layer(stored: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The tensors of DeepSeek-V3's layer for multi-token prediction, after the last layer."""
    last, own = f"model.layers.{number - 1}.", f"model.layers.{number}."
    layer = {
        own + name.removeprefix(last): tensor.clone()
        for name, tensor in stored.items()
        if name.startswith(last)
    }
    embedding = stored["model.embed_tokens.weight"]
    norm = torch.ones(embedding.shape[1])
    return layer | {
        f"{own}embed_tokens.weight": embedding.clone(),
        f"{own}enorm.weight": norm,
        f"{own}hnorm.weight": norm.clone(),
        f"{own}eh_proj.weight": torch.cat([embedding[: len(norm)]] * 2, dim=1),
        f"{own}shared_head.norm.weight": norm.clone(),
        f"{own}shared_head.head.weight": embedding.clone(),
    }
