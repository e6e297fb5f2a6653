"""QK-Clip: keep every head's largest attention logit at or below a threshold by scaling q and k.

After an optimizer step, a head h whose largest logit S_h is above the threshold τ has its logits
multiplied by gamma_h = τ / S_h, through the rows of its query and key weights:

- one key per query head (MHA): W_q <- √gamma_h · W_q and W_k <- √gamma_h · W_k;
- MLA: the same for the parts without position (nope); the rotary part (rope) of the query takes
  gamma_h, because its key is shared by all heads and stays as it is;
- one key for a group of query heads (GQA): the key takes √(min gamma) of its heads, and the query
  of head h takes gamma_h divided by that.

Source: Kimi K2 technical report (arXiv 2507.20534), section 2.1, for MHA and MLA. The rule for GQA
is exact for each head; the report has none.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import groupby
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from muonclip.attention_layouts import AttentionLayout
from muonclip.distributed.sharding import is_dtensor, local_indices
from muonclip.hooks import (
    Handle,
    call_before_zero_grad,
    is_recording,
    untraced,
    unwrap_optimizer,
)
from muonclip.max_logits import Mask, screened_max_logits
from muonclip.row_scaling import (
    ScaledSides,
    ScalingPlan,
    locate_master_shards,
    scale_on_owners,
)
from muonclip.update import may_be_nonzero
from muonclip.warning import warn


class ClipFactors(NamedTuple):
    """Factors for the rows of one attention layer.

    Attributes:
        query: [heads], for each query head.
        key: [groups], for each key group.
        query_rope: [heads], for each rotary query (MLA): gamma, the factor on the head's logits.
    """

    query: Tensor
    key: Tensor
    query_rope: Tensor


class ClipResult(NamedTuple):
    """Result of one ``QKClip.step``. Tensors are on the weights' device: reading them waits.

    A head's largest logit lies between its entries in ``max_logits`` and ``upper_bounds``. They
    are equal where it is known exactly, which includes every head above the threshold.

    Attributes:
        max_logits: layer -> [heads]: the largest computed logit of the step, over micro-batches and
            ranks, before clipping, with additive biases; -inf if none was computed.
        num_clipped: int64 scalar: number of heads scaled down, over all layers of this rank.
        upper_bounds: layer -> [heads]: an upper bound on all logits of the step; -inf if the layer
            was not observed.
        factors: layer -> [heads]: gamma, the factor on each head's q·k; 1 if it was not clipped.
        skipped: layer -> reason why its heads are not scaled, for layers with frozen weights.
    """

    max_logits: dict[str, Tensor]
    num_clipped: Tensor
    upper_bounds: dict[str, Tensor]
    factors: dict[str, Tensor]
    skipped: dict[str, str]


def clip_factors(max_logits: Tensor, threshold: float, num_kv_groups: int) -> ClipFactors:
    """The factors that bring the largest logit of every head above the threshold down to it.

    Args:
        max_logits: [heads], each head's largest logit S_h. Heads with a negative or non-finite one
            are not scaled. With additive biases, pass ``unbiased_max_logits`` of
            ``screened_max_logits``.
        threshold: τ, above 0.
        num_kv_groups: number of key groups; divides heads.

    Returns:
        Factors in at least float32; exactly 1 for groups with no head above τ.

    Raises:
        ValueError: if the threshold is not above 0 or groups do not divide heads.
    """
    check_threshold(threshold)
    heads = max_logits.numel()
    if max_logits.ndim != 1 or num_kv_groups < 1 or heads % num_kv_groups:
        raise ValueError(
            f"max_logits of shape {tuple(max_logits.shape)} must be [heads], "
            f"a multiple of num_kv_groups={num_kv_groups}"
        )
    return split_factor(_gamma(max_logits, threshold), num_kv_groups)


def _gamma(max_logits: Tensor, threshold: float) -> Tensor:
    """gamma_h = min(1, τ / S_h), [heads]."""
    largest = max_logits.to(torch.promote_types(max_logits.dtype, torch.float32))
    is_over = (largest > threshold) & largest.isfinite()
    # Clamped because a quotient just below one may round to just above it.
    return torch.where(is_over, threshold / largest, 1.0).clamp(max=1)


def split_factor(gamma: Tensor, num_kv_groups: int, sides: ScaledSides = "both") -> ClipFactors:
    """Divide each head's gamma between its query and the key of its group.

    Args:
        gamma: [heads].
        num_kv_groups: number of key groups; divides heads.
        sides: the sides that can be scaled. ``"key"`` requires one group per head, ``"none"``
            that gamma is 1.
    """
    if sides in ("query", "none"):
        return ClipFactors(gamma, gamma.new_ones(num_kv_groups), gamma)
    if sides == "key":
        return ClipFactors(torch.ones_like(gamma), gamma, gamma)
    key = gamma.view(num_kv_groups, -1).amin(1).sqrt()
    query = gamma / key.repeat_interleave(gamma.numel() // num_kv_groups)
    return ClipFactors(query, key, query_rope=gamma)


def row_factors(gamma: Tensor, plan: ScalingPlan) -> Tensor:
    """The factors of all layers in the order of ``ScalingPlan``, from each head's gamma."""

    def rule(name: str) -> tuple[int, ScaledSides]:
        layout = plan.layouts[name]
        return layout.num_heads // layout.num_kv_groups, plan.sides[name]

    factors = []
    # Consecutive layers with the same rule are computed at once.
    for (heads_per_group, sides), names in groupby(plan.layouts, rule):
        groups = sum(plan.layouts[name].num_kv_groups for name in names)
        heads = groups * heads_per_group
        factors.append(split_factor(gamma[:heads], groups, sides))
        gamma = gamma[heads:]
    return torch.cat([*map(torch.cat, zip(*factors, strict=True)), gamma.new_ones(1)])


