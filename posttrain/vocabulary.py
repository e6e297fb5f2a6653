"""Tokens that an exported model lacks, added to its tokenizer and its embedding."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain import model
from posttrain.model import Exported
from pretrain.data.tokenizer import Tokenizer

_TOKENIZER = "tokenizer.json"


def extend(
    exported: Exported,
    out: Path,
    special: Sequence[str],
    words: Sequence[str] = (),
    *,
    max_length: int = 0,
    template: str | None = None,
) -> Exported:
    """Write an export with more tokens, whose embeddings are to be trained, and load it.

    Args:
        exported: the model; its weights in memory are changed.
        out: folder of the new export.
        special: markup, which no text is encoded to. Those that exist are not added again.
        words: text that becomes one token each, wherever it is in a text.
        max_length: the least limit of positions of the new export, in tokens.
        template: its chat template; None: unchanged.
    """
    content = json.loads((exported.folder / _TOKENIZER).read_text())
    known = exported.tokenizer.vocab_size
    missing = [name for name in (*special, *words) if exported.tokenizer.id_of(name) is None]
    for number, name in enumerate(missing, known):
        content["added_tokens"].append(_added(number, name, special=name in special))
    rows = exported.model.get_input_embeddings().num_embeddings
    if known + len(missing) > rows:
        exported.model.resize_token_embeddings(known + len(missing))
    partial = out.with_name(f"{out.name}.new")
    model.save(exported, exported.model, partial, template)
    (partial / _TOKENIZER).write_text(json.dumps(content, ensure_ascii=False, indent=2))
    length = max(max_length, exported.max_length)
    _update(partial / "tokenizer_config.json", {"model_max_length": length})
    sizes = {"vocab_size": max(rows, known + len(missing)), "max_position_embeddings": length}
    _update(partial / "config.json", sizes, section="text_config")
    if exported.has_images:
        # The id of video placeholders is that of no token.
        _update(partial / "config.json", {"video_token_id": sizes["vocab_size"]})
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return model.load(out)


def long_words(tokenizer: Tokenizer, words: Sequence[str], tokens: int) -> list[str]:
    """The words that a tokenizer has more than ``tokens`` tokens for."""
    return [word for word in words if len(tokenizer.encode(word)) > tokens]


def _update(file: Path, settings: dict[str, Any], section: str = "") -> None:
    """Change settings in a JSON object, or in a section of it if it has that section."""
    content = json.loads(file.read_text())
    content.get(section, content).update(settings)
    file.write_text(json.dumps(content, indent=2))


def _added(number: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": special}
