"""Newton-Schulz orthogonalization: pure functions from tensors to tensors."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from muonclip.kernels.blocked_product import Matrices
from muonclip.kernels.matrix_polynomial import (
    SMALL_SIDE,
    Polynomial,
    Workspace,
    apply,
    as_matrix,
    has_no_blocks,
    in_passes,
    multiply_,
    polynomial,
    product,
)
from muonclip.kernels.support import multiplies_fast, prefers_bfloat16
from muonclip.kernels.symmetric_product import unchecked_product
from muonclip.update import cast

Triple: TypeAlias = tuple[float, float, float]
CoefficientName = Literal["quintic", "you", "polar_express", "cans", "deepseek_v4", "cubic"]
Coefficients: TypeAlias = CoefficientName | Sequence[float] | Sequence[Sequence[float]]
AdjustLR = Literal["match_rms_adamw", "original", "spectral", "none"]
Form = Literal["auto", "direct", "gram"]

_QUINTIC: Triple = (3.4445, -4.7750, 2.0315)


def _with_margin(table: Sequence[Triple], margin: float) -> tuple[Triple, ...]:
    """p(s / margin) for each step: singular values that rounding lifts over one stay in range."""
    return tuple((a / margin, b / margin**3, c / margin**5) for a, b, c in table)


# One (a, b, c) per step, each step mapping a singular value s to a*s + b*s**3 + c*s**5.
# If there are more steps than triples, the last one repeats.
# `python -m benchmarks run coefficients` plots what each does to [0, 1].
COEFFICIENTS: Mapping[CoefficientName, tuple[Triple, ...]] = MappingProxyType(
    {
        # Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024):
        # steepest at zero; five steps take s in [1e-3, 1] to between 0.47 and 1.20.
        "quintic": (_QUINTIC,),
        # YouJiacheng's five triples, each tuned for its step (modded-nanogpt, 2025).
        "you": (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        # Amsel et al., "The Polar Express" (arXiv 2505.16932), table of Algorithm 1 (l = 1e-3):
        # each step is the minimax polynomial for what the one before left; margin 1.01 as there.
        "polar_express": (
            *_with_margin(
                (
                    (8.28721201814563, -23.595886519098837, 17.300387312530933),
                    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
                ),
                1.01,
            ),
            (1.875, -1.25, 0.375),
        ),
        # Grishina et al., "Accelerating Newton-Schulz iteration with Chebyshev-type polynomials"
        # (CANS, arXiv 2506.10935): Remez polynomials on an interval adapted to each step. They
        # diverge from a value just above one, which rounding gives; hence a margin here too.
        "cans": _with_margin(
            (
                (8.4703, -25.1081, 18.6293),
                (4.1828, -3.1087, 0.5806),
                (3.9619, -2.9541, 0.5630),
                (3.2866, -2.4647, 0.5074),
                (2.2737, -1.6447, 0.4162),
            ),
            1.01,
        ),
        # DeepSeek-V4 report: eight steep steps, then two that converge to one. Use 10 steps.
        "deepseek_v4": (*[_QUINTIC] * 8, (2.0, -1.5, 0.5)),
        # Cubic steps (c = 0), one product less in each (arXiv 2606.00371). The first turns negative
        # just above one: the margin keeps a rounded update from changing its sign.
        "cubic": _with_margin(
            (
                (3.3656576, -3.3420992, 0.0),
                (2.5744352, -1.4957376, 0.0),
                (2.5368962, -1.4312570, 0.0),
                (2.4418906, -1.2764040, 0.0),
                (2.2230472, -0.9630650, 0.0),
            ),
            1.01,
        ),
    }
)

NS_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# The Gram form pays from this aspect ratio on. Square matrices need as much work in either form.
_GRAM_ASPECT = 1.5
# A Gram matrix loses small singular values to rounding, and each step taken on it magnifies the
# loss by a². It is recomputed from the matrix before that exceeds this limit; the Gram form is then
# almost as exact as the direct one. Otherwise null spaces would blow up. With 64 in float16, sets
# with a steep first step would be more exact on small random matrices, and less on low rank.
_GRAM_GROWTH = {torch.float16: 80, torch.float32: 160, torch.float64: 160}


# On a CPU, matrices with a smaller side are faster in float32: twice at 32, single or in batches.
# So are few larger ones, whose calls take longer in bfloat16 than what it saves: a single one up to
# 112 rows (2.5 times at 64), while 16 of 64 to 112 rows take half to three quarters of the time of
# float32. Parameters with fewer elements of Gram matrices are in float32; this limit, 90 rows, is
# between the two. Measured with oneDNN, EPYC with AVX512-BF16.
BFLOAT16_FROM, BFLOAT16_GRAM_ELEMENTS = 64, 2**13
# The most rows and, in all, elements of matrices of which calls take most of the time, with at most
# twice as many columns. Measured on EPYC.
_FEW_ROWS, _FEW_ELEMENTS = 64, 2**15
# On a CPU, the Gram form has more calls. It saves about six times as many FLOPs as this expression:
# b n² (2 m - 3 n) for [b, n, m]. From this value on they take longer than the calls.
_LEAST_SAVED = 3_000_000
# The elements of a matrix from which on a copy takes longer than a call.
_LARGE_COPY = 2**14


def default_ns_dtype(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]
) -> torch.dtype:
    """The default dtype of Newton-Schulz; see ``orthogonalize``.

    In the Gram form, float16 does less work than bfloat16, which is too coarse for it, and is ten
    times as exact on matrices of low rank. On a CPU, float32 is the default for float64 matrices,
    where digits matter more than speed, and for small ones, which bfloat16 makes slower; on
    accelerators, float64 matrices are in bfloat16.

    Args:
        device: of the matrices.
        dtype: of the matrices.
        shapes: [b, n, m] of b matrices, at least one, for all of which the dtype is chosen: on a
            CPU the large ones must have enough work, and on a GPU all must prefer the Gram form.
    """
    if device.type == "cpu":
        sides = [(b, min(n, m)) for b, n, m in shapes if min(n, m) >= BFLOAT16_FROM]
        is_large = sum(b * side**2 for b, side in sides) >= BFLOAT16_GRAM_ELEMENTS
        takes_bfloat16 = is_large and dtype != torch.float64 and prefers_bfloat16()
        return torch.bfloat16 if takes_bfloat16 else torch.float32
    takes_gram = device.type == "cuda" and all(prefers_gram(n, m) for _, n, m in shapes)
    return torch.float16 if takes_gram and dtype != torch.float64 else torch.bfloat16


def prefers_gram(n: int, m: int, count: int = 1, *, on_cpu: bool = False) -> bool:
    """Whether ``"auto"`` is the Gram form for matrices [count, n, m], in dtypes that allow it."""
    short, long = min(n, m), max(n, m)
    if on_cpu and count * short**2 * (2 * long - 3 * short) < _LEAST_SAVED:
        return False
    # Small matrices take time for calls, of which the direct form has fewer.
    is_small = short <= SMALL_SIDE and long <= 2 * SMALL_SIDE
    return long >= _GRAM_ASPECT * short and not is_small and not _takes_calls(count, short, long)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the input of ``orthogonalize_``; float16 is too narrow before normalization."""
    return torch.float32 if dtype == torch.float16 else dtype


