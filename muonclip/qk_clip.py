"""QK-Clip: keep every head's largest attention logit at a threshold by scaling its q and k rows.

Source: Kimi K2 technical report (arXiv 2507.20534), section 2.1. The rule for key groups shared by
several query heads (GQA) is exact per head, where the report gives none.
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from muonclip.attachment import Attachment, Handle, has_rate, tensors_of
from muonclip.attention_layouts import AttentionLayout
from muonclip.max_logits import Mask, screened_max_logits
from muonclip.precision import get_master
from muonclip.row_scaling import Rows, ScalingPlan, Share, plan_key, read_sides


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
    """Result of one ``QKClip.step``. Tensors on the weights' device: reading them waits.

    A head's largest logit lies between its entries in ``max_logits`` and ``upper_bounds``. Where
    they are equal it is known exactly, and so it is for every head over the threshold.

    Attributes:
        max_logits: per layer, [heads]: the largest logit that was computed in the step, over
            micro-batches and ranks, before clipping, additive biases included; -inf where none was.
        num_clipped: int64 scalar: heads scaled down, over all layers of this rank.
        upper_bounds: per layer, [heads]: what no logit of the step exceeded; -inf where the layer
            was not observed.
        factors: per layer, [heads]: gamma, the factor on each head's q·k; 1 where nothing changed.
        skipped: layer -> why its heads are not scaled, for layers whose weights are frozen.
    """

    max_logits: dict[str, Tensor]
    num_clipped: Tensor
    upper_bounds: dict[str, Tensor]
    factors: dict[str, Tensor]
    skipped: dict[str, str]


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
    return split_factor(_gamma(max_logits, threshold), num_kv_groups)


def _gamma(max_logits: Tensor, threshold: float) -> Tensor:
    """[heads]: the factor on each head's logits that brings its largest down to the threshold."""
    largest = max_logits.to(torch.promote_types(max_logits.dtype, torch.float32))
    over = (largest > threshold) & largest.isfinite()
    # Clamped because a quotient just under one may round to just over it.
    return torch.where(over, threshold / largest, 1.0).clamp(max=1)


