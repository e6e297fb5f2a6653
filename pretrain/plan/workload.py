"""Work of a step: tokens, images, and activations that are computed again."""

from dataclasses import dataclass

from pretrain.config import Config
from pretrain.data.sources import image_share
from pretrain.model.geometry import PATCHES_PER_TOKEN
from pretrain.model.weights import Weight

# Parts of a layer that each module of selective recompute computes again.
_RECOMPUTED_PARTS = {
    "core_attn": ("scores",),
    "mlp": ("dense MLP",),
    "moe": ("router", "experts", "shared experts"),
    "shared_experts": ("shared experts",),
}


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

    def update(self, weight: Weight) -> bool:
        """Whether a step updates a weight: without images the encoder is never updated."""
        return self.features > 0 or weight.layer is not None

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


def recomputed_layers(config: Config, chunk: range) -> range:
    """Return the layers of a model chunk that are recomputed as a whole."""
    recompute = config.recompute
    if recompute.granularity != "full":
        return chunk[:0]
    return chunk if recompute.method == "uniform" else chunk[: recompute.num_layers]


def recomputed_parts(config: Config) -> set[str]:
    """Return the parts that are recomputed in every layer."""
    if config.recompute.granularity != "selective":
        return set()
    return {part for module in config.recompute.modules for part in _RECOMPUTED_PARTS[module]}
