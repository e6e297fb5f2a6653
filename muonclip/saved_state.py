"""Matching of a saved state dict with an optimizer's parameters, by name or by order."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonclip.distributed.sharded_state import ShardedState
from muonclip.distributed.sharding import is_dtensor, placements_like, reduced_shape
from muonclip.labels import WRAPPERS, label
from muonclip.variants import neuron_state, variant_of

_KEYS: dict[str, set[str]] = {
    "muon": {"momentum_buffer"},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
}
_ORDER = (
    "rename it in a load_state_dict pre-hook, or delete 'param_names' from the saved groups to "
    "match by order"
)


class _Saved(NamedTuple):
    """A parameter of a saved state dict: its key in ``state``, and the index of its group."""

    key: Any
    group: int


def match(
    groups: Sequence[Mapping[str, Any]],
    state_dict: Mapping[str, Any],
    fit: Callable[[str, Tensor, Mapping[str, Any], Mapping[str, Any], Any], dict[str, Any]],
) -> dict[str, Any]:
    """A saved state dict, rearranged to the parameters of an optimizer's groups.

    They are matched as ``MuonClip.load_state_dict`` describes. A state dict from
    ``torch.distributed.checkpoint`` has names for keys and is in order.

    Args:
        groups: the optimizer's ``param_groups``.
        state_dict: as returned by ``MuonClip.state_dict``, or by a pre-hook. Not changed.
        fit: returns the saved entries of a parameter, checked and placed as the optimizer stores
            them, given the parameter's label, the parameter, its group, the entries, and the layout
            of the saved group.

    Returns:
        A state dict with one entry for each parameter, in the optimizer's order; steps are tensors.

    Raises:
        ValueError: naming the first parameter without a counterpart, or with another algorithm or
            shape.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("state_dict must have the keys 'state' and 'param_groups'")
    saved_groups = state_dict["param_groups"]
    named = _saved_by_name(saved_groups)
    if named is not None and all("param_names" in group for group in groups):
        matched = _match_by_name(groups, saved_groups, named)
    else:
        matched = _match_by_order(groups, saved_groups)
    state = dict(state_dict["state"])
    layouts = {key: saved.get("layout") for saved in saved_groups for key in saved["params"]}
    for group, saved in zip(groups, matched, strict=True):
        saved.pop("param_names", None)  # the optimizer keeps its own
        for index, (param, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            if state.get(key):
                state[key] = fit(label(group, index), param, group, state[key], layouts[key])
    return {**state_dict, "state": state, "param_groups": matched}


# ---------------------------------------------------------------------- matching


def _saved_by_name(saved_groups: Sequence[Mapping[str, Any]]) -> dict[str, _Saved] | None:
    """The saved parameters by name, or None if their names are missing or ambiguous."""
    by_name: dict[str, _Saved] = {}
    for index, group in enumerate(saved_groups):
        keys, names = group["params"], group.get("param_names", [])
        if len(names) != len(keys) or any(isinstance(key, str) for key in keys):
            return None
        for name, key in zip(names, keys, strict=True):
            if name in by_name:
                return None
            by_name[name] = _Saved(key, index)
    return by_name or None


def _match_by_name(
    groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
    by_name: dict[str, _Saved],
) -> list[dict[str, Any]]:
    names = [group["param_names"] for group in groups]
    flat = [name for group_names in names for name in group_names]
    unwrapped = {_unwrapped(name): saved for name, saved in by_name.items()}
    unambiguous = len(unwrapped) == len(by_name) == len(flat)
    if by_name.keys() != set(flat) and unambiguous and unwrapped.keys() == {*map(_unwrapped, flat)}:
        # Trained with a wrapper and loaded without it, or the reverse.
        by_name = unwrapped
        names = [[_unwrapped(name) for name in group_names] for group_names in names]
        flat = [name for group_names in names for name in group_names]
    for name in flat:
        if name not in by_name:
            raise ValueError(
                f"the saved state has nothing for parameter {name!r}: load a state of the same "
                f"parameters, {_ORDER}"
            )
    if extra := by_name.keys() - set(flat):
        raise ValueError(
            f"the optimizer has nothing for parameter {min(extra)!r} of the saved state: load a "
            f"state of the same parameters, {_ORDER}"
        )
    matched = []
    for index, (group, group_names) in enumerate(zip(groups, names, strict=True)):
        members = [by_name[name] for name in group_names]
        for name, member in zip(group_names, members, strict=True):
            _check_algorithm(f"parameter {name!r}", group, saved_groups[member.group])
        options = group
        if members:
            most = Counter(member.group for member in members).most_common(1)[0][0]
            options = saved_groups[most]
        elif index < len(saved_groups) and not saved_groups[index]["params"]:
            options = saved_groups[index]  # both are empty
        matched.append({**options, "params": [member.key for member in members]})
    return matched


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _match_by_order(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    for group, saved in zip_longest(groups, saved_groups):
        _check_both_exist(group, saved, group, saved, 0)
        for index, (param, key) in enumerate(zip_longest(group["params"], saved["params"])):
            _check_both_exist(param, key, group, saved, index)
            _check_algorithm(label(group, index), group, saved)
    return [dict(saved) for saved in saved_groups]


def _check_both_exist(param: Any, key: Any, group: Any, saved: Any, index: int) -> None:
    """Raise if only the optimizer or only the saved state has a parameter at this index."""
    for present, absent, owner, side in (
        (param, key, group, "saved state"),
        (key, param, saved, "optimizer"),
    ):
        if present is not None and absent is None:
            raise ValueError(
                f"the {side} has nothing for {label(owner, index)}: "
                "load a state saved from the same parameters in the same groups"
            )


# ---------------------------------------------------------------------- one parameter


def _check_algorithm(name: str, group: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    algorithm = saved.get("algorithm")
    if algorithm is None:
        raise ValueError(
            f"{name} is trained by MuonClip, but its saved state is of another optimizer: load the "
            "weights alone, and start with a new state"
        )
    if algorithm != group["algorithm"]:
        raise ValueError(
            f"{name} is trained by {group['algorithm']}, but its saved state is of {algorithm}: "
            "group the parameters as when it was saved"
        )


def differences(group: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    """Differences between the state of a variant that a group needs and the saved one."""
    if group["algorithm"] != "muon" or "momentum_buffer" not in saved:
        return
    needed, variant = variant_of(group).state, group["variant"]
    for name in sorted(neuron_state()):
        if name in needed and name not in saved:
            yield f"has no {name}, which variant={variant!r} needs, and which starts at zero"
        elif name in saved and name not in needed:
            yield f"has {name}, which variant={variant!r} does not use, and which was left out"


def check_entries(
    saved: Mapping[str, Any],
    name: str,
    param: Tensor,
    algorithm: str,
    reduced_dims: Callable[[str], Sequence[int]],
) -> dict[str, Any]:
    """The saved state of one parameter, with its step as a tensor.

    Args:
        saved: its entries.
        name: of the parameter, for errors.
        param, algorithm: the parameter and the algorithm of its group.
        reduced_dims: returns the dimensions along which an entry has one element.

    Raises:
        ValueError: unless it has the entries of the algorithm, in the shape and the placement of
            the parameter. A master copy may come alone, or be missing; so may state of neurons.
    """
    keys = saved.keys() - {"master"} - neuron_state()
    if not saved.keys() <= {"master"} and keys != _KEYS[algorithm]:
        raise ValueError(
            f"{name}: the saved state has {sorted(saved)}, {algorithm} needs "
            f"{sorted(_KEYS[algorithm])}"
        )
    state = dict(saved)
    for key, value in saved.items():
        if key == "step":
            state[key] = _step(value, name)
        elif not isinstance(value, Tensor):
            raise ValueError(f"{name}: its saved {key} is a {type(value).__name__}, not a tensor")
        elif not value.is_floating_point():
            raise ValueError(
                f"{name}: its saved {key} has dtype {value.dtype}, not values: save the state with "
                "state_dict(), full_state_dict() or named_state(), which decode it"
            )
        elif not isinstance(value, ShardedState):  # which has the parameter's layout
            _check_tensor(value, f"saved {key}", name, param, reduced_dims(key))
    return state


def _check_tensor(value: Tensor, kind: str, name: str, param: Tensor, dims: Sequence[int]) -> None:
    """Raise unless saved state has a parameter's shape and placement, but one element along
    ``dims``."""
    shape, placement = reduced_shape(param.shape, dims), _placement(param, dims)
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(param.shape)}, but its {kind} has {tuple(value.shape)}"
            + (f", not {shape}" if dims else "")
        )
    if _placement(value) != placement:
        raise ValueError(
            f"{name} is {_placement(param)}, but its {kind} is {_placement(value)}: save "
            "and load with torch.distributed.checkpoint.state_dict (get_optimizer_state_dict, "
            "set_optimizer_state_dict), which shard a state as the parameters are"
        )


def _placement(tensor: Tensor, dims: Sequence[int] = ()) -> str:
    """Description of a tensor's placement on ranks; with ``dims``, see ``placements_like``."""
    if not is_dtensor(tensor):
        return "a plain tensor"
    mesh = tuple(tensor.device_mesh.shape)
    return f"a DTensor with placements {placements_like(tensor, dims)} on a mesh of {mesh}"


def _step(value: Any, name: str) -> Tensor:
    """A saved step, a number, array or tensor, as a float32 scalar."""
    if not isinstance(value, Tensor):
        number = (
            value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value
        )
        if not isinstance(number, Real) or not 0 <= float(number) < math.inf:
            raise ValueError(f"{name}: its saved step must be a count, got {value!r:.80}")
        return torch.tensor(float(number), dtype=torch.float32, device="cpu")
    if value.numel() != 1 or value.is_complex():
        raise ValueError(f"{name}: its saved step must be one number, got {tuple(value.shape)}")
    return value.detach().to(torch.float32).reshape(())
