"""The Triton kernel of ``symmetric_product``; requires Triton."""

# Triton has no type annotations, and the arguments of kernels have no Python types.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, no-untyped-call"
# mypy: disable-error-code="untyped-decorator, no-any-unimported"

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from muonclip.kernels.dense_product import dense
from muonclip.kernels.support import allows_tf32


class Tiling(NamedTuple):
    """A program computes ``rows`` x ``columns`` of the product, in steps of ``depth``."""

    rows: int  # a multiple of columns
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# The first is the default, which fits every GPU from Ampere on in any dtype. The large ones are for
# the shared memory of A100 and H100, the last for products of few tiles.
TILINGS = (
    Tiling(128, 128, 32, num_warps=8, num_stages=3),
    Tiling(128, 128, 64, num_warps=8, num_stages=3),
    Tiling(128, 128, 64, num_warps=8, num_stages=4),
    Tiling(128, 128, 64, num_warps=4, num_stages=3),
    Tiling(256, 128, 64, num_warps=8, num_stages=3),
    Tiling(128, 64, 64, num_warps=4, num_stages=4),
    Tiling(64, 64, 64, num_warps=4, num_stages=4),
)
# None: the whole product by cuBLAS. On an H100 that is faster for some sizes, such as 2048.
Choice: TypeAlias = Tiling | None
_CHOICES: tuple[Choice, ...] = (*TILINGS, None)
_tuned: dict[tuple[object, ...], Choice] = {}


def symmetric_product_triton(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    alpha: float,
    beta: float,
    tiling: Tiling | None = None,
) -> Tensor:
    """As ``symmetric_product``, for float32 and smaller.

    Without ``tiling``, the fastest one is chosen by timing, or the whole product if it is faster.
    """
    batch, n, k = a.shape
    if beta == 0:
        c = None

    def product(choice: Choice) -> Tensor:
        if choice is None:
            return dense(a, b, c, alpha, beta)
        out = a.new_empty(batch, n, n)
        summand = out if c is None else c  # out is not read
        tile_rows = triton.cdiv(n, choice.rows)
        programs = batch * tile_rows * (tile_rows + 1) // 2 * (choice.rows // choice.columns)
        _kernel[(programs,)](
            a, b, summand, out, n, k, alpha, beta,
            *a.stride(), *b.stride(), *summand.stride(),
            ADD=summand is not out,
            PRECISION="tf32" if allows_tf32() else "ieee",
            ROWS=choice.rows, COLUMNS=choice.columns, DEPTH=choice.depth,
            num_warps=choice.num_warps, num_stages=choice.num_stages,
        )  # fmt: skip
        return out

    with torch.cuda.device_of(a):
        if tiling is not None:
            return product(tiling)
        # Everything that affects the speed; loads run along contiguous dimensions.
        operands = (a, b) if c is None else (a, b, c)
        unit = tuple(stride == 1 for x in operands for stride in x.stride()[1:])
        key = (a.device, a.dtype, a.shape, unit)
        return product(_tuned[key] if key in _tuned else _tune(key, product))


def _tune(key: tuple[object, ...], product: Callable[[Choice], Tensor]) -> Choice:
    """The fastest choice, measured once.

    The default while a CUDA graph is being captured, and with deterministic algorithms: the bits
    of a product depend on the choice, which another process may make differently.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic or torch.cuda.is_current_stream_capturing():
        return TILINGS[0]

    def milliseconds(choice: Choice) -> float:
        try:
            median: float = triton.testing.do_bench(
                lambda: product(choice), warmup=10, rep=40, return_mode="median"
            )
        except triton.OutOfResources:  # more shared memory than this GPU has
            return float("inf")
        return median

    return _tuned.setdefault(key, min(_CHOICES, key=milliseconds))


@triton.jit
def _kernel(
    a, b, c, out, n, k, alpha, beta,
    a_batch, a_row, a_column, b_batch, b_row, b_column, c_batch, c_row, c_column,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # The tiles on or below the diagonal are square; ROWS / COLUMNS programs share each.
    pieces: tl.constexpr = ROWS // COLUMNS
    tile_rows = tl.cdiv(n, ROWS)
    per_matrix = tile_rows * (tile_rows + 1) // 2 * pieces
    batch = (tl.program_id(0) // per_matrix).to(tl.int64)
    index = tl.program_id(0) % per_matrix
    tile_row, tile_column = _tile_below_diagonal(index // pieces, tile_rows)
    # Offsets of tiles need 64 bits in a large matrix; 32 are enough within a tile.
    first_row = (tile_row * ROWS).to(tl.int64)
    first_column = (tile_column * ROWS + index % pieces * COLUMNS).to(tl.int64)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    row_inside = rows < n - first_row
    column_inside = columns < n - first_column

    a += batch * a_batch + first_row * a_row
    b += batch * b_batch + first_column * b_row
    a_tile = a + (rows[:, None] * a_row + depth[None, :] * a_column)
    b_tile = b + (columns[None, :] * b_row + depth[:, None] * b_column)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, k, DEPTH):
        inside = depth < k - start
        x = tl.load(a_tile, mask=row_inside[:, None] & inside[None, :], other=0.0)
        y = tl.load(b_tile, mask=column_inside[None, :] & inside[:, None], other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
        a_tile += DEPTH * a_column
        b_tile += DEPTH * b_column
    total *= alpha

    # Tiles on the diagonal reach above it; the mirrored store writes those entries.
    down = (first_row - first_column).to(tl.int32)
    lower = row_inside[:, None] & (rows[:, None] + down >= columns[None, :])
    if ADD:
        c += batch * c_batch + first_row * c_row + first_column * c_column
        summand = tl.load(c + (rows[:, None] * c_row + columns[None, :] * c_column), mask=lower)
        total += beta * summand.to(tl.float32)
    result = total.to(out.dtype.element_ty)
    out += batch * n * n
    tile = out + first_row * n + first_column
    tl.store(tile + (rows[:, None] * n + columns[None, :]), result, mask=lower)
    upper = row_inside[None, :] & (rows[None, :] + down > columns[:, None])
    mirror = out + first_column * n + first_row
    tl.store(mirror + (columns[:, None] * n + rows[None, :]), tl.trans(result), mask=upper)


@triton.jit
def _tile_below_diagonal(index, tile_rows, GROUP: tl.constexpr = 8):
    """(row, column) of a tile, counting through GROUP rows of the triangle at a time.

    Within a group, column by column, so that programs that run together share most of their factors
    in the L2 cache; then the group's own small triangle on the diagonal, row by row.
    """
    first = _triangle_row(index) // GROUP * GROUP
    rows = tl.minimum(GROUP, tile_rows - first)
    index -= first * (first + 1) // 2
    corner = tl.maximum(index - rows * first, 0)
    corner_row = _triangle_row(corner)
    in_corner = index >= rows * first
    row = tl.where(in_corner, corner_row, index % rows)
    column = tl.where(in_corner, first + corner - corner_row * (corner_row + 1) // 2, index // rows)
    return first + row, column


@triton.jit
def _triangle_row(index):
    """The row of the index-th element of a lower triangle, counted row by row."""
    row = ((tl.sqrt(8.0 * index + 1) - 1) / 2).to(tl.int32)
    # The root is rounded: it may be one off.
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    return tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