class QKClip:
    """Observes the largest attention logits of a model and clips them after each optimizer step.

    In the forward pass, pass each layer's queries and keys to ``observe_attention``, or the maxima
    that an attention kernel returns to ``observe``. Call ``step()`` after each
    ``optimizer.step()``, or ``attach`` the clip to the optimizer once. Works with any optimizer.
    ``muonclip.integrations`` observes the models of other libraries.

    Weights may be DTensors (FSDP2, tensor parallelism) with any sharding: each rank scales its
    shard. If a weight has an attribute ``main_param`` (the float32 master copy of ``MuonClip`` and
    of Megatron), the master copy is scaled and the weight refreshed from it. With
    ``main_param_sharded`` too, each rank of ``process_group`` has a flat shard of the master, one
    after the other, as in Megatron's distributed optimizer: each rank scales its shard of the
    master, and the whole weight until the optimizer refreshes it. With ``MuonClip``'s
    ``shard_state``, owners scale their parts of the master and send the weights to all ranks.

    Only trained weights are scaled, by their ``requires_grad`` at each step; an attached clip skips
    layers that its optimizer does not train. If only the query or only the key is trained, it takes
    the whole factor if that is exact: the query always, the key if it has a single query head. All
    other layers are skipped and reported, by a warning and in ``ClipResult.skipped``. Under PEFT's
    adapters the effective weights are scaled: DoRA (without dropout) and IA3 through their vectors;
    LoRA over a frozen weight cannot be scaled exactly and is refused. Only forward passes with the
    adapters that are active when ``step`` is called count: passes with adapters disabled or
    switched (the reference model of DPO) run other weights than those to scale.

    A copy of a model that refers to its clip (``copy.deepcopy``, ``torch.save``) gets a separate
    clip, which scales the weights of the copy. It is not attached to an optimizer and has no hooks.

    Args:
        layouts: layer name -> rows of its heads.
        threshold: τ: no head's largest logit stays above it, unless an additive bias alone is.
        exact: compute the exact largest logit of every head in ``observe_attention``, for a
            monitor. Otherwise only for heads whose bound is above the threshold; the clip is the
            same.
        process_group: ranks that have copies or shards of these weights and process other data
            (data and context parallel); their maxima are combined. Default: the ranks of the
            weights' meshes if all are DTensors, otherwise all ranks, if ``torch.distributed`` is
            initialized. Under Megatron's tensor or pipeline parallelism pass the data-parallel
            group, because the other ranks have other heads.
        warn_unobserved: warn once about layers that are trained but never observed and so not
            clipped, because the model is in eval mode or another model is trained. If weights have
            ``grad`` when ``step`` is called, those without one count as not trained.

    Raises:
        ValueError: if there are no layouts, two layouts share a weight, query and key share rows,
            the threshold is not above 0, or a layer is trained in a way that cannot be clipped
            exactly (LoRA over a frozen weight, weight norm).

    Attributes:
        exact: as above; may be changed at any time.
        result: the result of the last ``step``, or None.
    """

    def __init__(
        self,
        layouts: Mapping[str, AttentionLayout],
        *,
        threshold: float = 100.0,
        exact: bool = False,
        process_group: "dist.ProcessGroup | None" = None,
        warn_unobserved: bool = True,
    ) -> None:
        if not layouts:
            raise ValueError("layouts is empty: QK-Clip has no attention layer to watch")
        if not all(isinstance(layout, AttentionLayout) for layout in layouts.values()):
            raise TypeError(f"layouts must map names to AttentionLayout, got {layouts!r:.80}")
        check_threshold(threshold)
        self.layouts = dict(layouts)
        self.threshold = threshold
        self.exact = exact
        self.process_group = process_group
        self.warn_unobserved = warn_unobserved
        self._lost_group = False
        ScalingPlan(self.layouts)  # raises now the errors that each step would
        self._set_up()

    def _set_up(self) -> None:
        """State that copies do not share."""
        self.result: ClipResult | None = None
        self._heads: dict[str, slice] = {}  # of each layer, among those of all layers
        num_heads = 0
        for name, layout in self.layouts.items():
            self._heads[name] = slice(num_heads, num_heads + layout.num_heads)
            num_heads += layout.num_heads
        self._maxima = _Maxima(num_heads)
        self._log = _ObservationLog(self.layouts)
        self._plan: ScalingPlan | None = None  # made by each step if parameters were replaced
        self._handles: list[Handle] = []
        self._step_hooks: OrderedDict[int, Callable[[ClipResult], None]] = OrderedDict()
        self._connected: Any = None  # the ranks of the weights' meshes
        self._inactive = ""  # the reason why the clip does nothing
        self._warned: set[tuple[str, str]] = set()  # layer, reason

    @property
    def _device(self) -> torch.device:
        return next(iter(self.layouts.values())).query.weight.device

    @property
    def _weights(self) -> list[Tensor]:
        return [x.weight for layout in self.layouts.values() for x in (layout.query, layout.key)]

    def __getstate__(self) -> dict[str, Any]:
        names = ("layouts", "threshold", "exact", "warn_unobserved", "_inactive")
        state = {name: getattr(self, name) for name in names}
        return {**state, "_lost_group": self._lost_group or self.process_group is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, process_group=None)
        self._set_up()
        self._inactive = state["_inactive"]
        if self._lost_group:
            self._inactive = "it is a copy, and its process group cannot be copied"

    @torch.no_grad()
    def observe(self, name: str, max_logits: Tensor) -> None:
        """Observe the largest logits of one forward pass of one layer.

        For attention kernels that return them: flex_attention's ``max_scores``, Transformer
        Engine's ``return_max_logit``. Call it for every micro-batch of a step, but not in
        evaluation, whose logits would count too; only forward passes in inference mode and in
        exports (``torch.export``, ``torch.jit.trace``) are ignored. Observing a forward pass twice,
        as activation recomputation does, changes nothing. Non-finite values are ignored, because
        they say nothing about the weights' scale. Logits with an additive bias (position bias,
        ALiBi) require ``observe_attention``, because their maxima do not show the contribution of
        q·k.

        Args:
            name: the layer, as in ``layouts``.
            max_logits: [heads], any floating dtype and device; detached here. Under tensor
                parallelism with DTensors, those of this rank.

        Raises:
            KeyError: for an unknown layer.
            ValueError: if the shape is not [heads].
            RuntimeError: within ``torch.vmap``.
        """
        heads = self._heads_on_rank(name, max_logits.numel())
        if max_logits.ndim != 1 or heads is None:
            raise ValueError(
                f"layer {name!r} has {self.layouts[name].num_heads} heads, "
                f"got max_logits of shape {tuple(max_logits.shape)}"
            )
        if self._ignores_forwards:
            return
        check_not_in_vmap(name)
        self._record(name, heads, max_logits, max_logits, max_logits)

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
        """Observe the queries and keys of one forward pass of one layer, as they enter attention.

        Computes the bound max‖q‖ · max‖k‖ · scale of every head, and exact logits only for heads
        whose bound is above the threshold (for all with ``exact``). Call it when ``observe`` would
        be called. Empty batches and sequences are ignored. Leave out a soft cap on the logits: only
        the logits before the cap follow the weights.

        A bias b that is added to the logits, as a floating mask or as ``bias``, is not scaled:
        gamma = min (τ - b) / (S - b) over the entries with S > τ and b < τ is the largest factor on
        q·k that brings all of them to τ or below. Entries whose bias alone reaches τ do not count,
        because no factor on q·k could bring them below it.

        Args:
            name: the layer, as in ``layouts``.
            query: [..., heads, queries, d], after any rotary embedding; detached here. Under tensor
                parallelism with DTensors, the heads of this rank.
            key: [..., groups, keys, d]; groups divides heads.
            scale: factor on the products; default: 1/√d.
            mask: boolean, floating or flex_attention's, as in ``max_logits``.
            bias: floating, added to the logits, as in ``max_logits``.
            causal: a query attends to keys up to its own index.

        Raises:
            KeyError: for an unknown layer.
            ValueError: if the shapes disagree or do not match the layer.
            RuntimeError: within ``torch.vmap``.
        """
        heads = None if query.ndim < 3 else self._heads_on_rank(name, query.size(-3))
        if heads is None:
            num_heads = self._layout(name).num_heads
            raise ValueError(
                f"layer {name!r} has {num_heads} heads: query must be [..., {num_heads}, queries, "
                f"d], got {tuple(query.shape)}"
            )
        if self._ignores_forwards:
            return
        check_not_in_vmap(name)
        self._track_backward(query)
        screened = screened_max_logits(
            query.detach(),
            key.detach(),
            self.threshold,
            scale=scale,
            mask=mask,
            bias=bias,
            causal=causal,
            exact=self.exact,
        )
        is_bound_enough = (screened.bounds <= self.threshold) & (not self.exact)
        bounds = torch.where(is_bound_enough, screened.bounds, screened.max_logits)
        self._record(name, heads, screened.max_logits, bounds, screened.unbiased_max_logits)

    def step(self, *, clip: bool | Tensor = True) -> ClipResult:
        """Clip the heads above the threshold, by the maxima of all forward passes since last time.

        A collective call: every rank of the process group makes it. On an accelerator the host does
        not wait for the device.

        Args:
            clip: False changes no weight and counts no head as clipped. For a step that the
                optimizer skipped: its logits are reported and do not count in the next step. May be
                a boolean scalar on the accelerator.

        Raises:
            ValueError: if a weight has another number of rows than its layout, is trained in a way
                that cannot be clipped exactly, or has a master copy whose sharding is not known.
                Then no weight is changed.
        """
        return self._step(clip)

    @torch.no_grad()
    def _step(self, clip: bool | Tensor, optimizer: Optimizer | None = None) -> ClipResult:
        """``step``, also after a step of the optimizer that the clip is attached to."""
        if self._inactive:
            if ("", self._inactive) not in self._warned:
                self._warned.add(("", self._inactive))
                warn(f"this QKClip does nothing: {self._inactive}")
            maxima = self._maxima.empty("cpu")
            return self._finish(maxima, torch.ones_like(maxima[0]), {})
        plan = self._checked_plan()
        skipped = dict(plan.skipped)
        if optimizer is not None:
            skipped |= _not_trained_by(optimizer, plan)
        locate_master_shards(plan.tensors, self.process_group, self._device)
        self._warn_skipped(skipped)
        adapters = {name: layout.active_adapters() for name, layout in self.layouts.items()}
        self._log.select(adapters)
        maxima = self._combine_ranks(self._total_maxima(adapters))
        _, bounds, unbiased = maxima
        if isinstance(clip, Tensor) and clip.device.type == "cpu":
            clip = bool(clip)
        # torch.distributed.checkpoint creates state by a step with a learning rate of zero.
        rates = [1] if optimizer is None else [g.get("lr") for g in optimizer.param_groups]
        if clip is not False and any(map(may_be_nonzero, rates)):
            self._warn_unobserved(bounds, plan, skipped, attached=optimizer is not None)
        gamma = _gamma(unbiased, self.threshold)
        for name in skipped:
            gamma[self._heads[name]] = 1
        if isinstance(clip, Tensor):
            gamma = gamma.where(clip.to(gamma.device), 1)
        elif not clip:
            gamma = torch.ones_like(gamma)
        # On an accelerator this is not read, because the host would wait for it.
        is_clipped = bool((gamma < 1).any()) if gamma.device.type == "cpu" else None
        on_owners = [tensor for tensor in plan.tensors if tensor.has_master_on_owners]
        if is_clipped is not False or on_owners:
            factors = row_factors(gamma, plan)
            for tensor in plan.tensors:
                if not tensor.has_master_on_owners:
                    tensor.scale(factors)
            scale_on_owners(on_owners, factors, is_clipped=is_clipped)
        return self._finish(maxima, gamma, skipped)

    def _finish(self, maxima: Tensor, gamma: Tensor, skipped: dict[str, str]) -> ClipResult:
        """Publish the result of a step and start the next one."""
        largest, bounds, _ = (self._by_layer(x) for x in maxima)
        num_clipped = (gamma < 1).sum()
        self.result = ClipResult(largest, num_clipped, bounds, self._by_layer(gamma), skipped)
        self._maxima.reset(maxima.device)
        self._log.start_step()
        for hook in tuple(self._step_hooks.values()):
            hook(self.result)
        return self.result

    def _by_layer(self, values: Tensor) -> dict[str, Tensor]:
        return {name: values[heads] for name, heads in self._heads.items()}

    def attach(self, optimizer: Optimizer) -> Handle:
        """Run ``step`` after every ``optimizer.step()``; its result is then in ``result``.

        Errors of ``step`` are raised before the optimizer's step, which then changes nothing.
        Layers whose query and key weights the optimizer does not have are skipped and reported. If
        several optimizers train the model's attention, call ``step`` after the steps of all of them
        instead.

        Nothing is clipped after a step that was skipped because a gradient was not finite
        (``MuonClip(nonfinite="skip")``, ``GradScaler``), and its logits do not count in the next
        step. If GradScaler does not call ``step`` at all, the optimizer's ``zero_grad`` discards
        them.

        A clip is attached to one optimizer at a time. Attaching it again moves it; attaching
        another clip of the same weights to the same optimizer replaces this one. A copied optimizer
        has no clip attached.

        Args:
            optimizer: any torch optimizer, or Accelerate's or Lightning's wrapper of one.

        Returns:
            A handle whose ``remove()`` detaches the clip.

        Raises:
            TypeError: if it is not a torch optimizer.
        """
        for handle in [h for h in self._handles if isinstance(h, _Attachment)]:
            handle.remove()
        attachment = _Attachment(self, optimizer)
        self._add_handle(attachment)
        return attachment

    def _add_handle(self, handle: Handle) -> None:
        """Let ``remove`` undo an ``attach`` or ``watch``, and activate the clip again."""
        if not self._lost_group:
            self._inactive = ""
        self._handles = [h for h in self._handles if h.is_active] + [handle]

    def remove(self) -> None:
        """Undo every ``watch`` and ``attach`` of this clip. They can be repeated later."""
        self._deactivate("it was removed")

    def _deactivate(self, reason: str, *, detach: bool = True) -> None:
        """``remove``, with the reason that ``step`` gives in its warning from now on.

        Without ``detach`` the clip stays attached, so that the steps of its optimizer warn, too.
        """
        kept: list[Handle] = []
        if not detach:
            kept = [h for h in self._handles if isinstance(h, _Attachment)]
        for handle in self._handles:
            if handle not in kept:
                handle.remove()
        self._handles = kept
        self._inactive = self._inactive or reason

    def register_step_post_hook(self, hook: Callable[[ClipResult], None]) -> RemovableHandle:
        """Call ``hook(result)`` at the end of every ``step``.

        Returns:
            A handle whose ``remove()`` unregisters the hook.
        """
        handle = RemovableHandle(self._step_hooks)
        self._step_hooks[handle.id] = hook
        return handle

    # ------------------------------------------------------------------ observations

    def _layout(self, name: str) -> AttentionLayout:
        if name not in self.layouts:
            raise KeyError(f"no layout for layer {name!r}; layers are {', '.join(self.layouts)}")
        return self.layouts[name]

    @property
    def _ignores_forwards(self) -> bool:
        """Whether forward passes do not count now.

        Those in inference mode and in exports cannot be part of training.
        """
        return bool(self._inactive) or torch.is_inference_mode_enabled() or is_recording()

    def _heads_on_rank(self, name: str, num_heads: int) -> slice | None:
        """The heads of a layer that this rank computes, among those of all layers.

        Args:
            name: the layer.
            num_heads: their number: all of the layer, or under tensor parallelism with DTensors
                those whose rows this rank has.

        Returns:
            None if that is neither number.
        """
        query, heads = self._layout(name).query, self._heads[name]
        if num_heads == heads.stop - heads.start:
            return heads
        if not is_dtensor(query.weight):
            return None
        # FSDP2 may have sharded the weight again since the forward pass used it.
        for first_axis in range(query.weight.device_mesh.ndim):
            rows = local_indices(query.weight, query.dim, first_axis)
            has_rows = torch.isin(query.rows.cpu(), rows).all(1)
            first = int(has_rows.int().argmax())
            if has_rows.sum() == num_heads == has_rows[first : first + num_heads].sum():
                return slice(heads.start + first, heads.start + first + num_heads)
        return None

    def _record(
        self, name: str, heads: slice, largest: Tensor, bounds: Tensor, unbiased: Tensor
    ) -> None:
        adapters = self.layouts[name].active_adapters()
        self._log.passes.setdefault(name, set()).add(adapters)
        values = torch.stack([largest, bounds, unbiased]).detach()
        self._maxima.update(adapters, heads, values, self._device)

    def _note_eval_mode(self, name: str) -> None:
        """Record that a layer ran in eval mode, which is not observed, for ``step``'s warning."""
        self._log.unobserved_modes[name] = "in eval mode"

    def _track_backward(self, *tensors: Tensor) -> None:
        """Call ``_note_backward`` when a backward pass reaches one of these tensors."""
        for tensor in tensors:
            if self._handles and tensor.requires_grad:
                tensor.register_hook(self._note_backward)  # type: ignore[no-untyped-call]
                return

    def _note_backward(self, _gradient: Tensor | None = None) -> None:
        """Record that a backward pass runs."""
        self._maxima.backward_ran = True

    @torch.no_grad()
    def _discard_graded(self) -> None:
        """Discard the logits of forward passes whose gradients are discarded.

        Called by ``zero_grad`` of an attached optimizer. Logits without a backward pass so far are
        kept, because a loop may call ``zero_grad`` between its forward and backward passes.
        """
        self._maxima.discard_graded()

    def _total_maxima(self, adapters: "Mapping[str, _Adapters]") -> Tensor:
        """The maxima of the forward passes that ran the weights to scale, [3, heads].

        Only those with the adapters that are active now: scaling an adapter does not change the
        logits of a reference model that is the same model without it.
        """
        totals = {x: self._maxima.total(x, self._device) for x in set(adapters.values())}
        if len(totals) == 1:
            return next(iter(totals.values()))
        return torch.cat([totals[adapters[n]][:, heads] for n, heads in self._heads.items()], 1)

    def _combine_ranks(self, maxima: Tensor) -> Tensor:
        """The maxima over all ranks that have copies or shards of the weights."""
        if not _is_distributed():
            return maxima
        weights = self._weights
        if self.process_group is None and all(hasattr(w, "device_mesh") for w in weights):
            from muonclip.distributed.groups import ConnectedRanks, groups_of

            groups = groups_of(weights, None, {})
            if self._connected is None and groups:
                self._connected = ConnectedRanks(groups)
            return maxima if self._connected is None else self._connected.largest(maxima)
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self.process_group)
        return maxima

    # ------------------------------------------------------------------ weights

    def _checked_plan(self) -> ScalingPlan:
        """The plan for the model's present parameters.

        Raises:
            ValueError: as ``step``.
        """
        if self._plan is None or not self._plan.is_current():
            self._plan = ScalingPlan(self.layouts)
        for tensor in self._plan.tensors:
            tensor.check()
        return self._plan

    # ------------------------------------------------------------------ warnings

    def _warn_skipped(self, reasons: Mapping[str, str]) -> None:
        new = {
            name: reason for name, reason in reasons.items() if (name, reason) not in self._warned
        }
        self._warned |= set(new.items())
        for reason in dict.fromkeys(new.values()):
            names = _enumerate([name for name in new if new[name] == reason])
            warn(f"QK-Clip does not scale {names}: {reason}")

    def _warn_unobserved(
        self, bounds: Tensor, plan: ScalingPlan, skipped: Mapping[str, str], *, attached: bool
    ) -> None:
        """Warn once about layers that are trained but never observed.

        Layers without gradients took no part in the step, unless gradients are elsewhere (Megatron)
        or were cleared before.
        """
        missing = self._log.missing_layers(skipped)
        trained = {tensor.layer for tensor in plan.tensors if tensor.has_gradient}
        if trained or attached:
            missing = [name for name in missing if name in trained]
        if not missing or not self.warn_unobserved:
            return
        if _is_distributed():  # another rank may have observed them
            is_unobserved = bounds.isneginf().cpu()
            observed = {name for name in missing if not is_unobserved[self._heads[name]].all()}
            self._log.ever_observed |= observed
            missing = [name for name in missing if name not in observed]
        if missing:
            self._log.reported |= set(missing)
            modes = sorted({mode for n, mode in self._log.unobserved_modes.items() if n in missing})
            cause = "no forward pass of the watched model reached it"
            if modes:
                remedy = "call model.train() before training"
                if modes == [_OTHER_ADAPTERS]:
                    remedy = "activate those that are trained before the step"
                cause = f"it ran {' and '.join(modes)} only; {remedy}"
            warn(
                f"QK-Clip did not observe {_enumerate(missing)} before this step and cannot clip "
                f"there: {cause}",
            )


