"""Encoder and projector compute the same as those of transformers' Kimi-K2.5."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pretrain.config import LanguageConfig, VisionConfig
from pretrain.export.conversion import conversions
from pretrain.export.hf_config import to_hf_config, transformers_vision_config
from pretrain.model.projector import VisionTower
from pretrain.model.vision import num_features
from pretrain.model.weights import vision_weights

pytest.importorskip("transformers", minversion="5.23")

LANGUAGE_HIDDEN, VOCAB_SIZE = 40, 300
LANGUAGE = LanguageConfig(
    num_layers=1, dense_layers=0, hidden_size=LANGUAGE_HIDDEN, num_experts=2, experts_per_token=1
)
CONFIG = VisionConfig(
    num_layers=3,
    hidden_size=48,
    num_heads=4,
    ffn_hidden_size=80,
    patch_size=4,
    position_grid=8,
    rope_base=1000.0,
)
SHAPES = {
    weight.name.removeprefix("vision."): weight.shape
    for weight in vision_weights(CONFIG, LANGUAGE_HIDDEN)
}
NUMEL = sum(map(math.prod, SHAPES.values()))

# Grids as the processors of Kimi-K2.5 make them: even rows and columns, clips of 1 to 4 frames;
# of the size of the position table, smaller and larger.
sides = st.sampled_from([2, 4, 6, 8, 10, 18])
shapes = st.tuples(st.integers(1, 4), sides, sides)
packs = st.lists(shapes, min_size=1, max_size=5)


class InFloat64(TorchFunctionMode):
    """Run code that asks for float32 in float64, as transformers' does in many places."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


@functools.cache
def make_ours(dtype: torch.dtype) -> VisionTower:
    torch.manual_seed(0)
    ours = VisionTower(CONFIG, LANGUAGE_HIDDEN).to(dtype)
    for parameter in ours.parameters():
        # Logits of several units, so that attention is far from even.
        nn.init.normal_(
            parameter, std=0.5 if parameter.ndim != 2 else 2 * parameter.shape[1] ** -0.5
        )
    return ours


def transformers_config() -> Any:
    from transformers import Kimi_K25Config, Kimi_K25VisionConfig

    return Kimi_K25Config(
        vision_config=Kimi_K25VisionConfig(
            **transformers_vision_config(CONFIG), attn_implementation="sdpa"
        ),
        projection_hidden_size=CONFIG.hidden_size,
        text_config=to_hf_config(LANGUAGE, None, VOCAB_SIZE, 256, {}, 4),
    )


@functools.cache
def make_reference(dtype: torch.dtype) -> nn.ModuleDict:
    from transformers.models.kimi_k25.modeling_kimi_k25 import (
        Kimi_K25MultimodalProjection,
        Kimi_K25VisionModel,
    )

    config = transformers_config()
    with InFloat64() if dtype == torch.float64 else contextlib.nullcontext():
        modules = {
            "vision_tower": Kimi_K25VisionModel(config.vision_config),
            "mm_projector": Kimi_K25MultimodalProjection(config),
        }
        reference = nn.ModuleDict(modules).to(dtype)
    values = flatten(dict(make_ours(dtype).named_parameters()))
    reference.load_state_dict({name: values[index] for name, index in indices().items()})
    return reference


@functools.cache
def indices() -> dict[str, Tensor]:
    """Positions of the values of transformers' parameters among ours (:func:`flatten`).

    Found by letting transformers load a published checkpoint whose values are these positions.
    """
    from safetensors.torch import save_file
    from transformers import Kimi_K25ForConditionalGeneration

    numbers = split_up(torch.arange(NUMEL))
    published = {}
    for item in conversions(LANGUAGE, CONFIG, VOCAB_SIZE):
        tensors = {
            name: numbers.get(name.removeprefix("vision."), torch.zeros(shape))
            for name, shape in item.ours.items()
        }
        published |= {name: t.float() for name, t in item.to_published(tensors).items()}
    with TemporaryDirectory() as folder:
        transformers_config().save_pretrained(folder)
        save_file(published, f"{folder}/model.safetensors", metadata={"format": "pt"})
        model = Kimi_K25ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return {
        name: tensor.long()
        for name, tensor in model.model.state_dict().items()
        if not name.startswith("language_model.")
    }


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """The values of all weights of a VisionTower, one after another."""
    return torch.cat([tensors[name].detach().flatten() for name in SHAPES])


def split_up(values: Tensor) -> dict[str, Tensor]:
    """The inverse of :func:`flatten`."""
    tensors = values.split([math.prod(shape) for shape in SHAPES.values()])
    return {n: t.view(SHAPES[n]) for n, t in zip(SHAPES, tensors, strict=True)}


def run_reference(
    reference: nn.ModuleDict, patches: Tensor, grids: Tensor, dtype: torch.dtype
) -> Tensor:
    side = CONFIG.patch_size
    pixels = ((patches.to(dtype) / 255 - 0.5) / 0.5).view(-1, 3, side, side)
    merged = reference["vision_tower"](pixels, grid_thw=grids).pooler_output
    features: Tensor = reference["mm_projector"](merged).squeeze(1)
    return features


def make_patches(grids: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (int(grids.prod(1).sum()), 3 * CONFIG.patch_size**2)
    return torch.randint(256, size, generator=generator, dtype=torch.uint8)


@settings(deadline=None, max_examples=25)
@given(packs)
def test_features_and_gradients_equal_transformers_in_float64(
    pack: list[tuple[int, int, int]],
) -> None:
    ours, reference = make_ours(torch.float64), make_reference(torch.float64)
    grids = torch.tensor(pack)
    patches = make_patches(grids)
    ours.zero_grad()
    reference.zero_grad()
    features = ours(patches, grids)
    with InFloat64():
        expected = run_reference(reference, patches, grids, torch.float64)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)

    gradient = torch.randn_like(features)
    features.backward(gradient)
    with InFloat64():
        expected.backward(gradient)
    gradients = torch.empty(NUMEL, dtype=torch.float64)
    for name, parameter in reference.named_parameters():
        gradients[indices()[name]] = parameter.grad
    for name, expected_gradient in split_up(gradients).items():
        torch.testing.assert_close(
            ours.get_parameter(name).grad, expected_gradient, rtol=1e-9, atol=1e-9, msg=name
        )


@settings(deadline=None, max_examples=25)
@given(packs)
def test_features_equal_transformers_in_float32(pack: list[tuple[int, int, int]]) -> None:
    ours, reference = make_ours(torch.float32), make_reference(torch.float32)
    grids = torch.tensor(pack)
    patches = make_patches(grids)
    with torch.no_grad():
        expected = run_reference(reference, patches, grids, torch.float32)
        torch.testing.assert_close(ours(patches, grids), expected, rtol=1e-5, atol=1e-5)


def test_a_long_video_in_groups_of_four_frames_equals_transformers() -> None:
    """The last group has one frame, to which neither adds a position in time."""
    ours, reference = make_ours(torch.float64), make_reference(torch.float64)
    grids = torch.tensor([(4, 4, 6), (4, 4, 6), (1, 4, 6)])
    patches = make_patches(grids)
    with torch.no_grad(), InFloat64():
        expected = run_reference(reference, patches, grids, torch.float64)
    features = ours(patches, grids)
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)
    assert num_features(grids).tolist() == [6, 6, 6]


def test_published_checkpoints_have_every_value_once() -> None:
    every = torch.cat([index.flatten() for index in indices().values()])
    assert torch.equal(every.sort().values, torch.arange(NUMEL))
