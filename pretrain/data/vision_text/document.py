"""Documents of images and text, before they are tokenized and read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.data.composer import Composer, as_pair
from pretrain.data.content import content_hash
from pretrain.data.media.frames import Media
from pretrain.data.media.pixels import Pixels
from pretrain.data.media.span import Span
from pretrain.data.packing import Document

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Mixed:
    """A document of text and images in reading order; one that ends with its only text consists of
    images and their caption."""

    name: str
    parts: tuple[str | Media, ...]

    @property
    def text(self) -> str:
        return "\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def media(self) -> list[Media]:
        return [part for part in self.parts if isinstance(part, Media)]

    @property
    def pair(self) -> tuple[Media, str] | None:
        return as_pair(self.parts)

    @property
    def hash(self) -> int:
        """64 bits of the text and of the names of images; in other files, also of their sizes."""
        root = Path(self.name).parent
        values: list[str] = []
        for part in self.parts:
            for value in [part] if isinstance(part, str) else part.paths:
                values.append(str(value).removeprefix(f"{root}/"))
                values += [str(value.size)] if isinstance(value, Span) else []
        return content_hash(*values)

    def described(self) -> list[Any]:
        """The parts in values that JSON has."""
        return [p if isinstance(p, str) else [p.paths, p.moving] for p in self.parts]

    def size(self, composer: Composer, shapes: Sequence[Shape]) -> tuple[int, int]:
        return composer.size(self._with(shapes))

    def document(self, composer: Composer, media: Sequence[Pixels | Shape]) -> Document:
        return composer.document(self._with(media))

    def _with(self, media: Sequence[Any]) -> list[Any]:
        rest = iter(media)
        return [part if isinstance(part, str) else next(rest) for part in self.parts]
