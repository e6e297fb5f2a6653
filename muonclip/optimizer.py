"""MuonClip's optimizer: Muon for matrices, AdamW for the rest, one ``step``."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from numbers import Real
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT

from muonclip.orthogonalize import (
    NS_DTYPES,
    AdjustLR,
    Coefficients,
    coefficient_steps,
    orthogonalize,
    update_scale,
)
from muonclip.param_groups import Algorithm, choose_algorithm

# Newton-Schulz runs on batches of at most this many elements (or one tensor), which bounds its
# memory; matrices this large keep a device busy without company.
_BATCH_ELEMENTS = 2**27

_STATE_KEYS: dict[str, set[str]] = {
    "muon": {"momentum_buffer"},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
}


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
    ``weight_decay``, where they are given; schedulers then move each group from its own start.
    ``param_groups(model)`` also looks at module types and is the better start for a whole model.

    The group option ``row_splits``, a tuple of row counts, says that the rows of each of the
    group's Muon parameters are several matrices of the model fused in storage (gate and up, say):
    each is orthogonalized and scaled on its own.

    A parameter without a gradient is left alone: no decay, no state. State is
    ``momentum_buffer`` (Muon) or ``step``, ``exp_avg``, ``exp_avg_sq`` (AdamW), in the
    parameter's dtype, and created at the first step with a gradient.

    Args:
        params: tensors, (name, tensor) pairs, or groups (dicts) of either.
        lr: learning rate :math:`\eta`.
        weight_decay: decoupled weight decay :math:`\lambda`.
        momentum: :math:`\mu`, in [0, 1).
        nesterov: look ahead along the momentum.
        ns_coefficients: Newton-Schulz coefficients: a name or (a, b, c).
        ns_steps: Newton-Schulz steps.
        ns_dtype: dtype of Newton-Schulz; everything else runs in at least float32.
        eps: least norm of an update before orthogonalization.
        adjust_lr: scale by shape: ``"match_rms_adamw"`` or ``"original"``; see ``update_scale``.
        adamw_lr: AdamW's learning rate; default: ``lr``.
        adamw_betas: AdamW's decay rates of the two moments.
        adamw_eps: AdamW's epsilon.
        adamw_weight_decay: AdamW's decoupled weight decay; default: ``weight_decay``.
        maximize: ascend instead of descend.

    Each option may be set per group; what a group sets wins over the constructor.

    Raises:
        TypeError, ValueError: for an option out of range, or a parameter that is complex, sparse,
            given twice, or sent to Muon without being a non-empty matrix or stack of matrices.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-4,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = "quintic",
        ns_steps: int = 5,
        ns_dtype: torch.dtype = torch.bfloat16,
        eps: float = 1e-7,
        adjust_lr: AdjustLR = "match_rms_adamw",
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        maximize: bool = False,
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
            "row_splits": None,
            "adamw_lr": adamw_lr,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
            "maximize": maximize,
        }
        _check_options(defaults)
        super().__init__(params, defaults)

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
        _check_options(options)
        params, names = options.pop("params"), options.pop("param_names", None)
        if names is not None:  # a group that has been in an optimizer
            params = list(zip(names, params, strict=True))
        entries = _entries(params, len(self.param_groups))
        self._check_new(entries)
        divided = _divide(entries, options.pop("algorithm", None))
        for entry in divided.get("muon", ()):
            _check_matrix(entry, options["row_splits"])

        for algorithm, members in divided.items():
            group = {**options, "algorithm": algorithm}
            if members and members[0].name is not None:
                group["params"] = [(entry.name, entry.param) for entry in members]
            else:
                group["params"] = [entry.param for entry in members]
            if algorithm == "adamw":
                group["row_splits"] = None
                for option in ("lr", "weight_decay"):
                    group[option] = self._adamw_option(option, param_group)
            super().add_param_group(group)
            # Resolved into lr and weight_decay, which is what schedulers move.
            del group["adamw_lr"], group["adamw_weight_decay"]

    def _adamw_option(self, option: str, param_group: dict[str, Any]) -> float:
        """AdamW's lr or weight_decay: the group's word before the constructor's."""
        for source in (param_group, self.defaults):
            for key in (f"adamw_{option}", option):
                if source.get(key) is not None:
                    return float(source[key])
        raise AssertionError("unreachable: the defaults have every option")

    def _check_new(self, entries: "list[_Entry]") -> None:
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for entry in entries:
            if id(entry.param) in known:
                raise ValueError(f"{entry.label} is given twice: list every parameter once")
            known.add(id(entry.param))
        for group in self.param_groups:
            if entries and ("param_names" in group) != (entries[0].name is not None):
                raise ValueError(
                    "either all parameters have names or none: "
                    f"{entries[0].label} differs from the groups before it"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the model and returns the loss; called once, with gradients
                enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: if a gradient is sparse; nothing is updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{_label(group, index)} has a sparse gradient; MuonClip needs dense ones "
                        "(nn.Embedding(sparse=False))"
                    )
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if group["algorithm"] == "muon":
                self._step_muon(params, group)
            else:
                self._step_adamw(params, group)
        return loss

    def _step_muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad.to(p.dtype) for p in params if p.grad is not None]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        momentum = group["momentum"]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)

        # A matrix is a matrix of the model, not of its storage: fused ones go separately.
        matrices: list[_Matrices] = []
        for p, grad, buffer in zip(params, grads, buffers, strict=True):
            rows = group["row_splits"] or (p.size(-2),)
            matrices += map(_Matrices, *(t.split_with_sizes(rows, -2) for t in (p, grad, buffer)))
        for batch in _batches(matrices):
            update = _stack(part.buffer for part in batch)
            if group["nesterov"]:
                update = _stack(part.grad for part in batch).lerp_(update, momentum)
            update = orthogonalize(
                update,
                coefficients=group["ns_coefficients"],
                steps=group["ns_steps"],
                eps=group["eps"],
                dtype=group["ns_dtype"],
            )
            lr, weight_decay = group["lr"], group["weight_decay"]
            scale = update_scale(update.shape, group["adjust_lr"])
            sizes = [part.param.shape[:-2].numel() for part in batch]
            for (p, _, _), direction in zip(batch, update.split_with_sizes(sizes), strict=True):
                # p itself if it is float32, else a copy: p is then rounded once.
                wide = p.to(torch.promote_types(p.dtype, torch.float32))
                wide.mul_(1 - lr * weight_decay).add_(direction.reshape(p.shape), alpha=-lr * scale)
                if wide is not p:
                    p.copy_(wide)

    def _step_adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                # On the host, as in torch.optim.AdamW: it is read there in every step.
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in params]
        beta1, beta2 = group["adamw_betas"]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["adamw_eps"],
            maximize=group["maximize"],
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, for the same parameters in the same groups.

        Args:
            state_dict: as returned by ``state_dict``; not changed.

        Raises:
            ValueError: if it belongs to other parameters, shapes or algorithms; the message names
                the first parameter that differs, and nothing is loaded.
        """
        # As the last pre-hook, so that it sees what the user's own pre-hooks made of the state.
        check = self.register_load_state_dict_pre_hook(_check_loadable)
        try:
            super().load_state_dict(state_dict)
        finally:
            check.remove()


class _Entry(NamedTuple):
    """A parameter on its way into a group; ``label`` is what errors call it."""

    name: str | None
    param: Tensor
    label: str


def _entries(params: Any, group_index: int) -> list[_Entry]:
    """The tensors of a group, with their names where given, checked one by one."""
    if isinstance(params, Tensor):
        params = [params]
    if isinstance(params, (set, frozenset)):
        raise TypeError("params must be ordered, e.g. a list: a set's order changes between runs")
    entries = []
    for index, item in enumerate(params):
        name, param = item if isinstance(item, tuple) else (None, item)
        where = repr(name) if name is not None else f"number {index} of group {group_index}"
        if not isinstance(param, Tensor):
            raise TypeError(f"parameter {where} must be a Tensor, got {type(param).__name__}")
        label = f"parameter {where} of shape {tuple(param.shape)}"
        if not param.is_floating_point():
            raise ValueError(f"{label} is {param.dtype}; MuonClip needs real floating point")
        if param.layout != torch.strided:
            raise ValueError(f"{label} is sparse; MuonClip needs dense tensors")
        if not (param.is_leaf or param.retains_grad):
            raise ValueError(f"{label} is computed from others; MuonClip updates leaf tensors only")
        entries.append(_Entry(name, param, label))
    if len({entry.name is None for entry in entries}) > 1:
        unnamed = next(entry for entry in entries if entry.name is None)
        raise ValueError(f"either all parameters have names or none: {unnamed.label} has none")
    return entries


def _divide(entries: list[_Entry], algorithm: Any) -> dict[Algorithm, list[_Entry]]:
    """The entries by algorithm: all in the named one, or each by ``choose_algorithm``."""
    if algorithm not in (None, *get_args(Algorithm)):
        first = entries[0].label if entries else "an empty group"
        raise ValueError(f"algorithm must be 'muon' or 'adamw', got {algorithm!r} for {first}")
    if algorithm is not None or not entries:
        return {algorithm or "muon": entries}
    divided: dict[Algorithm, list[_Entry]] = {}
    for entry in entries:
        divided.setdefault(choose_algorithm(entry.param, entry.name)[0], []).append(entry)
    return divided


def _check_matrix(entry: _Entry, row_splits: tuple[int, ...] | None) -> None:
    param = entry.param
    if param.ndim not in (2, 3):
        raise ValueError(
            f"{entry.label} is no matrix [n, m] or stack of matrices [E, n, m]: "
            "give it algorithm='adamw'"
        )
    if param.numel() == 0:
        raise ValueError(f"{entry.label} has no elements: leave it out")
    if row_splits is not None and sum(row_splits) != param.size(-2):
        raise ValueError(
            f"row_splits {tuple(row_splits)} add up to {sum(row_splits)}, "
            f"but {entry.label} has {param.size(-2)} rows"
        )


def _check_options(options: dict[str, Any]) -> None:
    """Raise for an option out of range, naming it."""
    for option in ("lr", "weight_decay", "eps", "adamw_lr", "adamw_eps", "adamw_weight_decay"):
        value = options[option]
        if value is None and option in ("adamw_lr", "adamw_weight_decay"):
            continue
        _check_number(option, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{option} must be at least 0 and finite, got {value}")
    betas = options["adamw_betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"adamw_betas must be two numbers, got {betas!r}")
    for option, value in (
        ("momentum", options["momentum"]),
        ("adamw_betas[0]", betas[0]),
        ("adamw_betas[1]", betas[1]),
    ):
        _check_number(option, value)
        if not 0 <= value < 1:
            raise ValueError(f"{option} must be in [0, 1), got {value}")
    try:
        coefficient_steps(options["ns_coefficients"], options["ns_steps"])
    except ValueError as error:  # names coefficients or steps
        raise ValueError(f"ns_{error}") from None
    if options["ns_dtype"] not in NS_DTYPES:
        raise ValueError(f"ns_dtype must be one of {NS_DTYPES}, got {options['ns_dtype']}")
    if options["adjust_lr"] not in get_args(AdjustLR):
        raise ValueError(
            f"adjust_lr must be one of {get_args(AdjustLR)}, got {options['adjust_lr']!r}"
        )
    splits = options["row_splits"]
    if splits is not None and not (
        isinstance(splits, Sequence) and all(isinstance(rows, int) and rows > 0 for rows in splits)
    ):
        raise ValueError(f"row_splits must be positive row counts, got {splits!r}")


def _check_number(option: str, value: Any) -> None:
    # A tensor would be shared between groups, and a scheduler would then move it twice.
    if not isinstance(value, Real):
        raise TypeError(f"{option} must be a number, got {type(value).__name__}")


class _Matrices(NamedTuple):
    """A parameter, its gradient and momentum, or the rows of each that are one matrix: views."""

    param: Tensor
    grad: Tensor
    buffer: Tensor


def _batches(matrices: list[_Matrices]) -> Iterator[list[_Matrices]]:
    """Batches of one matrix shape, dtype and device."""
    alike = defaultdict(list)
    for part in matrices:
        alike[part.param.shape[-2:], part.param.dtype, part.param.device].append(part)
    for parts in alike.values():
        batch: list[_Matrices] = []
        elements = 0
        for part in parts:
            if batch and elements + part.param.numel() > _BATCH_ELEMENTS:
                yield batch
                batch, elements = [], 0
            batch.append(part)
            elements += part.param.numel()
        yield batch


def _stack(tensors: Iterable[Tensor]) -> Tensor:
    """[n, m] and [E, n, m] tensors as one new [all, n, m]."""
    return torch.cat([t.reshape(-1, *t.shape[-2:]) for t in tensors])


def _label(group: dict[str, Any], index: int) -> str:
    """What errors call a parameter: its name, or its place in its group."""
    names = group.get("param_names", [])
    if index < len(names):
        return f"parameter {names[index]!r}"
    return f"parameter number {index} of the {group.get('algorithm')} group"


def _check_loadable(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Raise unless ``state_dict`` fits the optimizer's parameters one to one."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("state_dict must have the keys 'state' and 'param_groups'")
    for group, saved in zip_longest(optimizer.param_groups, state_dict["param_groups"]):
        _check_both(group, saved, group, saved, 0)
        algorithm, splits = group["algorithm"], saved.get("row_splits")
        for index, (param, key) in enumerate(zip_longest(group["params"], saved["params"])):
            _check_both(param, key, group, saved, index)
            label = _label(group, index)
            if saved.get("algorithm") != algorithm:
                raise ValueError(
                    f"{label} is trained by {algorithm}, but its saved state is of "
                    f"{saved.get('algorithm') or 'another optimizer'}: "
                    "group the parameters as when it was saved"
                )
            state = state_dict["state"].get(key, {})
            if state and state.keys() != _STATE_KEYS[algorithm]:
                raise ValueError(
                    f"{label}: the saved state has {sorted(state)}, "
                    f"{algorithm} needs {sorted(_STATE_KEYS[algorithm])}"
                )
            for name, value in state.items():
                if name != "step" and value.shape != param.shape:
                    raise ValueError(
                        f"{label} has shape {tuple(param.shape)}, "
                        f"but its saved {name} has {tuple(value.shape)}"
                    )
            if algorithm == "muon":
                _check_matrix(_Entry(None, param, label), splits)


def _check_both(ours: Any, theirs: Any, group: Any, saved: Any, index: int) -> None:
    """Raise if only one side has the parameter at this place."""
    for present, absent, owner, side in (
        (ours, theirs, group, "saved state"),
        (theirs, ours, saved, "optimizer"),
    ):
        if present is not None and absent is None:
            raise ValueError(
                f"the {side} has nothing for {_label(owner, index)}: "
                "load a state saved from the same parameters in the same groups"
            )
