"""Tokens and images of a step."""

from dataclasses import dataclass

from pretrain.config import Config
from pretrain.data.sources import image_share
from pretrain.model.geometry import PATCHES_PER_TOKEN


def tokens_per_step(config: Config) -> int:
    return config.global_batch_size * config.data.seq_length


@dataclass(frozen=True)
class Images:
    """Images of a step, all of one size.

    Attributes:
        patches_per_image: size of each image.
        features: tokens of the language model in the global batch that are image features.
    """

    patches_per_image: int
    features: float

    @property
    def patches(self) -> float:
        return self.features * PATCHES_PER_TOKEN

    @property
    def count(self) -> float:
        return self.patches / self.patches_per_image


def images_per_step(config: Config, patches_per_image: int | None = None) -> Images:
    """Return the images of a step, as many as ``data.vision_share`` asks for.

    Args:
        patches_per_image: size of each image; default: 1,024 (448 x 448 pixels), or a quarter of a
            sequence if that is less.
    """
    patches = patches_per_image or min(1024, config.data.seq_length // 4 * PATCHES_PER_TOKEN)
    return Images(patches, image_share(config.data) * tokens_per_step(config))
