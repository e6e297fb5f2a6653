"""Packs of items, positions, and merging in the vision encoder."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pretrain.config import VisionConfig
from pretrain.model.projector import VisionTower
from pretrain.model.vision import (
    VisionAttention,
    VisionEncoder,
    apply_rotary,
    cubic_taps,
    frame_positions,
    merge,
    num_features,
    observers_disabled,
    patch_points,
    resize,
    rotary_2d,
    rotary_table,
    split_items,
)
from pretrain.model.vision_attention import Pack

CONFIG = VisionConfig(
    num_layers=2, hidden_size=16, num_heads=2, ffn_hidden_size=24, patch_size=2, position_grid=5
)
grids = st.tuples(st.integers(1, 4), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 8]))


def make_encoder(seed: int = 0) -> VisionEncoder:
    torch.manual_seed(seed)
    encoder = VisionEncoder(CONFIG).double()
    nn.init.normal_(encoder.pos_embed)
    return encoder


def make_tower() -> VisionTower:
    torch.manual_seed(0)
    tower = VisionTower(CONFIG, 12).double()
    nn.init.normal_(tower.encoder.pos_embed)
    return tower


def make_items(shapes: list[tuple[int, int, int]], seed: int = 0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = 3 * CONFIG.patch_size**2
    patches = [
        torch.randint(256, (t * h * w, width), generator=generator, dtype=torch.uint8)
        for t, h, w in shapes
    ]
    return patches, torch.tensor(shapes)


@settings(deadline=None, max_examples=25)
@given(st.lists(grids, min_size=1, max_size=6))
def test_a_pack_has_the_features_of_its_items(shapes: list[tuple[int, int, int]]) -> None:
    encoder = make_encoder()
    patches, all_grids = make_items(shapes)
    packed = encoder(torch.cat(patches), all_grids)
    singly = [encoder(p, g[None]) for p, g in zip(patches, all_grids, strict=True)]
    torch.testing.assert_close(packed, torch.cat(singly), rtol=1e-10, atol=1e-10)
    assert [len(features) for features in singly] == num_features(all_grids).tolist()


@settings(deadline=None, max_examples=10)
@given(st.permutations(range(4)))
def test_reordering_items_reorders_features(order: list[int]) -> None:
    encoder = make_encoder()
    shapes = [(1, 2, 4), (2, 4, 2), (1, 4, 2), (4, 2, 2)]
    patches, all_grids = make_items(shapes)
    features = encoder(torch.cat(patches), all_grids).split(num_features(all_grids).tolist())
    moved = encoder(torch.cat([patches[i] for i in order]), all_grids[order])
    torch.testing.assert_close(moved, torch.cat([features[i] for i in order]))


def test_one_large_image_among_small_ones() -> None:
    encoder = make_encoder()
    shapes = [(1, 2, 2), (1, 48, 50), (2, 2, 4), (1, 2, 2)]
    patches, all_grids = make_items(shapes)
    packed = encoder(torch.cat(patches), all_grids)
    singly = [encoder(p, g[None]) for p, g in zip(patches, all_grids, strict=True)]
    torch.testing.assert_close(packed, torch.cat(singly), rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 60))
def test_slices_have_all_items_in_order_and_as_many_as_fit(
    patches_per_item: list[int], max_patches: int
) -> None:
    chunks = [patches_per_item[items] for items in split_items(patches_per_item, max_patches)]
    assert [item for chunk in chunks for item in chunk] == patches_per_item
    assert all(sum(chunk) <= max_patches or len(chunk) == 1 for chunk in chunks)
    # The first item of the next chunk would not have fitted.
    assert all(sum(chunk) + after[0] > max_patches for chunk, after in pairwise(chunks))


@settings(deadline=None, max_examples=15)
@given(st.lists(grids, min_size=1, max_size=8), st.integers(1, 300))
def test_chunks_have_the_features_and_gradients_of_one_pack(
    shapes: list[tuple[int, int, int]], max_patches: int
) -> None:
    tower = make_tower()
    patches, all_grids = make_items(shapes)
    whole = tower(torch.cat(patches), all_grids)
    gradient = torch.randn_like(whole)
    whole.backward(gradient)
    expected = {name: parameter.grad for name, parameter in tower.named_parameters()}

    tower.zero_grad(set_to_none=True)
    features_per_item = num_features(all_grids).tolist()
    features, gradients = [], list(torch.split(gradient, features_per_item))
    for items in split_items([len(item) for item in patches], max_patches):
        features.append(tower(torch.cat(patches[items]), all_grids[items]))
        features[-1].backward(torch.cat(gradients[items]))
    torch.testing.assert_close(torch.cat(features), whole, rtol=1e-12, atol=1e-12)
    for name, parameter in tower.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=1e-12)


def test_attention_is_softmax_within_each_item_and_reports_max_logits() -> None:
    torch.manual_seed(0)
    attention = VisionAttention(8, 2).double()
    x = torch.randn(10, 8, dtype=torch.float64)
    table = rotary_table(3, 4, 10000.0)
    rotary = rotary_2d(patch_points(torch.tensor([[1, 2, 2], [1, 2, 3]])), table)
    pack = Pack([4, 6], x.device)
    observed: list[Tensor] = []
    attention.observer = observed.append
    output = attention(x, rotary, pack)

    expected, max_logits = [], []
    for part in (slice(0, 4), slice(4, 10)):
        heads = [
            projection(x[part]).unflatten(-1, (2, 4)).double()
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        query, key = apply_rotary(heads[0], rotary[part]), apply_rotary(heads[1], rotary[part])
        logits = torch.einsum("ihd,jhd->hij", query, key) / 2
        max_logits.append(logits.amax((1, 2)))
        mixed = torch.einsum("hij,jhd->ihd", logits.softmax(-1), heads[2])
        expected.append(attention.o_proj(mixed.flatten(1)))
    torch.testing.assert_close(output, torch.cat(expected))
    (largest,) = observed
    torch.testing.assert_close(largest, torch.stack(max_logits).amax(0))
    with observers_disabled(attention):
        attention(x, rotary, pack)
    attention.eval()
    attention(x, rotary, pack)
    assert len(observed) == 1


def test_logits_depend_on_relative_positions_alone() -> None:
    """Moving a query and a key by the same rows and columns changes nothing."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    points = patch_points(torch.tensor([[1, 6, 6]]))
    rotary = rotary_2d(points, rotary_table(6, 8, 10000.0)).view(6, 6, 4)

    def logit(at: tuple[int, int], other: tuple[int, int]) -> Tensor:
        rotated_query = apply_rotary(query, rotary[at][None])
        return (rotated_query * apply_rotary(key, rotary[other][None])).sum()

    torch.testing.assert_close(logit((0, 1), (2, 4)), logit((3, 0), (5, 3)))
    assert not torch.isclose(logit((0, 1), (2, 4)), logit((0, 1), (4, 2)))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.lists(st.tuples(*[st.integers(1, 20)] * 2), min_size=1, max_size=3))
