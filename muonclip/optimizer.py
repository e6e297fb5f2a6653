"""The MuonClip optimizer: Muon for matrices, AdamW for everything else."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from muonclip import saved_state, validation
from muonclip.adamw import AdamWPart, update_parts
from muonclip.distributed.groups import ConnectedRanks, groups_of
from muonclip.distributed.int8_state import decode, encode_, new_scale
from muonclip.distributed.muon import DistributedMuon, SharedParam
from muonclip.distributed.owners import StateOwners
from muonclip.distributed.remainder_master import RemainderMaster, local_remainder
from muonclip.distributed.sharded_state import (
    ShardedState,
    StateLayout,
    flat_range,
    local_values,
    write_flat,
)
from muonclip.distributed.sharding import (
    Sharding,
    is_dtensor,
    local_gradient,
    local_tensor,
    place_like,
    reduced_shape,
)
from muonclip.hooks import untraced
from muonclip.kernels.support import prefers_bfloat16
from muonclip.labels import label
from muonclip.matrix_layouts import WHOLE, MatrixLayout
from muonclip.muon import BATCH_ELEMENTS_ELSEWHERE, LocalMuon, MuonParam
from muonclip.offload import Devices
from muonclip.orthogonalize import AdjustLR, Coefficients, default_ns_dtype
from muonclip.other_names import canonical
from muonclip.precision import (
    PRECISION,
    drop_master,
    get_master,
    keeps_remainder,
    moment_dtype,
    needs_master,
    refresh_master,
    set_master,
    state_dtype,
)
from muonclip.qk_clip import QKClip, attached_clips
from muonclip.remainders import adopt, join
from muonclip.update import (
    AdamWDecayMode,
    WeightDecayMode,
    is_fake,
    is_free_to_read,
    may_be_nonzero,
)
from muonclip.variants import VariantName, neuron_state, variant_of
from muonclip.warning import warn

if TYPE_CHECKING:
    import torch.distributed as dist

    from muonclip.model_report import ModelReport

NonFinite = Literal["raise", "skip", "ignore"]

_NOT_OPTIONS = {"params", "param_names"}


class MuonClip(Optimizer):
    """Muon for the matrices of a model and AdamW for its other parameters.

    For each matrix W of n x m with gradient G, learning rate η, momentum μ and weight decay λ:

        M = M + (1 - μ) (G - M)
        O = NS(G + μ (M - G))       # Nesterov; otherwise NS(M)
        W = W - η (0.2 sqrt(max(n, m)) O + λ W)

    NS is scale-free, so M is an exponential average, as in ``torch.optim.Muon``, where the papers
    write the sum μ M + G. Source: Kimi K2 technical report (arXiv 2507.20534),
    algorithm 1; Moonlight (arXiv 2502.16982), section 2. ``QKClip`` adds QK-Clip.

    Each parameter group has one algorithm, so that learning rate schedulers can set its options. A
    group without the option ``algorithm`` ("muon" or "adamw") is split into one of each by
    ``choose_algorithm``: matrices [n, m] and stacks of matrices [E, n, m] to Muon; everything else
    and, given named parameters, embeddings, output heads and routers to AdamW. AdamW's group takes
    ``adamw_lr`` and ``adamw_weight_decay``, if given, as its ``lr`` and ``weight_decay``, and
    ``adamw_betas`` as its ``momentum`` and ``adamw_beta2``, so that schedulers that cycle momentum
    (OneCycleLR, CyclicLR) cycle AdamW's beta1 as well. Each group has its own copy of a tensor
    ``lr``: change it there. For a whole model, ``param_groups(model)`` is preferable, because it
    also looks at module types.

    The group option ``layout``, a ``MatrixLayout``, describes parameters that store matrices of the
    model in another form: fused, per head, transposed.

    Works on plain tensors, under DDP, and on DTensors (FSDP2, tensor parallelism) of any placement:
    a sharded matrix is rebuilt on one rank, which orthogonalizes it and returns each rank its
    shard. With ``process_group`` the ranks that have copies of the same tensors share the work.

    A parameter without a gradient is left alone: no decay, no state. The state, created at the
    first step with a gradient, is ``momentum_buffer`` (Muon; NorMuon also has ``neuron_square``),
    or ``step``, ``exp_avg`` and ``exp_avg_sq`` (AdamW); and ``master`` with ``master_weights``. See
    ``named_state``.

    Args:
        params: tensors, (name, tensor) pairs, or groups (dicts) of either.
        lr: learning rate η; a number, or a tensor of one element, which a captured
            graph reads in each replay.
        weight_decay: decoupled weight decay λ.
        momentum: μ, in [0, 1).
        nesterov: use Nesterov momentum.
        ns_coefficients: Newton-Schulz coefficients: a name, (a, b, c), or such triples.
        ns_steps: Newton-Schulz steps.
        ns_dtype: dtype of Newton-Schulz; default: by device and shapes, as ``dtype`` of
            ``orthogonalize``, but one for all matrices of a parameter. Ranks that share parameters
            agree; give it for CPUs where ranks with copies of a parameter do not share it (DDP
            without ``process_group``), because they choose separately, and for the same arithmetic
            when a run resumes on another processor.
        eps: guards the normalization against 0/0; relative to an update's largest entry, below 1.
            A zero update stays zero; any other is normalized whatever its scale. Gradient clipping
            therefore does not change the size of Muon's updates, only the weight of this step's
            gradient in the momentum.
        adjust_lr: scale by shape: ``"match_rms_adamw"``, ``"original"``, ``"spectral"`` or
            ``"none"``; see ``update_scale``.
        update_rms: the update RMS that ``"match_rms_adamw"`` matches.
        weight_decay_mode: of Muon's groups: ``"decoupled"``, ``"cautious"``, ``"independent"`` or
            ``"l2"``; see ``muonclip.update.decay_and_apply``.
        variant: ``"muon"``, or ``"normuon"``: divide each row of an orthogonalized update by the
            root of a moving average of its mean square, and keep the Frobenius norm of the matrix
            (NorMuon, arXiv 2510.05491). The average is further state: ``neuron_square``.
        normuon_beta2: decay rate of NorMuon's average.
        momentum_warmup_steps: steps over which the momentum rises linearly from
            ``momentum_warmup_start``; 0: none.
        momentum_warmup_start: momentum at the first step of the warm-up.
        momentum_dtype: dtype of Muon's momentum: int8, bfloat16, float32 or float64; default: the
            parameter's, or float32 for float16 parameters and with ``master_weights`` or
            ``stochastic_rounding``. int8 has a float32 scale for each row of what a rank stores of
            the parameter, and is decoded in batches. Saved states have its values in float32.
        master_weights: keep a float32 master copy of each parameter of lower precision, update the
            copy, and round it into the parameter. The copy is also ``parameter.main_param``.
            Entries of a parameter that change between steps, e.g. by ``load_state_dict`` of the
            model, replace those of the copy at the next step. ``"remainder"``: the same copy in 2
            more bytes instead of 4, as the bfloat16 parameter and 16 bits of its difference, which
            entries that change keep; see ``muonclip.remainders``.
        stochastic_rounding: round bfloat16 parameters up or down at random instead of to nearest,
            so that small updates add up without a master copy. Copies of a parameter on several
            ranks stay equal.
        nonfinite: response to a gradient with an infinity or NaN: ``"raise"``, ``"skip"`` the whole
            step, or ``"ignore"``. With the first two, nothing changes in such a step. On an
            accelerator ``"raise"`` does not wait: the step is skipped and the next one raises.
        capturable: allow the step to be captured in a CUDA graph: nothing is read on the host.
        adamw_lr: AdamW's learning rate; default: ``lr``.
        adamw_betas: AdamW's decay rates of the two moments.
        adamw_eps: AdamW's epsilon.
        adamw_weight_decay: AdamW's decoupled weight decay; default: ``weight_decay``.
        adamw_weight_decay_mode: ``"decoupled"``, or ``"cautious"``: only of weights whose update
            does not have the opposite sign, as ``weight_decay_mode`` for Muon.
        maximize: ascend instead of descend.
        process_group: ranks that have copies of the plain tensors and have reduced their gradients
            (DDP); each then orthogonalizes a share of the matrices. Default: each does all. Give it
            on GPUs, where each process chooses kernels by timing: copies that are computed by
            different kernels drift apart by rounding.
        shardings: a ``Sharding`` for each plain tensor that is a shard of a larger one.
        shard_state: store the state of a parameter of which several ranks have a copy, or the same
            shard, only once: momentum and master copy of a matrix on the rank that orthogonalizes
            it, AdamW's state in equal parts on these ranks (ZeRO, arXiv 1910.02054, stage 1). The
            weights are those of a run without it, to rounding. With FSDP2 without replicas, no two
            ranks have the same state: it is sharded anyway, and stays where it is. Entries of the
            state, and ``parameter.main_param``, are ``ShardedState``; save them with
            ``full_state_dict`` or ``torch.distributed.checkpoint``.
        qk_clip: attached to the optimizer, so that each ``step`` also clips. It has no state to
            save. ``muonclip.for_model`` makes it for a whole model.
        state_device: ``"cpu"`` keeps the state in main memory and copies it to ``compute_device``
            and back in batches, in pinned memory for CUDA, the next batch of Muon's while one is
            computed. Default: the parameter's device.
        compute_device: device of a step's computations; default: the parameter's. For parameters
            and gradients on the CPU, as with FSDP2's ``CPUOffloadPolicy``, ``"cuda"`` copies them
            too, in the same batches, instead of computing Newton-Schulz on the CPU.

    Values that other libraries name differently are accepted where no value here has the same
    name: see ``muonclip.other_names``.

    Each option above ``process_group`` may be set per group, and overrides the constructor's;
    ``nonfinite`` must be the same in all groups. Options in ``param_groups`` may change between
    steps, except ``algorithm`` and, after the first step, ``momentum_dtype``; the next step checks
    them.

    Attributes:
        skipped_steps: number of steps skipped because of a non-finite gradient, or because ranks
            on accelerators disagreed (see ``step``); an int, or a tensor on the accelerator.
        momentum_scales: of the rows of each int8 ``momentum_buffer``, by parameter.
        report: of ``muonclip.for_model``; None for optimizers that it did not make.

    Raises:
        TypeError, ValueError: for an option out of range, a device that is missing, or a parameter
            that is complex, sparse, given twice, or assigned to Muon but not a non-empty matrix or
            stack of matrices.
    """

    report: "ModelReport | None" = None

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
        variant: VariantName = "muon",
        normuon_beta2: float = 0.95,
        momentum_warmup_steps: int = 0,
        momentum_warmup_start: float = 0.85,
        momentum_dtype: torch.dtype | None = None,
        master_weights: bool | Literal["remainder"] = False,
        stochastic_rounding: bool = False,
        nonfinite: NonFinite = "raise",
        capturable: bool = False,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        adamw_weight_decay_mode: AdamWDecayMode = "decoupled",
        maximize: bool = False,
        process_group: "dist.ProcessGroup | None" = None,
        shardings: Mapping[Tensor, Sharding] | None = None,
        shard_state: bool = False,
        qk_clip: QKClip | None = None,
        state_device: torch.device | str | None = None,
        compute_device: torch.device | str | None = None,
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
            "variant": variant,
            "normuon_beta2": normuon_beta2,
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
            "adamw_weight_decay_mode": adamw_weight_decay_mode,
            "maximize": maximize,
        }
        defaults = canonical(defaults)
        validation.check_options(defaults)
        validation.check_process_group(process_group)
        if qk_clip is not None and not isinstance(qk_clip, QKClip):
            raise TypeError(f"qk_clip must be a QKClip, got {type(qk_clip).__name__}")
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"params must be parameters or groups, got the model {type(params).__name__}: give "
                "model.named_parameters(), or muonclip.param_groups(model), or let "
                "muonclip.for_model(model) make the optimizer"
            )
        self.process_group = process_group
        self.shardings = dict(shardings or {})
        self.shard_state = shard_state
        self.devices = Devices.of(state_device, compute_device)
        validation.check_devices(self.devices, capturable, shard_state)
        self.skipped_steps: int | Tensor = 0
        self.momentum_scales: dict[Tensor, Tensor] = {}
        self._reset()
        super().__init__(params, defaults)
        initial = MuonClip.__init__.__kwdefaults__ or {}
        validation.check_variants(self.defaults, self.param_groups, initial)
        if qk_clip is not None:
            qk_clip.attach(self)

    @property
    def qk_clip(self) -> QKClip | None:
        """The QK-Clip that was attached last; None if none is. Copies have none."""
        return next(reversed(attached_clips(self)), None)

    def _reset(self) -> None:
        """Initialize the attributes that are neither saved nor copied."""
        self._warned_of_shapes = False
        self._known_shapes: list[tuple[Tensor, torch.Size]] = []
        self._known_options: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._pending: _PendingFlags | None = None
        self._is_changed = True  # parameters were added or replaced since ranks were connected
        self._groups: list[dist.ProcessGroup] = []
        self._connected: ConnectedRanks | None = None
        self._plan: _Plan | None = None
        self._local_muon = LocalMuon()
        self._avoids_bfloat16 = False
        self._ns_dtypes: dict[Any, torch.dtype] = {}  # defaults by device, dtype, layout and shape
        self._owners: StateOwners | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; two groups, if it has parameters for Muon and for AdamW.

        Args:
            param_group: ``params`` and any option; see the class.

        Raises:
            TypeError, ValueError: as the constructor; nothing is added then.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"param_group must be a dict with 'params', got {param_group!r:.80}")
        options = canonical({**self.defaults, **param_group})
        validation.check_options(options)
        validation.check_common_options([*self.param_groups, options])
        if "updates" not in param_group:  # a group that has been in an optimizer has all options
            validation.check_group(canonical(param_group), options, self.defaults)
            if options["capturable"]:
                validation.check_capture(options)
        if options.get("algorithm") is None:
            validation.check_may_split()
        params, names = options.pop("params"), options.pop("param_names", None)
        if names is not None:  # a group that has been in an optimizer
            params = list(zip(names, params, strict=True))
        entries = validation.check_parameters(params, len(self.param_groups))
        if options["master_weights"] == "remainder":
            validation.check_remainders(entries, self.shard_state)
        validation.check_new_parameters(entries, self.param_groups)
        algorithm = options.pop("algorithm", None)
        by_algorithm = validation.split_by_algorithm(entries, algorithm, self.shardings)
        for entry in by_algorithm.get("muon", ()):
            validation.check_matrix(entry, self._whole_shape(entry.param), options)
            if algorithm is None and entry.name is None and not self._warned_of_shapes:
                self._warned_of_shapes = True
                warn(_BY_SHAPE)

        for algorithm, members in by_algorithm.items():
            group = {**options, "algorithm": algorithm, "updates": 0}
            if algorithm == "adamw":
                group |= {"layout": None, "variant": "muon", **self._adamw_options(param_group)}
            # Schedulers change tensors in place: no two groups may share one, nor a list.
            group = {option: _copy_option(value) for option, value in group.items()}
            if members and members[0].name is not None:
                group["params"] = [(entry.name, entry.param) for entry in members]
            else:
                group["params"] = [entry.param for entry in members]
            super().add_param_group(group)
            for option in validation.RESOLVED:
                del group[option]
        for entry in entries:
            drop_master(entry.param)
        self._remember_shapes()
        self._known_options += self._options()[-len(by_algorithm) :]

    def _adamw_options(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """AdamW's options by the names that schedulers know: beta1 is the momentum."""

        def choose(option: str) -> Any:
            """The group's option before the constructor's, AdamW's before the common one."""
            keys = (f"adamw_{option}", option)
            values = [source.get(key) for source in (param_group, self.defaults) for key in keys]
            return next(value for value in values if value is not None)

        beta1, beta2 = param_group.get("adamw_betas", self.defaults["adamw_betas"])
        if "adamw_betas" not in param_group and param_group.get("algorithm") == "adamw":
            beta1 = param_group.get("momentum", beta1)
            beta2 = param_group.get("adamw_beta2", beta2)
        return {
            "lr": choose("lr"),
            "weight_decay": choose("weight_decay"),
            "momentum": beta1,
            "adamw_beta2": beta2,
        }

    def _whole_shape(self, param: Tensor) -> tuple[int, ...]:
        """Shape of the whole parameter, of which this rank may have a shard."""
        sharding = self.shardings.get(param)
        return tuple(param.shape) if sharding is None else sharding.shape

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Ranks that share parameters must have gradients of the same ones. If these change on all
        ranks at once, they divide the work again. On accelerators, a rank cannot see in time that
        another one has other gradients or parameters than before, or an error: then all ranks skip
        the step, and at the next one they divide the work again, with a warning, or raise.

        Args:
            closure: recomputes the model and returns the loss; called once, with gradients
                enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: if a gradient is sparse, or not finite (see ``nonfinite``); nothing is
                updated then.
            ValueError, TypeError: if an option was set in ``param_groups`` to a value that it
                cannot have; nothing is updated then. On all ranks, if ranks that share parameters
                have gradients of different ones.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work, flags = self._begin()
        if flags.is_done:
            return loss
        if self._connected is None and not self.devices.are_given:
            self._update(work, flags)
        else:
            self._update_untraced(work, flags, torch.compiler.is_compiling())
        return loss

    @untraced
    def _begin(self) -> "tuple[_Work, _Flags]":
        """Check the step, and agree on it with the ranks that must take it together."""
        self._read_pending()
        work: _Work = []
        error: Exception | None = None
        try:
            self._check_step()
            work = self._work()
        except (RuntimeError, TypeError, ValueError) as exception:
            error = exception  # raised once the other ranks know it
        if not work and error is None:
            self._warn_without_gradients()
        self._warn_of_devices(work)
        flags = self._exchange_flags(work, error)
        if flags.error is not None:
            raise error or RuntimeError(_refused(flags.error))
        if flags.only_creates_state:
            self._complete_state()
            return work, flags._replace(is_done=True)
        found_inf = flags.found_inf
        if found_inf is None:
            return work, flags
        if not is_free_to_read(found_inf.device):
            self.skipped_steps = self.skipped_steps + found_inf  # the host does not wait for it
            return work, flags
        if not found_inf:
            return work, flags._replace(found_inf=None)
        self.skipped_steps += 1
        if self._raises:
            raise RuntimeError(self._describe_nonfinite())
        return work, flags._replace(is_done=True)

    def _update(self, work: "_Work", flags: "_Flags") -> None:
        """Update the parameters, or let other ranks see that this one cannot."""
        found_inf = flags.found_inf
        muon = self._muon_params(work if flags.takes_part else [])
        for group in self.param_groups:
            group["updates"] += 1
        if not flags.takes_part:
            self._attend()
            return
        self._step_muon(muon, work, found_inf)
        for group, params, gradients in work:
            if group["algorithm"] == "adamw":
                self._step_adamw(group, params, gradients, found_inf)
        if self._owners is not None:
            self._owners.gather(self._sharded_adamw(work), found_inf)
        self.devices.finish(local_tensor(p) for _, params, _ in work for p in params)

    @untraced
    def _update_untraced(self, work: "_Work", flags: "_Flags", is_compiled: bool) -> None:
        """The same outside torch.compile, which cannot trace messages between ranks."""
        if is_compiled:
            warn(_NOT_COMPILED)
        self._update(work, flags)

    @property
    def _raises(self) -> bool:
        return bool(self.param_groups[0]["nonfinite"] == "raise")

    def _attend(self) -> None:
        """Take part in the messages of a step that all ranks skip because of this one."""
        assert self._plan is not None
        self._plan.muon.attend()
        if self._owners is not None:
            self._owners.attend(self._plan.adamw)

    def _step_muon(self, params: list[MuonParam], work: "_Work", found_inf: Tensor | None) -> None:
        if self._connected is None:
            self._local_muon.step(params, found_inf)
            return
        if self._plan is None:
            self._plan = self._make_plan(params, work)
        self._plan.muon.step(params, found_inf)

    def _make_plan(self, params: list[MuonParam], work: "_Work") -> "_Plan":
        """Plan the work of all ranks for these parameters, together with them."""
        assert self._connected is not None
        owners = self._owners
        others = [
            self._shared_param(p, of_group.group)
            for of_group in work
            for p in self._sharded_adamw([of_group])
        ]
        muon = DistributedMuon(
            params,
            self._groups,
            self._connected,
            self.process_group,
            self.shardings,
            {p.param: owners.owners(p.param) for p in params if owners and p.is_sharded},
            others,
        )
        locals_ = {other.param: local_tensor(other.param) for other in others}
        adamw = {param: (local.dtype, local.device) for param, local in locals_.items()}
        return _Plan(muon, adamw, self._signature(work))

    def _step_adamw(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        gradients: list[Tensor],
        found_inf: Tensor | None,
    ) -> None:
        batch: list[AdamWPart] = []
        elements = 0
        copies = []
        for number, (param, gradient) in enumerate(zip(params, gradients, strict=True)):
            state = self._state_of(param, group)
            parts = self._adamw_parts(param, gradient, state, (group["updates"], number))
            if not parts:
                # Parameters without elements here count, too: a checkpoint keeps one rank's step.
                state["step"] += 1 if found_inf is None else 1 - found_inf
            for part in parts:
                batch.append(part)
                elements += part.local.numel()
                if self._layout_of(param) is not None and not local_tensor(param).is_contiguous():
                    copies.append((param, part.start, part.local))  # not a view
            if elements >= BATCH_ELEMENTS_ELSEWHERE:  # for the temporary tensors of its elements
                update_parts(batch, group, found_inf)
                batch, elements = [], 0
        update_parts(batch, group, found_inf)
        for param, start, local in copies:
            write_flat(local_tensor(param), start, local)

    def _adamw_parts(
        self, param: Tensor, gradient: Tensor, state: dict[str, Any], seed: tuple[int, ...]
    ) -> list[AdamWPart]:
        """This rank's parts of a parameter of AdamW: its local tensor, or with sharded state the
        ranges of it that this rank updates."""
        local, step = local_tensor(param), state["step"]
        moments = [state[key] for key in ("exp_avg", "exp_avg_sq")]
        if self._layout_of(param) is None:
            if not local.numel():
                return []
            to_update = self._tensor_to_update(local, state)
            average, square = map(local_tensor, moments)
            remainder = local_remainder(state)
            compute = self.devices.of_step(local) if self.devices.are_given else None
            return [
                AdamWPart(
                    local, to_update, gradient, average, square, step, seed,
                    remainder=remainder, compute=compute,
                )
            ]  # fmt: skip
        assert self._owners is not None
        parts = []
        for index, (start, stop) in enumerate(self._owners.local_ranges(param)):
            weights = flat_range(local, start, stop)
            to_update = weights
            if "master" in state:
                to_update = state["master"].parts[index]
                refresh_master(to_update, weights)
            average, square = (moment.parts[index] for moment in moments)
            # Each part adds one to its step: the first to the parameter's own.
            parts.append(
                AdamWPart(
                    weights, to_update, flat_range(gradient, start, stop), average, square,
                    step.clone() if index else step, seed, start,
                )
            )  # fmt: skip
        return parts

    def _tensor_to_update(self, local: Tensor, state: dict[str, Any]) -> Tensor:
        """The local part of the master copy, or the given local tensor.

        The very same object: two views of it would be taken for two tensors, and one copied into
        the other.
        """
        if "master" not in state or isinstance(state["master"], RemainderMaster):
            return local
        master = local_tensor(state["master"])
        if not self.devices.are_given:  # otherwise once both are where the step computes
            refresh_master(master, local)
        return master

    # ------------------------------------------------------------------ parameters and their state

    def _work(self) -> "_Work":
        """Each group that has parameters with a gradient, with these."""
        work = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                work.append(_GroupWork(group, params, [local_gradient(p) for p in params]))
        return work

    def _signature(self, work: "_Work") -> list[tuple[Any, ...]]:
        """The parameters and dtypes that the ranks' messages depend on."""
        return [
            (
                id(p), p.dtype, p.device, p.grad.dtype if p.grad is not None else None,
                self._momentum_dtype(p, group), group["ns_dtype"], needs_master(group, p),
                group["variant"], group["layout"],
            )
            for group, params, _ in work
            for p in params
            if group["algorithm"] == "muon" or self._layout_of(p) is not None
        ]  # fmt: skip

    def _momentum_dtype(self, param: Tensor, group: dict[str, Any]) -> torch.dtype:
        momentum = self.state[param].get("momentum_buffer") if param in self.state else None
        return moment_dtype(group, param) if momentum is None else momentum.dtype

    def _sharded_adamw(self, work: "_Work") -> list[Tensor]:
        """AdamW's parameters with sharded state."""
        return [
            param
            for group, params, _ in work
            if group["algorithm"] == "adamw"
            for param in params
            if self._layout_of(param) is not None
        ]

    def _muon_params(self, work: "_Work") -> list[MuonParam]:
        muon: list[MuonParam] = []
        for group, params, gradients in work:
            if group["algorithm"] == "muon":
                for param, gradient in zip(params, gradients, strict=True):
                    muon.append(self._muon_param(param, gradient, group, len(muon)))
        return muon

    def _muon_param(
        self, param: Tensor, gradient: Tensor, group: dict[str, Any], number: int
    ) -> MuonParam:
        state = self._state_of(param, group)
        local = local_tensor(param)
        is_sharded = self._layout_of(param) is not None
        master = state.get("master") if is_sharded else None
        to_update = local if is_sharded else self._tensor_to_update(local, state)
        if group["maximize"]:
            gradient = -gradient
        # The owner of a sharded master copy adds the decay itself.
        remainder = local_remainder(state)
        if group["weight_decay_mode"] == "l2" and group["weight_decay"] and master is None:
            weights = to_update if remainder is None else join(local, remainder)
            weights = weights.to(gradient.device)
            if self.devices.are_given and to_update is not local:
                refresh_master(weights, local)
            gradient = gradient.to(weights.dtype).add(weights, alpha=group["weight_decay"])
        momentum = state["momentum_buffer"]
        names = variant_of(group).state
        neurons = {n: state[n] if is_sharded else local_tensor(state[n]) for n in names}
        return MuonParam(
            param, local, to_update, gradient, momentum if is_sharded else local_tensor(momentum),
            group, self._whole_shape(param), (group["updates"], number),
            group["ns_dtype"] or self._default_ns_dtype(param, group), is_sharded, master,
            self.momentum_scales[param] if momentum.dtype == torch.int8 else None, remainder,
            self.devices.of_step(local) if self.devices.are_given else None,
            neurons,
        )  # fmt: skip

    def _default_ns_dtype(self, param: Tensor, group: dict[str, Any]) -> torch.dtype:
        device = self.devices.of_step(local_tensor(param))
        key = device, param.dtype, group["layout"], self._whole_shape(param)
        if key not in self._ns_dtypes:
            if device.type == "cpu" and self._avoids_bfloat16:
                self._ns_dtypes[key] = torch.float32
            else:
                shapes = (group["layout"] or WHOLE).matrix_shapes(key[-1])
                self._ns_dtypes[key] = default_ns_dtype(device, param.dtype, shapes)
        return self._ns_dtypes[key]

    def _state_of(
        self, param: Tensor, group: dict[str, Any], *, steps: bool = True
    ) -> dict[str, Any]:
        """A parameter's state, on its device; created if missing.

        To create a sharded master copy is a collective call of the ranks that share the parameter.

        Args:
            param, group: the parameter and its group.
            steps: False: a master copy that was loaded is not split into weight and remainder, as
                the weights that belong to it may be loaded later.
        """
        state: dict[str, Any] = self.state[param]
        self._move_state(param, state)
        self._update_master(param, group, state, steps)
        if state.keys() <= {"master"}:
            self._create_moments(param, group, state)
        for name in variant_of(group).state:
            if name not in state:
                state[name] = self._new_neuron_state(param, group, name)
        return state

    def _move_state(self, param: Tensor, state: dict[str, Any]) -> None:
        """Move the state to its device: the model was moved, or the step was loaded from a file."""
        local = local_tensor(param)
        for name, value in list(state.items()):
            device = self._state_device(name, local)
            if not isinstance(value, RemainderMaster) and local_tensor(value).device != device:
                state[name] = self.devices.pin(value.to(device))
                if name == "momentum_buffer" and value.dtype == torch.int8:
                    self._set_scale(param, self.momentum_scales[param].to(device))
                if name == "master":
                    set_master(param, state, state[name])

    def _update_master(
        self, param: Tensor, group: dict[str, Any], state: dict[str, Any], steps: bool
    ) -> None:
        """Create, convert, attach or drop the master copy; arguments as for ``_state_of``."""
        is_needed = needs_master(group, param)
        if keeps_remainder(group, param):
            if steps or "master" not in state:
                self._keep_remainder(param, state)
        elif isinstance(master := state.get("master"), RemainderMaster):
            is_whole = is_needed and param.dtype == torch.bfloat16
            set_master(param, state, master.float32() if is_whole else None)
        if is_needed and "master" not in state:
            if self._layout_of(param) is None:
                master = self._as_stored(param, group, "master", param.detach(), copy=True)
            else:
                assert self._owners is not None
                wide = local_tensor(param).detach().float()
                master = self._owners.collect(self._shared_param(param, group), wide)
            set_master(param, state, master)
        elif not is_needed and "master" in state:  # the model was converted
            set_master(param, state, None)
        elif is_needed and get_master(param) is not state["master"]:
            # The parameter was converted, or another optimizer had it since.
            set_master(param, state, state["master"])

    def _create_moments(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        """Create the momentum (Muon), or step and moments (AdamW)."""
        local, layout = local_tensor(param), self._layout_of(param)
        dtype = moment_dtype(group, param)

        def zeros() -> Tensor:
            if layout is None:
                return self.devices.new_zeros(param, dtype)
            return layout.zeros(dtype, local.device)

        if group["algorithm"] == "muon":
            state["momentum_buffer"] = zeros()
            if dtype == torch.int8:
                self._set_scale(
                    param, new_scale(state["momentum_buffer"], group["layout"] or WHOLE)
                )
        else:
            # Where torch's fused AdamW reads it: on the device, so that nothing waits.
            device = self._state_device("step", local)
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"], state["exp_avg_sq"] = zeros(), zeros()

    def _state_device(self, name: str, local: Tensor) -> torch.device:
        """The device of an entry of a parameter's state."""
        if not self.devices.are_given:
            return local.device
        # A step is one number, which torch's fused AdamW reads where it computes, and state of
        # neurons is small.
        is_small = name == "step" or name in neuron_state()
        return self.devices.of_step(local) if is_small else self.devices.of_state(local)

    def _keep_remainder(self, param: Tensor, state: dict[str, Any]) -> None:
        """Keep the master copy as a remainder, which is zero unless there is another copy."""
        master, local = state.get("master"), local_tensor(param.detach())
        device = self.devices.of_state(local)
        if isinstance(master, RemainderMaster) and master.weight is param:
            remainder = master.remainder_bits
            if (master.device, local_tensor(remainder).device) == (local.device, device):
                return
            set_master(param, state, RemainderMaster(param, self.devices.pin(remainder.to(device))))
            return
        kept = RemainderMaster(param, self.devices.new_zeros(param, torch.int16))
        if master is not None:  # loaded, or copied with the optimizer
            kept.write(adopt(local_tensor(master).to(local.device), local))
        set_master(param, state, kept)

    def _new_neuron_state(self, param: Tensor, group: dict[str, Any], name: str) -> Tensor:
        """State with a number for each neuron, zero everywhere."""
        dims, local = self._reduced_dims(param, group, name), local_tensor(param)
        dtype, layout = state_dtype(name, group, param), self._layout_of(param, dims)
        if layout is not None:
            return layout.zeros(dtype, local.device)
        device = self.devices.of_step(local)
        zeros = torch.zeros(reduced_shape(param.shape, dims), dtype=dtype, device=device)
        # torch moves it to the device of the mesh, which need not be this one.
        return place_like(param, zeros, dims).to(device) if is_dtensor(param) else zeros

    def _reduced_dims(self, param: Tensor, group: dict[str, Any], name: str) -> tuple[int, ...]:
        """Dimensions along which an entry of the parameter's state has one element."""
        return self._shared_param(param, group).input_dims if name in neuron_state() else ()

    def _layout_of(self, param: Tensor, dims: tuple[int, ...] = ()) -> StateLayout | None:
        """The parts of the parameter's state on this rank; None if its state is not sharded.

        Args:
            param: the parameter.
            dims: dimensions along which the state has one element, in place of the parameter's.
        """
        layout = None if self._owners is None else self._owners.layout(param)
        return None if layout is None else layout.reduced(dims)

    def _shared_param(self, param: Tensor, group: dict[str, Any]) -> SharedParam:
        return SharedParam(param, group, self._whole_shape(param))

    def create_state(self) -> None:
        """Create the state of every trainable parameter that has none, as before its first step.

        For checkpoints that are loaded into the tensors of ``named_state``. With ``shard_state``, a
        collective call of all ranks that share parameters.
        """
        self._connect_for_state()
        self._complete_state()

    def _complete_state(self) -> None:
        """Create the state of every trainable parameter that has none."""
        for p, group in self._members():
            if p.requires_grad and not p.is_meta:
                self._state_of(p, group, steps=False)

    def _members(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Each parameter and its group; a state dict numbers parameters in this order."""
        return [(p, group) for group in self.param_groups for p in group["params"]]

    def _remember_shapes(self) -> None:
        self._known_shapes = [(p, p.shape) for p, _ in self._members()]
        self._is_changed = True

    def _check_step(self) -> None:
        """Raise for options, parameters or gradients that a step cannot use."""
        capturing = _is_capturing()
        for group in self.param_groups:
            validation.check_resolved_options(group, self.defaults)
            validation.check_gradients(group, capturing)
            if capturing:
                validation.check_capture(group)
            lr = group["lr"]
            validation.check_at_least_zero("lr", lr)
            if isinstance(lr, Tensor) and lr.ndim:
                group["lr"] = lr.reshape(())
        if [now for _, now in self._options()] != [before for _, before in self._known_options]:
            self._check_changed_options()
        params = [p for group in self.param_groups for p in group["params"]]
        if len(params) == len(self._known_shapes) and all(
            p is known and p.shape == shape
            for p, (known, shape) in zip(params, self._known_shapes, strict=True)
        ):
            return
        shapes = dict(self._known_shapes)
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                validation.check_changed_parameter(
                    group, index, shapes.get(p), self._whole_shape(p)
                )
        self._remember_shapes()

    def _options(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Each group, and its options that a step checks if they changed.

        Learning rates change in most steps, and torch.compile sets ``capturable`` in groups on
        GPUs.
        """
        unchecked = {"lr", "capturable"}
        names = self.defaults.keys() - validation.RESOLVED.keys() - unchecked | {"algorithm"}
        return [(group, {name: group.get(name) for name in names}) for group in self.param_groups]

    def _check_changed_options(self) -> None:
        """Raise for an option of a group that was set to a value that it cannot have."""
        validation.check_common_options(self.param_groups)
        known = {id(group): options for group, options in self._known_options}
        now = self._options()
        for group, options in now:
            before = known.get(id(group), options)  # a group may have been put in the list
            validation.check_changed_options(
                group, before, self.defaults, is_sharded=self.shard_state
            )
            if all(options[option] == before[option] for option in ("layout", "variant")):
                continue
            for index, p in enumerate(group["params"]):
                shape = self._whole_shape(p)
                validation.check_changed_parameter(group, index, None, shape)
                if neuron_state() & self.state.get(p, {}).keys():
                    validation.check_changed_layout(group, index, shape, before["layout"])
        self._known_options = now

    def _warn_without_gradients(self) -> None:
        """Warn of a first step without gradients: there may never be one."""
        groups = self.param_groups
        if any(g["updates"] for g in groups) or not any(g["params"] for g in groups):
            return
        warn(
            "MuonClip's first step finds no gradient of any of its parameters and changes nothing. "
            "If the model was wrapped or sharded after constructing the optimizer, it has the old "
            "parameters: construct it afterwards",
        )

    def _warn_of_devices(self, work: "_Work") -> None:
        """Warn at the first step of devices that are those of the parameters."""
        if not (work and self.devices.are_given) or any(g["updates"] for g in self.param_groups):
            return
        devices = {local_tensor(p).device for _, params, _ in work for p in params}
        if not any(self.devices.differ_from(device) for device in devices):
            warn(
                "MuonClip's state_device and compute_device have no effect: parameters, state and "
                f"computations are all on {' and '.join(sorted(map(str, devices)))}. Leave them "
                "out, or give compute_device an accelerator",
            )

    # ------------------------------------------------------------------ agreement of the ranks

    def _connect(self) -> None:
        """Find the ranks that share parameters, and assign owners to the state.

        A collective call of these ranks, after the parameters have changed.
        """
        members = self._members()
        groups = groups_of([p for p, _ in members], self.process_group, self.shardings)
        connected = ConnectedRanks(groups) if groups else None
        if connected is not None:  # processors may differ, but not what ranks send each other
            devices = {self.devices.of_step(local_tensor(p)).type for p, _ in members} or {"cpu"}
            # Nothing is measured for other devices; parameters that move to a CPU are in float32.
            avoids = "cpu" not in devices or not prefers_bfloat16()
            self._avoids_bfloat16 = connected.any(avoids)
            self._ns_dtypes.clear()
        if self.shard_state and connected is not None:
            if self._owners is None:
                self._owners = StateOwners(self.process_group, self.shardings)
            shared = [self._shared_param(p, group) for p, group in members]
            self._owners.add(shared, groups, connected)
        elif self.shard_state and members:
            warn(
                "shard_state=True has no effect: no ranks have copies of these parameters. Pass "
                "process_group, the ranks of DDP, or leave shard_state out",
            )
        self._groups, self._connected, self._plan = groups, connected, None
        self._is_changed = False

    def _exchange_flags(self, work: "_Work", error: Exception | None) -> "_Flags":
        """The flags of this step, the same on all ranks that must take it together.

        A rank on an accelerator reads them on the host only if it cannot take the step as planned,
        or the step may only create state. If no rank can, all read them, and raise or plan again at
        once. Otherwise all skip the step on their devices, and read the flags when the next begins.
        """
        if self._is_changed and self._connected is None:
            self._connect()
        ignore = self.param_groups[0]["nonfinite"] == "ignore"
        is_first = not any(group["updates"] for group in self.param_groups)
        is_update = not is_first or any(may_be_nonzero(g["lr"]) for g in self.param_groups)
        message = None if error is None else str(error)
        if ignore and is_update and self._connected is None:
            return _Flags(None, message)
        gradients = [g for of_group in work for g in of_group.gradients if g.numel()]
        changes = is_update or any(g.count_nonzero() for g in gradients)
        found_inf = None if ignore else _any_nonfinite(gradients)
        if self._connected is not None:
            device = gradients[0].device if gradients else self._device()
            if found_inf is None:
                found_inf = torch.zeros((), dtype=torch.float32, device=device)
            has_error, plan = error is not None, self._plan
            is_unplanned = not has_error and (
                plan is None or plan.signature != self._signature(work)
            )
            fits = not (has_error or self._is_changed or is_unplanned)
            if not fits and _is_capturing():  # which cannot read the flags
                raise error or RuntimeError(_UNPLANNED_CAPTURE)
            known = (has_error, self._is_changed, is_unplanned, changes, fits)
            flags = torch.stack([found_inf, *(torch.full_like(found_inf, flag) for flag in known)])
            flags = self._connected.largest(flags)
            is_read = is_free_to_read(device) or not is_update
            if is_read or not fits:
                _, any_error, any_changed, any_unplanned, changes, any_fits = map(
                    bool, flags.tolist()
                )
            if not is_read and (fits or any_fits):  # other ranks do not read the flags
                self._remember_flags(flags[:4], error)
                return _Flags(flags[:4].amax(), None, takes_part=fits)
            if any_error:
                message = self._connected.first_error(message)
            elif any_changed:
                self._connect()
            elif any_unplanned:
                self._plan = None
            found_inf = flags[0]
        if message is None and found_inf is not None:
            self._remember_flags(found_inf, None)
        return _Flags(found_inf, message, only_creates_state=not changes)

    def _remember_flags(self, flags: Tensor, error: Exception | None) -> None:
        """Read flags on an accelerator when the next step begins."""
        is_needed = flags.ndim > 0 or self._raises
        if is_needed and not is_free_to_read(flags.device) and not _is_capturing():
            self._pending = _PendingFlags(flags, error)

    def _read_pending(self) -> None:
        """Raise the error of the step before, or plan again, as all its ranks do."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        found_inf, any_error, any_changed, any_unplanned = pending.read()
        if any_changed or any_unplanned:
            self._plan = None
            self._is_changed |= any_changed
        if any_error:
            assert self._connected is not None
            error = pending.error
            message = self._connected.first_error(None if error is None else str(error))
            raise error or RuntimeError(_refused(str(message)))
        if found_inf and self._raises:
            raise RuntimeError(
                "a gradient of the step before was not finite; that step was skipped and nothing "
                f"was updated. {_ADVICE}"
            )
        if any_changed or any_unplanned:
            warn(_REPLANNED)

    def _warn_of_pending(self) -> None:
        """Warn that the last step was skipped, which may be the last of all."""
        if self._pending is None:
            return
        found_inf, *others = self._pending.read()
        if any(others) or (found_inf and self._raises):
            error = self._pending.error
            warn(_PENDING + (f": {error}" if error else ""))

    def _device(self) -> torch.device:
        """The device of the parameters, or that of the process group on a rank without any."""
        for p, _ in self._members():
            return local_tensor(p).device
        if self.process_group is not None:
            backend = torch.distributed.get_backend(self.process_group)
            if backend == "nccl":
                return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _describe_nonfinite(self) -> str:
        labels = [
            label(group, index)
            for group in self.param_groups
            for index, p in enumerate(group["params"])
            if p.grad is not None and not local_gradient(p).isfinite().all()
        ]
        first = labels[0] if labels else "a parameter on another rank"
        others = f" (and {len(labels) - 1} others)" if len(labels) > 1 else ""
        return f"the gradient of {first}{others} is not finite; nothing was updated. {_ADVICE}"

    # ------------------------------------------------------------------ saving and copying

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state of every trainable parameter, and the groups.

        Once any parameter has state, those that never had a gradient get state here, because
        ``torch.distributed.checkpoint`` loads only entries that both the checkpoint and the
        optimizer have. Groups store dtypes and layouts as strings, because it saves tensors,
        numbers and strings only. An int8 momentum, and a master copy with a remainder, are in
        float32: new tensors, on the device of the weight or the state, for all parameters at once.

        With ``shard_state``, all ranks call it together. Tensors that ranks store in parts are
        ``ShardedState``, which ``torch.distributed.checkpoint`` saves and loads at any number of
        ranks, and which cannot be pickled: a file of one rank would contain a part of the state
        only. ``full_state_dict`` returns whole tensors. Use it, or ``shard_state``, for plain
        tensors with a ``Sharding`` too: otherwise their state is this rank's shard, which
        ``torch.distributed.checkpoint`` takes for a copy of those of other ranks.
        """
        self._drop_replaced()
        self._warn_of_pending()
        if self.state:  # not before: Accelerate asks for it, and then replaces the parameters
            self._connect_for_state()
            self._complete_state()
        # As the first post-hook, so that the user's own see what is saved, and may rename it.
        handle = self.register_state_dict_post_hook(
            lambda _, saved: self._convert_saved(saved), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _convert_saved(self, saved: dict[str, Any]) -> None:
        """Replace what torch would save by what ``state_dict`` returns."""
        for group in saved["param_groups"]:
            for option, value in group.items():
                if isinstance(value, (torch.dtype, MatrixLayout)):
                    group[option] = str(value)
        for key, (param, group) in enumerate(self._members()):
            if key not in saved["state"]:
                continue
            entries = self._as_saved(param, saved["state"][key])
            if self._owners is not None:
                entries = {
                    name: self._owners.whole_shard(
                        param, value, self._reduced_dims(param, group, name)
                    )
                    for name, value in entries.items()
                }
            saved["state"][key] = entries

    def _drop_replaced(self) -> None:
        """Drop the initial state of parameters that are no longer in any group.

        Accelerate reads the state when it prepares an optimizer, and then replaces the parameters
        by sharded ones.
        """
        present = {id(p) for p, _ in self._members()}
        replaced = [p for p in self.state if isinstance(p, Tensor) and id(p) not in present]
        for p in replaced:
            moments = [v for name, v in self.state[p].items() if name != "master"]
            if any(values.any() for moment in moments for values in local_values(moment)):
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} was replaced in the optimizer's groups "
                    "after training began, and its momentum belongs to no other: construct an "
                    "optimizer of the new parameters, and load the state_dict of the old optimizer"
                )
        for p in replaced:
            del self.state[p]
            self.momentum_scales.pop(p, None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, for the same parameters in the same groups.

        If both sides have names, parameters are matched by name, whatever the order of parameters
        and groups; a group takes the options of the saved group that most of its parameters were
        in. Otherwise they are matched by order. Moments and master copies are copied to the device
        and dtype that this optimizer keeps them in. Layouts, names and ``capturable`` are not
        loaded: they belong to the model and this process. Neither are ``momentum_dtype``,
        ``master_weights`` and ``stochastic_rounding``: the state is converted, with a warning. Nor
        are variants: state of the group's variant that is missing starts at zero, and state of
        another one is left out, with a warning. Where the saved layout has the rows of the same
        matrices in another order, as Megatron's gate and up at another number of tensor-parallel
        ranks, the state is rearranged, with a warning.

        With ``shard_state``, each rank copies its parts of whole tensors (of ``full_state_dict``,
        or of an optimizer without ``shard_state``), and all ranks call it together. So must the
        ranks of an optimizer without ``shard_state`` if tensors are ``ShardedState``.

        Args:
            state_dict: as returned by ``state_dict``; not changed.

        Raises:
            ValueError: if it belongs to other parameters, shapes or algorithms, or has an option
                out of range; the message names the first parameter or option that differs, and
                nothing is loaded.
        """
        matched: dict[str, Any] = {}
        rearranged: set[str] = set()
        converted: set[str] = set()
        differences: set[str] = set()

        def fit(name: str, param: Tensor, group: Any, entries: Any, layout: Any) -> dict[str, Any]:
            differences.update(saved_state.differences(group, entries))
            own, saved = group["layout"], layout
            if isinstance(saved, str):  # as state_dict returns it
                saved = MatrixLayout.parse(saved)
            if own is not None and saved is not None and own.differs_in_order(saved):
                rearranged.add(f"from ({saved}) to ({own})")
                entries = self._rearrange(param, group, entries, saved)
            return self._fit(name, param, group, entries)

        def match(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            matched.update(saved_state.match(optimizer.param_groups, state_dict, fit))
            for group, saved in zip(self.param_groups, matched["param_groups"], strict=True):
                converted.update(self._complete_options(saved, group))
            return matched

        # As the last pre-hook, so that it sees what the user's own pre-hooks made of the state.
        self._connect_for_state()
        handle = self.register_load_state_dict_pre_hook(match)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        keys = [key for saved in matched["param_groups"] for key in saved["params"]]
        for (p, group), key in zip(self._members(), keys, strict=True):
            if key in matched["state"]:
                self._copy_state(p, group, matched["state"][key])
        self._forget_plan()
        if rearranged:
            warn(_REARRANGED.format("; ".join(sorted(rearranged))))
        if converted:
            warn(_CONVERTED.format("; ".join(sorted(converted))))
        _warn_of_differences(differences)

    def _complete_options(self, saved: dict[str, Any], group: dict[str, Any]) -> set[str]:
        """Convert the options of a saved group to those of this optimizer's group, and check them.

        An option that the saved group does not have keeps its value.

        Returns:
            The options of precision that differ, and so convert the state.
        """
        saved |= {name: group[name] for name in group.keys() - saved.keys() - _NOT_OPTIONS}
        saved |= {option: group[option] for option in ("layout", "variant", "capturable")}
        for option in ("ns_dtype", "momentum_dtype"):
            if isinstance(saved[option], str):  # as "torch.float32"
                saved[option] = getattr(torch, saved[option].removeprefix("torch."), saved[option])
        try:
            validation.check_options({**self.defaults, **saved})
        except (TypeError, ValueError) as error:
            raise ValueError(f"the saved state has an option out of range: {error}") from None
        before = {option: saved[option] for option in PRECISION}
        saved |= {option: group[option] for option in PRECISION}
        return {
            f"{option}={before[option]}, and this optimizer has {option}={group[option]}"
            for option, effect in PRECISION.items()
            if before[option] != group[option]
            and any(effect(group | before, p) != effect(group, p) for p in group["params"])
        }

    def _copy_state(self, param: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> None:
        """Copy a parameter's saved state, which torch shares, or casts to the parameter's dtype."""
        state = self.state[param]
        for name, value in saved.items():
            if name != "master":
                state[name] = self._as_stored(param, group, name, value, copy=True)
        # The next step creates a remainder, or a master copy on its owner.
        is_created = keeps_remainder(group, param) or self._layout_of(param) is not None
        if not needs_master(group, param) or ("master" not in saved and is_created):
            set_master(param, state, None)
        elif state:
            master = saved.get("master", param.detach())
            set_master(param, state, self._as_stored(param, group, "master", master, copy=True))

    def _as_stored(
        self, param: Tensor, group: dict[str, Any], name: str, value: Tensor, *, copy: bool = False
    ) -> Tensor:
        """A tensor of a parameter's state on the device and in the dtype that it is kept in.

        The codes of an int8 momentum have new ``momentum_scales``.
        """
        value = value.to(self._state_device(name, local_tensor(param)))
        dtype = state_dtype(name, group, param)
        if dtype != torch.int8:
            return self.devices.pin(value.to(dtype, copy=copy))
        codes = self.devices.pin(torch.empty_like(value, dtype=torch.int8))
        self._set_scale(param, new_scale(codes, group["layout"] or WHOLE))
        encode_(codes, self.momentum_scales[param], value)
        return codes

    def _set_scale(self, param: Tensor, scale: Tensor) -> None:
        self.momentum_scales[param] = self.devices.pin(scale)

    def _as_saved(self, param: Tensor, entries: Mapping[str, Any]) -> dict[str, Any]:
        """A parameter's state as it is saved: momentum and master copy in their float32 values.

        The entries have the same names: ``torch.distributed.checkpoint`` looks for those of the
        optimizer in what it loads.
        """
        saved = dict(entries)
        if isinstance(master := saved.get("master"), RemainderMaster):
            saved["master"] = master.float32()
        momentum = saved.get("momentum_buffer")
        if momentum is not None and momentum.dtype == torch.int8:
            saved["momentum_buffer"] = decode(momentum, self.momentum_scales[param])
        return saved

    def _connect_for_state(self) -> None:
        """Assign owners to the state of new parameters; collective with ``shard_state``."""
        if not self.shard_state:
            return
        if self._connected is not None:  # on one of its ranks, perhaps
            flag = torch.tensor(float(self._is_changed), device=self._device())
            self._is_changed = bool(self._connected.largest(flag))
        if self._is_changed:
            self._connect()

    def _fit(
        self, name: str, param: Tensor, group: dict[str, Any], entries: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Saved entries of a parameter's state, checked, and as this optimizer stores them.

        A collective call of the ranks that share the parameter, if it was saved in parts.
        """
        unused = neuron_state().difference(variant_of(group).state)
        fitting = {
            key: self._fit_tensor(param, group, key, value)
            if isinstance(value, Tensor) and key != "step"
            else value
            for key, value in entries.items()
            if key not in unused
        }
        reduced_dims = partial(self._reduced_dims, param, group)
        return saved_state.check_entries(fitting, name, param, group["algorithm"], reduced_dims)

    def _rearrange(
        self,
        param: Tensor,
        group: dict[str, Any],
        entries: Mapping[str, Any],
        saved: MatrixLayout,
    ) -> dict[str, Any]:
        """Saved entries of a parameter's state, with the rows in the order of the group's layout.

        A collective call of the ranks that share the parameter, if it was saved in parts.
        """
        own: MatrixLayout = group["layout"]

        def arrange(name: str, value: Tensor) -> Tensor:
            dims = self._reduced_dims(param, group, name)
            shape = reduced_shape(self._whole_shape(param), dims)
            whole = self._whole(param, value, dims)
            if tuple(whole.shape) != shape:  # an error that is raised later
                return value
            source, target = (saved.of_neurons, own.of_neurons) if dims else (saved, own)
            whole = target.join(source.split(whole), shape)
            return place_like(param, whole, dims) if is_dtensor(value) else whole

        return {
            name: arrange(name, value) if isinstance(value, Tensor) and name != "step" else value
            for name, value in entries.items()
        }

    def _fit_tensor(self, param: Tensor, group: dict[str, Any], name: str, value: Tensor) -> Tensor:
        dims = self._reduced_dims(param, group, name)
        layout, shape = self._layout_of(param, dims), self._whole_shape(param)
        if isinstance(value, ShardedState):
            if value.state_layout is layout:
                return value
            value = value.full_tensor()
        elif layout is not None and is_dtensor(value):
            value = value.full_tensor()
        is_whole = tuple(value.shape) == reduced_shape(shape, dims)
        if layout is None and is_whole and is_dtensor(param) and not is_dtensor(value):
            return place_like(param, value, dims)
        if layout is not None and is_whole:
            return layout.select(value)
        if layout is not None and tuple(value.shape) == reduced_shape(param.shape, dims):
            assert self._owners is not None  # this rank's shard
            return self._owners.collect(self._shared_param(param, group), value, dims)
        if is_whole and param in self.shardings:
            return value[self.shardings[param].local.reduced(dims).slices].clone()
        return value

    @torch.no_grad()
    def full_state_dict(self, rank: int | None = 0) -> dict[str, Any]:
        """``state_dict`` with whole tensors on the CPU, to be saved in one file.

        A collective call of all ranks. It can be loaded by ``load_state_dict`` of any MuonClip with
        the same parameters, with or without ``shard_state``, at any number of ranks. One tensor at
        a time is whole on the ranks that share its parameter.

        Args:
            rank: the global rank that needs it; None: all ranks.

        Returns:
            The state dict, for the parameters that the rank has; empty on other ranks.
        """
        saved = self.state_dict()
        members = self._members()
        is_needed = rank is None or not self._groups or torch.distributed.get_rank() == rank
        state: dict[Any, dict[str, Any]] = {}
        for key, entries in saved["state"].items():
            param, group = members[key]
            whole = {
                name: self._whole(param, value, self._reduced_dims(param, group, name))
                for name, value in entries.items()
            }
            if is_needed:
                state[key] = {
                    name: value.to("cpu", copy=value is entries[name])
                    for name, value in whole.items()
                }
        return {**saved, "state": state} if is_needed else {}

    def _whole(self, param: Tensor, value: Tensor, dims: tuple[int, ...]) -> Tensor:
        """A whole tensor of state. A collective call of the ranks that share the parameter.

        Args:
            param: its parameter.
            value: as this rank stores it, or whole.
            dims: dimensions along which it has one element, in place of the parameter's.
        """
        if isinstance(value, ShardedState) or is_dtensor(value):
            return value.full_tensor()
        sharding = self.shardings.get(param)
        if sharding is None or tuple(value.shape) != reduced_shape(param.shape, dims):
            return value  # whole already, or a step
        return sharding.reduced(dims).gather_whole(value)

    def named_state(
        self, named_parameters: Iterable[tuple[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """The state of each parameter by name, without copies, except of an int8 momentum and of a
        master copy with a remainder, which are in float32.

        For checkpoints that store every tensor by name, whatever the order of parameters and
        groups.

        Args:
            named_parameters: (name, parameter) pairs, e.g. ``model.named_parameters()``.

        Returns:
            Name -> entries: ``momentum_buffer`` (Muon; NorMuon also has ``neuron_square``), or
            ``step``, ``exp_avg`` and ``exp_avg_sq`` (AdamW); and ``master``, if the parameter has a
            master copy. Empty for a parameter without state. With ``shard_state``, tensors of a
            parameter of which several ranks have copies are ``ShardedState``: ``pieces()`` yields
            what this rank stores. Tensors of a plain tensor with a ``Sharding`` are this rank's
            shard, if no other rank has it: save them under another name on each rank.
        """
        self._warn_of_pending()
        return {
            name: self._as_saved(param, self.state.get(param, {}))
            for name, param in named_parameters
        }

    def load_named_state(
        self,
        state: Mapping[str, Mapping[str, Tensor]],
        named_parameters: Iterable[tuple[str, Tensor]],
    ) -> None:
        """Replace the state of each named parameter by the given tensors.

        They are copied only where this optimizer keeps them in another dtype, on another device, or
        cut into shards.

        A parameter without entries is left without state, as before its first gradient. ``master``
        alone attaches a master copy; the other state of the parameter will start at zero. So will
        state of a variant that is missing, and that of other variants is left out, with a warning.

        Args:
            state: name -> entries, as returned by ``named_state``.
            named_parameters: (name, parameter) pairs.

        Raises:
            ValueError: for a name or an entry that does not belong to a parameter; nothing is
                loaded then.
        """
        self._connect_for_state()
        params = dict(named_parameters)
        groups = dict(self._members())
        if unknown := {name for name in state if params.get(name) not in groups}:
            raise ValueError(f"the optimizer has no parameter {min(unknown)!r}")
        checked = {
            name: self._fit(f"parameter {name!r}", params[name], groups[params[name]], entries)
            for name, entries in state.items()
            if entries
        }
        for param in params.values():
            set_master(param, self.state.pop(param, {}), None)
        for name, entries in checked.items():
            param = params[name]
            stored = {
                key: self._as_stored(param, groups[param], key, value)
                for key, value in entries.items()
            }
            self.state[param] = stored
            set_master(param, stored, stored.get("master"))
        self._forget_plan()
        _warn_of_differences(
            {
                difference
                for name, entries in state.items()
                for difference in saved_state.differences(groups[params[name]], entries)
            }
        )

    def _forget_plan(self) -> None:
        """Let all ranks read the flags of the next step, which may collect missing master copies.

        A rank that cannot take the step as planned does not take part in that.
        """
        if self.shard_state:
            self._plan = None

    def __getstate__(self) -> dict[str, Any]:
        if self.shardings or self.process_group is not None or self._owners is not None:
            raise TypeError(
                "an optimizer that shares work over a process group cannot be copied or pickled: "
                "save its state_dict() and construct a new one"
            )
        copied = (
            "process_group", "shardings", "shard_state", "devices", "skipped_steps",
            "momentum_scales",
        )  # fmt: skip
        return {**super().__getstate__(), **{name: getattr(self, name) for name in copied}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch adds it whenever a state is loaded, and later groups would have an option more.
        self.defaults.pop("differentiable", None)
        if "_known_shapes" not in self.__dict__:  # a copy, rather than a state that is loaded
            self._reset()
            self._remember_shapes()
        self._known_options = self._options()
        for param, entries in self.state.items():  # a copied parameter does not have the attribute
            set_master(param, entries, entries.get("master"))


def _warn_of_differences(differences: set[str]) -> None:
    if differences:
        warn(f"the loaded state {'; it '.join(sorted(differences))}")


def _copy_option(value: Any) -> Any:
    """A copy of an option that may be changed in place; others as they are."""
    if isinstance(value, Tensor):
        copied = value.detach().clone()
        return copied.reshape(()) if copied.numel() == 1 else copied
    return copy.deepcopy(value) if isinstance(value, (list, dict, set)) else value


def _is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    try:
        return bool(torch.cuda.is_current_stream_capturing())
    except RuntimeError:  # a build without CUDA
        return False


def _any_nonfinite(gradients: list[Tensor]) -> Tensor | None:
    """1 if a gradient is not finite, as a float32 scalar on the device of the first; else 0, or
    None if the host has read that all are finite."""
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_device[gradient.device].append(gradient)
    found = [
        flag.to(gradients[0].device)
        for members in by_device.values()
        if (flag := _any_nonfinite_of_device(members)) is not None
    ]
    return torch.stack(found).amax() if len(found) > 1 else next(iter(found), None)


def _any_nonfinite_of_device(gradients: list[Tensor]) -> Tensor | None:
    """``_any_nonfinite`` for gradients on one device."""
    if is_fake(gradients[0]):
        return None
    if is_free_to_read(gradients[0].device):
        # The fast norm may overflow for finite gradients; then they are checked one by one.
        # torch.compile warns of norm.item().
        if all(math.isfinite(norm) for norm in torch._foreach_norm(gradients)):
            return None
        bad = any(not g.isfinite().all() for g in gradients)
        return torch.tensor(float(bad), dtype=torch.float32, device="cpu")
    largest = torch._foreach_norm(gradients, float("inf"))
    return torch.stack([norm.float() for norm in largest]).isfinite().logical_not().any().float()


class _GroupWork(NamedTuple):
    """A group that has parameters with a gradient, these parameters, and local gradients."""

    group: dict[str, Any]
    params: list[Tensor]
    gradients: list[Tensor]


_Work = list[_GroupWork]


class _Flags(NamedTuple):
    """Facts of a step that all its ranks know.

    Attributes:
        found_inf: 1 if the step must change nothing: a gradient has an infinity or NaN, or a rank
            cannot take the step as planned. A float32 scalar on the device of the gradients; None:
            the step changes something.
        error: the error that a rank found before anything was updated, or None.
        only_creates_state: whether this is the first step, with learning rates and gradients of
            zero. ``torch.distributed.checkpoint.state_dict`` takes such a step to create the state
            of a new optimizer, and it must not count.
        takes_part: False on a rank that cannot take the step as planned, which others do not know.
        is_done: whether nothing is left to do, as the host knows that the step changes nothing.
    """

    found_inf: Tensor | None
    error: str | None
    only_creates_state: bool = False
    takes_part: bool = True
    is_done: bool = False


class _Plan(NamedTuple):
    """The work of the ranks in steps with the same parameters.

    Attributes:
        muon: of Muon's parameters.
        adamw: dtype and device of each parameter of AdamW whose state is sharded.
        signature: of these parameters, see ``MuonClip._signature``.
    """

    muon: DistributedMuon
    adamw: dict[Tensor, tuple[torch.dtype, torch.device]]
    signature: list[tuple[Any, ...]]


_BY_SHAPE = (
    "MuonClip has parameters without names and chooses between Muon and AdamW by their shapes: "
    "embeddings and output heads, which belong to AdamW, are matrices too and go to Muon. Give it "
    "param_groups(model), or model.named_parameters(), or groups with algorithm='muon' or 'adamw'"
)
_ADVICE = (
    "Look at this step's data and loss, or lower the learning rate; MuonClip(nonfinite='skip') "
    "skips such steps"
)
_REPLANNED = (
    "MuonClip skipped the step before on all ranks, because some of them had gradients of other "
    "parameters than before, or new parameters. If that was a surprise, look for parameters that "
    "some ranks do not use"
)
_NOT_COMPILED = (
    "torch.compile has no effect on a step of MuonClip that exchanges data between ranks, or with "
    "state_device or compute_device: call optimizer.step itself"
)
_PENDING = (
    "MuonClip skipped the last step before this state was read, on all ranks; the next step raises "
    "the error, or divides the work again"
)
_UNPLANNED_CAPTURE = (
    "a step cannot be captured in which ranks divide their work: before the capture, take a step "
    "with gradients of the same parameters on all ranks"
)
_REARRANGED = (
    "the loaded state stores the rows of the same matrices in another order, as at another number "
    "of tensor-parallel ranks, and was rearranged: {}. The weights must be in the order of the "
    "latter"
)
_CONVERTED = (
    "the loaded state has {}: the state was converted. To continue as it was saved, give the saved "
    "value to the constructor"
)


def _refused(message: str) -> str:
    return f"another rank refused this step before anything was updated: {message}"


class _PendingFlags:
    """Flags of a step on their way from an accelerator, read when the next step begins.

    Args:
        flags: on the accelerator: whether a gradient is not finite, a rank found an error, has
            changed parameters, or other gradients than before. The first alone, or all.
        error: that this rank found.
    """

    def __init__(self, flags: Tensor, error: Exception | None) -> None:
        self.error = error
        is_cuda = flags.is_cuda
        self._flags = torch.empty(flags.shape, dtype=flags.dtype, device="cpu", pin_memory=is_cuda)
        self._flags.copy_(flags, non_blocking=is_cuda)  # only there can its end be awaited
        self._event: Any = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def read(self) -> list[bool]:
        if self._event is not None and not _is_capturing():  # a capture begins after all work
            self._event.synchronize()
        read = [bool(flag) for flag in self._flags.view(-1).tolist()]
        return read + [False] * (4 - len(read))