_ATTACHMENTS = "_qk_clip_attachments"  # attribute of an optimizer


def attached_clips(optimizer: Optimizer) -> list[QKClip]:
    """The clips that are attached to an optimizer, in the order in which they were."""
    return [attachment.clip for attachment in optimizer.__dict__.get(_ATTACHMENTS, ())]


class _Attachment(Handle):
    """Runs a clip after every step of an optimizer.

    Steps that were skipped because a gradient was not finite are recognized by
    ``MuonClip.skipped_steps`` and by ``found_inf``, which ``torch.amp.GradScaler`` sets on fused
    optimizers. For other optimizers GradScaler does not call ``step``, and calls of ``zero_grad``
    show which gradients were discarded.
    """

    def __init__(self, clip: QKClip, optimizer: Any) -> None:
        optimizer = unwrap_optimizer(optimizer)
        self.clip = clip
        self._skipped_before: int | Tensor | None = None
        for other in tuple(getattr(optimizer, _ATTACHMENTS, ())):
            if not {*map(id, clip._weights)}.isdisjoint(map(id, other.clip._weights)):
                other.clip._deactivate(
                    "a newer QKClip of these weights was attached to the optimizer"
                )
        hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # Stored in the optimizer, so that both end together. Not copied with the optimizer.
        optimizer.__dict__.setdefault(_ATTACHMENTS, []).append(self)
        restore = call_before_zero_grad(optimizer, clip._discard_graded)
        super().__init__([partial(self._forget, optimizer), restore, *(h.remove for h in hooks)])

    @untraced
    def _before_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if not self.clip._inactive:
            self.clip._checked_plan()  # raises errors before the step changes anything
        self._skipped_before = getattr(optimizer, "skipped_steps", None)

    @untraced
    def _after_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        applied: bool | Tensor = True
        if self._skipped_before is not None:
            applied = getattr(optimizer, "skipped_steps", 0) == self._skipped_before
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            applied = applied & (found_inf == 0)
        self.clip._step(applied, optimizer)

    def _forget(self, optimizer: Optimizer) -> None:
        attachments = optimizer.__dict__.get(_ATTACHMENTS, [])
        if self in attachments:
            attachments.remove(self)
        if not attachments:
            optimizer.__dict__.pop(_ATTACHMENTS, None)


