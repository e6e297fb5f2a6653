"""MuonClip's options as settings of the ``optimizer`` section.

Every option of ``MuonClip`` is a setting of the same name, type, default and meaning, or is in
``NOT_SETTINGS`` with the reason. The section declares a setting itself where the trainer's
default or type differs; :func:`with_options` adds the others from the signature, so that a new
option of the optimizer needs no change here.
"""

import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Literal, TypeVar, Union

import torch
from torch import Tensor

from muonclip import MuonClip, validation
from pretrain.config.rules import WithoutEffectError, is_union, require

C = TypeVar("C", bound=type[Any])

# Options of MuonClip without a setting of their name, and why.
NOT_SETTINGS: Mapping[str, str] = types.MappingProxyType(
    {
        "adamw_betas": "set adamw_beta1 and adamw_beta2",
        "qk_clip": "set qk_clip_threshold",
        "nonfinite": "set faults.non_finite, which also rolls back",
        "process_group": "it follows from the parallel section",
        "shardings": "it follows from the parallel section",
        "master_weights": "with precision=bfloat16 there are always float32 master copies",
        "stochastic_rounding": "it is for training without master copies, which the trainer has",
        "capturable": "the trainer does not capture its steps in CUDA graphs",
        "maximize": "the trainer minimizes its loss",
        "state_device": "ranks divide the state among them instead (shard_state)",
        "compute_device": "the weights are on the device that computes",
    }
)
# Options without effect unless another one has one of these values; None: anything but zero.
_PARTS: Mapping[str, tuple[str, tuple[Any, ...] | None]] = types.MappingProxyType(
    {
        "update_rms": ("adjust_lr", ("match_rms_adamw",)),
        "momentum_warmup_start": ("momentum_warmup_steps", None),
        "normuon_beta2": ("variant", ("normuon",)),
    }
)


def signature() -> dict[str, inspect.Parameter]:
    """MuonClip's options by name."""
    parameters = dict(inspect.signature(MuonClip).parameters)
    del parameters["params"]
    return parameters


def with_options(cls: C) -> C:
    """Add a field for each option of MuonClip that a section does not declare.

    Applied before ``dataclass``.
    """
    meanings = _meanings()
    for name, parameter in signature().items():
        if name in NOT_SETTINGS or name in cls.__annotations__:
            continue
        cls.__annotations__[name] = _setting_type(name, parameter.annotation)
        meaning = {"meaning": meanings.get(name, "")}
        setattr(cls, name, field(default=parameter.default, metadata=meaning))
    return cls


def values_of(section: Any) -> dict[str, Any]:
    """MuonClip's options from the settings of a section, without ``shard_state``."""
    values = {
        name: _as_dtype(getattr(section, name))
        if _allows(parameter, torch.dtype)
        else getattr(section, name)
        for name, parameter in signature().items()
        if name not in NOT_SETTINGS and name != "shard_state"
    }
    return {**values, "adamw_betas": (section.adamw_beta1, section.adamw_beta2)}


def check(section: Any) -> None:
    """Refuse values that MuonClip does not allow, by constructing one, those that always lead to
    NaN, and options without effect.

    Raises:
        ValueError: begins with the name of the setting.
    """
    groups = [
        {"params": [("matrix", torch.zeros(2, 2))], "algorithm": "muon"},
        {"params": [("vector", torch.zeros(2))], "algorithm": "adamw"},
    ]
    try:
        MuonClip(groups, **values_of(section))
    except TypeError as error:
        raise ValueError(str(error)) from error
    if section.adamw_eps == 0:
        # MuonClip and torch's AdamW accept it.
        raise ValueError(
            "adamw_eps=0 must be above 0: the update of an entry without a gradient, such as the "
            "embedding of a token that has not occurred yet, would be 0/0"
        )
    defaults = {name: parameter.default for name, parameter in signature().items()}
    for name, (whole, effective) in _PARTS.items():
        value = getattr(section, whole)
        has_effect = bool(value) if effective is None else value in effective
        if getattr(section, name) != defaults[name] and not has_effect:
            raise WithoutEffectError(
                f"{name}={getattr(section, name)} has no effect with {whole}={value}: leave it out"
            )
    start, momentum = section.momentum_warmup_start, section.momentum
    require(
        section.momentum_warmup_steps == 0 or start <= momentum,
        f"momentum_warmup_start={start} is more than momentum={momentum}, to which it rises: lower "
        "it",
    )


def _setting_type(name: str, annotation: Any) -> Any:
    """The type of a setting for an option of this type."""
    members = typing.get_args(annotation) if is_union(annotation) else (annotation,)
    kept: list[Any] = []
    for member in members:
        if member in (Tensor, torch.device):  # a file has numbers and names instead
            continue
        kept.append(_literal_type(name, member))
    return Union[tuple(kept)]  # noqa: UP007 (the members are computed)


def _literal_type(name: str, hint: Any) -> Any:
    """The type in a file for a type without unions."""
    if hint in (bool, int, float, str, types.NoneType) or typing.get_origin(hint) is Literal:
        return hint
    if hint is torch.dtype:
        allowed = [dtype for dtype in validation.choices(name) if dtype is not None]
        return Literal[tuple(str(dtype).removeprefix("torch.") for dtype in allowed)]
    if typing.get_origin(hint) is Sequence:
        element = _literal_type(name, typing.get_args(hint)[0])
        return types.GenericAlias(tuple, (element, ...))
    raise TypeError(
        f"MuonClip's option {name} has the type {hint}, which a configuration file cannot "
        "express: add it to NOT_SETTINGS, with the reason"
    )


def _allows(parameter: inspect.Parameter, kind: type) -> bool:
    """Whether values of an option may be of a type."""
    return kind in (parameter.annotation, *typing.get_args(parameter.annotation))


def _as_dtype(name: str | None) -> torch.dtype | None:
    return None if name in (None, "auto") else getattr(torch, str(name))


def _meanings() -> dict[str, str]:
    """The description of each option in MuonClip's docstring, as plain text."""
    (section,) = re.findall(
        r"^Args:\n(.*?)\n\n\S", inspect.getdoc(MuonClip) or "", re.MULTILINE | re.DOTALL
    )
    meanings: dict[str, str] = {}
    for names, text in re.findall(
        r"^ {4}(\w[\w, ]*): (.*?)(?=\n {4}\w|\Z)", section, re.MULTILINE | re.DOTALL
    ):
        plain = re.sub(r":math:`\\?([^`]*)`", r"\1", text).replace("``", "")
        meanings |= dict.fromkeys(names.split(", "), " ".join(plain.split()))
    return meanings
