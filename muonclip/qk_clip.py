"""QK-Clip: keep every head's largest attention logit at a threshold by scaling its q and k rows.

Source: Kimi K2 technical report (arXiv 2507.20534), section 2.1. The rule for key groups shared by
several query heads (GQA) is exact per head, where the report gives none.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from muonclip.attention_layouts import AttentionLayout, HeadRows


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

    Attributes:
        max_logits: per layer, [heads]: the largest logit of the step over micro-batches and ranks,
            before clipping; -inf where none was observed.
        num_clipped: int64 scalar: heads scaled down, over all layers of this rank.
    """

    max_logits: dict[str, Tensor]
    num_clipped: Tensor


def clip_factors(max_logits: Tensor, threshold: float, num_kv_groups: int) -> ClipFactors:
    """The factors that bring each head's largest logit down to the threshold, and no other's.

    With gamma_h = min(1, τ/S_h) for head h, key group g takes the root of its heads' least gamma
    and head h's query takes gamma_h over that: its logits are multiplied by exactly gamma_h. With
    one head per group both take the root of gamma_h, as published.

    Args:
        max_logits: [heads], each head's largest logit S_h. A negative or non-finite one asks for
            nothing: its gamma is 1.
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
    largest = max_logits.to(torch.promote_types(max_logits.dtype, torch.float32))
    over = (largest > threshold) & largest.isfinite()
    # Clamped because a quotient just under one may round to just over it.
    gamma = torch.where(over, threshold / largest, 1.0).clamp(max=1)
    key = gamma.view(num_kv_groups, -1).amin(1).sqrt()
    query = gamma / key.repeat_interleave(heads // num_kv_groups)
    return ClipFactors(query, key, gamma)


class QKClip:
    """Watches the largest attention logits of a model and clips them after each optimizer step.

    In the forward pass hand each layer's maxima to ``observe``; after ``optimizer.step()`` call
    ``step()``, or ``attach`` to the optimizer once and forget about it. Works with any optimizer.
    Nothing here waits for the device.

    A weight with an attribute ``main_param`` (Megatron's float32 master copy) has that scaled, and
    is refreshed from it.

    Args:
        layouts: layer name -> where its heads' rows are.
        threshold: τ: no head's largest logit stays above it.
        process_group: ranks that hold copies of these weights and see other data (data and context
            parallel); their maxima are joined. Default: all ranks, where ``torch.distributed`` is
            initialised. Under tensor or pipeline parallelism pass the data-parallel group, since
            other ranks there hold other heads.

    Raises:
        ValueError: if there are no layouts, two layouts share a weight, or the threshold is not
            above 0.

    Attributes:
        result: what the last ``step`` returned, or None.
    """

    def __init__(
        self,
        layouts: Mapping[str, AttentionLayout],
        *,
        threshold: float = 100.0,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        if not layouts:
            raise ValueError("layouts is empty: QK-Clip has no attention layer to watch")
        _check_threshold(threshold)
        owners: dict[int, str] = {}
        for name, layout in layouts.items():
            for head_rows in _parts(layout):
                if owners.setdefault(id(head_rows.weight), name) != name:
                    raise ValueError(
                        f"layers {owners[id(head_rows.weight)]!r} and {name!r} share a weight: "
                        "give QK-Clip one layout for it and observe both layers under its name"
                    )
        self.layouts = dict(layouts)
        self.threshold = threshold
        self.process_group = process_group
        self.result: ClipResult | None = None
        # One tensor for all layers, so that joining ranks takes one collective.
        heads = [layout.num_heads for layout in self.layouts.values()]
        device = next(iter(self.layouts.values())).query.weight.device
        self._running = torch.full((sum(heads),), -math.inf, device=device)
        self._views = dict(zip(self.layouts, self._running.split_with_sizes(heads), strict=True))

    @torch.no_grad()
    def observe(self, name: str, max_logits: Tensor) -> None:
        """Take in the largest logits of one forward pass of one layer.

        Call it for every micro-batch of a step (not in evaluation: those logits would count too).
        Seeing the same forward twice, as activation recomputation does, changes nothing. Values
        that are not finite are passed over: they say nothing about the weights' scale.

        Args:
            name: the layer, as in ``layouts``.
            max_logits: [heads], any floating dtype and device; detached here.

        Raises:
            KeyError: for an unknown layer.
            ValueError: if the shape is not [heads].
        """
        if name not in self._views:
            raise KeyError(f"no layout for layer {name!r}; layers are {', '.join(self._views)}")
        running = self._views[name]
        if max_logits.shape != running.shape:
            raise ValueError(
                f"layer {name!r} has {running.numel()} heads, "
                f"got max_logits of shape {tuple(max_logits.shape)}"
            )
        seen = max_logits.detach().to(running)
        torch.maximum(running, seen.where(seen.isfinite(), -math.inf), out=running)

    @torch.no_grad()
    def step(self) -> ClipResult:
        """Join the maxima over ranks, scale the rows of heads above the threshold, start afresh.

        A collective call: every rank of the process group makes it.

        Raises:
            ValueError: if a master copy is sharded; no weight is changed then.
        """
        for name, layout in self.layouts.items():
            for head_rows in _parts(layout):
                _check_master(name, head_rows)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._running, dist.ReduceOp.MAX, group=self.process_group)
        for name, layout in self.layouts.items():
            factors = clip_factors(self._views[name], self.threshold, layout.num_kv_groups)
            _scale_rows(layout, factors)
        # Copied: the running maxima are overwritten by the next step.
        maxima = self._running.clone()
        heads = [layout.num_heads for layout in self.layouts.values()]
        self.result = ClipResult(
            dict(zip(self.layouts, maxima.split_with_sizes(heads), strict=True)),
            (maxima > self.threshold).sum(),
        )
        self._running.fill_(-math.inf)
        return self.result

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Run ``step`` after every ``optimizer.step()``; its result is then in ``result``.

        Returns:
            A handle whose ``remove()`` detaches it.
        """

        def clip(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            self.step()

        return optimizer.register_step_post_hook(clip)


def _parts(layout: AttentionLayout) -> tuple[HeadRows, ...]:
    """The layout's rows, in the order of ``ClipFactors``."""
    if layout.query_rope is None:
        return layout.query, layout.key
    return layout.query, layout.key, layout.query_rope


def _tensors(head_rows: HeadRows) -> list[Tensor]:
    return [head_rows.weight] if head_rows.bias is None else [head_rows.weight, head_rows.bias]


def _check_master(name: str, head_rows: HeadRows) -> None:
    for tensor in _tensors(head_rows):
        master = getattr(tensor, "main_param", None)
        sharded = getattr(tensor, "main_param_sharded", False)
        if sharded or (master is not None and master.shape != tensor.shape):
            raise ValueError(
                f"layer {name!r}: the master copy (main_param) of a weight of shape "
                f"{tuple(tensor.shape)} is sharded over ranks; QK-Clip needs it whole: "
                "turn the distributed optimizer off"
            )


def _scale_rows(layout: AttentionLayout, factors: ClipFactors) -> None:
    """Multiply each head's rows by its factor, in the master copy where there is one."""
    # One factor per row and one pass per tensor: query and key may be fused in it.
    scales: dict[int, tuple[Tensor, Tensor]] = {}
    for head_rows, factor in zip(_parts(layout), factors, strict=False):
        for tensor in _tensors(head_rows):
            if id(tensor) not in scales:
                scales[id(tensor)] = tensor, torch.ones(tensor.size(0), device=tensor.device)
            rows = head_rows.rows.to(tensor.device)
            scales[id(tensor)][1][rows] = factor.to(tensor.device)[:, None].expand(rows.shape)
    for tensor, scale in scales.values():
        by_row = scale.view(-1, *[1] * (tensor.ndim - 1))
        master = getattr(tensor, "main_param", None)
        if master is None:
            tensor.mul_(by_row)
        else:
            master.mul_(by_row)
            # Rows that were not scaled keep their bits, even where the copy was rounded otherwise.
            tensor.copy_(torch.where(by_row == 1, tensor, master))


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be above 0 and finite, got {threshold}")