# The active adapters of a layer's query, key and rotary query.
_Adapters: TypeAlias = tuple[tuple[str, ...], ...]


class _Maxima:
    """The maxima of all forward passes since the last step, for the heads of all layers.

    float32 [3, heads]: largest logits, upper bounds on them, and largest unbiased logits, which
    determine gamma. One tensor, so that combining ranks takes one collective; one for each
    combination of active adapters, because a step scales only those that are active then.

    Maxima of forward passes whose gradients have been computed are kept separately, because
    ``zero_grad`` discards those gradients if ``GradScaler`` skips a step.
    """

    def __init__(self, num_heads: int) -> None:
        self._num_heads = num_heads
        # Allocated in the first forward pass, where the model then is.
        self._recent: dict[_Adapters, Tensor] = {}
        self._graded: dict[_Adapters, Tensor] = {}
        self.backward_ran = False

    def empty(self, device: torch.device | str) -> Tensor:
        """The maxima of no forward pass."""
        return torch.full((3, self._num_heads), -math.inf, dtype=torch.float32, device=device)

    def reset(self, device: torch.device) -> None:
        """Forget all forward passes."""
        known = self._recent.keys() | self._graded.keys()
        self._recent = {adapters: self.empty(device) for adapters in known}
        self._graded = {}
        self.backward_ran = False

    def update(
        self, adapters: _Adapters, heads: slice, values: Tensor, device: torch.device
    ) -> None:
        """Take the maximum with the values of a forward pass, [3, heads of the layer].

        Changes ``values``. Entries that are not finite do not count.
        """
        self._separate_graded()
        known = self._recent.get(adapters)
        maxima = self.empty(device) if known is None else known.to(device)  # the model may move
        self._recent[adapters] = maxima
        recent = maxima[:, heads]
        values = values.to(recent)
        values[2].masked_fill_(~values[0].isfinite(), -math.inf)
        torch.maximum(recent, values.where(values.isfinite(), -math.inf), out=recent)

    def discard_graded(self) -> None:
        """Forget the forward passes whose gradients have been computed."""
        self._separate_graded()
        self._graded.clear()

    def total(self, adapters: _Adapters, device: torch.device) -> Tensor:
        """The maxima of all forward passes with these adapters."""
        total = self.empty(device)
        for maxima in (self._recent, self._graded):
            if adapters in maxima:
                total = torch.maximum(total, maxima[adapters].to(device))
        return total

    def _separate_graded(self) -> None:
        if self.backward_ran:
            for adapters, recent in self._recent.items():
                graded = self._graded.get(adapters)
                if graded is not None:
                    recent = torch.maximum(recent, graded.to(recent.device))
                self._graded[adapters] = recent
            self._recent.clear()
            self.backward_ran = False


