"""Matching of a saved state dict with an optimizer's parameters, by name or by order."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonclip.distributed.sharded_state import ShardedState
from muonclip.labels import WRAPPERS, label

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
    fit: Callable[[Tensor, Mapping[str, Any], Mapping[str, Any], Any], Mapping[str, Any]],
) -> dict[str, Any]:
    """A saved state dict, rearranged to the parameters of an optimizer's groups.

    They are matched as ``MuonClip.load_state_dict`` describes. A state dict from
    ``torch.distributed.checkpoint`` has names for keys and is in order.

    Args:
        groups: the optimizer's ``param_groups``.
        state_dict: as returned by ``MuonClip.state_dict``, or by a pre-hook. Not changed.
        fit: returns the saved entries of a parameter, placed as the optimizer stores them, given
            the parameter, its group, the entries, and the layout of the saved group.

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
                name = label(group, index)
                entries = fit(param, group, state[key], layouts[key])
                state[key] = check_entries(entries, name, param, group["algorithm"])
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
    if saved.get("algorithm") != group["algorithm"]:
        raise ValueError(
            f"{name} is trained by {group['algorithm']}, but its saved state is of "
            f"{saved.get('algorithm') or 'another optimizer'}: "
            "group the parameters as when it was saved"
        )


def check_entries(
    saved: Mapping[str, Any],
    name: str,
    param: Tensor,
    algorithm: str,
) -> dict[str, Any]:
    """The saved state of one parameter, with its step as a tensor.

    Raises:
        ValueError: unless it has the entries of the algorithm, in the shape and the placement of
            the parameter. A master copy may come alone, or be missing.
    """
    if not saved.keys() <= {"master"} and saved.keys() - {"master"} != _KEYS[algorithm]:
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
        elif isinstance(value, ShardedState):  # has the parameter's layout
            continue
        elif value.shape != param.shape:
            raise ValueError(
                f"{name} has shape {tuple(param.shape)}, "
                f"but its saved {key} has {tuple(value.shape)}"
            )
        elif _placement(value) != _placement(param):
            raise ValueError(
                f"{name} is {_placement(param)}, but its saved {key} is {_placement(value)}: save "
                "and load with torch.distributed.checkpoint.state_dict (get_optimizer_state_dict, "
                "set_optimizer_state_dict), which shard a state as the parameters are"
            )
    return state


def _placement(tensor: Tensor) -> str:
    """Description of a tensor's placement on ranks."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return "a plain tensor"
    placements = getattr(tensor, "placements", None)
    return f"a DTensor with placements {placements} on a mesh of {tuple(mesh.shape)}"


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