def split_factor(gamma: Tensor, num_kv_groups: int, share: Share = "both") -> ClipFactors:
    """Divide each head's factor between its query and the key of its group.

    Args:
        gamma: [heads].
        num_kv_groups: key groups; divides heads.
        share: which of the two can be scaled. ``"key"``: as many groups as heads. ``"none"``: gamma
            is 1.
    """
    if share in ("query", "none"):
        return ClipFactors(gamma, gamma.new_ones(num_kv_groups), gamma)
    if share == "key":
        return ClipFactors(torch.ones_like(gamma), gamma, gamma)
    key = gamma.view(num_kv_groups, -1).amin(1).sqrt()
    query = gamma / key.repeat_interleave(gamma.numel() // num_kv_groups)
    return ClipFactors(query, key, gamma)


class QKClip:
    """Watches the largest attention logits of a model and clips them after each optimizer step.

    In the forward pass hand each layer's queries and keys to ``observe_attention``, or maxima that
    the attention kernel gives to ``observe``; after ``optimizer.step()`` call ``step()``, or
    ``attach`` to the optimizer once and forget about it. Works with any optimizer.
    ``muonclip.integrations`` does the observing for models of other libraries.

    Weights may be DTensors (FSDP2, tensor parallelism), sharded in any way: each rank scales its
    part. A weight with an attribute ``main_param`` (the float32 master copy of ``MuonClip`` and
    of Megatron) has that scaled, and is refreshed from it. With ``main_param_sharded`` too, the
    ranks of ``process_group`` have consecutive flat pieces of the master, as in Megatron's
    distributed optimizer: each scales its own, and the weight itself until the optimizer refreshes
    it.

    Only trained weights are scaled, as ``requires_grad`` is at each step; an attached clip leaves
    layers alone that its optimizer does not have. If only the query or only
    the key is trained, it takes the whole factor where that is exact: the query always, the key
    where no other query head shares it. Other layers are left alone, and reported by a warning and
    in ``ClipResult.skipped``. In PEFT's adapters the effective weights are scaled: DoRA and IA3
    through their vectors; LoRA over a frozen weight cannot be scaled exactly and is refused.

    A copy of a model that refers to its clip (``copy.deepcopy``, ``torch.save``) gets a clip of its
    own, which scales the weights of the copy; it is not attached to an optimizer and has no hooks.

    Args:
        layouts: layer name -> where its heads' rows are.
        threshold: τ: no head's largest logit stays above it, unless an additive bias alone is.
        exact: compute the exact largest logit of every head in ``observe_attention``, for a
            monitor. Else only of heads whose bound is over the threshold; the clip is the same.
        process_group: ranks that have copies or shards of these weights and see other data (data
            and context parallel); their maxima are joined. Default: the ranks of the weights'
            meshes where all are DTensors, otherwise all ranks, if ``torch.distributed`` is
            initialized. Under Megatron's tensor or pipeline parallelism
            pass the data-parallel group, since other ranks there have other heads.
        warn_unobserved: warn once about layers that are trained but never observed, so that they
            are not clipped: because the model is in eval mode, or another model is trained. Where
            weights have ``grad`` when ``step`` is called, those without one are not trained.

    Raises:
        ValueError: if there are no layouts, two layouts share a weight, query and key share rows,
            the threshold is not above 0, or a layer is trained in a way that cannot be clipped
            exactly (LoRA over a frozen weight, weight norm).

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
        warn_unobserved: bool = True,
    ) -> None:
        if not layouts:
            raise ValueError("layouts is empty: QK-Clip has no attention layer to watch")
        _check_threshold(threshold)
        self.layouts = dict(layouts)
        self.threshold = threshold
        self.exact = exact
        self.process_group = process_group
        self.warn_unobserved = warn_unobserved
        self.result: ClipResult | None = None
        self._lost_group = False
        self._plan: ScalingPlan | None = None
        self._current_plan()  # raises now what each step would
        self._slices, start = {}, 0
        for name, layout in self.layouts.items():
            self._slices[name] = slice(start, start + layout.num_heads)
            start += layout.num_heads
        self._set_up()

    def _set_up(self) -> None:
        """State that copies do not share."""
        self._plan = None  # parameters may be replaced (fully_shard): do not keep them
        self._handles: list[Handle] = []
        self._step_hooks: OrderedDict[int, Callable[[ClipResult], None]] = OrderedDict()
        self._connected: Any = None  # the ranks of the weights' meshes
        self._inactive = ""  # why the clip does nothing
        self._warned: set[tuple[str, ...]] = set()
        # Allocated by the first forward pass, on the device where the model then is.
        self._running = self._nothing_seen("meta")
        # Logits of forward passes whose gradients have been computed since.
        self._graded = self._nothing_seen("meta")
        self._backward_ran = False
        # For the warning about layers that are not observed: steps so far, layers observed so far
        # and since the last step, and layers that ran without being observed since then.
        self._steps = 0
        self._ever_observed: set[str] = set()
        self._observed: set[str] = set()
        self._passed_over: dict[str, str] = {}

    def _nothing_seen(self, device: "torch.device | str") -> Tensor:
        """Largest logits, their bounds, and largest unbiased logits, which decide the factors.

        One tensor for all layers, so that joining ranks takes one collective.
        """
        heads = sum(layout.num_heads for layout in self.layouts.values())
        return torch.full((3, heads), -math.inf, dtype=torch.float32, device=device)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.layouts.values())).query.weight.device

    def __getstate__(self) -> dict[str, Any]:
        names = ("layouts", "threshold", "exact", "_slices", "_inactive", "warn_unobserved")
        state = {name: getattr(self, name) for name in names}
        return {**state, "_lost_group": self._lost_group or self.process_group is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, process_group=None, result=None)
        self._set_up()
        self._inactive = state["_inactive"]
        if self._lost_group:
            self._inactive = "it is a copy, and its process group cannot be copied"

    @torch.no_grad()
    def observe(self, name: str, max_logits: Tensor) -> None:
        """Take in the largest logits of one forward pass of one layer.

        For attention kernels that give them: flex_attention's ``max_scores``, Transformer Engine's
        ``return_max_logit``. Call it for every micro-batch of a step (not in evaluation: those
        logits would count too; only forward passes in inference mode are ignored). Seeing the same
        forward twice, as activation recomputation does, changes nothing. Values that are not finite
        are passed over: they say nothing about the weights' scale. Logits with an additive
        bias (position bias, ALiBi) go to ``observe_attention``: their maxima do not say what q·k
        contributed.

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
        bound is over the threshold (or for all, with ``exact``). Call it as ``observe``. Empty
        batches and sequences are passed over. A soft cap on the logits is left out: the logits
        that count are those that follow the weights, before the cap.

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
        if self._ignores_forwards:
            return
        self._track_backward(query)
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

    def step(self, *, clip: bool | Tensor = True) -> ClipResult:
        """Join the maxima over ranks, scale the rows of heads above the threshold, start afresh.

        A collective call: every rank of the process group makes it. On an accelerator nothing
        here waits for it.

        Args:
            clip: False changes no weight, and counts none as clipped: for a step that the optimizer
                left out, whose logits are to be seen and must not count in the next step's. May be
                a boolean scalar on the accelerator.

        Raises:
            ValueError: if a weight has other rows than when its layout was made, is trained in a
                way that cannot be clipped exactly, or has a master copy in an unknown place; no
                weight is changed then.
        """
        return self._step(clip)

    @torch.no_grad()
    def _step(self, clip: bool | Tensor, optimizer: Optimizer | None = None) -> ClipResult:
        """As ``step``, after a step of an optimizer that the clip is attached to."""
        if self._inactive:
            self._warn_once((self._inactive,), f"this QKClip does nothing: {self._inactive}")
            return self._finish(self._nothing_seen("cpu"), None, {})
        plan = self._check()
        skipped = dict(plan.skipped)
        if optimizer is not None:
            skipped |= _not_in(optimizer, plan)
        self._place_masters(plan.rows)
        self._report_skipped(skipped)
        self._move()
        running = torch.maximum(self._running, self._graded)
        running = self._join_ranks(running)
        if isinstance(clip, Tensor) and clip.device.type == "cpu":
            clip = bool(clip)
        if clip is not False and (optimizer is None or has_rate(optimizer)):
            self._report_unobserved(running[1], plan, skipped, attached=optimizer is not None)
        gamma = _gamma(running[2], self.threshold)
        for name in skipped:
            gamma[self._slices[name]] = 1
        if isinstance(clip, Tensor):
            gamma = gamma.where(clip.to(gamma.device), 1)
        elif not clip:
            gamma = torch.ones_like(gamma)
        # Whether any is over is not read on an accelerator, which that would wait for.
        if gamma.device.type != "cpu" or (gamma < 1).any():
            factors = self._factors(gamma, plan.shares)
            for rows in plan.rows:
                rows.scale(factors)
        return self._finish(running, gamma, skipped)

    def _finish(self, running: Tensor, gamma: Tensor | None, skipped: dict[str, str]) -> ClipResult:
        largest, bounds, _ = running
        gamma = torch.ones_like(largest) if gamma is None else gamma
        self.result = ClipResult(
            {name: largest[heads] for name, heads in self._slices.items()},
            (gamma < 1).sum(),
            {name: bounds[heads] for name, heads in self._slices.items()},
            {name: gamma[heads] for name, heads in self._slices.items()},
            skipped,
        )
        self._running = torch.full_like(running, -math.inf)
        self._graded = torch.full_like(running, -math.inf)
        self._backward_ran = False
        self._observed, self._passed_over = set(), {}
        for hook in tuple(self._step_hooks.values()):
            hook(self.result)
        return self.result

    def attach(self, optimizer: Optimizer) -> Handle:
        """Run ``step`` after every ``optimizer.step()``; its result is then in ``result``.

        What ``step`` would raise is raised before the optimizer's step, which then changes nothing.
        Layers none of whose weights the optimizer has are left alone and reported: where several
        optimizers train the model's attention, call ``step`` after the steps of all instead.

        Nothing is clipped after a step that changed nothing because a gradient was not finite
        (``MuonClip(nonfinite="skip")``, ``GradScaler``), and its logits do not count in the next
        step. They are dropped by the optimizer's ``zero_grad`` where GradScaler does not call
        ``step`` at all.

        A clip is attached to one optimizer at a time. Attaching it again moves it; attaching
        another clip of the same weights to the same optimizer replaces this one. A copied optimizer
        has no clip attached.

        Args:
            optimizer: any torch optimizer, or Accelerate's or Lightning's wrapper of one.

        Returns:
            A handle whose ``remove()`` detaches it.

        Raises:
            TypeError: for what is not a torch optimizer.
        """
        for handle in [h for h in self._handles if isinstance(h, Attachment)]:
            handle.remove()
        attachment = Attachment(self, optimizer)
        self._keep(attachment)
        return attachment

    def _keep(self, handle: Handle) -> None:
        """Let ``remove`` undo this, too. ``watch`` calls it with the handle that it returns."""
        if not self._lost_group:
            self._inactive = ""
        self._handles = [h for h in self._handles if h.is_active] + [handle]

    def remove(self) -> None:
        """Undo every ``watch`` and ``attach`` of this clip, which can be repeated later."""
        self._retire("it was removed")

    def _retire(self, reason: str) -> None:
        """As ``remove``; from now on ``step`` warns that the clip does nothing, and why."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inactive = self._inactive or reason

    def register_step_post_hook(self, hook: Callable[[ClipResult], None]) -> RemovableHandle:
        """Call ``hook(result)`` at the end of every ``step``.

        Returns:
            A handle whose ``remove()`` ends that.
        """
        handle = RemovableHandle(self._step_hooks)
        self._step_hooks[handle.id] = hook
        return handle

    # ------------------------------------------------------------------ observations

    def _layout(self, name: str) -> AttentionLayout:
        if name not in self.layouts:
            raise KeyError(f"no layout for layer {name!r}; layers are {', '.join(self.layouts)}")
        return self.layouts[name]

    @torch.no_grad()
    def _forget_discarded(self) -> None:
        """Drop the logits of forward passes whose gradients are discarded unused.

        ``zero_grad`` of an attached optimizer calls it. Logits that no backward pass followed yet
        are kept: a loop may call ``zero_grad`` between its forward and backward passes.
        """
        self._separate_graded()
        self._graded = torch.full_like(self._graded, -math.inf)

    def _track_backward(self, *tensors: Tensor) -> None:
        """Note when a backward pass reaches one of these tensors of the forward pass, so that
        ``_forget_discarded`` can tell which logits it followed."""
        for tensor in tensors:
            if self._handles and tensor.requires_grad:
                tensor.register_hook(self._note_backward)  # type: ignore[no-untyped-call]
                return

    def _note_unobserved(self, name: str, reason: str) -> None:
        """Take note of a forward pass of a layer that is not observed, for the warning of ``step``.

        Args:
            name: the layer.
            reason: in which mode it ran, e.g. ``"eval mode"``.
        """
        self._passed_over[name] = reason

    def _note_backward(self, _gradient: Tensor | None = None) -> None:
        """Take note that a backward pass runs or has run."""
        self._backward_ran = True

    def _separate_graded(self) -> None:
        """Put aside the logits seen before the last backward pass."""
        if self._backward_ran:
            self._move()
            self._graded = torch.maximum(self._graded, self._running)
            self._running = torch.full_like(self._running, -math.inf)
            self._backward_ran = False

    @property
    def _ignores_forwards(self) -> bool:
        """Whether forward passes do not count now: nothing in inference mode can be trained."""
        return bool(self._inactive) or torch.is_inference_mode_enabled()

    def _move(self) -> None:
        """Follow a model that moved to another device since."""
        device = self._device
        if self._running.is_meta:
            self._running, self._graded = self._nothing_seen(device), self._nothing_seen(device)
        elif self._running.device != device:
            self._running, self._graded = self._running.to(device), self._graded.to(device)

    def _take(self, name: str, largest: Tensor, bounds: Tensor, unbiased: Tensor) -> None:
        if self._ignores_forwards:
            return
        self._move()
        self._separate_graded()
        self._observed.add(name)
        running = self._running[:, self._slices[name]]
        seen = torch.stack([largest, bounds, unbiased]).detach().to(running)
        seen[2].masked_fill_(~seen[0].isfinite(), -math.inf)
        torch.maximum(running, seen.where(seen.isfinite(), -math.inf), out=running)

    # ------------------------------------------------------------------ weights

    def _current_plan(self) -> ScalingPlan:
        """The tensors to scale now: parameters may have been replaced, frozen or unfrozen since."""
        sides = read_sides(self.layouts)
        if self._plan is None or self._plan.key != plan_key(sides):
            self._plan = ScalingPlan(self.layouts, sides)
        return self._plan

    def _check(self) -> ScalingPlan:
        """The current plan.

        Raises:
            ValueError: as ``step``.
        """
        plan = self._current_plan()
        for rows in plan.rows:
            rows.check()
        return plan

    def _report_skipped(self, reasons: Mapping[str, str]) -> None:
        by_reason: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            if (name, reason) not in self._warned:
                self._warned.add((name, reason))
                by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            text = f"QK-Clip does not scale {_listed(names)}: {reason}"
            self._warn_once((reason, *names), text, stacklevel=6)

    def _report_unobserved(
        self, bounds: Tensor, plan: ScalingPlan, skipped: Mapping[str, str], *, attached: bool
    ) -> None:
        """Warn once about layers that no forward pass shows to the clip.

        If a step saw nothing at all, at once. A single layer may be left out of some steps (layer
        drop, batches without images), so that it is reported after a few. Layers without gradients
        took no part in the step, unless gradients are elsewhere (Megatron) or were cleared before.
        """
        self._steps += 1
        self._ever_observed |= self._observed
        missing = [n for n in self.layouts if n not in self._observed and n not in skipped]
        never = [n for n in missing if n not in self._ever_observed]
        if self._observed:
            missing = never if self._steps >= _STEPS_BEFORE_A_LAYER_IS_MISSED else []
        elif not self._passed_over:
            missing = never
        trained = {rows.layer for rows in plan.rows if rows.has_gradient}
        if trained or attached:
            missing = [n for n in missing if n in trained]
        missing = [n for n in missing if ("unobserved", n) not in self._warned]
        if not missing or not self.warn_unobserved:
            return
        if dist.is_available() and dist.is_initialized():  # another rank may have observed them
            unseen = bounds.isneginf().cpu()
            unseen_by_all = [n for n in missing if unseen[self._slices[n]].all()]
            self._ever_observed.update(set(missing).difference(unseen_by_all))
            missing = unseen_by_all
        if missing:
            self._warned |= {("unobserved", name) for name in missing}
            modes = sorted({self._passed_over[n] for n in missing if n in self._passed_over})
            cause = "no forward pass of the watched model reached it"
            if modes:
                cause = f"it ran in {' and '.join(modes)} only; call model.train() before training"
            warnings.warn(
                f"QK-Clip did not observe {_listed(missing)} before this step and cannot clip "
                f"there: {cause}",
                stacklevel=5,
            )

    def _warn_once(self, key: tuple[str, ...], text: str, stacklevel: int = 5) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(text, stacklevel=stacklevel)

    def _join_ranks(self, running: Tensor) -> Tensor:
        """The maxima of all ranks that have copies or shards of the weights."""
        if not (dist.is_available() and dist.is_initialized()):
            return running
        parts = [part for x in self.layouts.values() for part in (x.query, x.key)]
        weights = [part.weight for part in parts]
        if self.process_group is None and all(hasattr(w, "device_mesh") for w in weights):
            from muonclip.distributed.groups import ConnectedRanks, groups_of

            groups = groups_of(weights, None, {})
            if self._connected is None and groups:
                self._connected = ConnectedRanks(groups)
            return running if self._connected is None else self._connected.largest(running)
        dist.all_reduce(running, dist.ReduceOp.MAX, group=self.process_group)
        return running

    def _place_masters(self, all_rows: list[Rows]) -> None:
        """Find out, once, where the rank's flat pieces of sharded master copies begin."""
        sharded = [
            (rows, rows.tensor)
            for rows in all_rows
            if getattr(rows.tensor, "main_param_sharded", False)
        ]
        if not any(rows.master_start is None for rows, _ in sharded):
            return
        masters = [get_master(tensor) for _, tensor in sharded]
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

    def _factors(self, gamma: Tensor, shares: Mapping[str, Share]) -> Tensor:
        """All layers' factors in the order of ``ScalingPlan``."""
        # Consecutive layers with as many heads a group are one layer as far as factors go.
        runs = []
        kinds = [(x.num_heads // x.num_kv_groups, shares[n]) for n, x in self.layouts.items()]
        for (size, share), layers in groupby(
            zip(kinds, self.layouts.values(), strict=True), _first
        ):
            groups = sum(layout.num_kv_groups for _, layout in layers)
            run, gamma = gamma[: groups * size], gamma[groups * size :]
            runs.append(split_factor(run, groups, share))
        return torch.cat([*map(torch.cat, zip(*runs, strict=True)), gamma.new_ones(1)])


# A layer that is left out of some steps may be missing in the first ones by chance.
_STEPS_BEFORE_A_LAYER_IS_MISSED = 3


def _not_in(optimizer: Optimizer, plan: ScalingPlan) -> dict[str, str]:
    """Layers none of whose tensors an optimizer has -> why they are not scaled."""
    known = {id(p) for p in tensors_of(optimizer)}
    inside = {
        rows.layer
        for rows in plan.rows
        # Pieces of a sharded master copy may all be on other ranks.
        if rows.is_master_sharded or any(id(p) in known for p in rows.sources)
    }
    reason = (
        "the optimizer that this clip is attached to does not have its query and key weights; "
        "attach the clip to the optimizer that trains them"
    )
    return {rows.layer: reason for rows in plan.rows if rows.layer not in inside}


def _listed(names: list[str], limit: int = 5) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more layers" if more > 0 else "")


def _first(pair: tuple[tuple[int, Share], Any]) -> tuple[int, Share]:
    return pair[0]


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be above 0 and finite, got {threshold}")