# A layer may be left out of some steps by chance (layer drop, batches without images).
_STEPS_BEFORE_A_LAYER_IS_MISSED = 3
_OTHER_ADAPTERS = "with other adapters"


class _ObservationLog:
    """A record of observed layers, to find those that never are."""

    def __init__(self, layers: Iterable[str]) -> None:
        self._layers, self._steps = tuple(layers), 0
        self.ever_observed: set[str] = set()
        self.reported: set[str] = set()
        self.start_step()

    def start_step(self) -> None:
        self.passes: dict[str, set[_Adapters]] = {}  # since the last step, by active adapters
        self.observed: set[str] = set()  # layers with passes that count, after ``select``
        self.unobserved_modes: dict[str, str] = {}  # layer -> mode in which it ran instead

    def select(self, adapters: Mapping[str, _Adapters]) -> None:
        """Let only those forward passes count that ran with each layer's given adapters."""
        self.observed = {name for name, used in self.passes.items() if adapters[name] in used}
        for name in self.passes.keys() - self.observed:
            self.unobserved_modes[name] = _OTHER_ADAPTERS

    def missing_layers(self, skipped: Mapping[str, str]) -> list[str]:
        """Layers to report at the end of a step, except skipped and reported ones.

        All unobserved layers if some ran in another mode and none was observed; otherwise layers
        that never were: at once if this step observed none, after a few steps if it observed
        others.
        """
        self._steps += 1
        self.ever_observed |= self.observed
        candidates = set(self._layers) - self.observed - set(skipped) - self.reported
        if self.observed or not self.unobserved_modes:
            candidates -= self.ever_observed
        if self.observed and self._steps < _STEPS_BEFORE_A_LAYER_IS_MISSED:
            return []
        return [name for name in self._layers if name in candidates]


