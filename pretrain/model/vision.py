"""MoonViT-3D: a vision encoder for images of any size and short clips, packed.

Source: Kimi-VL (arXiv 2504.07491, section 2.1) and the Kimi K2.5 report for clips.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonclip import max_logits
from pretrain.config import VisionConfig

# 2x2 patches of the (time-pooled) grid are merged into one feature.
MERGE = 2
MAX_FRAMES = 4


class VisionAttention(nn.Module):
    """Attention of all patches of an item, and of no others.

    ``observer``, where set, is called in training with every head's largest logit, [heads].
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.observer: Callable[[Tensor], None] | None = None

    def forward(self, x: Tensor, rotation: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        """Attend: x [P, hidden] to [P, hidden].

        Args:
            rotation: complex [P, head_dim / 2].
            runs: (items, patches in each) of consecutive items of one length, which are attended
                as one batch: never a mask over the whole pack.
        """
        query, key, value = (
            torch.unflatten(projection(x), -1, (self.num_heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, rotation), rotate(key, rotation)
        outputs = []
        rows = [items * length for items, length in runs]
        for (items, length), *parts in zip(
            runs, *(torch.split(each, rows) for each in (query, key, value)), strict=True
        ):
            q, k, v = (torch.unflatten(x, 0, (items, length)).transpose(1, 2) for x in parts)
            if self.observer is not None and self.training:
                self.observer(max_logits(q, k))
            attended = F.scaled_dot_product_attention(q, k, v)
            outputs.append(attended.transpose(1, 2).flatten(0, 1).flatten(1))
        mixed: Tensor = self.o_proj(torch.cat(outputs))
        return mixed


class VisionBlock(nn.Module):
    """Pre-norm transformer block with a tanh-GELU MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.attention = VisionAttention(config.hidden_size, config.num_heads)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotation: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        x = x + self.attention(self.norm1(x), rotation, runs)
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))
        return x


class VisionEncoder(nn.Module):
    """Patches of many images and clips to merged features."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.pos_embed = nn.Parameter(
            torch.empty(config.position_grid, config.position_grid, config.hidden_size)
        )
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        """Encode a pack of items.

        Args:
            patches: uint8 [P, 3 * patch * patch], item after item, each in reading order frame by
                frame, each patch laid out (channel, y, x).
            grids: int64 [n, 3], (frames, rows, columns) of each item, in patches.

        Returns:
            [N, 4 * hidden], item after item in reading order: frames averaged, 2x2 patches merged.
            No items give no features.

        Raises:
            ValueError: an item has odd rows or columns or too many frames, or the patches are not
                as many as the grids say; the message names the item.
        """
        shapes = check_grids(grids, patches.shape[0])
        weight = self.patch_embed.weight
        if not shapes:
            return weight.new_empty(0, MERGE * MERGE * self.config.hidden_size)
        lengths = [math.prod(shape) for shape in shapes]
        # Items of one length become neighbours, so that attention takes them as a batch.
        order = sorted(range(len(shapes)), key=lambda item: lengths[item])
        runs = [(len(list(run)), length) for length, run in groupby(lengths[i] for i in order)]
        patches = _reorder(patches, lengths, order)
        sorted_shapes = [shapes[item] for item in order]

        # Rounded once, at the end: halfway in bfloat16, mid-greys would lose half their bits.
        pixels = patches.to(torch.promote_types(weight.dtype, torch.float32)) / 127.5 - 1
        x = self.patch_embed(pixels.to(weight.dtype))
        x = x + self._positions(sorted_shapes)
        rotation = self._rotations(sorted_shapes, x.device)
        for block in self.blocks:
            x = block(x, rotation, runs)
        x = self.final_norm(x)

        merged = [
            merge(part, shape)
            for part, shape in zip(
                torch.split(x, [lengths[item] for item in order]), sorted_shapes, strict=True
            )
        ]
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat([merged[item] for item in back])

    def _positions(self, shapes: list[tuple[int, int, int]]) -> Tensor:
        """[P, hidden]: the learned table, resized to each item's grid, and the frame's own sine."""
        table = self.pos_embed.permute(2, 0, 1)[None]
        resized: dict[tuple[int, int, int], Tensor] = {}
        for shape in shapes:
            if shape not in resized:
                frames, rows, columns = shape
                plane = F.interpolate(table, size=(rows, columns), mode="bicubic")
                plane = plane[0].permute(1, 2, 0).flatten(0, 1)
                if frames > 1:
                    time = frame_positions(frames, plane.shape[-1]).to(plane)
                    plane = (time[:, None] + plane).flatten(0, 1)
                resized[shape] = plane
        return torch.cat([resized[shape] for shape in shapes])

    def _rotations(self, shapes: list[tuple[int, int, int]], device: torch.device) -> Tensor:
        head_dim = self.config.hidden_size // self.config.num_heads
        made = {shape: rotations(*shape, head_dim, self.config.rope_base) for shape in set(shapes)}
        return torch.cat([made[shape] for shape in shapes]).to(device)


@contextmanager
def unobserved(module: nn.Module) -> Iterator[None]:
    """Let the attention layers of a module run without calling their observers."""
    layers = [layer for layer in module.modules() if isinstance(layer, VisionAttention)]
    observers = [layer.observer for layer in layers]
    for layer in layers:
        layer.observer = None
    try:
        yield
    finally:
        for layer, observer in zip(layers, observers, strict=True):
            layer.observer = observer


def check_grids(grids: Tensor, num_patches: int) -> list[tuple[int, int, int]]:
    """The grids as tuples.

    Raises:
        ValueError: a grid that cannot be encoded, or does not fit the patches.
    """
    shapes = [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]
    for item, (frames, rows, columns) in enumerate(shapes):
        if not 1 <= frames <= MAX_FRAMES:
            raise ValueError(f"item {item} has {frames} frames, not 1 to {MAX_FRAMES}")
        if rows < MERGE or columns < MERGE or rows % MERGE or columns % MERGE:
            raise ValueError(
                f"item {item} has {rows} x {columns} patches: both must be multiples of {MERGE}; "
                "pad the image"
            )
    expected = sum(math.prod(shape) for shape in shapes)
    if expected != num_patches:
        raise ValueError(f"{num_patches} patches were given, but the grids hold {expected}")
    return shapes


def num_features(grids: Tensor) -> Tensor:
    """int64 [n]: features, and so tokens, of each item of grids [n, 3]."""
    return (grids[:, 1] // MERGE) * (grids[:, 2] // MERGE)


def merge(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Average an item's frames and join 2x2 patches: [t * h * w, d] to [h/2 * w/2, 4 * d]."""
    frames, rows, columns = shape
    pooled = x.view(frames, rows // MERGE, MERGE, columns // MERGE, MERGE, -1).mean(0)
    return pooled.transpose(1, 2).flatten(2).flatten(0, 1)


def frame_positions(frames: int, dim: int) -> Tensor:
    """[frames, dim]: sines, then cosines, of the frame number at falling frequencies."""
    frequencies = 10000 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = torch.arange(frames, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rotations(frames: int, rows: int, columns: int, head_dim: int, base: float) -> Tensor:
    """Complex [frames * rows * columns, head_dim / 2]: the 2-D rotary embedding of a grid.

    Pairs of channels turn with the column and with the row by turns, at falling frequencies.
    """
    exponents = torch.arange(0, head_dim, 4, dtype=torch.float64) / head_dim
    frequencies = base**-exponents
    along_row = torch.arange(columns, dtype=torch.float64)[:, None] * frequencies
    down = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
    angles = torch.stack(
        [
            along_row[None].expand(rows, -1, -1),
            down[:, None].expand(-1, columns, -1),
        ],
        dim=-1,
    ).flatten(2)
    plane = torch.polar(torch.ones_like(angles), angles).flatten(0, 1)
    return plane.repeat(frames, 1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring channels of x [P, heads, d] by complex rotation [P, d / 2]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.view_as_complex(torch.unflatten(x.to(wide), -1, (-1, 2)))
    turned = pairs * rotation[:, None].to(pairs.dtype)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def _reorder(rows: Tensor, counts: list[int], order: list[int]) -> Tensor:
    """The items' rows, ``counts`` each, in another order of items."""
    parts = torch.split(rows, counts)
    return torch.cat([parts[item] for item in order])
