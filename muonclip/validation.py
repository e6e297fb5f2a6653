"""Validation of options, parameters and gradients. Every error names its cause and a remedy."""

import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor

from muonclip.labels import label
from muonclip.matrix_layouts import WHOLE, MatrixLayout
from muonclip.offload import Devices
from muonclip.orthogonalize import NS_DTYPES, AdjustLR, coefficient_steps
from muonclip.param_groups import Algorithm, choose_algorithm, part_of_matrix, whole_parameter
from muonclip.update import AdamWDecayMode, WeightDecayMode
from muonclip.variants import VARIANTS, Options, variant_of

if TYPE_CHECKING:
    from muonclip.distributed.sharding import Sharding

# Options of the constructor that groups do not keep, and the options of AdamW's groups they set.
RESOLVED = {
    "adamw_lr": "lr",
    "adamw_weight_decay": "weight_decay",
    "adamw_betas": "momentum (beta1) and adamw_beta2",
}
# Options of the constructor that no group has, and options of other optimizers' groups.
_OF_ALL_GROUPS = frozenset(
    ("process_group", "shardings", "shard_state", "qk_clip", "state_device", "compute_device")
)
_ELSEWHERE = {"betas": "adamw_betas", "use_muon": "algorithm='muon' or algorithm='adamw'"}
_OF_ADAMW = (*RESOLVED, "adamw_eps", "adamw_weight_decay_mode")
# By algorithm: the options that only the other one reads.
_READ_BY_OTHERS = {
    "muon": _OF_ADAMW,
    "adamw": (
        "nesterov", "ns_coefficients", "ns_steps", "ns_dtype", "eps", "adjust_lr", "update_rms",
        "weight_decay_mode", "momentum_warmup_steps", "momentum_warmup_start", "momentum_dtype",
        "layout",
    ),
}  # fmt: skip
_CHOICES: dict[str, tuple[Any, ...]] = {
    "adjust_lr": get_args(AdjustLR),
    "weight_decay_mode": get_args(WeightDecayMode),
    "adamw_weight_decay_mode": get_args(AdamWDecayMode),
    "nonfinite": ("raise", "skip", "ignore"),
    "master_weights": (False, True, "remainder"),
    "ns_dtype": (None, *NS_DTYPES),
    "momentum_dtype": (None, torch.int8, torch.bfloat16, torch.float32, torch.float64),
    **dict.fromkeys(("nesterov", "maximize", "stochastic_rounding", "capturable"), (False, True)),
}

# A schedule may end below zero by this much.
_ROUNDING_OF_SCHEDULES = -1e-12


class Entry(NamedTuple):
    """A parameter to add to a group; ``label`` identifies it in errors."""

    name: str | None
    param: Tensor
    label: str


# ---------------------------------------------------------------------- options