def _not_trained_by(optimizer: Optimizer, plan: ScalingPlan) -> dict[str, str]:
    """Layers that have no tensor in common with an optimizer -> reason why they are not scaled."""
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {
        x.layer
        for x in plan.tensors
        # Shards of a master copy may all be on other ranks.
        if x.has_sharded_master or any(id(p) in updated for p in x.optimizer_tensors)
    }
    reason = (
        "the optimizer that this clip is attached to does not have its query and key weights; "
        "attach the clip to the optimizer that trains them"
    )
    return {x.layer: reason for x in plan.tensors if x.layer not in trained}


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _enumerate(names: list[str], limit: int = 5) -> str:
    more = len(names) - limit
    shown = [name or "the model itself" for name in names[:limit]]
    return ", ".join(shown) + (f" and {more} more layers" if more > 0 else "")


def check_not_in_vmap(layer: str) -> None:
    """Raise within ``torch.vmap``, whose tensors have no values that could be compared."""
    if torch.compiler.is_compiling():  # which cannot trace the next line
        return
    functorch: Any = torch._C._functorch
    transforms = functorch.get_interpreter_stack() or ()
    if any(transform.key() == functorch.TransformType.Vmap for transform in transforms):
        raise RuntimeError(
            f"layer {layer!r}: QK-Clip cannot observe a forward pass within torch.vmap, as for "
            "gradients of single samples: run the model on whole batches, or without QK-Clip "
            "(clip.remove(); qk_clip_threshold=None of for_model)"
        )


def check_threshold(threshold: object, option: str = "threshold") -> None:
    """Raise for a threshold that is not a positive number; ``option`` is its name in messages."""
    if not isinstance(threshold, Real):
        raise TypeError(f"{option} must be a number, got {threshold!r}")
    if not 0 < float(threshold) < math.inf:
        raise ValueError(f"{option} must be above 0 and finite, got {threshold}")
