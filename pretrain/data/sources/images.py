"""Sources of images, videos and text: captioned images, and documents that mix them."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import DataConfig
from pretrain.data import remote
from pretrain.data.cache import key_of
from pretrain.data.skipped import Skip
from pretrain.data.sources.described import DescribedSource, restore_media
from pretrain.data.vision_text import reading
from pretrain.data.vision_text.document import Mixed
from pretrain.data.vision_text.layouts import Names


class ImageSource(DescribedSource[Mixed]):
    """Images, videos and text in the layouts of :mod:`pretrain.data.vision_text`."""

    kind = "vision"

    def __init__(self, number: int, data: DataConfig, seed: int) -> None:
        super().__init__(number, data, seed)
        if self.config.image_field:
            self.key = key_of(self.key, self.config.image_field)

    @property
    def names(self) -> Names:
        return Names(self.config.field, self.config.image_field)

    def find(self) -> list[Path | Skip]:
        path = remote.local_path(self.config.path, self.data.cache_dir, self.setting)
        return reading.find(path, self.setting)

    def read(self, file: Path) -> Iterator[Mixed | Skip]:
        return reading.read(file, self.names, self.data.cache_dir, self.setting, self.downloads)

    def companions(self, paths: Sequence[Path]) -> Iterable[Path]:
        return itertools.chain.from_iterable(map(reading.companions, paths))

    def check(self) -> None:
        for file in self.files:
            reading.check_columns(Path(file.name), self.names, self.data.cache_dir, self.setting)

    def media_files(self) -> Iterator[str]:
        self.check()  # before any record is read
        for file in self.files:
            if not reading.names_files(Path(file.name)):
                yield file.name
                continue
            yield from self.files_named_by(file.records())

    def restore(self, name: str, described: Any) -> Mixed:
        parts = (part if isinstance(part, str) else restore_media(*part) for part in described)
        return Mixed(name, tuple(parts))
