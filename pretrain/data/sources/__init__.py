"""Sources of data: :data:`SOURCES` lists their types, one file each.

To add a type, subclass :class:`~pretrain.data.sources.interface.Source` or, for files,
:class:`~pretrain.data.sources.indexed.FileSource`, and enter it in :data:`SOURCES`.
"""

from collections.abc import Callable

from pretrain.config import DataConfig, SourceConfig
from pretrain.data.sources.chat import ChatSource
from pretrain.data.sources.energon import EnergonSource
from pretrain.data.sources.images import ImageSource
from pretrain.data.sources.interface import Source
from pretrain.data.sources.megatron import MegatronChatSource, MegatronSource
from pretrain.data.sources.standard_library import StandardLibraryChatSource, StandardLibrarySource
from pretrain.data.sources.text import TextSource
from pretrain.data.sources.vision_chat import ImageQuestionSource, VisionChatSource
from pretrain.errors import PretrainError

SOURCES: dict[str, type[Source]] = {
    "text": TextSource,
    "chat": ChatSource,
    "vision_chat": VisionChatSource,
    "images": ImageSource,
    "energon": EnergonSource,
    "megatron": MegatronSource,
    "megatron_chat": MegatronChatSource,
    "standard_library": StandardLibrarySource,
    "standard_library_chat": StandardLibraryChatSource,
    "image_questions": ImageQuestionSource,
}
"""Source types by the name that ``type`` has in ``data.sources``."""
# Settings of an entry that some types do not read.
_APPLIES: dict[str, Callable[[type[Source]], bool]] = {
    "field": lambda source: source.reads_field,
    "image_field": lambda source: source is ImageSource,
    "trust_code": lambda source: source.may_run_code,
    "media_urls": lambda source: source.may_download,
}


def source_types(config: DataConfig) -> list[type[Source]]:
    """The type of each entry of ``data.sources``, whose settings are checked.

    Raises:
        PretrainError: a type is unknown, or a setting is missing or does not apply to it.
    """
    types = []
    for number, source in enumerate(config.sources):
        setting = f"data.sources[{number}]"
        if source.type not in SOURCES:
            names = ", ".join(map(repr, SOURCES))
            raise PretrainError(f"{setting}.type must be one of {names}, not {source.type!r}")
        source_type = SOURCES[source.type]
        if bool(source.path) != source_type.needs_path:
            must = "given" if source_type.needs_path else "left out"
            raise PretrainError(f"{setting}.path must be {must} for a source of {source.type}")
        for name, applies in _APPLIES.items():
            is_set = getattr(source, name) != getattr(SourceConfig, name)
            if is_set and not applies(source_type):
                names = ", ".join(other for other in SOURCES if applies(SOURCES[other]))
                raise PretrainError(
                    f"{setting}.{name} applies to sources of type {names}, not {source.type}"
                )
        types.append(source_type)
    return types


def find_sources(config: DataConfig, seed: int) -> list[Source]:
    """The sources with a weight above 0.

    Raises:
        PretrainError: as :func:`source_types`, or nothing is found for a source.
    """
    return [
        source_type(number, config, seed)
        for number, source_type in enumerate(source_types(config))
        if config.sources[number].weight > 0
    ]


def image_share(config: DataConfig) -> float:
    """Share of all tokens that are image placeholders: ``vision_share``, or 0 for sources that
    have no images."""
    types = source_types(config)
    without_images = types and not any(source_type.has_images for source_type in types)
    return 0.0 if without_images else config.vision_share
