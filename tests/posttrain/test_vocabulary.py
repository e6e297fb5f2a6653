"""Added tokens leave all other tokens and weights as they are."""

import json
from pathlib import Path

import torch

from posttrain import model
from posttrain.vocabulary import extend, long_words


def test_tokens_are_added(text_export: Path, tmp_path: Path) -> None:
    before = model.load(text_export)
    size = before.tokenizer.vocab_size
    rows = before.model.get_input_embeddings().weight.detach().clone()
    after = extend(before, tmp_path / "new", ["<|call|>"], ["assign_task"], max_length=500)
    tokenizer = after.tokenizer
    assert tokenizer.vocab_size == size + 2
    assert torch.equal(after.model.get_input_embeddings().weight[:size], rows)
    assert after.model.get_output_embeddings().weight.shape[0] == size + 2
    # A word is a token wherever it is; markup is never the encoding of a text.
    assert tokenizer.encode("assign_task:").tolist()[0] == size + 1
    assert size not in tokenizer.encode("<|call|>")
    assert tokenizer.decode([size, size + 1], skip_special_tokens=False) == "<|call|>assign_task"
    assert after.hf_tokenizer.convert_tokens_to_ids("<|call|>") == size
    assert after.max_length == after.hf_tokenizer.model_max_length == 500
    for text in ("some text", "calls", '{"x": 1}'):
        expected = model.load(text_export).tokenizer.encode(text).tolist()
        assert tokenizer.encode(text).tolist() == expected


def test_known_tokens_are_not_added_again(text_export: Path, tmp_path: Path) -> None:
    first = extend(model.load(text_export), tmp_path / "first", ["<|call|>"])
    second = extend(first, tmp_path / "second", ["<|call|>", "<|im_end|>"])
    assert second.tokenizer.vocab_size == first.tokenizer.vocab_size
    added = json.loads((tmp_path / "second" / "tokenizer.json").read_text())["added_tokens"]
    assert [token["content"] for token in added].count("<|call|>") == 1


def test_words_with_many_tokens(text_export: Path) -> None:
    tokenizer = model.load(text_export).tokenizer
    assert long_words(tokenizer, ["ab", "create_subagent"], 8) == ["create_subagent"]
