"""Sources of conversations with images and videos."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.data.builtin import image_questions
from pretrain.data.cache import cached, key_of
from pretrain.data.chat import (
    REPLY,
    Message,
    ToolCall,
    add_header,
    add_thought,
    kind_of,
    render,
)
from pretrain.data.composer import Composer
from pretrain.data.conversation_media import MediaFinder
from pretrain.data.conversations import Conversation, Resolve
from pretrain.data.interface import Split
from pretrain.data.media.frames import Media
from pretrain.data.media.pixels import Pixels
from pretrain.data.packing import Document, Question
from pretrain.data.skipped import Skip
from pretrain.data.sources.chat import FORMAT, Chat, ConversationSource
from pretrain.data.sources.described import (
    DescribedDocuments,
    DescribedSource,
    Shape,
    restore_media,
)
from pretrain.data.vision_text import columns
from pretrain.errors import PretrainError

# Conversations of which replies are looked at: few of them may be short.
_MOST_ASKED = 10_000


@dataclass(frozen=True)
class VisionChat(Chat):
    """A conversation with at least one reply, whose messages may have images and videos."""

    @property
    def media(self) -> Sequence[Media]:
        return self.conversation.media

    @property
    def pair(self) -> None:
        return None

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
        of_media += sum(len(kind_of(composer.tokenizer, media)) for media in self.media)
        text = render(composer.tokenizer, *self.conversation, lambda *_: None)
        return len(text) + of_media, placeholders

    def document(self, composer: Composer, media: Sequence[Pixels | Shape]) -> Document:
        rest = iter(media)

        def add(document: Document, medium: Media) -> None:
            composer.add(document, next(rest), kind_of(composer.tokenizer, medium))

        return render(composer.tokenizer, *self.conversation, add)

    def question(self) -> tuple["VisionChat", str] | None:
        """The conversation up to its first reply, and that reply; None if the one has no image, or
        the other one is more than a line of text."""
        messages, tools = self.conversation
        place = next(n for n, message in enumerate(messages) if message.role == REPLY)
        before = VisionChat(self.name, Conversation(messages[:place], tools))
        reply = messages[place]
        if reply.calls or reply.reasoning or "\n" in reply.text or not before.media:
            return None
        return before, reply.text


def _described(part: str | Media) -> Any:
    return part if isinstance(part, str) else [part.paths, part.moving]


def _restored(part: Any) -> str | Media:
    return part if isinstance(part, str) else restore_media(*part)


class VisionChatDocuments(DescribedDocuments):
    """Conversations, of which the index has descriptions."""

    def questions(self, split: Split, longest: int) -> Iterator[Question]:
        tokenizer = self.composer.tokenizer
        for number in itertools.islice(self.numbers[split], _MOST_ASKED):
            record, shapes = self.describe(number)
            assert isinstance(record, VisionChat)
            if (asked := record.question()) is None:
                continue
            before, answer = asked
            del shapes[len(before.media) :]
            size, _ = before.size(self.composer, shapes)
            room = self.source.data.seq_length - size - len(_begin_reply(Document(tokenizer)))
            if len(tokenizer.encode(answer)) >= longest or longest > room:
                continue
            try:
                media = self.read(before, shapes)
            except ValueError:
                continue  # it is reported when a sequence contains it
            prompt = _begin_reply(before.document(self.composer, media))
            text = before.conversation.messages[-1].text
            yield Question(prompt, answer, tokenizer.im_end, media[0][0], text)


def _begin_reply(document: Document) -> Document:
    return add_thought(add_header(document, REPLY))


class VisionChatSource(ConversationSource[VisionChat], DescribedSource[VisionChat]):
    """Conversations with images and videos; see :mod:`pretrain.data.conversations`."""

    kind = f"vision-chat-{FORMAT}"
    record = VisionChat
    max_row_bytes = columns.MAX_ROW_BYTES  # with the content of images

    def resolver(self, file: Path) -> Resolve:
        def read_all(resolve: Resolve) -> None:
            for _ in self.read_with(file, resolve):
                pass

        config, cache = self.config, self.data.cache_dir
        return MediaFinder(file, config.field, cache, read_all, self.downloads)

    @property
    def documents(self) -> type[DescribedDocuments]:
        return VisionChatDocuments

    def restore(self, name: str, described: Any) -> VisionChat:
        return VisionChat.restore(name, described)

    def index(self, composer: Composer) -> DescribedDocuments:
        composer.tokenizer.require_chat()
        self.check()
        return super().index(composer)


class ImageQuestionSource(VisionChatSource):
    """Questions about drawn words (:mod:`pretrain.data.builtin.image_questions`)."""

    needs_path = False
    reads_field = False
    location = "questions about drawn words"

    def find(self) -> list[Path | Skip]:
        split = self.config.split
        if split == "hash":
            raise PretrainError(
                f"{self.setting}.split must be train or held_out for a source of image_questions, "
                "which holds words out, not images"
            )
        key = key_of("image_questions", self.data.images, self.data.max_corpus_mb, split)
        path, _ = cached(
            Path(self.data.cache_dir) / f"image-questions-{key}",
            lambda folder: image_questions.write(folder, self.data, split),
            lambda folder: (folder / image_questions.FILE).resolve(strict=True),
        )
        return [path]
