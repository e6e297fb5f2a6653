"""Each different image of a batch is encoded once, for all responses of a group."""

from typing import Any

import torch
from torch import Tensor, nn


def encode_once(model: nn.Module) -> None:
    """Let a Kimi-K2.5 of transformers encode equal images of a batch once, and accept no images.

    With K responses to a prompt, the encoder and its gradient cost a K-th. Results are the same but
    for the order in which gradients are summed. TRL passes a part of a batch that has only prompts
    of text an empty tensor of images.
    """
    inner: Any = model.model
    encode = inner.get_image_features

    def get_image_features(
        pixel_values: Tensor, image_grid_thw: Tensor | None = None, **options: Any
    ) -> Any:
        assert image_grid_thw is not None
        first, places = distinct(pixel_values, image_grid_thw)
        images = torch.split(pixel_values, image_grid_thw.prod(-1).tolist())
        encoded = encode(torch.cat([images[i] for i in first]), image_grid_thw[first], **options)
        encoded.pooler_output = tuple(encoded.pooler_output[place] for place in places)
        return encoded

    inner.get_image_features = get_image_features
    model.register_forward_pre_hook(_without_empty_images, with_kwargs=True)


def _without_empty_images(
    _model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pixels = named.get("pixel_values")
    if pixels is not None and len(pixels) == 0:
        named = {**named, "pixel_values": None, "image_grid_thw": None}
    return arguments, named


def distinct(pixels: Tensor, grids: Tensor) -> tuple[list[int], list[int]]:
    """The first of each group of equal images, and the group of each image.

    Args:
        pixels: [patches, …], of all images.
        grids: [images, 3], frames, rows and columns of patches.
    """
    numbers: dict[tuple[Any, ...], int] = {}
    first: list[int] = []
    places: list[int] = []
    images = torch.split(pixels.cpu(), grids.prod(-1).tolist())
    for index, (image, grid) in enumerate(zip(images, grids.tolist(), strict=True)):
        place = numbers.setdefault((*grid, image.numpy().tobytes()), len(numbers))
        if place == len(first):
            first.append(index)
        places.append(place)
    return first, places