def check_options(values: Mapping[str, Any]) -> None:
    """Raise for an option out of range, naming it."""
    for option in ("lr", "weight_decay", "eps", "update_rms", "adamw_eps"):
        check_at_least_zero(option, values[option])
    for option in ("adamw_lr", "adamw_weight_decay"):
        if values[option] is not None:
            check_at_least_zero(option, values[option])
    if values["update_rms"] == 0:
        raise ValueError(
            "update_rms=0 would leave every matrix as it is: it is the RMS of the updates; "
            "choose a number above 0"
        )
    betas = values["adamw_betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"adamw_betas must be two numbers, got {betas!r}")
    for option, value in (
        ("momentum", values["momentum"]),
        ("momentum_warmup_start", values["momentum_warmup_start"]),
        ("normuon_beta2", values["normuon_beta2"]),
        ("adamw_betas[0]", betas[0]),
        ("adamw_betas[1]", betas[1]),
    ):
        _number(option, value)
        if not 0 <= value < 1:
            raise ValueError(f"{option} must be in [0, 1), got {value}")
    try:
        coefficient_steps(values["ns_coefficients"], values["ns_steps"])
    except ValueError as error:  # names coefficients or steps
        raise ValueError(f"ns_{error}") from None
    if values["eps"] >= 1:
        raise ValueError(f"eps must be below 1, as it only guards 0/0, got {values['eps']}")
    if values["momentum_dtype"] == torch.float16:
        raise ValueError(
            "momentum_dtype=torch.float16 cannot represent gradients below 6e-8 or above 65504: "
            "use torch.bfloat16, of the same size, or torch.float32"
        )
    for option, choices in {**_CHOICES, "variant": tuple(VARIANTS)}.items():
        if values[option] not in choices:
            raise ValueError(f"{option} must be one of {choices}, got {values[option]!r}")
    warmup = values["momentum_warmup_steps"]
    if not isinstance(warmup, int) or warmup < 0:
        raise ValueError(f"momentum_warmup_steps must be a count of steps, got {warmup!r}")
    if not isinstance(values["layout"], (MatrixLayout, type(None))):
        raise TypeError(f"layout must be a MatrixLayout, got {values['layout']!r:.80}")
    if values["master_weights"] and values["stochastic_rounding"]:
        raise ValueError("master_weights and stochastic_rounding exclude each other: choose one")


def check_capture(options: Options) -> None:
    """Raise for an option that a replayed step would not follow: it repeats captured numbers."""
    for option, wrong in (
        ("momentum_warmup_steps", options["momentum_warmup_steps"] > 0),
        ("stochastic_rounding", options["stochastic_rounding"]),
        ("nonfinite", options["nonfinite"] == "raise"),
    ):
        if wrong:
            raise ValueError(
                f"{option}={options[option]!r} cannot be captured in a CUDA graph (capturable=True)"
                + (": use 'skip' or 'ignore'" if option == "nonfinite" else "")
            )


def check_at_least_zero(option: str, value: Any) -> None:
    """Raise unless an option is finite and not negative; learning rates may be tensors."""
    is_lr = option in ("lr", "adamw_lr")
    if is_lr and isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise TypeError(
                f"{option} must be a number or a floating-point tensor of one element, got "
                f"{value.dtype} of shape {tuple(value.shape)}"
            )
        if value.device.type != "cpu" or type(value) is not Tensor:
            return  # reading it would wait for a device
        value = value.item()
    _number(option, value)
    lowest = _ROUNDING_OF_SCHEDULES if is_lr else 0.0
    if not lowest <= value < math.inf:
        raise ValueError(f"{option} must be at least 0 and finite, got {value}")


def choices(option: str) -> tuple[Any, ...]:
    """The values that an option may have, if it has a fixed set of them."""
    return _CHOICES[option]


def check_devices(devices: Devices, capturable: bool, is_sharded: bool) -> None:
    """Raise for options that cannot be combined with ``state_device`` or ``compute_device``."""
    if devices.are_given and (capturable or is_sharded):
        option = "capturable" if capturable else "shard_state"
        raise ValueError(
            f"state_device and compute_device cannot be combined with {option}=True: leave "
            f"{option} or both devices out"
        )


def check_remainders(entries: Sequence[Entry], is_sharded: bool) -> None:
    """Raise for parameters whose master copy cannot be stored as a remainder.

    Args:
        entries: parameters of a group with ``master_weights="remainder"``.
        is_sharded: the optimizer's ``shard_state``.
    """
    if is_sharded:
        raise ValueError(
            "master_weights='remainder' cannot be combined with shard_state=True, whose owners may "
            "not have the weights: use master_weights=True, which it stores once"
        )
    for entry in entries:
        if entry.param.dtype == torch.float16:
            raise ValueError(
                f"master_weights='remainder' needs bfloat16 parameters, but {entry.label} is "
                "float16, with fewer bits for the exponent than float32: use master_weights=True, "
                "or convert the model to bfloat16"
            )


def check_variants(defaults: Options, groups: Sequence[Options], initial: Options) -> None:
    """Raise for an option of the constructor that no group's variant reads.

    Args:
        defaults: the constructor's options.
        groups: the optimizer's groups.
        initial: values of options that were not given.
    """
    _check_is_read(defaults, [defaults, *groups], initial)


def check_group(given: Options, group: Options, defaults: Options) -> None:
    """Raise for an option that is given for a new group and has no effect on it.

    Args:
        given: the options that were given for the group.
        group: all its options.
        defaults: the constructor's options.
    """
    for option in _OF_ALL_GROUPS & given.keys():
        raise ValueError(
            f"{option} has no effect on a group: it applies to the whole optimizer. Give it to the "
            "constructor"
        )
    for option, ours in _ELSEWHERE.items():
        if option in given:
            raise ValueError(f"MuonClip's groups have no option {option}: give them {ours}")
    algorithm = group.get("algorithm")
    if algorithm in _READ_BY_OTHERS:
        for option in _READ_BY_OTHERS[algorithm]:
            if option in given and given[option] != defaults[option]:
                advice = f"adamw_{option}"
                raise ValueError(
                    f"{option}={given[option]!r:.80} has no effect on a group whose algorithm is "
                    f"{algorithm!r}: "
                    + (f"set {advice}" if advice in _OF_ADAMW else "leave it out")
                )
    check_group_variant(given, group, defaults)


def check_group_variant(given: Options, group: Options, defaults: Options) -> None:
    """Raise for a variant of AdamW, or for an option that the group's variant does not read.

    Args:
        given: the options that were given for the group, or changed.
        group: all its options.
        defaults: the constructor's options.
    """
    if group.get("algorithm") == "adamw" and given.get("variant", "muon") != "muon":
        raise ValueError(
            f"variant={given['variant']!r} has no effect on a group whose algorithm is 'adamw': it "
            "scales Muon's updates. Leave it out"
        )
    _check_is_read(given, [group], defaults)


def _check_is_read(given: Options, groups: Sequence[Options], initial: Options) -> None:
    read = {option for group in groups for option in variant_of(group).options}
    for name, variant in VARIANTS.items():
        for option in variant.options:
            if option in given and given[option] != initial[option] and option not in read:
                raise ValueError(
                    f"{option}={given[option]!r} has no effect without variant={name!r}: set that, "
                    f"or leave {option} out"
                )


def _number(option: str, value: Any) -> None:
    # A tensor would be shared between groups, and a scheduler would then move it twice.
    if not isinstance(value, Real):
        raise TypeError(f"{option} must be a number, got {type(value).__name__}")


def check_process_group(process_group: Any) -> None:
    """Raise unless this is None or a process group that this rank is in."""
    if process_group is None or isinstance(process_group, torch.distributed.ProcessGroup):
        return
    if isinstance(process_group, int):  # dist.new_group returns it on all other ranks
        raise ValueError(
            "this rank is not in process_group: construct the optimizer only on the group's ranks"
        )
    raise TypeError(
        "process_group must be a torch.distributed.ProcessGroup (of a DeviceMesh: "
        f"mesh.get_group()), got {type(process_group).__name__}"
    )


# ---------------------------------------------------------------------- parameters


def check_parameters(params: Any, group_index: int) -> list[Entry]:
    """Validate the parameters of a group.

    Args:
        params: a tensor, or an ordered iterable of tensors or (name, tensor) pairs.
        group_index: the number of the group, for errors.
    """
    if isinstance(params, Tensor):
        params = [params]
    if isinstance(params, (set, frozenset)):
        raise TypeError("params must be ordered, e.g. a list: a set's order changes between runs")
    result = []
    for index, item in enumerate(params):
        name, param = item if isinstance(item, tuple) else (None, item)
        where = repr(name) if name is not None else f"number {index} of group {group_index}"
        if not isinstance(param, Tensor):
            raise TypeError(f"parameter {where} must be a Tensor, got {type(param).__name__}")
        text = f"parameter {where} of shape {tuple(param.shape)}"
        if param.dtype not in NS_DTYPES:
            raise ValueError(
                f"{text} is {param.dtype}; MuonClip needs real floating point of 16 to 64 bits: "
                "leave it out, as param_groups(model) leaves out frozen parameters"
            )
        if param.layout != torch.strided:
            raise ValueError(f"{text} is sparse; MuonClip needs dense tensors")
        if not (param.is_leaf or param.retains_grad):
            raise ValueError(f"{text} is computed from others; MuonClip updates leaf tensors only")
        if _may_overlap(param):
            raise ValueError(
                f"{text} has elements that share memory (strides {param.stride()}), which a step "
                "would write more than once: use its .clone() or .contiguous()"
            )
        if (reason := part_of_matrix(param)) is not None:
            raise ValueError(f"{text} {reason}")
        result.append(Entry(name, param, text))
    if len({entry.name is None for entry in result}) > 1:
        unnamed = next(entry for entry in result if entry.name is None)
        raise ValueError(f"either all parameters have names or none: {unnamed.label} has none")
    return result


def _may_overlap(param: Tensor) -> bool:
    """Whether elements may share memory, as those of an expanded tensor do."""
    length = 1
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size > 1:
            if stride < length:
                return True
            length += stride * (size - 1)
    return False


def check_new_parameters(added: Sequence[Entry], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise for a parameter that is in a group already, or if only some parameters have names."""
    known = {id(p) for group in groups for p in group["params"]}
    for entry in added:
        if id(entry.param) in known:
            raise ValueError(f"{entry.label} is given twice: list every parameter once")
        known.add(id(entry.param))
    for group in groups:
        if added and ("param_names" in group) != (added[0].name is not None):
            raise ValueError(
                "either all parameters have names or none: "
                f"{added[0].label} differs from the groups before it"
            )


def check_may_split() -> None:
    """Raise if torch's ZeroRedundancyOptimizer is constructing the optimizer.

    It matches its own groups with the optimizer's by position, which fails once a group is split by
    algorithm; on a rank whose share has parameters of one kind only, it would not even notice.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.optim.zero_redundancy_optimizer":
            raise ValueError(
                "ZeroRedundancyOptimizer needs groups that stay as they are, but MuonClip would "
                "split these by algorithm: use MuonClip(param_groups(model), process_group=group) "
                "without it (the ranks share the work), or give it groups with an 'algorithm' each "
                "and parameters without names"
            )
        frame = frame.f_back


def split_by_algorithm(
    members: list[Entry], algorithm: Any, shardings: "Mapping[Tensor, Sharding]"
) -> dict[Algorithm, list[Entry]]:
    """Group parameters by algorithm: the given one, or each by ``choose_algorithm``.

    That looks at whole parameters, so that all ranks choose the same for those with ``shardings``.
    """
    if algorithm not in (None, *get_args(Algorithm)):
        first = members[0].label if members else "an empty group"
        raise ValueError(f"algorithm must be 'muon' or 'adamw', got {algorithm!r} for {first}")
    if algorithm is not None or not members:
        return {algorithm or "muon": members}
    by_algorithm: dict[Algorithm, list[Entry]] = {}
    for entry in members:
        whole = whole_parameter(entry.param, shardings)
        by_algorithm.setdefault(choose_algorithm(whole, entry.name)[0], []).append(entry)
    return by_algorithm


def check_matrix(entry: Entry, shape: tuple[int, ...], options: Options) -> None:
    """Raise unless a parameter is one or more matrices that the group's variant supports.

    Args:
        entry: the parameter.
        shape: of the whole parameter.
        options: of its group.
    """
    layout = options["layout"] or WHOLE
    if math.prod(shape) == 0:
        raise ValueError(f"{entry.label} has no elements: leave it out")
    try:
        layout.check(shape)
    except ValueError as error:
        raise ValueError(
            f"{entry.label} cannot go to Muon as it is: {error}. Give it algorithm='adamw', or "
            "the layout of its matrices"
        ) from None
    if variant_of(options).state:
        try:
            layout.input_dims(shape)
        except ValueError as error:
            raise ValueError(
                f"{entry.label} cannot have variant={options['variant']!r}: {error}. Give its "
                "group variant='muon'"
            ) from None


def check_resolved_options(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise for an option that has no effect on a group, unless it has the constructor's value."""
    for option, effective in RESOLVED.items():
        if option in group and group[option] is not defaults[option]:
            raise ValueError(
                f"{option} has no effect on a group of the optimizer: set {effective} of the "
                "groups whose algorithm is 'adamw'"
            )


def check_common_options(groups: Sequence[Options]) -> None:
    """Raise for an option of the whole step that differs between groups."""
    for group in groups[1:]:
        if group["nonfinite"] != groups[0]["nonfinite"]:
            raise ValueError(
                f"nonfinite must be the same in all groups, got {groups[0]['nonfinite']!r} and "
                f"{group['nonfinite']!r}: give it to the constructor"
            )


def check_changed_options(
    group: Options, before: Options, defaults: Options, *, is_sharded: bool
) -> None:
    """Raise for an option that was set in a group to a value that it cannot have there.

    Args:
        group: the optimizer's group.
        before: the options that it had when they were last checked.
        defaults: the constructor's options.
        is_sharded: the optimizer's ``shard_state``.
    """
    check_options({**defaults, **group})
    fixed = ["algorithm"]
    if group["updates"]:
        fixed.append("momentum_dtype")  # the momentum has it already
    if is_sharded or group["algorithm"] == "adamw":
        fixed.append("layout")
    for option in fixed:
        if group[option] != before[option]:
            raise ValueError(
                f"{option} of a group was changed from {before[option]} to {group[option]}, which "
                "needs another optimizer: construct one, and load the state into it"
            )
    changed = {name: group[name] for name, value in before.items() if group[name] != value}
    check_group_variant(changed, group, defaults)


def check_changed_layout(
    group: Options, index: int, shape: tuple[int, ...], before: MatrixLayout | None
) -> None:
    """Raise for a layout whose outputs are not those that a parameter has state for.

    Args:
        group, index: the group of the parameter, and its position there.
        shape: of the whole parameter.
        before: the layout that its group had.
    """
    old, new = before or WHOLE, group["layout"] or WHOLE
    if old.input_dims(shape) != new.input_dims(shape):
        raise ValueError(
            f"{label(group, index)} has state of a variant for each output of "
            f"its layout ({old}), but the layout was changed ({new}): give it to the constructor"
        )


def check_changed_parameter(
    group: Mapping[str, Any], index: int, before: torch.Size | None, shape: tuple[int, ...]
) -> None:
    """Raise for a parameter that was replaced, or changed its shape, and cannot be updated.

    Args:
        group, index: the group of the parameter, and its position there.
        before: its shape when it was added; None for a tensor that replaced another.
        shape: of the whole parameter.
    """
    param, name = group["params"][index], label(group, index)
    text = f"{name} of shape {tuple(param.shape)}"
    if (reason := part_of_matrix(param)) is not None:
        raise ValueError(f"{text} {reason}")
    if before is not None and before != param.shape:
        raise ValueError(
            f"{name} has changed its shape from {tuple(before)} to {tuple(param.shape)} since the "
            "optimizer was constructed: wrap, shard and resize the model before"
        )
    if before is None and group["algorithm"] == "muon":
        check_matrix(Entry(None, param, text), shape, group)


def check_gradients(group: Mapping[str, Any], capturing: bool) -> None:
    """Raise for a sparse gradient and, while a CUDA graph is captured, for a missing one."""
    for index, p in enumerate(group["params"]):
        gradient = p.grad
        if gradient is None:
            if capturing and p.requires_grad:
                raise RuntimeError(
                    f"{label(group, index)} has no gradient while a CUDA graph is captured: the "
                    "graph would never update it, whatever gradient it gets later. Run backward "
                    "before the capture, with gradients kept (zero_grad(set_to_none=False)), or "
                    "leave it out"
                )
        elif gradient.layout != torch.strided:
            raise RuntimeError(
                f"{label(group, index)} has a sparse gradient; MuonClip needs dense ones "
                "(nn.Embedding(sparse=False))"
            )