def test_resizing_equals_torchs_bicubic_interpolation(
    side: int, sizes: list[tuple[int, int]]
) -> None:
    table = torch.randn(side, side, 3, dtype=torch.float64, requires_grad=True)
    image = table.permute(2, 0, 1)[None]
    expected = torch.cat(
        [F.interpolate(image, size, mode="bicubic").flatten(2) for size in sizes], 2
    )
    grids = torch.tensor([(1, *size) for size in sizes])
    resized = resize(table, grids, patch_points(grids))
    torch.testing.assert_close(resized, expected[0].T)
    weights = torch.randn_like(resized)
    gradients = [
        torch.autograd.grad(values, table, weights)[0] for values in (resized, expected[0].T)
    ]
    torch.testing.assert_close(*gradients)


def test_resizing_to_the_same_size_changes_nothing() -> None:
    table = torch.randn(7, 7, 3)
    grids = torch.tensor([[1, 7, 7]])
    assert torch.equal(resize(table, grids, patch_points(grids)), table.flatten(0, 1))


def test_weights_cached_in_inference_mode_serve_training() -> None:
    cubic_taps.cache_clear()
    encoder = make_encoder()
    patches, all_grids = make_items([(1, 2, 4)])
    with torch.inference_mode():
        encoder(patches[0], all_grids)
    encoder(patches[0], all_grids).sum().backward()
    assert encoder.pos_embed.grad is not None


