"""MoonViT-3D: a vision encoder for images of any size and short clips, packed.

Source: Kimi-VL (arXiv 2504.07491, section 2.1) and the Kimi K2.5 report for clips. Equal to
transformers' ``Kimi_K25VisionModel`` on the weights of :mod:`pretrain.model.hf_vision`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonclip import max_logits
from pretrain.config import VisionConfig
from pretrain.model.geometry import MAX_FRAMES, MERGE
from pretrain.model.vision_attention import Pack, attend, batches

# (frames, rows, columns) of an item, in patches.
Shape = tuple[int, int, int]


class VisionAttention(nn.Module):
    """Attention of all patches of an item, and of no others.

    ``observer``, where set, is called in training with every head's largest logit, [heads], of
    some items at a time; an item's are seen once.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.observer: Callable[[Tensor], None] | None = None

    def forward(self, x: Tensor, rotation: Tensor, pack: Pack) -> Tensor:
        """Attend: x [P, hidden] to [P, hidden], by rotation [P, head_dim / 2] (complex)."""
        query, key, value = (
            torch.unflatten(projection(x), -1, (self.num_heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, rotation), rotate(key, rotation)
        if self.observer is not None and self.training:
            for batch in batches(query, key, pack):
                self.observer(max_logits(*batch))
        mixed: Tensor = self.o_proj(attend(query, key, value, pack).flatten(1))
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

    def forward(self, x: Tensor, rotation: Tensor, pack: Pack) -> Tensor:
        x = x + self.attention(self.norm1(x), rotation, pack)
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
            ValueError: an item cannot be encoded (:func:`check_grids` says why, and which), or
                the patches are not bytes of this encoder's patch size.
        """
        shapes = check_grids(grids, patches.shape[0])
        check_patches(patches, self.config.patch_size)
        weight = self.patch_embed.weight
        if not shapes:
            return weight.new_empty(0, MERGE * MERGE * self.config.hidden_size)
        # Items of one shape become neighbours: they are handled as a batch, and so is attention
        # of items of one length.
        lengths = [math.prod(shape) for shape in shapes]
        order = sorted(range(len(shapes)), key=lambda item: (lengths[item], shapes[item]))
        pack = Pack([lengths[item] for item in order], weight.device)
        alike = [
            (len(list(group)), shape) for shape, group in groupby(shapes[item] for item in order)
        ]
        patches = patches.index_select(0, _rows_of(lengths, order).to(patches.device))

        # Rounded once, at the end: halfway in bfloat16, mid-greys would lose half their bits.
        pixels = patches.to(torch.promote_types(weight.dtype, torch.float32)).div_(127.5).sub_(1)
        x = self.patch_embed(pixels.to(weight.dtype))
        x = x + self._positions(alike)
        rotation = self._rotations(alike, x)
        for block in self.blocks:
            x = block(x, rotation, pack)
        x = self.final_norm(x)

        parts = torch.split(x, [count * math.prod(shape) for count, shape in alike])
        merged = torch.cat(
            [merge(part, shape) for part, (_, shape) in zip(parts, alike, strict=True)]
        )
        back = sorted(range(len(order)), key=order.__getitem__)
        cells = [shapes[item][1] * shapes[item][2] // MERGE**2 for item in order]
        return merged.index_select(0, _rows_of(cells, back).to(merged.device))

    def _positions(self, alike: Sequence[tuple[int, Shape]]) -> Tensor:
        """[P, hidden]: the learned table, resized to each item's grid, and the frame's own sine."""
        wide = torch.promote_types(self.pos_embed.dtype, torch.float32)
        table = self.pos_embed.to(wide)
        planes: dict[tuple[int, int], Tensor] = {}
        parts = []
        for count, (frames, rows, columns) in alike:
            if (rows, columns) not in planes:
                planes[rows, columns] = resize(table, rows, columns).flatten(0, 1)
            plane = planes[rows, columns]
            if frames > 1:
                time = frame_positions(frames, plane.shape[-1]).to(plane)
                plane = (time[:, None] + plane).flatten(0, 1)
            parts.append(plane.expand(count, -1, -1).flatten(0, 1))
        return torch.cat(parts).to(self.pos_embed.dtype)

    def _rotations(self, alike: Sequence[tuple[int, Shape]], like: Tensor) -> Tensor:
        """Complex [P, head_dim / 2], as exact as the precision in which heads are turned."""
        config = self.config
        longest = max(max(rows, columns) for _, (_, rows, columns) in alike)
        turns = rotation_table(longest, config.hidden_size // config.num_heads, config.rope_base)
        turns = turns.to(like.device, torch.promote_types(like.dtype, torch.complex64))
        return torch.cat([rotations(shape, turns).repeat(count, 1) for count, shape in alike])


@contextmanager
def observers_disabled(module: nn.Module) -> Iterator[None]:
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


def check_grids(grids: Tensor, num_patches: int) -> list[Shape]:
    """The grids as tuples.

    Raises:
        ValueError: a grid that cannot be encoded, or does not fit the patches; the message names
            the item.
    """
    if grids.ndim != 2 or grids.shape[1] != 3 or grids.is_floating_point():
        raise ValueError(
            "grids must be integers [items, 3], (frames, rows, columns) of each, not "
            f"{grids.dtype} {list(grids.shape)}"
        )
    shapes = [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]
    for item, (frames, rows, columns) in enumerate(shapes):
        if not 1 <= frames <= MAX_FRAMES:
            raise ValueError(
                f"item {item} has {frames} frames, not 1 to {MAX_FRAMES}; cut a longer clip into "
                f"groups of {MAX_FRAMES} (pretrain.data.media.fit.frame_groups)"
            )
        if rows < MERGE or columns < MERGE or rows % MERGE or columns % MERGE:
            raise ValueError(
                f"item {item} has {rows} x {columns} patches: both must be multiples of {MERGE}; "
                "pad the image (pretrain.data.media.fit.fit)"
            )
    expected = sum(math.prod(shape) for shape in shapes)
    if expected != num_patches:
        raise ValueError(f"{num_patches} patches were given, but the grids hold {expected}")
    return shapes


def check_patches(patches: Tensor, patch_size: int) -> None:
    """Raises ValueError if these are not bytes [P, 3 * patch_size * patch_size]."""
    width = 3 * patch_size**2
    if patches.dtype != torch.uint8 or patches.ndim != 2 or patches.shape[1] != width:
        raise ValueError(
            f"patches must be uint8 [P, {width}] for patch_size={patch_size}, not "
            f"{patches.dtype} {list(patches.shape)}"
        )


def num_features(grids: Tensor) -> Tensor:
    """int64 [n]: features, and so tokens, of each item of grids [n, 3]."""
    return (grids[:, 1] // MERGE) * (grids[:, 2] // MERGE)


def chunks(patches_per_item: Sequence[int], max_patches: int) -> list[slice]:
    """Cut a list of items into runs of neighbours of at most ``max_patches`` patches together.

    Encoding chunk by chunk gives what encoding all at once does, and takes memory for a chunk. An
    item with more patches, which cannot be cut since all its patches attend to each other, is a
    chunk of its own.

    Raises:
        ValueError: max_patches is below 1.
    """
    if max_patches < 1:
        raise ValueError(f"max_patches must be at least 1, not {max_patches}")
    cuts: list[slice] = []
    first, filled = 0, 0
    for item, patches in enumerate(patches_per_item):
        if item > first and filled + patches > max_patches:
            cuts.append(slice(first, item))
            first, filled = item, 0
        filled += patches
    if first < len(patches_per_item):
        cuts.append(slice(first, len(patches_per_item)))
    return cuts


def merge(x: Tensor, shape: Shape) -> Tensor:
    """Average an item's frames and join 2x2 patches: [t * h * w, d] to [h/2 * w/2, 4 * d].

    Several items of the shape in x, one behind the other, come out the same way.
    """
    frames, rows, columns = shape
    grid = x.view(-1, frames, rows // MERGE, MERGE, columns // MERGE, MERGE, x.shape[-1])
    return grid.mean(1).transpose(2, 3).flatten(3).flatten(0, 2)


def resize(table: Tensor, rows: int, columns: int) -> Tensor:
    """Resample a table [side, side, d] to [rows, columns, d], bicubically.

    As ``F.interpolate(mode="bicubic")``, in two products: less time on small grids.
    """
    down, along = (cubic_weights(n, table.shape[0]).to(table) for n in (rows, columns))
    tall = torch.unflatten(down @ table.flatten(1), 1, table.shape[1:])
    return along @ tall


@functools.lru_cache(maxsize=1024)
@torch.inference_mode(False)  # what is kept must serve training too, whoever asked first
def cubic_weights(size: int, side: int) -> Tensor:
    """float64 [size, side]: how ``size`` points mix the ``side`` entries of an axis.

    Cubic convolution (Keys, 1981) with a = -0.75, pixel centres aligned (``align_corners=False``),
    beyond the edge its last entry: the identity where size is side.
    """
    at = ((torch.arange(size, dtype=torch.float64) + 0.5) * side / size - 0.5)[:, None]
    entries = at.floor() + torch.arange(-1, 3)
    x = (at - entries).abs()
    near = (1.25 * x - 2.25) * x * x + 1
    far = -0.75 * (((x - 5) * x + 8) * x - 4)
    weights = torch.zeros(size, side, dtype=torch.float64)
    return weights.scatter_add_(
        1, entries.long().clamp(0, side - 1), torch.where(x <= 1, near, far)
    )


def frame_positions(frames: int, dim: int) -> Tensor:
    """float64 [frames, dim]: sines, then cosines, of the frame number at falling frequencies."""
    frequencies = 10000 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = torch.arange(frames, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rotation_table(length: int, head_dim: int, base: float) -> Tensor:
    """complex128 [length, head_dim / 4]: the turns of a row's or column's number."""
    exponents = torch.arange(0, head_dim, 4, dtype=torch.float64) / head_dim
    angles = torch.arange(length, dtype=torch.float64)[:, None] * base**-exponents
    return torch.polar(torch.ones_like(angles), angles)


def rotations(shape: Shape, turns: Tensor) -> Tensor:
    """Complex [frames * rows * columns, head_dim / 2]: the 2-D rotary embedding of a grid.

    Pairs of channels turn with the column and with the row by turns, at falling frequencies.

    Args:
        turns: :func:`rotation_table` of at least the longer side.
    """
    frames, rows, columns = shape
    plane = torch.stack(
        [
            turns[:columns].expand(rows, -1, -1),
            turns[:rows, None].expand(-1, columns, -1),
        ],
        dim=-1,
    )
    return plane.flatten(2).flatten(0, 1).repeat(frames, 1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring channels of x [P, heads, d] by complex rotation [P, d / 2].

    In at least float32, whatever x is.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.view_as_complex(torch.unflatten(x.to(wide), -1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).to(x.dtype)


def _rows_of(counts: Sequence[int], order: Sequence[int]) -> Tensor:
    """int64: the rows of items that have ``counts`` rows each, taken in this order of items."""
    numbers = torch.tensor(counts)
    taken = numbers[list(order)]
    firsts = (numbers.cumsum(0) - numbers)[list(order)]
    shifts = firsts - (taken.cumsum(0) - taken)
    return torch.arange(int(taken.sum())) + shifts.repeat_interleave(taken)
