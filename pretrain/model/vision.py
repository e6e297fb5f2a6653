"""MoonViT-3D: a vision encoder for packs of images of any size and short clips.

Sources: Kimi-VL (arXiv 2504.07491, section 2.1) for images; the Kimi K2.5 report for clips, whose
frames attend to each other and are averaged at the end. A test compares it with transformers'
``Kimi_K25VisionModel``.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import VisionConfig
from pretrain.model.flex import to_device
from pretrain.model.geometry import MAX_FRAMES, MERGE, PATCHES_PER_TOKEN, num_tokens
from pretrain.model.vision_attention import Pack, attend, largest_logits

# (frames, rows, columns) of an item, in patches.
Grid = tuple[int, int, int]


class VisionAttention(nn.Module):
    """Multi-head attention within each item of a pack.

    Attributes:
        observer: if set, called in training with the max logit of every head, [heads], over all
            items.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.observer: Callable[[Tensor], None] | None = None

    def forward(self, x: Tensor, rotary: Tensor, pack: Pack) -> Tensor:
        """x [P, hidden] and rotary [P, head_dim / 2] (complex) to [P, hidden]."""
        query, key, value = (
            torch.unflatten(projection(x), -1, (self.num_heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        if self.observer is not None and self.training:
            self.observer(largest_logits(query, key, pack))
        output: Tensor = self.o_proj(attend(query, key, value, pack).flatten(1))
        return output


class VisionBlock(nn.Module):
    """Pre-norm transformer block with a tanh-GELU MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.attention = VisionAttention(config.hidden_size, config.num_heads)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotary: Tensor, pack: Pack) -> Tensor:
        x = x + self.attention(self.norm1(x), rotary, pack)
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))
        return x


class VisionEncoder(nn.Module):
    """Encoder of a pack of images and clips: patches to merged features."""

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
            patches: uint8 [P, 3 * patch_size²], item by item and frame by frame, row-major; each
                patch is laid out as (channel, y, x).
            grids: int64 [n, 3], (frames, rows, columns) of each item, in patches.

        Returns:
            [N, 4 * hidden], item by item, row-major: averages over frames, 2 x 2 patches merged.

        Raises:
            ValueError: an item cannot be encoded (see :func:`check_grids`), or the patches have
                another dtype or size.
        """
        shapes = check_grids(grids, patches.shape[0])
        check_patches(patches, self.config.patch_size)
        weight = self.patch_embed.weight
        if not shapes:
            return weight.new_empty(0, PATCHES_PER_TOKEN * self.config.hidden_size)
        lengths = [math.prod(shape) for shape in shapes]
        # Sorted, because items of one length share an attention.
        order = sorted(range(len(shapes)), key=lengths.__getitem__)
        pack = Pack([lengths[item] for item in order], weight.device)
        ordered = torch.tensor([shapes[item] for item in order])
        points = patch_points(ordered)

        # Rounded once, at the end: mid-grey values would lose half of their bits in bfloat16.
        pixels = select_items(patches, lengths, order)
        pixels = pixels.to(torch.promote_types(weight.dtype, torch.float32)).div_(127.5).sub_(1)
        x = self.patch_embed(pixels.to(weight.dtype))
        x = x + self._positions(ordered, points)
        rotary = self._rotary(points, x)
        for block in self.blocks:
            x = block(x, rotary, pack)
        x = self.final_norm(x)

        return merge(x, ordered, order)

    def _positions(self, grids: Tensor, points: Tensor) -> Tensor:
        """[P, hidden]: learned table, resized to each item's grid, plus sinusoids of the frames."""
        table = self.pos_embed.to(torch.promote_types(self.pos_embed.dtype, torch.float32))
        positions = resize(table, grids, points)
        clips = grids[:, 0] > 1
        if clips.any():
            times = frame_positions(MAX_FRAMES, table.shape[-1])[points[:, 0]]
            times[~clips.repeat_interleave(grids.prod(1))] = 0
            positions = positions + to_device(times.to(table.dtype), table.device)
        return positions.to(self.pos_embed.dtype)

    def _rotary(self, points: Tensor, x: Tensor) -> Tensor:
        """Complex [P, head_dim / 2] in the precision in which :func:`apply_rotary` rotates x."""
        config = self.config
        longest = int(points[:, 1:].max()) + 1
        table = rotary_table(longest, config.hidden_size // config.num_heads, config.rope_base)
        table = table.to(x.device, torch.promote_types(x.dtype, torch.complex64))
        return rotary_2d(to_device(points, x.device), table)


@contextmanager
def observers_disabled(module: nn.Module) -> Iterator[None]:
    """Run the vision attention layers of a module without their observers."""
    layers = [layer for layer in module.modules() if isinstance(layer, VisionAttention)]
    observers = [layer.observer for layer in layers]
    for layer in layers:
        layer.observer = None
    try:
        yield
    finally:
        for layer, observer in zip(layers, observers, strict=True):
            layer.observer = observer


def check_grids(grids: Tensor, num_patches: int) -> list[Grid]:
    """Return the grids as tuples.

    Raises:
        ValueError: a grid cannot be encoded (the message names the item), or the grids do not add
            up to ``num_patches``.
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
        raise ValueError(f"the grids have {expected} patches, but {num_patches} were given")
    return shapes


def check_patches(patches: Tensor, patch_size: int) -> None:
    """Raise ValueError unless the patches are uint8 [P, 3 * patch_size²]."""
    width = 3 * patch_size**2
    if patches.dtype != torch.uint8 or patches.ndim != 2 or patches.shape[1] != width:
        raise ValueError(
            f"patches must be uint8 [P, {width}] for patch_size={patch_size}, not "
            f"{patches.dtype} {list(patches.shape)}"
        )


def num_features(grids: Tensor) -> Tensor:
    """int64 [n]: features, and thus language-model tokens, of each item of grids [n, 3]."""
    return num_tokens(grids.unbind(1))


def select_items(rows: Tensor, rows_per_item: Sequence[int], order: Sequence[int]) -> Tensor:
    """Reorder packed items.

    Args:
        rows: [R, d], item by item.
        rows_per_item: number of rows of each item.
        order: items of the result.
    """
    counts, items = torch.tensor(rows_per_item, dtype=torch.int64), list(order)
    first, counts = first_rows(counts)[items], counts[items]
    shifts = first - first_rows(counts)
    indices = torch.arange(int(counts.sum())) + shifts.repeat_interleave(counts)
    return rows.index_select(0, indices.to(rows.device))


def split_items(sizes: Sequence[int], max_size: int) -> list[slice]:
    """Split consecutive items into slices of at most ``max_size``; a larger item is a slice.

    Encoding slices of a limited number of patches gives the same features with less memory.
    """
    starts, total = [0], 0
    for item, size in enumerate(sizes):
        if item > starts[-1] and total + size > max_size:
            starts.append(item)
            total = 0
        total += size
    return [slice(*ends) for ends in pairwise([*starts, len(sizes)])] if sizes else []


def patch_points(grids: Tensor) -> Tensor:
    """int64 [P, 3], (frame, row, column) of each patch of items with grids [n, 3], on the CPU."""
    lengths = grids.prod(1)
    rows, columns = grids[:, 1:].repeat_interleave(lengths, 0).unbind(1)
    numbers = torch.arange(len(rows)) - first_rows(lengths).repeat_interleave(lengths)
    cells = numbers // columns
    return torch.stack([cells // rows, cells % rows, numbers % columns], 1)


def first_rows(lengths: Tensor) -> Tensor:
    """int64 [n]: row at which each of consecutive items of these lengths begins."""
    return lengths.cumsum(0) - lengths


def merge(x: Tensor, grids: Tensor, order: Sequence[int]) -> Tensor:
    """Average frames and merge 2 x 2 patches.

    Args:
        x: [P, d], item by item.
        grids: int64 [n, 3] of the items, on the CPU.
        order: position of each item among those of the result, a permutation of 0..n-1.

    Returns:
        [N, 4 * d], item by item, row-major.
    """
    frames, rows, columns = grids.unbind(1)
    if (frames > 1).any():
        parts = zip(torch.split(x, grids.prod(1).tolist()), frames.tolist(), strict=True)
        x = torch.cat([torch.unflatten(part, 0, (count, -1)).mean(0) for part, count in parts])
    items = torch.tensor(order).argsort()
    first, columns = first_rows(rows * columns)[items], columns[items]
    merged = torch.stack([torch.ones_like(rows), rows[items] // MERGE, columns // MERGE], 1)
    first, columns = torch.stack([first, columns], 1).repeat_interleave(merged.prod(1), 0).unbind(1)
    _, row, column = patch_points(merged).unbind(1)
    corner = first + MERGE * (row * columns + column)
    square = torch.stack([corner, corner + 1, corner + columns, corner + columns + 1], 1)
    return x.index_select(0, to_device(square.flatten(), x.device)).view(len(square), -1)


def resize(table: Tensor, grids: Tensor, points: Tensor) -> Tensor:
    """Resize a table [side, side, d] to the grid of each item by bicubic interpolation.

    Equal to ``F.interpolate(mode="bicubic")``, but only the 16 entries of each position are read,
    for all items at once.

    Args:
        grids: int64 [n, 3] of the items, on the CPU.
        points: the result of :func:`patch_points`.

    Returns:
        [P, d], the value at each patch.
    """
    side = table.shape[0]
    sizes = torch.unique(grids[:, 1:])
    first = torch.zeros(int(sizes.max()) + 1, dtype=torch.int64)
    first[sizes] = first_rows(sizes)
    at = first[grids[:, 1:]].repeat_interleave(grids.prod(1), 0) + points[:, 1:]
    row, column = to_device(at, table.device).unbind(1)
    taps = zip(*(cubic_taps(size, side) for size in sizes.tolist()), strict=True)
    entries, weights = (to_device(torch.cat(parts), table.device) for parts in taps)
    weights = weights.to(table.dtype)
    return F.embedding_bag(
        (entries[row][:, :, None] * side + entries[column][:, None]).flatten(1),
        table.flatten(0, 1),
        mode="sum",
        per_sample_weights=(weights[row][:, :, None] * weights[column][:, None]).flatten(1),
    )


@functools.lru_cache(maxsize=1024)
@torch.inference_mode(False)  # a cached tensor must also serve training
def cubic_taps(size: int, side: int) -> tuple[Tensor, Tensor]:
    """Interpolation of ``side`` entries at ``size`` points.

    Cubic convolution (Keys, 1981) with a = -0.75 and ``align_corners=False``. The border entry is
    repeated. The identity if size == side.

    Returns:
        int32 and float64 [size, 4], the entries of each point and their weights.
    """
    points = ((torch.arange(size, dtype=torch.float64) + 0.5) * side / size - 0.5)[:, None]
    entries = points.floor() + torch.arange(-1, 3)
    x = (points - entries).abs()
    near = (1.25 * x - 2.25) * x * x + 1
    far = -0.75 * (((x - 5) * x + 8) * x - 4)
    return entries.clamp(0, side - 1).int(), torch.where(x <= 1, near, far)


def frame_positions(frames: int, dim: int) -> Tensor:
    """float64 [frames, dim]: sinusoidal embedding of the frame number, sines before cosines."""
    frequencies = 10000 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = torch.arange(frames, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rotary_table(length: int, head_dim: int, base: float) -> Tensor:
    """complex128 [length, head_dim / 4]: exp(i * position * base^(-4k / head_dim))."""
    exponents = torch.arange(0, head_dim, 4, dtype=torch.float64) / head_dim
    angles = torch.arange(length, dtype=torch.float64)[:, None] * base**-exponents
    return torch.polar(torch.ones_like(angles), angles)


def rotary_2d(points: Tensor, table: Tensor) -> Tensor:
    """Complex [P, head_dim / 2]: 2-D rotary embedding of patches.

    Even channel pairs rotate with the column, odd ones with the row, at falling frequencies.

    Args:
        points: the result of :func:`patch_points`.
        table: :func:`rotary_table` of at least the longest side.
    """
    _, row, column = points.unbind(1)
    return torch.stack([table[column], table[row]], dim=-1).flatten(1)


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels of x [P, heads, d] by rotary [P, d / 2] (complex).

    Computed in at least float32; the result has the dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.view_as_complex(torch.unflatten(x.to(wide), -1, (-1, 2)))
    return torch.view_as_real(pairs * rotary[:, None]).flatten(-2).to(x.dtype)
