"""Conversations as the model reads them: Kimi K2's chat format."""

from collections.abc import Sequence
from typing import NamedTuple

from pretrain.data import tokenizer as tokens
from pretrain.data.packing import Document
from pretrain.data.tokenizer import Tokenizer

REPLY = "assistant"
# Kimi K2's template begins all messages but those of users and the assistant like a system message,
# with their role as the header.
_TOKENS = {**{role: role for role in tokens.ROLES}, "developer": "system", "tool": "system"}
ROLES = tuple(_TOKENS)
"""Roles of messages."""
_RETURNED = "## Return of "


class Message(NamedTuple):
    """A message of a conversation.

    Attributes:
        role: one of :data:`ROLES`.
        content: its text.
    """

    role: str
    content: str


def add_header(document: Document, role: str) -> Document:
    """Append the header of a role's message, with weight 0."""
    tokenizer = document.tokenizer
    header = [tokenizer.roles[_TOKENS[role]], *tokenizer.encode(role), tokenizer.im_middle]
    return document.add_tokens(header, weight=0)


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> Document:
    """Render a conversation; only replies and their end tokens have a weight other than 0.

    :func:`template` renders the same tokens, except that special tokens written out in a content
    are plain text here. Unlike Kimi K2's own template, neither adds a default system message.
    """
    document = Document(tokenizer)
    for role, content in messages:
        add_header(document, role)
        tokens = [*tokenizer.encode(content), tokenizer.im_end]
        document.add_tokens(tokens, weight=1 if role == REPLY else 0)
    return document


def returned(call: str, content: str) -> str:
    """The content of a tool's message.

    Args:
        call: id of the tool call that it answers.
    """
    return f"{_RETURNED}{call}\n{content}"


def template(content: str) -> str:
    """The chat template in Jinja, for transformers and inference servers.

    Args:
        content: Jinja that renders the content of a message.
    """
    unknown_role = f"the roles are {', '.join(ROLES)}, not "
    return (
        "{{ bos_token }}{% for message in messages %}"
        f"{{% if message.role not in {list(ROLES)} %}}"
        f"{{{{ raise_exception('{unknown_role}' ~ message.role) }}}}{{% endif %}}"
        f"{{{{ '<|im_' ~ {_TOKENS}[message.role] ~ '|>' ~ message.role }}}}<|im_middle|>"
        "{% if message.tool_call_id %}"
        f"{{{{ '{_RETURNED}' ~ message.tool_call_id ~ '\\n' }}}}{{% endif %}}"
        f"{content}<|im_end|>{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_{REPLY}|>{REPLY}<|im_middle|>{{% endif %}}"
    )
