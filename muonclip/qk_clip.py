"""QK-Clip: keep every head's largest attention logit at a threshold by scaling its q and k rows.

Source: Kimi K2 technical report (arXiv 2507.20534), section 2.1. The rule for key groups shared by
several query heads (GQA) is exact per head, where the report gives none.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from muonclip.attention_layouts import AttentionLayout, HeadRows
from muonclip.max_logits import Mask, screened_max_logits
from muonclip.update import local


class ClipFactors(NamedTuple):
    """Factors on the rows of one attention layer.

    Attributes:
        query: [heads], on each query head's rows.
        key: [groups], on each key group's rows.
        query_rope: [heads], on each rotary query's rows (MLA); the factor on the head's logits.
    """

    query: Tensor
    key: Tensor
    query_rope: Tensor


class ClipResult(NamedTuple):
    """What one ``QKClip.step`` saw and did. Tensors on the weights' device: reading them waits.

    A head's largest logit lies between its entries in ``max_logits`` and ``upper_bounds``. Where
    they are equal it is known exactly, and so it is for every head over the threshold.

    Attributes:
        max_logits: per layer, [heads]: the largest logit that was computed in the step, over
            micro-batches and ranks, before clipping, additive biases included; -inf where none was.
        num_clipped: int64 scalar: heads scaled down, over all layers of this rank.
        upper_bounds: per layer, [heads]: what no logit of the step exceeded; -inf where the layer
            was not observed.
        factors: per layer, [heads]: gamma, the factor on each head's q·k; 1 where nothing changed.
    """

    max_logits: dict[str, Tensor]
    num_clipped: Tensor
    upper_bounds: dict[str, Tensor]
    factors: dict[str, Tensor]


def clip_factors(max_logits: Tensor, threshold: float, num_kv_groups: int) -> ClipFactors:
    """The factors that bring each head's largest logit down to the threshold, and no other's.

    With gamma_h = min(1, τ/S_h) for head h, key group g takes the root of its heads' least gamma
    and head h's query takes gamma_h over that: its logits are multiplied by exactly gamma_h. With
    one head per group both take the root of gamma_h, as published.

    Args:
        max_logits: [heads], each head's largest logit S_h. A negative or non-finite one asks for
            nothing: its gamma is 1. With additive biases give ``unbiased_max_logits`` of
            ``screened_max_logits``.
        threshold: τ, above 0.
        num_kv_groups: key groups; divides heads.

    Returns:
        Factors in at least float32; exactly 1 for groups with no head above τ.

    Raises:
        ValueError: if the threshold is not above 0 or groups do not divide heads.
    """
    _check_threshold(threshold)
    heads = max_logits.numel()
    if max_logits.ndim != 1 or num_kv_groups < 1 or heads % num_kv_groups:
        raise ValueError(
            f"max_logits of shape {tuple(max_logits.shape)} must be [heads], "
            f"a multiple of num_kv_groups={num_kv_groups}"
        )
    return _split(_gamma(max_logits, threshold), num_kv_groups)


def _gamma(max_logits: Tensor, threshold: float) -> Tensor:
    """[heads]: the factor on each head's logits that brings its largest down to the threshold."""
    largest = max_logits.to(torch.promote_types(max_logits.dtype, torch.float32))
    over = (largest > threshold) & largest.isfinite()
    # Clamped because a quotient just under one may round to just over it.
    return torch.where(over, threshold / largest, 1.0).clamp(max=1)


