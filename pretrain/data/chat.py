"""Conversations as the model reads them, rendered as by Kimi K2's chat template."""

from collections.abc import Sequence
from typing import NamedTuple

from pretrain.data.packing import NOTHING, TEXT, Document
from pretrain.data.tokenizer import ROLES, Tokenizer

REPLY = "assistant"


class Message(NamedTuple):
    """What one of :data:`ROLES` says."""

    role: str
    content: str


def begin(document: Document, role: str) -> Document:
    """Add the heading of a role's message: nothing of it is learnt."""
    tokenizer = document.tokenizer
    name = tokenizer.encode(role)
    return document.add_tokens([tokenizer.roles[role], *name, tokenizer.im_middle], NOTHING)


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> Document:
    """A conversation as a document, in which replies are learnt, with what ends each.

    :func:`template` says the same to others; only that what looks like a special token in a content
    is text here. Kimi K2's own template puts a sentence about Kimi before a conversation that has
    no system message; this one does not.
    """
    document = Document(tokenizer)
    for role, content in messages:
        begin(document, role)
        kind = TEXT if role == REPLY else NOTHING
        document.add_tokens([*tokenizer.encode(content), tokenizer.im_end], kind)
    return document


def template(content: str) -> str:
    """The chat template in Jinja, as transformers and servers read it.

    Args:
        content: Jinja that renders a message's content.
    """
    refusal = f"the roles are {', '.join(ROLES)}, not "
    return (
        "{{ bos_token }}{% for message in messages %}"
        f"{{% if message.role not in {list(ROLES)} %}}"
        f"{{{{ raise_exception('{refusal}' ~ message.role) }}}}{{% endif %}}"
        "{{ '<|im_' ~ message.role ~ '|>' ~ message.role }}<|im_middle|>"
        f"{content}<|im_end|>{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_{REPLY}|>{REPLY}<|im_middle|>{{% endif %}}"
    )
