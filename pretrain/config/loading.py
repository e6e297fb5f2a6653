"""Reading a configuration: YAML files that build on each other, overrides, and typed settings."""

import contextlib
import dataclasses
import difflib
import os
import re
import string
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from pretrain import untrusted_files
from pretrain.config import rules, yaml_core
from pretrain.config.rules import PathRule, Settings, WithoutEffectError
from pretrain.config.schema import Config, SourceConfig
from pretrain.errors import PretrainError

S = TypeVar("S", bound=Settings)

# The file, or None for an override, and its settings.
Layer = tuple[Path | None, dict[str, Any]]

_MAX_BYTES = 1 << 20

# Sections with more settings are not listed in an error.
_MAX_LISTED = 12
# Names of settings in other programs and in config.json, which do not look like ours.
_SYNONYMS = {
    "learning_rate": "lr", "max_lr": "lr", "beta1": "adamw_beta1", "beta2": "adamw_beta2",
    "max_grad_norm": "clip_grad_norm", "clip_grad": "clip_grad_norm", "wd": "weight_decay",
    "max_steps": "steps", "train_iters": "steps", "batch_size": "global_batch_size",
    "logging_steps": "log_every", "output_dir": "run_dir", "dtype": "precision",
    "seq_len": "seq_length", "max_length": "seq_length", "context_length": "seq_length",
    "rope_theta": "rope_base", "rms_norm_eps": "norm_eps", "initializer_range": "init_std",
    "intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads",
    "n_routed_experts": "num_experts", "num_experts_per_tok": "experts_per_token",
    "routed_scaling_factor": "router_scaling", "first_k_dense_replace": "dense_layers",
    "save_steps": "every", "interval": "every",
}  # fmt: skip

# A value in a mapping of options.
Option = bool | int | float | str | tuple[bool | int | float | str, ...]


class SettingError(PretrainError):
    """A setting with an invalid value or name.

    Attributes:
        key: its dotted name, with which the message begins.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


# ---------------------------------------------------------------------- files and overrides


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration of a training run; see :func:`load_as`."""
    return load_as(Config, path, overrides)


