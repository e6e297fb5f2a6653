"""Ways to ask a model: as a document of pretraining, or in the modes of its chat template."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from posttrain.environment.core import Task
from posttrain.model import Exported
from posttrain.sampling import finite_logits
from pretrain.data import chat
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


CHAT_MODES = ("instant", "thinking")
"""Modes of the chat format: a reply begins without reasoning, or with it."""
END_OF_THINKING = "</think>"


def chat_template(exported: Exported) -> str:
    """The template of the chat format, with the variable ``thinking``."""
    tokenizer = exported.tokenizer
    content = chat_templates.content(tokenizer if exported.has_images else None, is_chat=True)
    return chat.template(tokenizer, content)


def find(exported: Exported, name: str) -> Mode:
    """A mode of a model.

    Args:
        name: one of :data:`CHAT_MODES`; or ``document``, the prompt of pretraining: an image or a
            text that the model continues up to the end of the line.

    Raises:
        PretrainError: the model's tokenizer lacks tokens of the mode.
    """
    tokenizer = exported.tokenizer
    if name == "document":
        template = chat_templates.document(tokenizer if exported.has_images else None)
        return Mode(name, template, {}, [tokenizer.newline, tokenizer.eos])
    if not has_chat_modes(exported):
        raise PretrainError(
            f"{exported.folder} does not know the mode {name}, because its tokenizer has no "
            f"{END_OF_THINKING}: run `python -m posttrain sft` first"
        )
    options = {"thinking": name == "thinking"}
    return Mode(name, chat_template(exported), options, [tokenizer.im_end, tokenizer.eos])


def has_chat_modes(exported: Exported) -> bool:
    """Whether the tokenizer has the tokens of the chat format and of reasoning."""
    tokenizer = exported.tokenizer
    return bool(tokenizer.roles) and tokenizer.id_of(END_OF_THINKING) is not None


def final_answer(exported: Exported, mode: Mode, tokens: Sequence[int]) -> str:
    """The text of a response after its reasoning; none if that has no end."""
    text = exported.tokenizer.decode(tokens, skip_special_tokens=False)
    _, ended, answer = text.rpartition(END_OF_THINKING)
    text = answer if ended or not mode.options.get("thinking") else ""
    for special in ("<|im_end|>", exported.hf_tokenizer.eos_token):
        text = text.removesuffix(special)
    return text.strip()


@torch.no_grad()
def answer(
    exported: Exported,
    mode: Mode,
    prompts: Sequence[Messages],
    images: Sequence[Sequence[Image.Image]],
    max_tokens: int,
    temperature: float = 0.0,
) -> list[list[int]]:
    """The tokens of the responses to prompts, with those that end them.

    Args:
        prompts: conversations; images are parts of their contents.
        images: those of each prompt, in order.
        max_tokens: limit of a response.
        temperature: 0: greedy decoding.
    """
    inputs = _inputs(exported, mode, prompts, images).to(exported.model.device)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    with finite_logits(exported.model):
        written = exported.model.generate(
            **inputs,
            **sampling,
            do_sample=temperature > 0,
            max_new_tokens=max_tokens,
            eos_token_id=mode.ends,
            pad_token_id=exported.hf_tokenizer.pad_token_id,
            # A generated image would have no features.
            suppress_tokens=[exported.tokenizer.media_pad] if exported.has_images else None,
        )
    return [
        _upto_end(row, mode.ends) for row in written[:, inputs["input_ids"].shape[1] :].tolist()
    ]


def answer_tasks(
    exported: Exported, mode: Mode, tasks: Sequence[Task], max_tokens: int, temperature: float = 0.0
) -> list[list[int]]:
    """The tokens of the responses to tasks; see :func:`answer`."""
    return answer(exported, mode, *_asked(tasks), max_tokens, temperature)


def longest_prompt(exported: Exported, mode: Mode, tasks: Sequence[Task]) -> int:
    """Tokens of the longest prompt of tasks; 0 without tasks."""
    longest = 0
    for task in tasks:
        (prompt,), (images,) = _asked([task])
        text = _text_of(exported, mode, prompt)
        length = len(exported.hf_tokenizer(text, add_special_tokens=False)["input_ids"])
        for image in images:  # one token in the text, and several for the model
            medium = {"type": "image", "image": image}
            length += exported.processor.image_processor.media_tokens_calculator(medium) - 1
        longest = max(longest, length)
    return longest


def _asked(tasks: Sequence[Task]) -> tuple[list[Messages], list[list[Image.Image]]]:
    """The conversation about each task, and its images."""
    images = [[] if task.image is None else [task.image] for task in tasks]
    asked = [
        [{"role": "user", "content": [{"type": "image"} for _ in shown] + [_text(task.question)]}]
        for task, shown in zip(tasks, images, strict=True)
    ]
    return asked, images


def _inputs(
    exported: Exported,
    mode: Mode,
    prompts: Sequence[Messages],
    images: Sequence[Sequence[Image.Image]],
) -> Any:
    """The model's inputs, padded on the left; arguments as of :func:`answer`."""
    shown = {"images": [list(some) for some in images]} if any(images) else {}
    return exported.processor(
        text=[_text_of(exported, mode, prompt) for prompt in prompts],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
        **shown,
    )


def _text_of(exported: Exported, mode: Mode, prompt: Messages) -> str:
    """A conversation as a text that the response continues."""
    text: str = exported.hf_tokenizer.apply_chat_template(
        prompt,
        chat_template=mode.template,
        add_generation_prompt=True,
        tokenize=False,
        **mode.options,
    )
    return text


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _upto_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    first = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]
