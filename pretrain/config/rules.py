"""Types of settings: which values a setting may have, and the base class of all sections."""

import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal


class Rule(typing.Protocol):
    """Values that a setting can have, as metadata of its type."""

    text: str
    """For people; reads on after "must be"."""

    def allows(self, value: Any) -> bool: ...


class In:
    """The numbers of an interval in mathematical notation: ``In("(0, 1]")``. Never NaN."""

    def __init__(self, interval: str) -> None:
        low, high = interval[1:-1].split(",")
        self.low, self.high = float(low), float(high)
        self.low_open, self.high_open = interval[0] == "(", interval[-1] == ")"
        self.text = f"in {interval}"

    def allows(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)


class NonEmpty:
    """Text of at least one character, without NUL."""

    text = "text that is not empty"

    def allows(self, value: str) -> bool:
        return value.strip() != "" and "\0" not in value


class PathRule:
    """A path, in which :func:`load` expands ``~`` and ``$VARIABLE``.

    Args:
        optional: empty text means none.
    """

    def __init__(self, *, optional: bool = False) -> None:
        self._optional = optional
        self.text = "a path" + (" or empty" if optional else "")

    def allows(self, value: str) -> bool:
        return "\0" not in value and (value.strip() != "" or (self._optional and not value))


# Upper limits are far above any use: they refuse slips such as a missing decimal point, and keep
# sizes that are multiplied within 64 bits.


def field_types(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def rule_of(hint: Any) -> Rule | None:
    """The rule in a setting's type, or in one part of a union or of a tuple."""
    if typing.get_origin(hint) is Annotated:
        rule: Rule = hint.__metadata__[0]
        return rule
    if is_union(hint) or typing.get_origin(hint) is tuple:
        return next(filter(None, map(rule_of, typing.get_args(hint))), None)
    return None


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Settings:
    """A section of the configuration: fields whose types say which values are allowed.

    Raises:
        ValueError: a value is not allowed, or contradicts another one; the message begins with
            the setting's name.
    """

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            rule, value = rule_of(hint), getattr(self, name)
            if rule is None or value is None:
                continue
            for item in value if isinstance(value, tuple) else (value,):
                also = " or null" if type(None) in typing.get_args(hint) else ""
                require(
                    rule.allows(item), f"{name} must be {rule.text}{also}, not {shortened(item)}"
                )
        self._check()

    def _check(self) -> None:
        """Compare settings with each other."""


def type_name(expected: Any) -> str:
    if typing.get_origin(expected) is typing.Annotated:
        return type_name(typing.get_args(expected)[0])
    if typing.get_origin(expected) is Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(expected))
    if is_union(expected):
        return " or ".join(type_name(part) for part in typing.get_args(expected))
    if typing.get_origin(expected) is tuple:
        parts = [type_name(part) for part in typing.get_args(expected) if part is not Ellipsis]
        return f"a list of {parts[0]}" if parts[1:] == [] else f"a list [{', '.join(parts)}]"
    if expected is types.NoneType:
        return "null"
    return str(expected.__name__)


def is_union(expected: Any) -> bool:
    return typing.get_origin(expected) in (typing.Union, types.UnionType)


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
