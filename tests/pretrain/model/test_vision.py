"""Items in a pack do not see each other, and geometry is what it says it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pretrain.config import VisionConfig
from pretrain.model.projector import VisionTower
from pretrain.model.vision import (
    VisionAttention,
    VisionEncoder,
    frame_positions,
    merge,
    num_features,
    rotate,
    rotations,
)

CONFIG = VisionConfig(
    num_layers=2, hidden_size=16, num_heads=2, ffn_hidden_size=24, patch_size=2, position_grid=5
)
grids = st.tuples(st.integers(1, 4), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 8]))


def make_encoder(seed: int = 0) -> VisionEncoder:
    torch.manual_seed(seed)
    encoder = VisionEncoder(CONFIG).double()
    nn.init.normal_(encoder.pos_embed)
    return encoder


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
def test_a_pack_equals_its_items_one_by_one(shapes: list[tuple[int, int, int]]) -> None:
    encoder = make_encoder()
    patches, all_grids = make_items(shapes)
    packed = encoder(torch.cat(patches), all_grids)
    singly = [encoder(p, g[None]) for p, g in zip(patches, all_grids, strict=True)]
    torch.testing.assert_close(packed, torch.cat(singly), rtol=1e-10, atol=1e-10)
    assert [len(features) for features in singly] == num_features(all_grids).tolist()


@settings(deadline=None, max_examples=10)
@given(st.permutations(range(4)))
def test_the_order_of_items_is_only_their_order(order: list[int]) -> None:
    encoder = make_encoder()
    shapes = [(1, 2, 4), (2, 4, 2), (1, 4, 2), (4, 2, 2)]
    patches, all_grids = make_items(shapes)
    features = encoder(torch.cat(patches), all_grids).split(num_features(all_grids).tolist())
    moved = encoder(torch.cat([patches[i] for i in order]), all_grids[order])
    torch.testing.assert_close(moved, torch.cat([features[i] for i in order]))


def test_attention_is_softmax_over_the_item_and_reports_its_largest_logit() -> None:
    torch.manual_seed(0)
    attention = VisionAttention(8, 2).double()
    x = torch.randn(10, 8, dtype=torch.float64)
    rotation = torch.cat([rotations(1, 2, 2, 4, 10000.0), rotations(1, 2, 3, 4, 10000.0)])
    seen: list[Tensor] = []
    attention.observer = seen.append
    output = attention(x, rotation, [(1, 4), (1, 6)])

    expected, largest = [], []
    for part in (slice(0, 4), slice(4, 10)):
        heads = [
            projection(x[part]).unflatten(-1, (2, 4)).double()
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        query, key = rotate(heads[0], rotation[part]), rotate(heads[1], rotation[part])
        logits = torch.einsum("ihd,jhd->hij", query, key) / 2
        largest.append(logits.amax((1, 2)))
        mixed = torch.einsum("hij,jhd->ihd", logits.softmax(-1), heads[2])
        expected.append(attention.o_proj(mixed.flatten(1)))
    torch.testing.assert_close(output, torch.cat(expected))
    torch.testing.assert_close(torch.stack(seen), torch.stack(largest))
    attention.eval()
    attention(x, rotation, [(1, 4), (1, 6)])
    assert len(seen) == 2


def test_logits_depend_on_where_patches_are_to_each_other_alone() -> None:
    """Moving both a query and a key by the same rows and columns changes nothing."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    turned = rotations(1, 6, 6, 8, 10000.0).view(6, 6, 4)

    def logit(at: tuple[int, int], other: tuple[int, int]) -> Tensor:
        return (rotate(query, turned[at][None]) * rotate(key, turned[other][None])).sum()

    torch.testing.assert_close(logit((0, 1), (2, 4)), logit((3, 0), (5, 3)))
    assert not torch.isclose(logit((0, 1), (2, 4)), logit((0, 1), (4, 2)))


def test_frames_are_averaged_and_neighbours_joined() -> None:
    frames = torch.arange(2 * 2 * 4, dtype=torch.float64).view(16, 1)
    merged = merge(frames, (2, 2, 4))
    mean = frames.view(2, 2, 4).mean(0)
    assert merged.tolist() == [
        [mean[0, 0], mean[0, 1], mean[1, 0], mean[1, 1]],
        [mean[0, 2], mean[0, 3], mean[1, 2], mean[1, 3]],
    ]


def test_the_first_frame_of_time_positions_is_sine_zero_and_cosine_one() -> None:
    positions = frame_positions(3, 6)
    assert positions[0].tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(positions[2, 0], torch.tensor(2.0).double().sin())


