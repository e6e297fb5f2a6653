"""Fits a saved state dict to an optimizer's parameters: by name where both sides have names."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonclip import validation

_KEYS: dict[str, set[str]] = {
    "muon": {"momentum_buffer"},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
}
# Put in front of names by DistributedDataParallel, torch.compile, checkpoint wrappers and Fabric.
_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module",
             "_forward_module"}  # fmt: skip
_ORDER = (
    "rename it in a load_state_dict pre-hook, or delete 'param_names' from the saved groups to "
    "match by order"
)


class _Saved(NamedTuple):
    """A parameter of a saved state dict: its key in ``state``, and the place of its group."""

    key: Any
    group: int


def match(groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state dict, rearranged to the parameters of an optimizer's groups.

    With names on both sides, every parameter finds its state by name, whatever the order of
    parameters and groups; a group takes the options of the saved group that most of its parameters
    were in. Otherwise parameters are matched by their order, as in any torch optimizer.
    ``torch.distributed.checkpoint`` brings its own order, with names for keys.

    Args:
        groups: the optimizer's ``param_groups``.
        state_dict: as returned by ``MuonClip.state_dict``, or by a pre-hook. Not changed.

    Returns:
        A state dict with one entry for each parameter, in the optimizer's order; steps are tensors.

    Raises:
        ValueError: naming the first parameter that has no counterpart, another algorithm or shape.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("state_dict must have the keys 'state' and 'param_groups'")
    saved_groups = state_dict["param_groups"]
    named = _saved_by_name(saved_groups)
    if named is not None and all("param_names" in group for group in groups):
        fitted = _by_name(groups, saved_groups, named)
    else:
        fitted = _by_order(groups, saved_groups)
    state = dict(state_dict["state"])
    for group, saved in zip(groups, fitted, strict=True):
        saved.pop("param_names", None)  # the optimizer's count
        for index, (param, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            if state.get(key):
                name = validation.label(group, index)
                state[key] = check_entries(state[key], name, param, group["algorithm"])
    return {**state_dict, "state": state, "param_groups": fitted}


# ---------------------------------------------------------------------- matching


def _saved_by_name(saved_groups: Sequence[Mapping[str, Any]]) -> dict[str, _Saved] | None:
    """The saved parameters by name, or None if their names are missing or ambiguous."""
    found: dict[str, _Saved] = {}
    for place, group in enumerate(saved_groups):
        keys, names = group["params"], group.get("param_names", [])
        if len(names) != len(keys) or any(isinstance(key, str) for key in keys):
            return None
        for name, key in zip(names, keys, strict=True):
            if name in found:
                return None
            found[name] = _Saved(key, place)
    return found or None


def _by_name(
    groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
    named: dict[str, _Saved],
) -> list[dict[str, Any]]:
    ours = [name for group in groups for name in group["param_names"]]
    plain = {_unwrapped(name): saved for name, saved in named.items()}
    unwrapped = sorted(plain) == sorted(map(_unwrapped, ours)) and len(plain) == len(named)
    if unwrapped and named.keys() != set(ours):
        # Trained under a wrapper and loaded without it, or the other way round.
        named, ours = plain, [_unwrapped(name) for name in ours]
        groups = [
            {**group, "param_names": [_unwrapped(name) for name in group["param_names"]]}
            for group in groups
        ]
    for name in ours:
        if name not in named:
            raise ValueError(
                f"the saved state has nothing for parameter {name!r}: load a state of the same "
                f"parameters, {_ORDER}"
            )
    extra = named.keys() - set(ours)
    if extra:
        raise ValueError(
            f"the optimizer has nothing for parameter {min(extra)!r} of the saved state: load a "
            f"state of the same parameters, {_ORDER}"
        )
    fitted = []
    for place, group in enumerate(groups):
        members = [named[name] for name in group["param_names"]]
        for name, member in zip(group["param_names"], members, strict=True):
            _check_algorithm(f"parameter {name!r}", group, saved_groups[member.group])
        if members:
            place = Counter(member.group for member in members).most_common(1)[0][0]
            options = saved_groups[place]
        else:
            options = _options_of_empty(group, saved_groups, place)
        fitted.append({**options, "params": [member.key for member in members]})
    return fitted


def _options_of_empty(
    group: Mapping[str, Any], saved_groups: Sequence[Mapping[str, Any]], place: int
) -> Mapping[str, Any]:
    """Options for a group without parameters: of the saved group in its place, if as empty."""
    if place < len(saved_groups) and not saved_groups[place]["params"]:
        return saved_groups[place]
    return group


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _by_order(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    for group, saved in zip_longest(groups, saved_groups):
        _both(group, saved, group, saved, 0)
        for index, (param, key) in enumerate(zip_longest(group["params"], saved["params"])):
            _both(param, key, group, saved, index)
            _check_algorithm(validation.label(group, index), group, saved)
    return [dict(saved) for saved in saved_groups]


def _both(ours: Any, theirs: Any, group: Any, saved: Any, index: int) -> None:
    """Raise if only one side has a parameter at this place."""
    for present, absent, owner, side in (
        (ours, theirs, group, "saved state"),
        (theirs, ours, saved, "optimizer"),
    ):
        if present is not None and absent is None:
            raise ValueError(
                f"the {side} has nothing for {validation.label(owner, index)}: "
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
    """How a tensor is placed on ranks, for comparison and for messages."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return "a plain tensor"
    placements = getattr(tensor, "placements", None)
    return f"a DTensor with placements {placements} on a mesh of {tuple(mesh.shape)}"


def _step(value: Any, name: str) -> Tensor:
    """A saved step, which may be a number or an array of any kind, as a float32 scalar."""
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
