"""Tiny exported models."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from posttrain.model import _publish_names
from pretrain.config import LanguageConfig, VisionConfig
from pretrain.data.media.fit import limits
from pretrain.data.tokenizer import Tokenizer
from pretrain.export import chat_templates
from pretrain.export.hf_config import to_hf_config
from pretrain.export.to_hf import _write_processor, _write_tokenizer


@pytest.fixture(scope="session")
def text_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an exported text model with random weights and the tokens of conversations."""
    folder = tmp_path_factory.mktemp("export")
    tokenizer = Tokenizer.train(["some text"], 270)
    tokenizer.save(folder / "tokenizer.json")
    names = {f"{name}_token": f"<|{name}|>" for name in ("bos", "eos", "pad")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos,
            eos_token_id=tokenizer.eos,
            pad_token_id=tokenizer.pad,
        )
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an exported Kimi-K2.5 with random weights, as ``pretrain export`` writes it."""
    folder = tmp_path_factory.mktemp("images") / "hf"
    folder.mkdir()
    tokenizer = Tokenizer.train(["some text"], 270)
    tokenizer.save(folder / "plain.json")
    language = LanguageConfig(
        num_layers=2, hidden_size=16, ffn_hidden_size=16, num_heads=2, num_experts=4,
        experts_per_token=2, expert_ffn_hidden_size=8, shared_expert_ffn_hidden_size=8,
        q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    vision = VisionConfig(num_layers=1, hidden_size=16, num_heads=2, ffn_hidden_size=16)
    special = {f"{name}_token_id": getattr(tokenizer, name) for name in ("bos", "eos", "pad")}
    size = tokenizer.vocab_size
    config = to_hf_config(language, vision, size, 64, special, tokenizer.media_pad)
    torch.manual_seed(0)
    plain = {name: value for name, value in config.items() if name != "model_type"}
    model = Kimi_K25ForConditionalGeneration(Kimi_K25Config(**plain))
    model.save_pretrained(folder)
    _publish_names(folder)
    (folder / "config.json").write_text(json.dumps(config))
    template = chat_templates.document(tokenizer)
    _write_tokenizer(folder, folder / "plain.json", tokenizer, 64, template)
    (folder / "plain.json").unlink()
    _write_processor(folder, vision.patch_size, limits(64, 16), 2.0)
    return folder
