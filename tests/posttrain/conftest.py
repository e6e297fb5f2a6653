"""A tiny exported text model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain.data.tokenizer import Tokenizer


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
