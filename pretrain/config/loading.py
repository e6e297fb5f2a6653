"""Reading a configuration: YAML files, overrides, and conversion to typed settings."""

import contextlib
import dataclasses
import difflib
import os
import string
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from pretrain import untrusted_files
from pretrain.config import yaml_core
from pretrain.config.rules import (
    PathRule,
    Settings,
    field_types,
    is_union,
    rule_of,
    shortened,
    type_name,
)
from pretrain.config.schema import Config
from pretrain.errors import PretrainError

T = TypeVar("T")
S = TypeVar("S", bound=Settings)

_MAX_BYTES = 1 << 20


def _convert(value: Any, expected: Any, key: str) -> Any:
    """Return ``value`` as ``expected``, or raise naming ``key``; never a lossy conversion."""
    if isinstance(expected, type) and issubclass(expected, Settings):
        return _build(expected, value, key)
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin is typing.Annotated:
        return _convert(value, args[0], key)
    if is_union(expected):
        for part in args:
            try:
                return _convert(value, part, key)
            except PretrainError:
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        if args[-1] is Ellipsis:
            return tuple(_convert(v, args[0], f"{key}[{i}]") for i, v in enumerate(value))
        if len(args) == len(value):
            return tuple(_convert(item, arg, key) for item, arg in zip(value, args, strict=True))
    elif expected is float and type(value) is int:
        with contextlib.suppress(OverflowError):  # more than a float can hold
            return float(value)
    elif type(value) is expected:
        return value
    hint = ""
    if expected is bool and str(value).lower() in ("yes", "no", "on", "off", "y", "n"):
        hint = ": write true or false"
    raise PretrainError(f"{key} must be {type_name(expected)}, not {shortened(value)}{hint}")


def _build(cls: type[T], values: Any, prefix: str) -> T:
    if not isinstance(values, dict):
        where = prefix or "the configuration"
        raise PretrainError(f"{where} must be a mapping, not {shortened(values)}")
    hints = field_types(cls)
    arguments = {}
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in hints:
            near = difflib.get_close_matches(str(name), list(hints), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "known keys: " + ", ".join(hints)
            raise PretrainError(f"unknown configuration key {shortened(key)}: {hint}")
        arguments[name] = _convert(value, hints[name], key)
    try:
        return cls(**arguments)
    except ValueError as error:
        raise PretrainError(f"{prefix}.{error}" if prefix else str(error)) from error


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    """Put ``more`` into ``values``; a section changes in what it names."""
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise PretrainError(f"cannot read the override {override!r}: write key=value")
    try:
        value = yaml_core.read(text, comments=False)
    except yaml.YAMLError as error:
        raise PretrainError(
            f"cannot read the value of the override {override!r}: {yaml_core.explain(error)}"
        ) from error
    *parents, name = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise PretrainError(f"the override {override!r} goes into {parent!r}, which is a value")
    _merge(values, {name: value})


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``key.sub=value`` overrides, of which the last one of a key wins.

    In settings that are paths, ``~`` and ``$VARIABLE`` are expanded; ``$$`` is a dollar sign.

    Raises:
        PretrainError: the file cannot be read, a key is unknown or given twice, or a value has the
            wrong type or lies outside its range; the message names the key.
    """
    try:
        values = yaml_core.read(untrusted_files.read_text(path, _MAX_BYTES, "utf-8-sig"))
    except OSError as error:
        raise PretrainError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PretrainError(f"the configuration {path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise PretrainError(
            f"the configuration {path} is not valid YAML: {yaml_core.explain(error)}"
        ) from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise PretrainError(f"the configuration {path} must be a mapping of keys to values")
    return _with_paths_expanded(from_dict(values, overrides), "")


def from_dict(values: dict[str, Any], overrides: typing.Sequence[str] = ()) -> Config:
    """A configuration from plain values, such as a checkpoint contains, and overrides.

    Paths stay as they are.

    Raises:
        PretrainError: as :func:`load`.
    """
    for override in overrides:
        _override(values, override)
    return _build(Config, values, "")


def _with_paths_expanded(settings: S, prefix: str) -> S:
    changed: dict[str, Any] = {}
    for name, hint in field_types(type(settings)).items():
        value, key = getattr(settings, name), f"{prefix}{name}"
        if isinstance(value, Settings):
            changed[name] = _with_paths_expanded(value, f"{key}.")
        elif isinstance(value, tuple):
            changed[name] = tuple(
                _with_paths_expanded(item, f"{key}[{i}].") if isinstance(item, Settings) else item
                for i, item in enumerate(value)
            )
        elif isinstance(value, str) and isinstance(rule_of(hint), PathRule):
            changed[name] = _expand(value, key)
    try:
        return dataclasses.replace(settings, **changed)
    except ValueError as error:
        raise PretrainError(f"{prefix}{error}") from error


def _expand(path: str, key: str) -> str:
    try:
        expanded = string.Template(path).substitute(os.environ)
    except KeyError as error:
        raise PretrainError(
            f"{key}={path}: the environment has no variable {error.args[0]}; set it, or write $$ "
            "for a dollar sign"
        ) from error
    except ValueError as error:
        raise PretrainError(f"{key}={path}: write $$ for a dollar sign") from error
    home = os.path.expanduser(expanded)
    if home.startswith("~"):
        raise PretrainError(
            f"{key}={path}: there is no user {home.split('/')[0][1:]!r}; write ./~ for a name that "
            "begins with ~"
        )
    return home


def escape_path(path: str) -> str:
    """A path as a configuration file has to spell it, such that :func:`load` gives it back."""
    return ("./" if path.startswith("~") else "") + path.replace("$", "$$")


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values, every default included."""
    return dataclasses.asdict(config)
