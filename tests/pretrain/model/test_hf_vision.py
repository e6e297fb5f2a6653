"""Encoder and projector are those of transformers' Kimi-K2.5, weight for weight."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pretrain.config import VisionConfig
from pretrain.model.hf_vision import from_transformers, to_transformers, transformers_config
from pretrain.model.projector import VisionTower
from pretrain.model.vision import num_features

pytest.importorskip("transformers", minversion="5.23")

LANGUAGE_HIDDEN = 40
CONFIG = VisionConfig(
    num_layers=3,
    hidden_size=48,
    num_heads=4,
    ffn_hidden_size=80,
    patch_size=4,
    position_grid=8,
    rope_base=1000.0,
)

# As their processors make them: even rows and columns; clips of 1 to 4 frames. The table's own
# size, smaller and larger ones.
sides = st.sampled_from([2, 4, 6, 8, 10, 18])
shapes = st.tuples(st.integers(1, 4), sides, sides)
packs = st.lists(shapes, min_size=1, max_size=5)


class InFloat64(TorchFunctionMode):
    """Run code that asks for float32 in float64: theirs does so by name in many places."""

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


def make_theirs(config: VisionConfig, language_hidden: int) -> nn.ModuleDict:
    from transformers import Kimi_K25Config, Kimi_K25VisionConfig
    from transformers.models.kimi_k25.modeling_kimi_k25 import (
        Kimi_K25MultimodalProjection,
        Kimi_K25VisionModel,
    )

    vision = Kimi_K25VisionConfig(**transformers_config(config), attn_implementation="sdpa")
    whole = Kimi_K25Config(
        vision_config=vision,
        projection_hidden_size=config.hidden_size,
        text_config={"model_type": "deepseek_v3", "hidden_size": language_hidden},
    )
    return nn.ModuleDict(
        {
            "vision_tower": Kimi_K25VisionModel(vision),
            "mm_projector": Kimi_K25MultimodalProjection(whole),
        }
    )


@functools.cache
def make_both(dtype: torch.dtype) -> tuple[VisionTower, nn.ModuleDict]:
    torch.manual_seed(0)
    ours = VisionTower(CONFIG, LANGUAGE_HIDDEN).to(dtype)
    for parameter in ours.parameters():
        # Logits of several units, so that attention is far from even.
        nn.init.normal_(
            parameter, std=0.5 if parameter.ndim != 2 else 2 * parameter.shape[1] ** -0.5
        )
    if dtype == torch.float64:
        with InFloat64():
            theirs = make_theirs(CONFIG, LANGUAGE_HIDDEN).to(dtype)
    else:
        theirs = make_theirs(CONFIG, LANGUAGE_HIDDEN)
    theirs.load_state_dict(to_transformers(ours.state_dict(), CONFIG.num_heads))
    return ours, theirs


def run_theirs(theirs: nn.ModuleDict, patches: Tensor, grids: Tensor, dtype: torch.dtype) -> Tensor:
    side = CONFIG.patch_size
    pixels = ((patches.to(dtype) / 255 - 0.5) / 0.5).view(-1, 3, side, side)
    merged = theirs["vision_tower"](pixels, grid_thw=grids).pooler_output
    features: Tensor = theirs["mm_projector"](merged).squeeze(1)
    return features


def make_patches(grids: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (int(grids.prod(1).sum()), 3 * CONFIG.patch_size**2)
    return torch.randint(256, size, generator=generator, dtype=torch.uint8)


@settings(deadline=None, max_examples=25)
@given(packs)
def test_features_and_gradients_are_theirs_in_float64(pack: list[tuple[int, int, int]]) -> None:
    ours, theirs = make_both(torch.float64)
    grids = torch.tensor(pack)
    patches = make_patches(grids)
    ours.zero_grad()
    theirs.zero_grad()
    features = ours(patches, grids)
    with InFloat64():
        expected = run_theirs(theirs, patches, grids, torch.float64)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)

    gradient = torch.randn_like(features)
    features.backward(gradient)
    with InFloat64():
        expected.backward(gradient)
    theirs_by_our_name = from_transformers(
        {name: parameter.grad for name, parameter in theirs.named_parameters()}, CONFIG.num_heads
    )
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs_by_our_name[name], rtol=1e-9, atol=1e-9, msg=name
        )


@settings(deadline=None, max_examples=25)
@given(packs)
def test_features_are_theirs_in_float32(pack: list[tuple[int, int, int]]) -> None:
    ours, theirs = make_both(torch.float32)
    grids = torch.tensor(pack)
    patches = make_patches(grids)
    with torch.no_grad():
        expected = run_theirs(theirs, patches, grids, torch.float32)
        torch.testing.assert_close(ours(patches, grids), expected, rtol=1e-5, atol=1e-5)


def test_a_long_video_in_groups_of_four_frames_is_theirs() -> None:
    """The last group has one frame, which has no time: neither with them nor with us."""
    ours, theirs = make_both(torch.float64)
    grids = torch.tensor([(4, 4, 6), (4, 4, 6), (1, 4, 6)])
    patches = make_patches(grids)
    with torch.no_grad(), InFloat64():
        expected = run_theirs(theirs, patches, grids, torch.float64)
    features = ours(patches, grids)
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)
    assert num_features(grids).tolist() == [6, 6, 6]


def test_every_weight_of_theirs_has_a_name_of_ours_and_back() -> None:
    theirs = make_theirs(CONFIG, LANGUAGE_HIDDEN).state_dict()
    ours = VisionTower(CONFIG, LANGUAGE_HIDDEN)
    ours.load_state_dict(from_transformers(theirs, CONFIG.num_heads))
    again = to_transformers(ours.state_dict(), CONFIG.num_heads)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_a_checkpoint_that_they_write_and_read_has_our_weights(tmp_path: Path) -> None:
    """Published checkpoints fuse q, k and v in the very order of rows that ours have."""
    from safetensors.torch import load_file
    from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

    text = dict.fromkeys(
        ["hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size"], LANGUAGE_HIDDEN
    )
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    text |= {"q_lora_rank": 8, "kv_lora_rank": 8}
    text |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    config = Kimi_K25Config(
        vision_config=transformers_config(CONFIG),
        projection_hidden_size=CONFIG.hidden_size,
        text_config={"model_type": "deepseek_v3", **text},
    )
    model = Kimi_K25ForConditionalGeneration(config)
    ours, _ = make_both(torch.float32)
    weights = to_transformers(ours.state_dict(), CONFIG.num_heads)
    missing = model.model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith("language_model.") for name in missing.missing_keys)

    model.save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    attention = ours.encoder.blocks[1].attention
    fused = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(published["vision_tower.encoder.blocks.1.wqkv.weight"], fused)

    read = Kimi_K25ForConditionalGeneration.from_pretrained(tmp_path).model.state_dict()
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("name", ["encoder.blocks.0.norm3.weight", "language.embedding.weight"])
def test_a_weight_that_is_none_of_the_towers_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is no weight of a vision encoder or projector"):
        to_transformers({name: torch.empty(1)}, 1)
