"""MuonClip's optimizer: Muon for matrices, AdamW for the rest, one ``step``."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from muonclip import saved_state, validation
from muonclip.adamw import AdamWParam, adamw_step
from muonclip.distributed.sharding import Sharding, local_gradient, local_tensor
from muonclip.matrix_layouts import MatrixLayout
from muonclip.muon import MuonParam, step_local
from muonclip.orthogonalize import AdjustLR, Coefficients
from muonclip.precision import (
    moment_dtype,
    needs_master,
    refresh_master,
    rounds_stochastically,
    set_master,
    write_back,
)
from muonclip.update import WeightDecayMode

if TYPE_CHECKING:
    import torch.distributed as dist

    from muonclip.distributed.groups import ConnectedRanks
    from muonclip.distributed.muon import DistributedMuon
    from muonclip.distributed.sharding import Sharding

NonFinite = Literal["raise", "skip", "ignore"]


class MuonClip(Optimizer):
    r"""Muon for the matrices of a model and AdamW for its other parameters.

    For each matrix :math:`W` of n x m with gradient :math:`G`:
    :math:`M \leftarrow M + (1 - \mu)(G - M)`;
    :math:`O = \mathrm{NS}(G + \mu (M - G))` (Nesterov; otherwise :math:`\mathrm{NS}(M)`);
    :math:`W \leftarrow W - \eta\,(0.2\sqrt{\max(n, m)}\, O + \lambda W)`.
    NS is scale-free, so :math:`M` is ``torch.optim.Muon``'s exponential average where the papers
    write the sum :math:`\mu M + G`. Source: Kimi K2 technical report (arXiv 2507.20534),
    algorithm 1; Moonlight (arXiv 2502.16982), section 2. QK-Clip is apart, in ``QKClip``.

    Every parameter group holds one algorithm, since learning rate schedulers act on groups: a
    group without the option ``algorithm`` ("muon" or "adamw") is split into one of each by the
    rule of ``choose_algorithm``: matrices [n, m] and stacks of matrices [E, n, m] to Muon, all
    else, and by name (when given named parameters) embeddings, output heads and routers, to
    AdamW. AdamW's group takes ``adamw_lr`` and ``adamw_weight_decay`` as its ``lr`` and
    ``weight_decay``, where they are given, and the first of ``adamw_betas`` as its ``momentum``
    (the second as ``adamw_beta2``). Schedulers then move each group from its own start, and those
    that cycle momentum (OneCycleLR, CyclicLR) cycle AdamW's beta1 too. Every group has a copy of a
    tensor ``lr`` for itself: change it there.
    ``param_groups(model)`` also looks at module types and is the better start for a whole model.

    The group option ``layout``, a ``MatrixLayout``, says which matrices of the model each of the
    group's Muon parameters stores, where it is not one: fused ones, heads, transposed storage.

    Works on plain tensors, under DDP, and on DTensors (FSDP2, tensor parallelism) of any placement:
    a sharded matrix is rebuilt on one rank, which orthogonalizes it and returns each rank its
    part. With ``process_group`` the ranks that hold copies of the same tensors share the work.

    A parameter without a gradient is left alone: no decay, no state. State is
    ``momentum_buffer`` (Muon) or ``step``, ``exp_avg``, ``exp_avg_sq`` (AdamW), and ``master``
    with ``master_weights``; created at the first step with a gradient.

    Args:
        params: tensors, (name, tensor) pairs, or groups (dicts) of either.
        lr: learning rate :math:`\eta`, a number or a tensor of one element, which a captured graph
            reads in each replay.
        weight_decay: decoupled weight decay :math:`\lambda`.
        momentum: :math:`\mu`, in [0, 1).
        nesterov: look ahead along the momentum.
        ns_coefficients: Newton-Schulz coefficients: a name, (a, b, c), or such triples.
        ns_steps: Newton-Schulz steps.
        ns_dtype: dtype of Newton-Schulz; default: bfloat16 on accelerators, float32 on a CPU.
        eps: guard of the normalization against 0/0, relative to an update's largest entry, below 1.
            A zero update stays zero; any other is normalized whatever its scale. Scaling the
            gradients, and so clipping their norm, does not change the size of Muon's updates, only
            the weight of this step's gradient in the momentum.
        adjust_lr: scale by shape: ``"match_rms_adamw"``, ``"original"``, ``"spectral"`` or
            ``"none"``; see ``update_scale``.
        update_rms: what ``"match_rms_adamw"`` matches.
        weight_decay_mode: of Muon's groups: ``"decoupled"``, ``"cautious"``, ``"independent"`` or
            ``"l2"``; see ``muonclip.update.decay_and_apply``.
        momentum_warmup_steps: steps over which the momentum rises linearly from
            ``momentum_warmup_start``; 0: none.
        momentum_warmup_start: where it begins.
        momentum_dtype: dtype of the momentum: bfloat16, float32 or float64; default: the
            parameter's, or float32 for float16 parameters and with ``master_weights`` or
            ``stochastic_rounding``.
        master_weights: keep a float32 copy of each parameter of lower precision, step that, and
            round it into the parameter. The copy is also ``parameter.main_param``. Entries of a
            parameter that are written to between steps, e.g. by ``load_state_dict`` of the model,
            replace those of the copy at the next step.
        stochastic_rounding: round bfloat16 parameters up or down at random instead of to nearest,
            so that small updates add up without a master copy. Copies of a parameter on several
            ranks round alike.
        nonfinite: of gradients with an infinity or NaN: ``"raise"``, ``"skip"`` the whole step, or
            ``"ignore"`` and use them. With the first two nothing changes in such a step.
            ``"raise"`` does not wait for an accelerator: there, the step is skipped and the next
            one raises.
        capturable: let the step be captured in a CUDA graph: nothing is read on the host.
        adamw_lr: AdamW's learning rate; default: ``lr``.
        adamw_betas: AdamW's decay rates of the two moments.
        adamw_eps: AdamW's epsilon.
        adamw_weight_decay: AdamW's decoupled weight decay; default: ``weight_decay``.
        maximize: ascend instead of descend.
        process_group: ranks that hold copies of the plain tensors and reduced their gradients
            (DDP); each then orthogonalizes a share of the matrices. Default: everyone does all.
        shardings: for plain tensors that are parts of larger ones, a ``Sharding`` each.

    Each option above ``process_group`` may be set per group (``capturable`` and ``nonfinite`` for
    all alike); what a group sets wins over the constructor.

    Attributes:
        skipped_steps: steps left out for a gradient that was not finite; a number, or a tensor on
            the accelerator.

    Raises:
        TypeError, ValueError: for an option out of range, or a parameter that is complex, sparse,
            given twice, or sent to Muon without being a non-empty matrix or stack of matrices.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-4,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = "quintic",
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        eps: float = 1e-7,
        adjust_lr: AdjustLR = "match_rms_adamw",
        update_rms: float = 0.2,
        weight_decay_mode: WeightDecayMode = "decoupled",
        momentum_warmup_steps: int = 0,
        momentum_warmup_start: float = 0.85,
        momentum_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        nonfinite: NonFinite = "raise",
        capturable: bool = False,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        maximize: bool = False,
        process_group: "dist.ProcessGroup | None" = None,
        shardings: "Mapping[Tensor, Sharding] | None" = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "eps": eps,
            "adjust_lr": adjust_lr,
            "update_rms": update_rms,
            "weight_decay_mode": weight_decay_mode,
            "momentum_warmup_steps": momentum_warmup_steps,
            "momentum_warmup_start": momentum_warmup_start,
            "momentum_dtype": momentum_dtype,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "nonfinite": nonfinite,
            "capturable": capturable,
            "layout": None,
            "adamw_lr": adamw_lr,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
            "maximize": maximize,
        }
        validation.options(defaults)
        validation.group(process_group)
        self.process_group = process_group
        self.shardings = dict(shardings or {})
        self.skipped_steps: int | Tensor = 0
        self._distributed_muon: DistributedMuon | None = None
        self._pending: _PendingError | None = None
        self._seen: list[tuple[Tensor, torch.Size]] = []
        self._groups: list[dist.ProcessGroup] | None = None
        self._connected: ConnectedRanks | None = None
        self._made = False
        self._warned_of_shapes = False
        super().__init__(params, defaults)
        self._made = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as two groups if it mixes Muon's and AdamW's parameters.

        Args:
            param_group: ``params`` and any option; see the class.

        Raises:
            TypeError, ValueError: as the constructor; nothing is added then.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"param_group must be a dict with 'params', got {param_group!r:.80}")
        options = {**self.defaults, **param_group}
        validation.options(options)
        if options.get("algorithm") is None:
            validation.splittable()
        params, names = options.pop("params"), options.pop("param_names", None)
        if names is not None:  # a group that has been in an optimizer
            params = list(zip(names, params, strict=True))
        entries = validation.entries(params, len(self.param_groups))
        validation.new_entries(entries, self.param_groups)
        algorithm = options.pop("algorithm", None)
        divided = validation.divide(entries, algorithm)
        for entry in divided.get("muon", ()):
            validation.matrix(entry, self._shape(entry.param), options["layout"])
            if algorithm is None and entry.name is None and not self._warned_of_shapes:
                self._warned_of_shapes = True
                # At the line that makes the optimizer, or adds the group.
                warnings.warn(_BY_SHAPE, stacklevel=2 if self._made else 4)

        for algorithm, members in divided.items():
            group = {**options, "algorithm": algorithm, "updates": 0}
            if algorithm == "adamw":
                group["layout"] = None
                group |= self._adamw_options(param_group)
            # Schedulers change tensors in place: no two groups may share one, nor a list.
            group = {option: _own(value) for option, value in group.items()}
            if members and members[0].name is not None:
                group["params"] = [(entry.name, entry.param) for entry in members]
            else:
                group["params"] = [entry.param for entry in members]
            super().add_param_group(group)
            for option in validation.RESOLVED:
                del group[option]
        self._remember_parameters()

    def _adamw_options(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """AdamW's options under the names that schedulers know: beta1 is the momentum."""
        beta1, beta2 = self.defaults["adamw_betas"]
        if "adamw_betas" in param_group:
            beta1, beta2 = param_group["adamw_betas"]
        elif param_group.get("algorithm") == "adamw":
            beta1 = param_group.get("momentum", beta1)
            beta2 = param_group.get("adamw_beta2", beta2)
        return {
            "lr": self._adamw_option("lr", param_group),
            "weight_decay": self._adamw_option("weight_decay", param_group),
            "momentum": beta1,
            "adamw_beta2": beta2,
        }

    def _adamw_option(self, option: str, param_group: dict[str, Any]) -> Any:
        """AdamW's lr or weight_decay: the group's word before the constructor's."""
        for source in (param_group, self.defaults):
            for key in (f"adamw_{option}", option):
                if source.get(key) is not None:
                    return source[key]
        raise AssertionError("unreachable: the defaults have every option")

    def _shape(self, param: Tensor) -> tuple[int, ...]:
        """Shape of the whole parameter, of which this rank may have a part."""
        sharding = self.shardings.get(param)
        return tuple(param.shape) if sharding is None else sharding.shape

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the model and returns the loss; called once, with gradients
                enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: if a gradient is sparse, or not finite (see ``nonfinite``); nothing is
                updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.raise_if_found()
        muon: list[MuonParam] = []
        adamw_groups: list[tuple[dict[str, Any], list[Tensor]]] = []
        refusal: Exception | None = None
        try:
            self._check_groups()
            self._check_parameters()
            muon, adamw_groups = self._work()
        except (RuntimeError, TypeError, ValueError) as error:
            refusal = error  # raised once the other ranks know of it
        if not muon and not adamw_groups and refusal is None:
            self._warn_without_gradients()
        flags = self._exchange_flags(muon, refusal)
        if flags.refused is not None:
            raise refusal or RuntimeError(
                f"another rank refused this step before anything was updated: {flags.refused}"
            )
        if flags.idle:
            self._complete_state()
            return loss
        found = flags.nonfinite
        if found is not None and found.device.type == "cpu":
            if found:
                return self._skip(loss)
            found = None
        for group in self.param_groups:
            group["updates"] += 1
        self._step_muon(muon, found)
        for group, params in adamw_groups:
            self._step_adamw(group, params, found)
        return loss

    def _warn_without_gradients(self) -> None:
        """Warn of a first step that finds no gradient: it may never find one."""
        groups = self.param_groups
        if any(g["updates"] for g in groups) or not any(g["params"] for g in groups):
            return
        warnings.warn(
            "MuonClip's first step finds no gradient of any of its parameters and changes nothing. "
            "If the model was wrapped or sharded after the optimizer was made, the optimizer has "
            "the parameters of before: make it afterwards",
            stacklevel=5,
        )

    # ------------------------------------------------------------------ what there is to do

    def _work(self) -> "tuple[list[MuonParam], list[tuple[dict[str, Any], list[Tensor]]]]":
        """Muon's parameters that have a gradient, and AdamW's by group; with their state."""
        muon: list[MuonParam] = []
        adamw_groups = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["algorithm"] == "muon":
                muon += [self._item(p, group, len(muon) + i) for i, p in enumerate(params)]
            elif params:
                adamw_groups.append((group, params))
        return muon, adamw_groups

    def _item(self, param: Tensor, group: dict[str, Any], number: int) -> "MuonParam":
        state = self._state_of(param, group)
        held = local_tensor(param)
        target = _target(held, state)
        gradient = local_gradient(param)
        if group["maximize"]:
            gradient = -gradient
        if group["weight_decay_mode"] == "l2" and group["weight_decay"]:
            gradient = gradient.to(target.dtype).add(target, alpha=group["weight_decay"])
        return MuonParam(
            param, held, target, gradient, local_tensor(state["momentum_buffer"]), group,
            self._shape(param), (group["updates"], number),
        )  # fmt: skip

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state, created if missing, as the parameter's device and dtype need it."""
        state: dict[str, Any] = self.state[param]
        device = local_tensor(param).device
        for name, value in list(state.items()):
            if (
                local_tensor(value).device != device
            ):  # the model was moved, or a step loaded from a file
                state[name] = value.to(device)
                if name == "master":
                    set_master(param, state, state[name])
        master_needed = needs_master(group, param)
        if master_needed and "master" not in state:
            set_master(param, state, param.detach().to(torch.float32, copy=True))
        elif not master_needed and "master" in state:  # the model was converted
            set_master(param, state, None)
        if state.keys() <= {"master"}:  # a master may be there before anything is learned
            dtype = moment_dtype(group, param)
            if group["algorithm"] == "muon":
                state["momentum_buffer"] = torch.zeros_like(param, dtype=dtype)
            else:
                # Where torch's fused AdamW reads it: on the device, so that nothing waits.
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
                state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
        return state

    def _remember_parameters(self) -> None:
        self._seen = [(p, p.shape) for group in self.param_groups for p in group["params"]]
        self._groups = None

    def _check_groups(self) -> None:
        """Raise for options without an effect, and for gradients that cannot be used."""
        capturing = _is_capturing()
        for group in self.param_groups:
            validation.resolved(group, self.defaults)
            if capturing:
                validation.has_gradients(group)
            validation.gradients(group)

    def _check_parameters(self) -> None:
        """Raise for parameters that were replaced or changed their shape, and cannot be updated as
        they are now."""
        now = [p for group in self.param_groups for p in group["params"]]
        if len(now) != len(self._seen) or any(
            p is not before or p.shape != shape
            for p, (before, shape) in zip(now, self._seen, strict=True)
        ):
            seen = dict(self._seen)
            for group in self.param_groups:
                for index, p in enumerate(group["params"]):
                    validation.changed(group, index, seen.get(p), self._shape(p))
            self._remember_parameters()

    def _complete_state(self) -> None:
        """Create the state of every trainable parameter that has none."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and not p.is_meta:
                    self._state_of(p, group)

    # ------------------------------------------------------------------ agreement of the ranks

    def _exchange_flags(self, items: "list[MuonParam]", refusal: Exception | None) -> "_Flags":
        """The flags of this step, of all ranks that must take it together.

        An accelerator's flags are read on the host only where the step waits for it anyway, to plan
        the ranks' work, or may be no update.
        """
        ignore = self.param_groups[0]["nonfinite"] == "ignore"
        first = not any(group["updates"] for group in self.param_groups)
        moves = not first or any(_may_be_nonzero(group["lr"]) for group in self.param_groups)
        self._find_groups()
        if ignore and moves and not (first and self._groups):
            return _Flags(None, None if refusal is None else str(refusal), idle=False)
        gradients = self._gradients() if refusal is None else {}
        device = next(iter(gradients), self._device())
        busy = moves or any(g.count_nonzero() for group in gradients.values() for g in group)
        fits = self._distributed_muon is None or self._distributed_muon.matches(items)
        found = torch.zeros((), dtype=torch.float32, device=device)
        if not ignore:
            for tensors in gradients.values():
                found = torch.maximum(found, _any_nonfinite(tensors).to(device))
        refused = None if refusal is None else str(refusal)
        if self._connected is not None:
            known = (refusal is not None, bool(busy), not fits)
            flags = torch.stack([found, *(torch.full_like(found, flag) for flag in known)])
            flags = self._connected.largest(flags)
            found = flags.unbind()[0]
            if device.type == "cpu" or self._distributed_muon is None or not moves:
                _, any_refused, busy, replan = map(bool, flags.tolist())
                if any_refused:
                    refused = self._connected.first_error(refused)
                if replan:  # together, where one of the ranks has other gradients than before
                    self._distributed_muon = None
        idle = not busy
        if not ignore and device.type != "cpu" and refused is None and not idle:
            self.skipped_steps = self.skipped_steps + found
            if self.param_groups[0]["nonfinite"] == "raise":
                self._pending = _PendingError(found)
        return _Flags(None if ignore else found, refused, idle)

    def _gradients(self) -> dict[torch.device, list[Tensor]]:
        """This rank's parts of all gradients, by device."""
        by_device = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and (gradient := local_gradient(p)).numel():
                    by_device[gradient.device].append(gradient)
        return by_device

    def _device(self) -> torch.device:
        """The device of the parameters, or that of the process group on a rank without any."""
        for group in self.param_groups:
            for p in group["params"]:
                return local_tensor(p).device
        if self.process_group is not None:
            backend = torch.distributed.get_backend(self.process_group)
            if backend == "nccl":
                return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _find_groups(self) -> None:
        """Find, once, the groups in which this rank shares parameters with others.

        Ranks work on parts or copies of the same parameters there, so that all ranks that are
        connected through them take or leave out a step together.
        """
        if self._groups is not None:
            return
        params = [p for group in self.param_groups for p in group["params"]]
        self._groups, self._connected, self._distributed_muon = [], None, None
        if (
            self.shardings
            or self.process_group is not None
            or any(hasattr(p, "device_mesh") for p in params)
        ):
            from muonclip.distributed.groups import ConnectedRanks, groups_of

            self._groups = groups_of(params, self.process_group, self.shardings)
            if self._groups:
                self._connected = ConnectedRanks(self._groups)

    def _skip(self, loss: float | None) -> float | None:
        self.skipped_steps = self.skipped_steps + 1
        if self.param_groups[0]["nonfinite"] == "raise":
            raise RuntimeError(self._describe_nonfinite())
        return loss

    def _describe_nonfinite(self) -> str:
        labels = [
            validation.label(group, index)
            for group in self.param_groups
            for index, p in enumerate(group["params"])
            if p.grad is not None and not local_gradient(p).isfinite().all()
        ]
        whose = labels[0] if labels else "a parameter on another rank"
        others = f" (and {len(labels) - 1} others)" if len(labels) > 1 else ""
        return f"the gradient of {whose}{others} is not finite; nothing was updated. " + _ADVICE

    # ------------------------------------------------------------------ Muon

    def _step_muon(self, items: "list[MuonParam]", found: Tensor | None) -> None:
        if self._connected is None:
            step_local(items, found)
            return
        from muonclip.distributed.muon import DistributedMuon

        assert self._groups is not None
        if self._distributed_muon is None or not self._distributed_muon.matches(items):
            self._distributed_muon = DistributedMuon(
                items, self._groups, self._connected, self.process_group, self.shardings
            )
        self._distributed_muon.step(items, found)

    # ------------------------------------------------------------------ AdamW

    def _step_adamw(
        self, group: dict[str, Any], params: list[Tensor], found: Tensor | None
    ) -> None:
        states = [self._state_of(p, group) for p in params]
        held = [local_tensor(p) for p in params]
        targets = []
        for p, own, state in zip(params, held, states, strict=True):
            target = _target(own, state)
            targets.append(target.float() if rounds_stochastically(group, p) else target)
        rows = []
        for p, target, state in zip(params, targets, states, strict=True):
            if target.numel():
                average, square = local_tensor(state["exp_avg"]), local_tensor(state["exp_avg_sq"])
                rows.append(
                    AdamWParam(
                        target, local_gradient(p), average, square, local_tensor(state["step"])
                    )
                )
            else:
                # Counted on empty shards too: a checkpoint keeps one rank's step for all.
                state["step"] += 1 if found is None else 1 - found
        adamw_step(
            rows,
            lr=group["lr"],
            beta1=group["momentum"],
            beta2=group["adamw_beta2"],
            weight_decay=group["weight_decay"],
            eps=group["adamw_eps"],
            maximize=group["maximize"],
            found_inf=found,
        )
        write_back(
            [
                (target, own, (group["updates"], number))
                for number, (own, target) in enumerate(zip(held, targets, strict=True))
                if target.numel()
            ],
            stochastic=group["stochastic_rounding"],
        )

    # ------------------------------------------------------------------ saving and copying

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state of every trainable parameter, and the groups.

        Once there is any state, parameters that never had a gradient get theirs here:
        ``torch.distributed.checkpoint`` loads only what the state to load into has, and a
        checkpoint must have it. Groups store dtypes and layouts as strings, because it saves
        tensors, numbers and strings only.
        """
        self._drop_replaced()
        if self.state:  # not before: Accelerate asks for it, and then replaces the parameters
            self._complete_state()
        saved = super().state_dict()
        for group in saved["param_groups"]:
            for option, value in group.items():
                if isinstance(value, (torch.dtype, MatrixLayout)):
                    group[option] = str(value)
        return saved

    def _drop_replaced(self) -> None:
        """Drop the initial state of parameters that are no longer in any group.

        Accelerate reads the state when it prepares an optimizer, and then puts sharded parameters
        in place.
        """
        present = {id(p) for group in self.param_groups for p in group["params"]}
        replaced = [p for p in self.state if isinstance(p, Tensor) and id(p) not in present]
        for p in replaced:
            moments = [local_tensor(v) for name, v in self.state[p].items() if name != "master"]
            if any(moment.any() for moment in moments):
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} was replaced in the optimizer's groups "
                    "after training began, and its momentum belongs to none that is there: make "
                    "an optimizer of the new parameters, and load the old one's state_dict"
                )
        for p in replaced:
            del self.state[p]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, for the same parameters in the same groups.

        With names on both sides, parameters are matched by name, whatever the order of parameters
        and groups; a group takes the options of the saved group that most of its parameters were
        in. Without, they are matched by order. Moments and master copies are copied to the device
        and dtype that this optimizer keeps them in. Layouts and names stay this optimizer's: they
        belong to the model.

        Args:
            state_dict: as returned by ``state_dict``; not changed.

        Raises:
            ValueError: if it belongs to other parameters, shapes or algorithms, or has an option
                out of range; the message names the first parameter or option that differs, and
                nothing is loaded.
        """
        fitted: dict[str, Any] = {}

        def fit(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            fitted.update(saved_state.fit(optimizer.param_groups, state_dict))
            for group, saved in zip(self.param_groups, fitted["param_groups"], strict=True):
                self._complete_options(saved, group["layout"])
            return fitted

        # As the last pre-hook, so that it sees what the user's own pre-hooks made of the state.
        handle = self.register_load_state_dict_pre_hook(fit)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, saved in zip(self.param_groups, fitted["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                if key in fitted["state"]:
                    self._take_state(p, group, fitted["state"][key])

    def _complete_options(self, saved: dict[str, Any], layout: MatrixLayout | None) -> None:
        """Options of a saved group as this optimizer keeps them, checked."""
        saved["layout"] = layout
        saved.pop("differentiable", None)  # torch's, of no use here
        resolved = {option: saved.pop(option, None) for option in validation.RESOLVED}
        if saved["algorithm"] == "adamw" and resolved["adamw_betas"] is not None:
            # Saved when groups kept these, and AdamW's had Muon's momentum too.
            saved["momentum"], saved["adamw_beta2"] = resolved["adamw_betas"]
        for option in ("ns_dtype", "momentum_dtype"):
            if isinstance(saved.get(option), str):  # as "torch.float32"
                saved[option] = getattr(torch, saved[option].removeprefix("torch."), saved[option])
        for option, value in self.defaults.items():  # saved before the option was there
            if option not in validation.RESOLVED:
                saved.setdefault(option, value)
        saved.setdefault("updates", 0)
        if saved["algorithm"] == "adamw":
            saved.setdefault("adamw_beta2", self.defaults["adamw_betas"][1])
        try:
            validation.options(
                {**{name: self.defaults[name] for name in validation.RESOLVED}, **saved}
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"the saved state has an option out of range: {error}") from None

    def _take_state(self, param: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> None:
        """Copy a parameter's saved state, which torch shares, or casts to the parameter's dtype."""
        state = self.state[param]
        dtype = moment_dtype(group, param)
        for name, value in saved.items():
            if name == "step":
                state[name] = value.to(local_tensor(param).device, copy=True)
            elif name != "master":
                state[name] = value.to(device=param.device, dtype=dtype, copy=True)
        if not needs_master(group, param):
            set_master(param, state, None)
        elif state:
            master = saved.get("master", param.detach())
            set_master(param, state, master.to(device=param.device, dtype=torch.float32, copy=True))

    def named_state(
        self, named_parameters: Iterable[tuple[str, Tensor]] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """The state of each parameter by its name, without copies.

        For checkpoints that store every tensor by name, whatever the order of parameters and
        groups.

        Args:
            named_parameters: (name, parameter) pairs, e.g. ``model.named_parameters()``; default:
                the names that the optimizer was given.

        Returns:
            Name -> entries: ``momentum_buffer`` (Muon), or ``step``, ``exp_avg`` and ``exp_avg_sq``
            (AdamW); and ``master``, if the parameter has a master copy. Empty for a parameter
            without state.

        Raises:
            ValueError: if the optimizer has no names and none are given.
        """
        return {
            name: dict(self.state.get(param, {})) for name, param in self._named(named_parameters)
        }

    def load_named_state(
        self,
        state: Mapping[str, Mapping[str, Tensor]],
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    ) -> None:
        """Replace the state of each named parameter by the given tensors, without copying them.

        A parameter without entries is left without state, as before its first gradient. ``master``
        alone attaches a master copy to a parameter whose other state will start at zero.

        Args:
            state: name -> entries, as returned by ``named_state``.
            named_parameters: as for ``named_state``.

        Raises:
            ValueError: for a name or an entry that does not belong to a parameter; nothing is
                loaded.
        """
        params = dict(self._named(named_parameters))
        algorithms = {p: group["algorithm"] for group in self.param_groups for p in group["params"]}
        if unknown := {name for name in state if params.get(name) not in algorithms}:
            raise ValueError(f"the optimizer has no parameter {min(unknown)!r}")
        checked = {
            name: saved_state.check_entries(
                state[name], f"parameter {name!r}", params[name], algorithms[params[name]]
            )
            for name in state
        }
        for param in params.values():
            set_master(param, self.state.pop(param, {}), None)
        for name, entries in checked.items():
            if entries:
                self.state[params[name]] = entries
                set_master(params[name], entries, entries.get("master"))

    def _named(
        self, named_parameters: Iterable[tuple[str, Tensor]] | None
    ) -> list[tuple[str, Tensor]]:
        """(name, parameter) pairs: the given ones, or those of the optimizer's groups."""
        if named_parameters is not None:
            return list(named_parameters)
        if not all("param_names" in group for group in self.param_groups):
            raise ValueError(
                "the optimizer's parameters have no names: construct it with named parameters, or "
                "give named_parameters"
            )
        return [
            pair
            for group in self.param_groups
            for pair in zip(group["param_names"], group["params"], strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        if self.shardings or self.process_group is not None:
            raise TypeError(
                "an optimizer that shares work over a process group cannot be copied or pickled: "
                "save its state_dict() and make a new one"
            )
        kept = ("process_group", "shardings", "skipped_steps")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch puts it there when a state is loaded, and new groups would then have a key more.
        self.defaults.pop("differentiable", None)
        self.__dict__.setdefault("_distributed_muon", None)
        self.__dict__.setdefault("_pending", None)
        for flag in ("_connected", "_warned_of_shapes"):
            self.__dict__.setdefault(flag, None)
        self._made = True
        if "_seen" not in self.__dict__:
            self._remember_parameters()
        for param, own in self.state.items():  # an attribute that copies of parameters do not have
            if "master" in own:
                set_master(param, own, own["master"])


def _own(value: Any) -> Any:
    """An option that may be changed in place, copied."""
    if isinstance(value, Tensor):
        copied = value.detach().clone()
        return copied.reshape(()) if copied.numel() == 1 else copied
    return copy.deepcopy(value) if isinstance(value, (list, dict, set)) else value


def _target(held: Tensor, state: dict[str, Any]) -> Tensor:
    """The tensor to update: the master copy, or the local part of the parameter, that very tensor:
    two views of it would be taken for two tensors, and one copied into the other."""
    if "master" not in state:
        return held
    master = local_tensor(state["master"])
    refresh_master(master, held)
    return master


def _is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    if torch.compiler.is_compiling():
        return False
    try:
        return bool(torch.cuda.is_current_stream_capturing())
    except RuntimeError:  # a build without CUDA
        return False


def _any_nonfinite(gradients: list[Tensor]) -> Tensor:
    """1 if one of these, on one device, is not finite, as a float32 scalar there; else 0."""
    if gradients[0].device.type == "cpu":
        # The fast norm may overflow where no gradient does: only then it takes another look.
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
        if norms.isfinite().all():
            return torch.zeros((), dtype=torch.float32, device="cpu")
        bad = any(not g.isfinite().all() for g in gradients)
        return torch.tensor(float(bad), dtype=torch.float32, device="cpu")
    largest = torch._foreach_norm(gradients, float("inf"))
    return torch.stack([norm.float() for norm in largest]).isfinite().logical_not().any().float()


def _may_be_nonzero(lr: float | Tensor) -> bool:
    """Whether a learning rate may be nonzero; one on an accelerator is not read."""
    return (isinstance(lr, Tensor) and lr.device.type != "cpu") or bool(lr)


class _Flags(NamedTuple):
    """Facts of a step that all its ranks know.

    Attributes:
        nonfinite: 1 if a gradient has an infinity or NaN, a float32 scalar on the device of the
            gradients; None with ``nonfinite="ignore"``.
        refused: the error that a rank found before anything was updated, or None.
        idle: whether the step is no update: the first one, with learning rates and gradients of
            zero. ``torch.distributed.checkpoint.state_dict`` makes such a step to have the state
            of a fresh optimizer, and it must not count.
    """

    nonfinite: Tensor | None
    refused: str | None
    idle: bool


_BY_SHAPE = (
    "MuonClip has parameters without names and chooses between Muon and AdamW by their shapes: "
    "embeddings and output heads, which belong to AdamW, are matrices too and go to Muon. Give it "
    "param_groups(model), or model.named_parameters(), or groups with algorithm='muon' or 'adamw'"
)
_ADVICE = (
    "Look at this step's data and loss, or lower the learning rate; MuonClip(nonfinite='skip') "
    "leaves such steps out"
)


class _PendingError:
    """A flag on its way from an accelerator, to be read when the next step begins."""

    def __init__(self, found: Tensor) -> None:
        self._flag = torch.empty((), dtype=found.dtype, device="cpu", pin_memory=found.is_cuda)
        self._flag.copy_(found, non_blocking=found.is_cuda)  # only there can its end be awaited
        self._event: Any = torch.cuda.Event() if found.is_cuda else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def raise_if_found(self) -> None:
        if self._event is not None:
            self._event.synchronize()
        if self._flag:
            raise RuntimeError(
                "a gradient of the step before was not finite; that step was left out and nothing "
                "was updated. " + _ADVICE
            )