def test_no_items_are_no_features_and_have_a_gradient_of_zero() -> None:
    tower = VisionTower(CONFIG, 12)
    features = tower(torch.empty(0, 12, dtype=torch.uint8), torch.empty(0, 3, dtype=torch.int64))
    assert features.shape == (0, 12)
    features.sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in tower.parameters())


def test_pixels_are_rounded_to_the_weights_precision_once() -> None:
    encoder = VisionEncoder(CONFIG).bfloat16()
    nn.init.zeros_(encoder.pos_embed)
    seen: list[Tensor] = []
    encoder.patch_embed.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    patches = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 12)
    encoder(patches, torch.tensor([[1, 16, 16]]))
    assert torch.equal(seen[0][:, 0], (torch.arange(256) / 127.5 - 1).bfloat16())


@pytest.mark.parametrize(
    ("shape", "num_patches", "message"),
    [
        ((5, 2, 2), 20, "item 1 has 5 frames, not 1 to 4"),
        ((1, 3, 2), 6, "item 1 has 3 x 2 patches: both must be multiples of 2"),
        ((1, 2, 2), 5, "9 patches were given, but the grids hold 8"),
    ],
)
def test_what_cannot_be_encoded_is_named(
    shape: tuple[int, int, int], num_patches: int, message: str
) -> None:
    patches = torch.zeros(4 + num_patches, 12, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        make_encoder()(patches, torch.tensor([(1, 2, 2), shape]))


def test_features_equal_those_of_transformers_kimi_k25() -> None:
    pytest.importorskip("transformers", minversion="5.23")
    from transformers import Kimi_K25Config, Kimi_K25VisionConfig
    from transformers.models.kimi_k25.modeling_kimi_k25 import (
        Kimi_K25MultimodalProjection,
        Kimi_K25VisionModel,
    )

    config = VisionConfig(
        num_layers=3, hidden_size=48, num_heads=4, ffn_hidden_size=80, position_grid=16
    )
    their_config = Kimi_K25VisionConfig(
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        intermediate_size=config.ffn_hidden_size,
        pos_emb_height=config.position_grid,
        pos_emb_width=config.position_grid,
        rope_parameters={"rope_type": "axial", "rope_theta": config.rope_base},
    )
    whole_config = Kimi_K25Config(
        vision_config=their_config, projection_hidden_size=48, text_config={"hidden_size": 40}
    )
    theirs = nn.ModuleDict(
        {
            "encoder": Kimi_K25VisionModel(their_config),
            "projector": Kimi_K25MultimodalProjection(whole_config),
        }
    )
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else parameter.shape[1] ** -0.5)
    ours = VisionTower(config, 40)
    ours.load_state_dict(from_transformers(theirs.state_dict(), config.num_heads))

    grids = torch.tensor([(1, 4, 6), (3, 6, 4), (1, 2, 2), (4, 8, 10), (1, 16, 16), (2, 20, 34)])
    patches = torch.randint(256, (int(grids.prod(1).sum()), 3 * 14 * 14), dtype=torch.uint8)
    pixels = ((patches.float() / 255 - 0.5) / 0.5).view(-1, 3, 14, 14)
    # Item by item, since their pooling cannot take clips of different lengths together.
    expected = [
        theirs["projector"](theirs["encoder"](part, grid_thw=grid[None]).pooler_output)[:, 0]
        for part, grid in zip(torch.split(pixels, grids.prod(1).tolist()), grids, strict=True)
    ]
    torch.testing.assert_close(ours(patches, grids), torch.cat(expected), rtol=1e-5, atol=1e-5)


def from_transformers(theirs: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Weights under our names; q's and k's rows from halves that turn together to neighbours."""
    renamed = {}
    for name, tensor in theirs.items():
        if ".q_proj." in name or ".k_proj." in name:
            halves = torch.unflatten(tensor, 0, (num_heads, 2, -1))
            tensor = halves.transpose(1, 2).flatten(0, 2)
        for old, new in (
            ("patch_embed.proj.", "patch_embed."),
            ("patch_embed.pos_emb.position_embeddings", "pos_embed"),
            (".layers.", ".blocks."),
            (".attn.proj.", ".attention.o_proj."),
            (".attn.", ".attention."),
            (".mlp.", "."),
            ("final_layernorm", "final_norm"),
            ("pre_norm", "norm"),
            ("in_proj", "fc1"),
            ("out_proj", "fc2"),
        ):
            name = name.replace(old, new)
        renamed[name] = tensor.flatten(1) if tensor.ndim == 4 else tensor
    return renamed
