"""Ways to ask a model: as a document of pretraining, or in the modes of its chat template."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from posttrain.model import Exported
from pretrain.errors import PretrainError
from pretrain.export import chat_templates

Messages = list[dict[str, Any]]


class Mode(NamedTuple):
    """A way to ask a model.

    Attributes:
        name: of the mode.
        template: chat template.
        options: arguments of the template.
        ends: ids of the tokens that end a response.
    """

    name: str
    template: str
    options: dict[str, Any]
    ends: list[int]


def find(exported: Exported, name: str) -> Mode:
    """A mode of a model.

    Args:
        name: ``document``: the prompt of pretraining, an image or a text that the model continues
            up to the end of the line.

    Raises:
        PretrainError: the model's tokenizer lacks tokens of the mode.
    """
    tokenizer = exported.tokenizer
    if name == "document":
        template = chat_templates.document(tokenizer if exported.has_images else None)
        return Mode(name, template, {}, [tokenizer.newline, tokenizer.eos])
    raise PretrainError(f"there is no mode {name!r}")


@torch.no_grad()
def answer(
    exported: Exported,
    mode: Mode,
    prompts: Sequence[Messages],
    images: Sequence[Sequence[Image.Image]],
    max_tokens: int,
) -> list[str]:
    """The responses to prompts by greedy decoding, without special tokens.

    Args:
        prompts: conversations; images are parts of their contents.
        images: those of each prompt, in order.
        max_tokens: limit of a response.
    """
    tokenizer = exported.hf_tokenizer
    texts = [
        tokenizer.apply_chat_template(
            prompt,
            chat_template=mode.template,
            add_generation_prompt=True,
            tokenize=False,
            **mode.options,
        )
        for prompt in prompts
    ]
    shown = {"images": [list(some) for some in images]} if any(images) else {}
    inputs = exported.processor(
        text=texts, padding=True, add_special_tokens=False, return_tensors="pt", **shown
    ).to(exported.model.device)
    written = exported.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=mode.ends,
        pad_token_id=tokenizer.pad_token_id,
        # A generated image would have no features.
        suppress_tokens=[exported.tokenizer.media_pad] if exported.has_images else None,
    )
    new = written[:, inputs["input_ids"].shape[1] :].tolist()
    return [tokenizer.decode(tokens, skip_special_tokens=True).strip("\n") for tokens in new]