def test_frames_are_averaged_and_neighbours_merged() -> None:
    frames = torch.arange(2 * 2 * 4, dtype=torch.float64).view(16, 1)
    merged = merge(frames, torch.tensor([[2, 2, 4]]), [0])
    mean = frames.view(2, 2, 4).mean(0)
    assert merged.tolist() == [
        [mean[0, 0], mean[0, 1], mean[1, 0], mean[1, 1]],
        [mean[0, 2], mean[0, 3], mean[1, 2], mean[1, 3]],
    ]


def test_merged_items_are_in_the_requested_order() -> None:
    grids = torch.tensor([[1, 2, 2], [1, 4, 2]])
    merged = merge(torch.arange(12)[:, None], grids, [1, 0])
    assert merged.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11], [0, 1, 2, 3]]


def test_frame_positions_are_sines_and_cosines() -> None:
    positions = frame_positions(3, 6)
    assert positions[0].tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(positions[2, 0], torch.tensor(2.0).double().sin())


def test_an_empty_pack_has_empty_features_and_no_gradient() -> None:
    tower = VisionTower(CONFIG, 12)
    features = tower(torch.empty(0, 12, dtype=torch.uint8), torch.empty(0, 3, dtype=torch.int64))
    assert features.shape == (0, 12)
    features.sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in tower.parameters())


def test_pixels_are_rounded_to_the_weights_dtype_once() -> None:
    encoder = VisionEncoder(CONFIG).bfloat16()
    nn.init.zeros_(encoder.pos_embed)
    inputs: list[Tensor] = []
    encoder.patch_embed.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    patches = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 12)
    encoder(patches, torch.tensor([[1, 16, 16]]))
    assert torch.equal(inputs[0][:, 0], (torch.arange(256) / 127.5 - 1).bfloat16())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 2, 2), "item 1 has 5 frames, not 1 to 4; cut a longer clip into groups of 4"),
        ((0, 2, 2), "item 1 has 0 frames, not 1 to 4"),
        ((1, 3, 2), "item 1 has 3 x 2 patches: both must be multiples of 2; pad the image"),
        ((1, 0, 2), "item 1 has 0 x 2 patches"),
        ((1, -2, -2), "item 1 has -2 x -2 patches"),
    ],
)
def test_errors_name_the_item_that_cannot_be_encoded(
    shape: tuple[int, int, int], message: str
) -> None:
    patches = torch.zeros(4 + abs(math.prod(shape)), 12, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        make_encoder()(patches, torch.tensor([(1, 2, 2), shape]))


@pytest.mark.parametrize(
    ("patches", "all_grids", "message"),
    [
        (torch.zeros(9, 12, dtype=torch.uint8), torch.tensor([[2, 2, 2]]), "but 9 were given"),
        (torch.zeros(4, 27, dtype=torch.uint8), torch.tensor([[1, 2, 2]]), r"uint8 \[P, 12\]"),
        (torch.zeros(4, 12), torch.tensor([[1, 2, 2]]), "not torch.float32"),
        (torch.zeros(4, 12, dtype=torch.uint8), torch.tensor([[1.0, 2, 2]]), "must be integers"),
        (torch.zeros(4, 12, dtype=torch.uint8), torch.tensor([1, 2, 2]), "must be integers"),
    ],
)
def test_inputs_of_another_dtype_or_shape_are_rejected(
    patches: Tensor, all_grids: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_encoder()(patches, all_grids)