def load_as(cls: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read a YAML file, the files it is based on, and ``key.sub=value`` overrides.

    ``base: FILE`` in a file names another one, relative to it, whose settings it changes:
    mappings are merged, everything else is replaced, and null restores a setting's default, or
    is a value where the setting allows it.
    Overrides change the result in the same way, in their order.

    In settings that are paths, ``~`` and ``$VARIABLE`` are expanded; ``$$`` is a dollar sign.

    Args:
        cls: the section at the top of the file.

    Raises:
        PretrainError: a file cannot be read, the bases form a cycle, a key is unknown or given
            twice, or a value has the wrong type or is out of range. The message names the key,
            and the file in which it is set.
    """
    layers = [*_with_bases(Path(path)), *((None, _parse(override)) for override in overrides)]
    values: dict[str, Any] = {}
    for _, changes in layers:
        values = merge(values, changes)
    try:
        return _expand_paths(_build(cls, values, ""), "")
    except SettingError as error:
        file = _file_of(error.key, layers)
        raise PretrainError(f"{file}: {error}" if file else str(error)) from error


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with ``changes``: mappings are merged, everything else is replaced."""
    merged = dict(values)
    for name, value in changes.items():
        before = merged.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            value = merge(before, value)
        merged[name] = value
    return merged


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return plain values with ``key.sub=value`` overrides.

    Raises:
        PretrainError: an override cannot be read.
    """
    for text in overrides:
        values = merge(values, _parse(text))
    return dict(values)


def _with_bases(path: Path) -> list[Layer]:
    """A file and the files it is based on, with their settings; each follows its base."""
    name = str(path)
    layers: dict[Path, Layer] = {}
    while True:
        values = _read(path, name)
        layers[path.resolve()] = (path, values)
        if "base" not in values:
            return list(reversed(layers.values()))
        base = values.pop("base")
        if not isinstance(base, str) or not PathRule().allows(base):
            raise PretrainError(
                f"{path}: base must be the path of one file, not {rules.shortened(base)}"
            )
        try:
            file = path.parent / _expand(base, "base")
        except SettingError as error:
            raise PretrainError(f"{path}: {error}") from error
        if file.resolve() in layers:
            cycle = " -> ".join(str(f) for f in (*(f for f, _ in layers.values()), file))
            raise PretrainError(f"{path}: the base files form a cycle: {cycle}")
        path, name = file, f"{file}, the base of {path}"


def _read(path: Path, name: str) -> dict[str, Any]:
    """The settings in a file; ``name`` is for messages."""
    try:
        values = yaml_core.read(untrusted_files.read_text(path, _MAX_BYTES, "utf-8-sig"))
    except IsADirectoryError as error:
        raise PretrainError(
            f"cannot read the configuration {name}: it is a folder: give the YAML file that the "
            "run was started with"
        ) from error
    except OSError as error:
        raise PretrainError(f"cannot read the configuration {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PretrainError(f"the configuration {path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise PretrainError(
            f"the configuration {path} is not valid YAML: {yaml_core.explain(error)}"
        ) from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise PretrainError(f"the configuration {path} must be a mapping of keys to values")
    return values


def _parse(override: str) -> dict[str, Any]:
    """The nested values of a ``key.sub=value`` override."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise PretrainError(f"cannot read the override {override!r}: write key=value")
    if not text.strip():  # such as run_dir=$VARIABLE where the variable is not set
        raise PretrainError(f"the override {override!r} has no value: null restores the default")
    try:
        value = yaml_core.read(text, comments=False)
    except yaml.YAMLError as error:
        raise PretrainError(
            f"cannot read the value of the override {override!r}: {yaml_core.explain(error)}"
        ) from error
    for name in reversed(key.split(".")):
        value = {name: value}
    return value  # type: ignore[no-any-return]


def _keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of the settings and sections in nested values."""
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


def _file_of(key: str, layers: Sequence[Layer]) -> Path | None:
    """The file that sets a setting, or else the list or section that contains it; the last one."""
    while key:
        for file, values in reversed(layers):
            if key in _keys(values):
                return file
        key = re.sub(r"(^|[.\[])[^.\[]*$", "", key)
    return None


# ---------------------------------------------------------------------- typed settings


def from_dict(values: Mapping[str, Any]) -> Config:
    """A configuration from plain values, such as a checkpoint contains.

    Paths stay as they are; settings that are missing or None have their defaults.

    Raises:
        SettingError: a key is unknown, or a value is invalid.
    """
    return _build(Config, values, "")


def drop_without_effect(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Plain values without the settings that have no effect with the others.

    A configuration with such a setting is refused; that of an earlier run may have it, and means
    the same without it. Other errors are left to :func:`from_dict`.
    """
    while True:
        try:
            _build(Config, values, "")
        except SettingError as error:
            if isinstance(error.__cause__, WithoutEffectError):
                values = _without(values, error.key)
                continue
        return values


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Nested values without the one of a dotted name."""
    name, _, rest = key.partition(".")
    changed = dict(values)
    if rest:
        changed[name] = _without(changed[name], rest)
    else:
        del changed[name]
    return changed


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values, including defaults."""
    return dataclasses.asdict(config)


def _build(cls: type[S], values: Any, prefix: str) -> S:
    """Construct a section; ``prefix`` is its dotted name and a dot."""
    if not isinstance(values, Mapping):
        key = prefix.rstrip(".")
        name = key or "the configuration"
        raise SettingError(key, f"{name} must be a mapping, not {rules.shortened(values)}")
    types = rules.field_types(cls)
    arguments = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in types:
            if reason := cls.not_settings().get(str(name)):
                raise SettingError(key, f"{rules.shortened(key)} is not a setting: {reason}")
            hint = _hint(str(name), list(types))
            raise SettingError(key, f"unknown configuration key {rules.shortened(key)}: {hint}")
        if value is not None:
            arguments[name] = _convert(value, types[name], key)
        elif rules.is_optional(types[name]):  # null is a value, which need not be the default
            arguments[name] = None
    return _construct(cls, arguments, prefix)


def _hint(name: str, known: Sequence[str]) -> str:
    """Suggest settings of a section for a name that it does not have."""
    synonym = _SYNONYMS.get(name)
    similar = [synonym] if synonym in known else difflib.get_close_matches(name, known, n=1)
    if similar:
        return f"did you mean {similar[0]!r}?"
    if len(known) <= _MAX_LISTED:
        return f"known keys: {', '.join(known)}"
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    return f"the nearest keys are {', '.join(nearest)}"


def _construct(cls: type[S], arguments: dict[str, Any], prefix: str) -> S:
    try:
        return cls(**arguments)
    except ValueError as error:
        message = f"{prefix}{error}"
        raise SettingError(re.split("[ =]", message, maxsplit=1)[0], message) from error


def _convert(value: Any, expected: Any, key: str) -> Any:
    """Return ``value`` as the type ``expected``, without loss, or raise an error about ``key``."""
    if rules.is_section(expected):
        return _build(expected, value, f"{key}.")
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin is typing.Annotated:
        return _convert(value, args[0], key)
    if rules.is_union(expected):
        for member in args:
            with contextlib.suppress(SettingError):
                return _convert(value, member, key)
    elif origin is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        if args[-1] is Ellipsis:
            return tuple(_convert(v, args[0], f"{key}[{i}]") for i, v in enumerate(value))
        if len(args) == len(value):
            return tuple(_convert(item, arg, key) for item, arg in zip(value, args, strict=True))
    elif origin is dict and isinstance(value, Mapping):
        kind = args[1] if rules.is_section(args[1]) else Option
        return {
            str(name): _convert(option, kind, f"{key}.{name}")
            for name, option in value.items()
            if option is not None
        }
    elif expected is float and type(value) is int:
        with contextlib.suppress(OverflowError):  # an int too large for a float
            return float(value)
    elif type(value) is expected:
        return value
    hint = ""
    if expected is bool and str(value).lower() in ("yes", "no", "on", "off", "y", "n"):
        hint = ": write true or false"
    message = f"{key} must be {rules.type_name(expected)}, not {rules.shortened(value)}{hint}"
    raise SettingError(key, message)


# ---------------------------------------------------------------------- paths


def _expand_paths(settings: S, prefix: str) -> S:
    """Expand ``~`` and ``$VARIABLE`` in every setting that is a path."""
    expanded: dict[str, Any] = {}
    for name, hint in rules.field_types(type(settings)).items():
        value, key = getattr(settings, name), f"{prefix}{name}"
        if isinstance(value, Settings):
            value = _expand_paths(value, f"{key}.")
        elif isinstance(value, tuple):
            value = tuple(
                _expand_paths(item, f"{key}[{i}].") if isinstance(item, Settings) else item
                for i, item in enumerate(value)
            )
        elif isinstance(value, dict):
            value = {
                item: _expand_paths(one, f"{key}.{item}.") if isinstance(one, Settings) else one
                for item, one in value.items()
            }
        elif isinstance(value, str) and isinstance(rules.rule_of(hint), PathRule):
            value = _expand(value, key)
        expanded[name] = value
    return _construct(type(settings), expanded, prefix)


def _expand(path: str, key: str) -> str:
    try:
        expanded = string.Template(path).substitute(os.environ)
    except KeyError as error:
        raise SettingError(
            key,
            f"{key}={path}: the environment has no variable {error.args[0]}; set it, or write $$ "
            "for a dollar sign",
        ) from error
    except ValueError as error:
        raise SettingError(key, f"{key}={path}: write $$ for a dollar sign") from error
    home = os.path.expanduser(expanded)
    if home.startswith("~"):
        user = home.split("/")[0][1:]
        raise SettingError(
            key, f"{key}={path}: there is no user {user!r}; write ./~ for a name that begins with ~"
        )
    return home


def escape_path(path: str) -> str:
    """Spell a path for a configuration file, such that :func:`load` returns it unchanged."""
    return ("./" if path.startswith("~") else "") + path.replace("$", "$$")


def sources_yaml(entries: Iterable[Mapping[str, Any]], tokenizer: str = "") -> str:
    """A configuration of data, as YAML.

    Args:
        entries: the settings of each source; a field that is the default is left out.
        tokenizer: path of their tokenizer; empty: left out.
    """
    lines = ["data:"]
    if tokenizer:
        lines.append(f"  {yaml_core.dump_line({'tokenizer': escape_path(tokenizer)})[1:-1]}")
    lines.append("  sources:")
    for entry in entries:
        shown = {**entry, "path": escape_path(entry["path"])}
        if entry.get("field") == SourceConfig.field:
            del shown["field"]
        lines.append(f"    - {yaml_core.dump_line(shown)}")
    return "\n".join(lines)