def coefficient_steps(coefficients: Coefficients, steps: int) -> list[Triple]:
    """The (a, b, c) of each Newton-Schulz step.

    Args:
        coefficients: a name in ``COEFFICIENTS``; three numbers for every step; or a sequence of
            such triples, one for each step, the last of which repeats.
        steps: number of steps, at least 1, and at least the number of triples; of the names, only
            ``"deepseek_v4"`` needs all of its 9 (its source takes 10).

    Raises:
        ValueError: for an unknown name, something that is not triples of finite numbers, or too few
            steps.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(
                f"coefficients must be one of {tuple(COEFFICIENTS)}, three numbers, "
                f"or triples of numbers, got {coefficients!r}"
            )
        table: Sequence[Triple] = COEFFICIENTS[coefficients]
    else:
        rows: list[Any] = [coefficients] if _is_triple(coefficients) else list(coefficients)
        if not rows or not all(_is_triple(row) for row in rows):
            raise ValueError(
                "coefficients must be three finite numbers, or a sequence of such triples, "
                f"got {coefficients!r}"
            )
        table = [(float(row[0]), float(row[1]), float(row[2])) for row in rows]
    # Of the other names, any number of first steps makes sense.
    needs_all = not isinstance(coefficients, str) or coefficients == "deepseek_v4"
    if steps < len(table) and needs_all:
        raise ValueError(
            f"steps must be at least {len(table)}, the number of triples of the coefficients "
            f"{coefficients!r}, got {steps}: the last ones would have no effect"
        )
    return [table[min(step, len(table) - 1)] for step in range(steps)]


def _is_triple(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 3
        and all(isinstance(x, (int, float)) and math.isfinite(x) for x in value)
    )


def orthogonalize(
    matrices: Tensor,
    *,
    coefficients: Coefficients = "quintic",
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    form: Form = "auto",
) -> Tensor:
    """Replace the singular values of each matrix by values near one, keeping its singular vectors.

    Newton-Schulz iteration on the Frobenius-normalised matrix. A zero matrix stays zero.
    The direct form is the iteration as published (Keller Jordan, 2024; Moonlight, arXiv
    2502.16982, section 2.1). The Gram form does the same on the Gram matrix of the shorter side
    and multiplies by the long side twice in all, instead of twice in each step: about half the work
    from aspect ratio 4 on. Both compute the same polynomial, up to rounding.

    Args:
        matrices: [..., n, m], any floating dtype; each [n, m] slice is a matrix. Not changed.
        coefficients: see ``coefficient_steps``.
        steps: number of iterations.
        eps: guard against 0/0, in [0, 1): least Frobenius norm to divide by, relative to a matrix's
            largest entry. The result does not depend on the scale of a matrix.
        dtype: of the arithmetic and the result: bfloat16, float16, float32 or float64; default:
            on NVIDIA and AMD GPUs float16 for matrices of aspect ratio 1.5 or more that are neither
            small nor float64; else bfloat16 on accelerators and on CPUs that multiply faster in it
            (those with AMX; AMD's and ARM's with other instructions are timed, once in a process);
            float32 on other CPUs, on a CPU for float64 matrices, for those with a side below 64 and
            for a single one with a side below 91, and with ``form="gram"`` in place of bfloat16.
            On a CPU without fast instructions for products in a 16-bit dtype, each product is
            computed in float32 and rounded.
        form: ``"direct"``, ``"gram"``, or ``"auto"``: by shape and dtype.

    Returns:
        [..., n, m] in ``dtype``.

    Raises:
        ValueError: if ``matrices`` has fewer than two dimensions or is complex, or an option is
            out of range.
    """
    if matrices.ndim < 2 or not matrices.is_floating_point():
        raise ValueError(
            "matrices must be a real floating-point tensor [..., n, m], "
            f"got {matrices.dtype} of shape {tuple(matrices.shape)}"
        )
    if dtype is None:
        *batch, n, m = matrices.shape
        shapes = [(math.prod(batch), n, m)]
        dtype = default_ns_dtype(matrices.device, matrices.dtype, shapes)
        if form == "gram" and dtype == torch.bfloat16:
            dtype = torch.float32
    if not 0 <= eps < 1:
        raise ValueError(f"eps must be in [0, 1), as it only guards 0/0, got {eps}")
    if dtype not in NS_DTYPES:
        raise ValueError(f"dtype must be one of {NS_DTYPES}, got {dtype}")
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {get_args(Form)}, got {form!r}")
    if form == "gram" and dtype == torch.bfloat16:
        raise ValueError(
            "form='gram' is unstable in bfloat16, whose 8 bits are too few for a Gram matrix that "
            "is stepped on: use float16 or float32, or form='auto'"
        )
    schedule = coefficient_steps(coefficients, steps)
    if matrices.numel() == 0:
        return matrices.new_empty(matrices.shape, dtype=dtype)

    # Not rounded to ``dtype`` yet, whose range may be too small before the normalization.
    wide = torch.promote_types(matrices.dtype, working_dtype(dtype))
    x = matrices.detach().to(wide, copy=True).reshape(-1, *matrices.shape[-2:])
    result = orthogonalize_(x, schedule, eps=eps, dtype=dtype, form=form)
    return result.contiguous().view(matrices.shape)


def orthogonalize_(
    matrices: Tensor,
    schedule: Sequence[Triple],
    *,
    eps: float,
    dtype: torch.dtype,
    form: Form = "auto",
    scale: float = 1.0,
) -> Tensor:
    """``orthogonalize`` that overwrites its argument; times ``scale``.

    Args:
        matrices: [b, n, m] in ``working_dtype(dtype)`` or a wider dtype, overwritten.
        schedule: (a, b, c) of each step.
        eps: as for ``orthogonalize``, validated, like the next two.
        dtype: of the arithmetic.
        form: of the iteration.
        scale: factor on the result.

    Returns:
        [b, n, m]; it may share memory with ``matrices``.
    """
    device = matrices.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # it would multiply in another dtype
            return orthogonalize_(matrices, schedule, eps=eps, dtype=dtype, form=form, scale=scale)
    on_cpu = device == "cpu"
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices  # the Gram matrix is then the smaller of the two
    x = cast(_normalize_(x, eps), dtype)
    compute = dtype
    if on_cpu and dtype in (torch.bfloat16, torch.float16):
        if multiplies_fast(dtype):
            x = _contiguous(x)  # baddbmm is a plain C++ loop for transposed 16-bit matrices
        else:
            compute = torch.float32
    count, n, m = x.shape
    may_use_gram = form == "auto" and dtype != torch.bfloat16
    use_gram = form == "gram" or (may_use_gram and prefers_gram(n, m, count, on_cpu=on_cpu))
    is_whole = compute == dtype and (_takes_calls(count, n, m) or has_no_blocks(x))
    if is_whole and not use_gram:
        x = in_passes(partial(_dense_form, schedule=schedule, scale=scale), x)
    else:
        iterate = _gram_form if use_gram else _direct_form
        x = apply(partial(iterate, schedule=schedule, scale=scale), x, compute=compute)
    return x.mT if tall else x


def _contiguous(x: Tensor) -> Tensor:
    """[b, n, m] in the order of memory."""
    if x.is_contiguous() or x.size(1) * x.size(2) < _LARGE_COPY or torch.compiler.is_compiling():
        return x.contiguous()
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    # torch transposes one matrix block by block, but several element by element: twice as slow.
    for target, source in zip(result, x, strict=True):
        target.copy_(source)
    return result


def _takes_calls(count: int, n: int, m: int) -> bool:
    """Whether the products of [count, n, m], n <= m, are so small that calls take most of the
    time."""
    return n <= _FEW_ROWS and m <= 2 * _FEW_ROWS and count * n * m <= _FEW_ELEMENTS


def _normalize_(x: Tensor, eps: float) -> Tensor:
    """Divide each matrix by its Frobenius norm, in place: singular values come to lie in [0, 1].

    The result does not depend on the scale of a matrix: ``eps`` is relative to its largest entry,
    which its norm exceeds unless both are zero. Squares of entries may leave the range of their
    dtype, so each matrix is first divided by a power of two, which is exact and brings its largest
    entry to [1, 2), or below for denormal numbers. (float64 sums would not
    help: MPS does not have them, and they are slow on a CPU.)
    """
    dims = (-2, -1)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    is_readable = type(x) is Tensor and not torch.compiler.is_compiling()  # unlike a fake tensor
    if x.device.type == "cpu" and x.numel() and is_readable:
        # Reading the result costs nothing on a CPU, and scaling is rarely necessary.
        norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=accumulate)
        least, largest = norm.aminmax()
        if least.item() > 1e-15 and largest.item() < 1e15:
            return x.div_(cast(norm, x.dtype))
    largest = torch.linalg.vector_norm(x, math.inf, dim=dims, keepdim=True, dtype=accumulate)
    power = _power_of_two(largest)
    norm = torch.linalg.vector_norm(
        x.div_(power.to(x.dtype)), dim=dims, keepdim=True, dtype=accumulate
    )
    least = largest.div_(power).mul_(eps).clamp_(min=torch.finfo(accumulate).tiny)
    return x.div_(torch.maximum(norm, least).to(x.dtype))


def _power_of_two(x: Tensor) -> Tensor:
    """The largest power of two up to x >= 0, float32 or float64, or the smallest normal one."""
    bits, exponent = (
        (torch.int64, 0x7FF0_0000_0000_0000)
        if x.dtype == torch.float64
        else (torch.int32, 0x7F80_0000)
    )
    power = x.view(bits).bitwise_and(exponent).view(x.dtype)
    return power.clamp_(min=torch.finfo(x.dtype).tiny)


def _direct_form(
    x: Matrices, memory: Workspace, schedule: Sequence[Triple], scale: float
) -> Matrices:
    """Step [b, n, m] by x <- (a + b xxᵀ + c (xxᵀ)²) x; ``x`` is overwritten."""
    for number, (a, b, c) in enumerate(schedule, start=1):
        gram = unchecked_product(x, x, out=memory.gram)
        p = polynomial(gram, a, b, c, out=memory.polynomial)
        factor = scale if number == len(schedule) else 1.0
        x, memory.spare = multiply_(p, x, factor, out=memory.spare), x
    return x


def _dense_form(x: Tensor, schedule: Sequence[Triple], scale: float) -> Tensor:
    """The same as :func:`_direct_form`, in as few calls as possible, without symmetric products."""
    for number, (a, b, c) in enumerate(schedule, start=1):
        factor = scale if number == len(schedule) else 1.0
        gram = torch.bmm(x, x.mT)
        # With alpha=0, baddbmm is wrong in bfloat16 on CPUs that have instructions for it.
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else gram.mul_(b)
        x = torch.baddbmm(x, p, x, beta=factor * a, alpha=factor)
    return x


def _gram_form(
    x: Matrices, memory: Workspace, schedule: Sequence[Triple], scale: float
) -> Matrices:
    """The same map, as one polynomial in the Gram matrix applied to [b, n, m].

    A step multiplies x by p = a + b r + c r², with r = xxᵀ; r becomes p r p, and the product of
    all p is kept in q. All are polynomials of one symmetric matrix: symmetric, and they commute.
    """
    parts = _between_restarts(schedule, _GRAM_GROWTH[x.dtype])
    for number, part in enumerate(parts, start=1):
        r = unchecked_product(x, x, out=memory.gram)
        p = polynomial(r, *part[0], out=memory.polynomial)
        q = as_matrix(p, out=memory.total)
        for triple in part[1:]:
            memory.square = product(r, p, out=memory.square)
            r = product(memory.square, p, out=r)
            p = polynomial(r, *triple, out=p.matrix)
            q, memory.square = product(q, p, out=memory.square), q
        if memory.total is not None:  # it may have been exchanged with ``square``
            memory.total = q
        factor = scale if number == len(parts) else 1.0
        x, memory.spare = multiply_(Polynomial(0.0, q), x, factor, out=memory.spare), x
    return x


def _between_restarts(schedule: Sequence[Triple], limit: float) -> list[list[Triple]]:
    """Split the schedule into parts in each of which rounding grows by no more than the limit."""
    parts: list[list[Triple]] = [[]]
    growth = 1.0
    for step in schedule:
        if parts[-1] and growth * parts[-1][-1][0] ** 2 > limit:
            parts.append([])
            growth = 1.0
        elif parts[-1]:
            growth *= parts[-1][-1][0] ** 2
        parts[-1].append(step)
    return parts


def update_scale(
    shape: Sequence[int], mode: AdjustLR = "match_rms_adamw", rms: float = 0.2
) -> float:
    """Factor on an orthogonalized update of a matrix of this shape.

    Args:
        shape: [..., n, m], outputs by inputs; stacked experts scale like a single expert.
        mode: ``"match_rms_adamw"``, rms·√max(n, m): the update's root mean square is then ``rms``
            for a full-rank gradient, as AdamW's, whose learning rate and weight decay carry over
            (Moonlight, arXiv 2502.16982, section 2.2). ``"original"``, √max(1, n/m) (Keller
            Jordan, 2024). ``"spectral"``, √(n/m): updates change the outputs of all layers equally
            (Bernstein, "Deriving Muon", 2025), and learning rates carry over widths. ``"none"``, 1.
        rms: the root mean square to match; AdamW's is 0.2 to 0.4.

    Raises:
        ValueError: for any other ``mode``.
    """
    n, m = shape[-2:]
    if mode == "match_rms_adamw":
        return rms * math.sqrt(max(n, m))
    if mode == "original":
        return math.sqrt(max(1, n / m))
    if mode == "spectral":
        return math.sqrt(n / m)
    if mode == "none":
        return 1.0
    raise ValueError(f"mode must be one of {get_args(AdjustLR)}, got {mode!r}")
