"""Types of settings: allowed values, the base class of all sections, and their description."""

import ast
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal


class Rule(typing.Protocol):
    """The allowed values of a setting, given as metadata of its type."""

    text: str
    """Description that continues "must be"."""

    def allows(self, value: Any) -> bool: ...


class In:
    """The numbers in an interval such as ``In("(0, 1]")``; NaN is not allowed."""

    def __init__(self, interval: str) -> None:
        low, high = interval[1:-1].split(",")
        self.low, self.high = float(low), float(high)
        self.low_open, self.high_open = interval[0] == "(", interval[-1] == ")"
        self.text = f"in {interval}"

    def allows(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)


class NonEmpty:
    """Text that is not blank, without NUL characters."""

    text = "text that is not empty"

    def allows(self, value: str) -> bool:
        return value.strip() != "" and "\0" not in value


class PathRule:
    """A path, in which :func:`~pretrain.config.load` expands ``~`` and ``$VARIABLE``.

    Args:
        optional: whether the path may be empty.
    """

    def __init__(self, *, optional: bool = False) -> None:
        self._optional = optional
        self.text = "a path" + (" or empty" if optional else "")

    def allows(self, value: str) -> bool:
        return "\0" not in value and (value.strip() != "" or (self._optional and not value))


# A mapping of names to plain values that the trainer does not know in advance.
Options = dict[str, Any]


def field_types(cls: type[Any]) -> dict[str, Any]:
    """The type of each field by name, with its metadata."""
    return typing.get_type_hints(cls, include_extras=True)


def rule_of(hint: Any) -> Rule | None:
    """The rule in a type, or in a member of a union or tuple."""
    if typing.get_origin(hint) is Annotated:
        rule: Rule = hint.__metadata__[0]
        return rule
    if is_union(hint) or typing.get_origin(hint) is tuple:
        return next(filter(None, map(rule_of, typing.get_args(hint))), None)
    return None


def require(condition: bool, message: str) -> None:
    """Raise a ``ValueError`` unless the condition holds."""
    if not condition:
        raise ValueError(message)


class WithoutEffectError(ValueError):
    """A setting that is neither at its default nor null has no effect with the other settings."""


@dataclass(frozen=True)
class Settings:
    """Base class of the sections of a configuration; a field's type contains its allowed values.

    Raises:
        ValueError: a value is not allowed, or contradicts another one. The message begins with the
            setting's name.
    """

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            rule, value = rule_of(hint), getattr(self, name)
            if rule is None or value is None:
                continue
            for item in value if isinstance(value, tuple) else (value,):
                or_null = " or null" if is_optional(hint) else ""
                require(
                    rule.allows(item), f"{name} must be {rule.text}{or_null}, not {shortened(item)}"
                )
        self._check()

    @classmethod
    def not_settings(cls) -> Mapping[str, str]:
        """Names that one might expect in this section -> what to do instead."""
        return {}

    def _check(self) -> None:
        """Refuse combinations of settings; overridden by sections that have such rules."""

    def _refuse_without_effect(self, choice: str, names: Iterable[str], section: str = "") -> None:
        """Refuse settings that are neither at their defaults nor null, if a choice disables
        them.

        Args:
            section: precedes the names in the message, with a dot.

        Raises:
            WithoutEffectError: names the first of them.
        """
        defaults = {
            f.name: f.default if f.default_factory is MISSING else f.default_factory()
            for f in fields(self)
        }
        for name in names:
            value = getattr(self, name)
            if value is not None and value != defaults[name]:
                raise WithoutEffectError(
                    f"{section}{name}={shortened(value)} has no effect with {choice}: leave it "
                    "out, or set null"
                )

    def _refuse_others(self, name: str) -> None:
        """Refuse all other settings of the section, if the value of this one disables them."""
        value = getattr(self, name)
        text = f"{value:g}" if isinstance(value, float) else str(value).lower()
        others = [field.name for field in fields(self) if field.name != name]
        self._refuse_without_effect(f"{name}={text}", others)


def type_name(expected: Any) -> str:
    """A type as error messages name it."""
    if typing.get_origin(expected) is typing.Annotated:
        return type_name(typing.get_args(expected)[0])
    if typing.get_origin(expected) is Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(expected))
    if is_union(expected):
        return " or ".join(type_name(member) for member in typing.get_args(expected))
    if typing.get_origin(expected) is tuple:
        first, *others = typing.get_args(expected)
        if others == [Ellipsis]:
            return f"a list of {type_name(first)}"
        return f"a list [{', '.join(map(type_name, typing.get_args(expected)))}]"
    if typing.get_origin(expected) is list:
        return f"a list of {type_name(typing.get_args(expected)[0])}"
    if typing.get_origin(expected) is dict:
        return "a mapping of names to values"
    if expected is types.NoneType:
        return "null"
    return str(expected.__name__)


def is_union(expected: Any) -> bool:
    """Whether a type is a union, such as ``int | None``."""
    return typing.get_origin(expected) in (typing.Union, types.UnionType)


def is_optional(expected: Any) -> bool:
    """Whether None is a value of a type."""
    return is_union(expected) and types.NoneType in typing.get_args(expected)


def shortened(value: Any) -> str:
    """A value's representation of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def describe(cls: type[Any], prefix: str = "") -> Iterator[str]:
    """One line per setting of a section: its name, default, meaning and allowed values."""
    hints, meanings = field_types(cls), _field_docstrings(cls)
    for field in fields(cls):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        if is_section(hint):
            yield from describe(hint, f"{name}.")
        else:
            meaning = meanings.get(field.name) or field.metadata.get("meaning", "")
            meaning = " ".join(meaning.split())
            allowed = _allowed(hint)
            default = field.default if field.default_factory is MISSING else field.default_factory()
            sections = [element for element in typing.get_args(hint) if is_section(element)]
            if sections and isinstance(default, dict):
                default = {element: {} for element in default}  # with the defaults that follow
            line = f"{name}={default!r}  {meaning}".rstrip()
            yield f"{line}  ({allowed})" if allowed else line
            for element in sections:  # of a list or a mapping
                mapping = typing.get_origin(hint) is dict
                yield from describe(element, f"{name}.NAME." if mapping else f"{name}[].")


def is_section(hint: Any) -> bool:
    """Whether a type is a section of a configuration."""
    return isinstance(hint, type) and issubclass(hint, Settings)


def _allowed(hint: Any) -> str:
    """The allowed values of a setting; empty if its type has no rule."""
    if typing.get_origin(hint) is tuple:
        return _allowed(typing.get_args(hint)[0])
    if is_union(hint):
        return " or ".join(
            _allowed(member) or type_name(member) for member in typing.get_args(hint)
        )
    if hint is types.NoneType:
        return "null"
    if typing.get_origin(hint) is Literal:
        return type_name(hint)
    rule = rule_of(hint)
    return "" if rule is None else rule.text


def _field_docstrings(cls: type[Any]) -> dict[str, str]:
    """The docstrings of a dataclass's fields by name; Python does not store them."""
    base = cls.__base__
    inherited = _field_docstrings(base) if base is not None and is_dataclass(base) else {}
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    return inherited | {
        target.target.id: note.value.value
        for target, note in itertools.pairwise(body.body)
        if isinstance(target, ast.AnnAssign)
        and isinstance(target.target, ast.Name)
        and isinstance(note, ast.Expr)
        and isinstance(note.value, ast.Constant)
        and isinstance(note.value.value, str)
    }