def _split(gamma: Tensor, num_kv_groups: int) -> ClipFactors:
    """Divide each head's factor between its query and the key of its group."""
    key = gamma.view(num_kv_groups, -1).amin(1).sqrt()
    query = gamma / key.repeat_interleave(gamma.numel() // num_kv_groups)
    return ClipFactors(query, key, gamma)


class QKClip:
    """Watches the largest attention logits of a model and clips them after each optimizer step.

    In the forward pass hand each layer's queries and keys to ``observe_attention``, or maxima that
    the attention kernel gives to ``observe``; after ``optimizer.step()`` call ``step()``, or
    ``attach`` to the optimizer once and forget about it. Works with any optimizer.
    ``muonclip.integrations`` does the observing for models of other libraries.

    Weights may be DTensors (FSDP2, tensor parallelism), sharded in any way: each rank scales what
    it holds. A weight with an attribute ``main_param`` (the float32 master copy of ``MuonClip`` and
    of Megatron) has that scaled, and is refreshed from it. With ``main_param_sharded`` too, the
    ranks of ``process_group`` hold consecutive flat pieces of the master, as Megatron's distributed
    optimizer has it: each scales its own, and the weight itself until the optimizer refreshes it.

    Args:
        layouts: layer name -> where its heads' rows are.
        threshold: τ: no head's largest logit stays above it.
        exact: compute the exact largest logit of every head in ``observe_attention``, for a
            monitor. Else only of heads whose bound is over the threshold; the clip is the same.
        process_group: ranks that hold copies or shards of these weights and see other data (data
            and context parallel); their maxima are joined. Default: all ranks, where
            ``torch.distributed`` is initialised. Under Megatron's tensor or pipeline parallelism
            pass the data-parallel group, since other ranks there hold other heads.

    Raises:
        ValueError: if there are no layouts, two layouts share a weight, query and key share rows,
            or the threshold is not above 0.

    Attributes:
        exact: as above; may be changed at any time.
        result: what the last ``step`` returned, or None.
    """

    def __init__(
        self,
        layouts: Mapping[str, AttentionLayout],
        *,
        threshold: float = 100.0,
        exact: bool = False,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        if not layouts:
            raise ValueError("layouts is empty: QK-Clip has no attention layer to watch")
        _check_threshold(threshold)
        self.layouts = dict(layouts)
        self.threshold = threshold
        self.exact = exact
        self.process_group = process_group
        self.result: ClipResult | None = None
        self._rows = _rows_of(self.layouts)
        self._step_hooks: OrderedDict[int, Callable[[ClipResult], None]] = OrderedDict()
        self._slices, start = {}, 0
        for name, layout in self.layouts.items():
            self._slices[name] = slice(start, start + layout.num_heads)
            start += layout.num_heads
        # Largest logits, what bounds them, and largest unbiased logits, which decide the factors.
        # One tensor for all layers, so that joining ranks takes one collective.
        self._running = torch.full((3, start), -math.inf, dtype=torch.float32, device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.layouts.values())).query.weight.device

    @torch.no_grad()
    def observe(self, name: str, max_logits: Tensor) -> None:
        """Take in the largest logits of one forward pass of one layer.

        For attention kernels that give them: flex_attention's ``max_scores``, Transformer Engine's
        ``return_max_logit``. Call it for every micro-batch of a step (not in evaluation: those
        logits would count too). Seeing the same forward twice, as activation recomputation does,
        changes nothing. Values that are not finite are passed over: they say nothing about the
        weights' scale. Logits with an additive bias (position bias, ALiBi) go to
        ``observe_attention``: their maxima do not say what q·k contributed.

        Args:
            name: the layer, as in ``layouts``.
            max_logits: [heads], any floating dtype and device; detached here.

        Raises:
            KeyError: for an unknown layer.
            ValueError: if the shape is not [heads].
        """
        heads = self._layout(name).num_heads
        if max_logits.shape != (heads,):
            raise ValueError(
                f"layer {name!r} has {heads} heads, "
                f"got max_logits of shape {tuple(max_logits.shape)}"
            )
        self._take(name, max_logits, max_logits, max_logits)

    @torch.no_grad()
    def observe_attention(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None = None,
        mask: Mask | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
    ) -> None:
        """Take in the queries and keys of one forward pass of one layer, as they enter attention.

        Computes the bound max‖q‖·max‖k‖·scale of every head, and exact logits only for heads whose
        bound is over the threshold (or for all, with ``exact``). Call it as ``observe``.

        A bias b that is added to the logits, as a floating mask or as ``bias``, is not scaled by a
        clip: q·k is scaled by gamma = min (τ - b) / (S - b) over the entries with S > τ and b < τ,
        the largest factor that brings all of them to τ or below. Entries whose bias alone reaches τ
        change nothing, since no factor on q·k could bring them below it.

        Args:
            name: the layer, as in ``layouts``.
            query: [..., heads, queries, d], after any rotary embedding; detached here.
            key: [..., groups, keys, d]; groups divides heads.
            scale: factor on the products; default: 1/√d.
            mask: boolean, floating or flex_attention's, as in ``max_logits``.
            bias: floating, added to the logits, as in ``max_logits``.
            causal: a query attends to keys up to its own index.

        Raises:
            KeyError: for an unknown layer.
            ValueError: if the shapes disagree or do not fit the layer.
        """
        heads = self._layout(name).num_heads
        if query.ndim < 3 or query.size(-3) != heads:
            raise ValueError(
                f"layer {name!r} has {heads} heads: query must be [..., {heads}, queries, d], "
                f"got {tuple(query.shape)}"
            )
        seen = screened_max_logits(
            query.detach(),
            key.detach(),
            self.threshold,
            scale=scale,
            mask=mask,
            bias=bias,
            causal=causal,
            exact=self.exact,
        )
        settled = (seen.bounds <= self.threshold) & (not self.exact)
        bounds = torch.where(settled, seen.bounds, seen.max_logits)
        self._take(name, seen.max_logits, bounds, seen.unbiased_max_logits)

    @torch.no_grad()
    def step(self, *, clip: bool = True) -> ClipResult:
        """Join the maxima over ranks, scale the rows of heads above the threshold, start afresh.

        A collective call: every rank of the process group makes it. On an accelerator nothing
        here waits for it.

        Args:
            clip: False changes no weight, and counts none as clipped: for a step that the optimizer
                left out, whose logits are to be seen and must not count in the next step's.

        Raises:
            ValueError: if a weight has other rows than when its layout was made, or the place of a
                master copy is not known; no weight is changed then.
        """
        tensors = [rows.check() for rows in self._rows]
        self._place_masters(tensors)
        running = self._running = self._running.to(self._device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(running, dist.ReduceOp.MAX, group=self.process_group)
        largest, bounds, unbiased = running
        gamma = _gamma(unbiased, self.threshold) if clip else torch.ones_like(unbiased)
        num_clipped = (gamma < 1).sum()
        # Whether any is over is not read on an accelerator, which that would wait for.
        if clip and (running.device.type != "cpu" or num_clipped > 0):
            factors = self._factors(gamma)
            for rows, tensor in zip(self._rows, tensors, strict=True):
                rows.scale(tensor, factors)
        self.result = ClipResult(
            {name: largest[heads] for name, heads in self._slices.items()},
            num_clipped,
            {name: bounds[heads] for name, heads in self._slices.items()},
            {name: gamma[heads] for name, heads in self._slices.items()},
        )
        self._running = torch.full_like(running, -math.inf)
        for hook in tuple(self._step_hooks.values()):
            hook(self.result)
        return self.result

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Run ``step`` after every ``optimizer.step()``; its result is then in ``result``.

        Returns:
            A handle whose ``remove()`` detaches it.
        """

        def clip(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            self.step()

        return optimizer.register_step_post_hook(clip)

    def register_step_post_hook(self, hook: Callable[[ClipResult], None]) -> RemovableHandle:
        """Call ``hook(result)`` at the end of every ``step``.

        Returns:
            A handle whose ``remove()`` ends that.
        """
        handle = RemovableHandle(self._step_hooks)
        self._step_hooks[handle.id] = hook
        return handle

    def _layout(self, name: str) -> AttentionLayout:
        if name not in self.layouts:
            raise KeyError(f"no layout for layer {name!r}; layers are {', '.join(self.layouts)}")
        return self.layouts[name]

    def _take(self, name: str, largest: Tensor, bounds: Tensor, unbiased: Tensor) -> None:
        if self._running.device != self._device:  # the model moved since
            self._running = self._running.to(self._device)
        running = self._running[:, self._slices[name]]
        seen = torch.stack([largest, bounds, unbiased]).detach().to(running)
        seen[2].masked_fill_(~seen[0].isfinite(), -math.inf)
        torch.maximum(running, seen.where(seen.isfinite(), -math.inf), out=running)

    def _place_masters(self, tensors: list[Tensor]) -> None:
        """Find out, once, where the rank's flat pieces of sharded master copies begin."""
        sharded = [
            (rows, tensor)
            for rows, tensor in zip(self._rows, tensors, strict=True)
            if getattr(tensor, "main_param_sharded", False)
        ]
        if not any(rows.master_start is None for rows, _ in sharded):
            return
        masters = [getattr(tensor, "main_param", None) for _, tensor in sharded]
        sizes = torch.tensor([0 if x is None else x.numel() for x in masters], device=self._device)
        everyones, rank = [sizes], 0
        if dist.is_available() and dist.is_initialized():
            rank = dist.get_rank(self.process_group)
            everyones = [sizes.clone() for _ in range(dist.get_world_size(self.process_group))]
            dist.all_gather(everyones, sizes, group=self.process_group)
        by_rank = torch.stack(everyones).cpu()
        for (rows, tensor), pieces in zip(sharded, by_rank.unbind(1), strict=True):
            if pieces.sum() != tensor.numel():
                raise ValueError(
                    f"layer {rows.layer!r}: the sharded master copies (main_param) of a weight of "
                    f"{tensor.numel()} elements have {int(pieces.sum())} over the process group: "
                    "give QKClip the group that the optimizer shards over"
                )
            rows.master_start = int(pieces[:rank].sum())

    def _factors(self, gamma: Tensor) -> Tensor:
        """All layers' factors in the order of ``_rows_of``."""
        # Consecutive layers with as many heads a group are one layer as far as factors go.
        runs = []
        per_group = [x.num_heads // x.num_kv_groups for x in self.layouts.values()]
        for size, layers in groupby(zip(per_group, self.layouts.values(), strict=True), _first):
            groups = sum(layout.num_kv_groups for _, layout in layers)
            run, gamma = gamma[: groups * size], gamma[groups * size :]
            runs.append(_split(run, groups))
        return torch.cat([*map(torch.cat, zip(*runs, strict=True)), gamma.new_ones(1)])


def _first(pair: tuple[int, Any]) -> int:
    return pair[0]


class _Rows:
    """A weight or bias, and which factor multiplies each of its rows.

    Args:
        layer: whose it is.
        read: gives the tensor as it is now.
        dim: the dimension of its rows.
        slots: int64 [rows], indices into the factors.
    """

    def __init__(
        self, layer: str, read: Callable[[], Tensor | None], dim: int, slots: Tensor
    ) -> None:
        self.layer, self.read, self.dim, self.slots = layer, read, dim, slots
        self.master_start: int | None = None
        self._local_slots: tuple[Any, Tensor] | None = None

    def check(self) -> Tensor:
        """The tensor as it is now, if it can be scaled.

        Raises:
            ValueError: if it cannot.
        """
        tensor = self.read()
        if tensor is None or tensor.ndim <= self.dim or tensor.size(self.dim) != len(self.slots):
            shape = None if tensor is None else tuple(tensor.shape)
            raise ValueError(
                f"layer {self.layer!r}: a weight has become {shape}, its layout has "
                f"{len(self.slots)} rows: make the layout of the model as it is trained, and shard "
                "with fully_shard (FSDP2), whose DTensors keep their shape"
            )
        master: Any = getattr(tensor, "main_param", None)
        if getattr(tensor, "main_param_sharded", False):
            placed = _placements(tensor) is None and (master is None or master.ndim == 1)
        else:
            placed = master is None or (
                (master.shape, _placements(master)) == (tensor.shape, _placements(tensor))
            )
        if not placed:
            raise ValueError(
                f"layer {self.layer!r}: the master copy (main_param) of a weight of shape "
                f"{tuple(tensor.shape)} is {tuple(master.shape)}: it must be sharded as the weight "
                "is, or be a flat piece of it with main_param_sharded set"
            )
        self._slots_of(tensor)
        return tensor

    def scale(self, tensor: Tensor, factors: Tensor) -> None:
        """Multiply each row by its factor, in the master copy where there is one."""
        held = local(tensor)
        shape = [-1 if dim == self.dim else 1 for dim in range(held.ndim)]
        by_row = factors.to(held.device)[self._slots_of(tensor)].view(shape)
        master = getattr(tensor, "main_param", None)
        if getattr(tensor, "main_param_sharded", False):
            # Not refreshed from the master: copies on other ranks must stay the same.
            held.mul_(by_row)
            if master is not None:
                piece = by_row.expand_as(held).flatten()[self.master_start :]
                master.mul_(piece[: master.numel()])
        elif master is None:
            held.mul_(by_row)
        else:
            master = local(master)
            master.mul_(by_row)
            # Rows that were not scaled keep their bits, even where the copy was rounded otherwise.
            held.copy_(torch.where(by_row == 1, held, master))

    def _slots_of(self, tensor: Tensor) -> Tensor:
        """The slots of the rows that this rank holds, on the tensor's device."""
        key = (tensor.device, _placements(tensor))
        if self._local_slots is None or self._local_slots[0] != key:
            slots = self.slots
            if _placements(tensor) is not None:
                slots = slots[_local_rows(tensor, self.dim)]
            self._local_slots = key, slots.to(tensor.device)
        return self._local_slots[1]


def _rows_of(layouts: Mapping[str, AttentionLayout]) -> list[_Rows]:
    """Every weight and bias of the layouts, once: query and key may be fused in it.

    Factors are those of all query heads, all key groups, all rotary query heads, and a one.
    """
    heads = sum(layout.num_heads for layout in layouts.values())
    groups = sum(layout.num_kv_groups for layout in layouts.values())
    one = 2 * heads + groups
    head, group = 0, heads
    found: dict[int, _Rows] = {}
    for name, layout in layouts.items():
        firsts = (head, group, heads + groups + head)
        for part, first in zip((layout.query, layout.key, layout.query_rope), firsts, strict=True):
            for read, dim, rows in _tensors(part):
                tensor = read()
                if tensor is None:
                    continue
                if id(tensor) not in found:
                    slots = torch.full((tensor.size(dim),), one)
                    found[id(tensor)] = _Rows(name, read, dim, slots)
                known = found[id(tensor)]
                if known.layer != name:
                    raise ValueError(
                        f"layers {known.layer!r} and {name!r} share a weight: "
                        "give QK-Clip one layout for it and observe both layers under its name"
                    )
                rows = rows.cpu()
                if known.dim != dim or (known.slots[rows] != one).any():
                    raise ValueError(f"layer {name!r}: query and key share rows of a weight")
                known.slots[rows] = first + torch.arange(len(rows))[:, None]
        head, group = head + layout.num_heads, group + layout.num_kv_groups
    return list(found.values())


def _tensors(
    part: HeadRows | None,
) -> list[tuple[Callable[[], Tensor | None], int, Tensor]]:
    """How to read the weight and the bias, the dimension of their rows, and the rows."""
    if part is None:
        return []
    bias_rows = part.rows if part.bias_rows is None else part.bias_rows
    return [(lambda: part.weight, part.dim, part.rows), (lambda: part.bias, 0, bias_rows)]


def _placements(tensor: Tensor) -> Any:
    """How a DTensor lies on its ranks; None for any other tensor."""
    placements = getattr(tensor, "placements", None)
    return None if placements is None else (tensor.device_mesh, placements)  # type: ignore[attr-defined]


def _local_rows(tensor: Any, dim: int) -> Tensor:
    """Which indices along a dimension of a DTensor this rank holds.

    Raises:
        ValueError: for a sum over ranks that was not formed, or a placement that is not known.
    """
    mesh = tensor.device_mesh
    rows = torch.arange(tensor.size(dim))
    if mesh.get_coordinate() is None:  # this rank holds nothing of it
        return rows[:0]
    for axis, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise ValueError(f"a weight has placements {tensor.placements}: reduce it first")
        if placement.is_replicate() or placement.dim % tensor.ndim != dim:
            continue
        # FSDP2 on top of tensor parallelism cuts each of that many pieces (_StridedShard).
        pieces = torch.chunk(rows, getattr(placement, "split_factor", 1))
        rows = torch.cat([_chunk(p, mesh.size(axis), mesh.get_local_rank(axis)) for p in pieces])
    if len(rows) != tensor.to_local().size(dim):
        raise ValueError(
            f"a weight of shape {tuple(tensor.shape)} has placements {tensor.placements}, of which "
            f"this rank should hold {len(rows)} rows, not {tensor.to_local().size(dim)}"
        )
    return rows


def _chunk(rows: Tensor, count: int, index: int) -> Tensor:
    chunks = torch.chunk(rows, count)
    return chunks[index] if index < len(chunks) else rows[:0]


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be above 0 and finite, got {threshold}")
