"""Conversations as tokens: the prompt once, then only what is added to it."""

from collections.abc import Sequence
from typing import Any, Protocol

from posttrain.environment.core import Message
from posttrain.environment.tools import ToolResult
from pretrain.data import chat
from pretrain.data.tokenizer import Tokenizer


class Chat(Protocol):
    """The format of a conversation."""

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """Ids of messages and of the header of the reply, which the model continues."""

    def results(self, reply: Sequence[int], results: Sequence[ToolResult]) -> list[int]:
        """Ids after a reply: its end if it has none, results of tools, and the next header."""

    def decode(self, reply: Sequence[int]) -> str:
        """Text of a reply, with its special tokens."""


class KimiChat:
    """Kimi K2's format, in which special tokens written out in a message are plain text.

    Args:
        tokenizer: has the tokens of the chat format.
        declare_tools: whether prompts contain the declarations of tools; a model that was finetuned
            with a fixed set of tools does not need them.

    Raises:
        PretrainError: the tokenizer lacks tokens of the chat format.
    """

    def __init__(self, tokenizer: Tokenizer, *, declare_tools: bool = True) -> None:
        tokenizer.require_chat()
        self._tokenizer = tokenizer
        self._declare_tools = declare_tools

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        rendered = [chat.Message(message["role"], message["content"]) for message in messages]
        declared = tools if self._declare_tools else ()
        document = chat.render(self._tokenizer, rendered, declared)
        return list(chat.add_header(document, chat.REPLY).tokens)

    def results(self, reply: Sequence[int], results: Sequence[ToolResult]) -> list[int]:
        messages = [chat.Message("tool", r.content, answered=r.id) for r in results]
        document = chat.render(self._tokenizer, messages)
        tokens = chat.add_header(document, chat.REPLY).tokens
        ended = bool(reply) and reply[-1] == self._tokenizer.im_end
        tokens[:1] = [] if ended else [self._tokenizer.im_end]  # instead of BOS
        return list(tokens)

    def decode(self, reply: Sequence[int]) -> str:
        return self._tokenizer.decode(reply, skip_special_tokens=False)
