"""Sources of conversations with images and videos."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import DataConfig
from pretrain.data.chat import Message, ToolCall, kind_of_image, render
from pretrain.data.composer import Composer
from pretrain.data.conversation_media import MediaFinder
from pretrain.data.conversations import Conversation, Resolve
from pretrain.data.media.frames import Media
from pretrain.data.media.pixels import Pixels
from pretrain.data.packing import Document
from pretrain.data.sources.chat import Chat, ConversationSource
from pretrain.data.sources.described import (
    DescribedDocuments,
    DescribedSource,
    Shape,
    restore_media,
)


@dataclass(frozen=True)
class VisionChat(Chat):
    """A conversation with at least one reply, whose messages may have images and videos."""

    @property
    def media(self) -> Sequence[Media]:
        return self.conversation.media

    def described(self) -> list[Any]:
        messages, tools = self.conversation
        listed = (m._asdict() | {"content": list(map(_described, m.parts))} for m in messages)
        return [list(listed), tools]

    @classmethod
    def restore(cls, name: str, described: list[Any]) -> "VisionChat":
        """The conversation of :meth:`described`."""
        listed, tools = described
        messages = (
            Message(
                **fields
                | {
                    "content": tuple(map(_restored, fields["content"])),
                    "calls": tuple(ToolCall(*call) for call in fields["calls"]),
                }
            )
            for fields in listed
        )
        return cls(name, Conversation(tuple(messages), tuple(tools)))

    def size(self, composer: Composer, shapes: Sequence[Shape]) -> tuple[int, int]:
        of_media, placeholders = composer.size(shapes)
        of_media -= 2  # BOS and EOS, which composer.size includes
        kind = len(kind_of_image(composer.tokenizer))
        of_media += kind * sum(not media.moving for media in self.media)
        text = render(composer.tokenizer, *self.conversation, lambda *_: None)
        return len(text) + of_media, placeholders

    def document(self, composer: Composer, media: Sequence[Pixels | Shape]) -> Document:
        rest, kind = iter(media), kind_of_image(composer.tokenizer)

        def add(document: Document, medium: Media) -> None:
            composer.add(document, next(rest), () if medium.moving else kind)

        return render(composer.tokenizer, *self.conversation, add)


def _described(part: str | Media) -> Any:
    return part if isinstance(part, str) else [part.paths, part.moving]


def _restored(part: Any) -> str | Media:
    return part if isinstance(part, str) else restore_media(*part)


class VisionChatSource(ConversationSource[VisionChat], DescribedSource[VisionChat]):
    """Conversations with images and videos; see :mod:`pretrain.data.conversations`."""

    kind = "vision-chat"
    record = VisionChat

    def __init__(self, number: int, data: DataConfig, seed: int) -> None:
        self._failed: dict[str, str] = {}  # URLs
        super().__init__(number, data, seed)

    def resolver(self, file: Path) -> Resolve:
        def read_all(resolve: Resolve) -> None:
            for _ in self.read_with(file, resolve):
                pass

        return MediaFinder(file, self.data.cache_dir, read_all, self._failed)

    def restore(self, name: str, described: Any) -> VisionChat:
        return VisionChat.restore(name, described)

    def index(self, composer: Composer) -> DescribedDocuments:
        composer.tokenizer.require_chat()
        self.check()
        return super().index(composer)
