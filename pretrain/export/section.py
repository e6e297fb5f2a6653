"""Validated values of a JSON object in a ``config.json``."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pretrain.errors import PretrainError

T = TypeVar("T")

# Limit of every count in config.json: a larger number is a mistake, and listing the weights of
# such a model would take forever.
_LARGEST = 1 << 27


@dataclass(frozen=True)
class Section:
    """A JSON object in config.json.

    Attributes:
        prefix: prefix of its keys in messages, such as ``text_config.``
    """

    values: Mapping[str, Any]
    prefix: str = ""

    def error(self, key: str, reason: str) -> PretrainError:
        """Return an error that names the key, its value and what is supported."""
        value = self.values.get(key)
        return PretrainError(f"config.json has {self.prefix}{key}={shorten(value)}: {reason}")

    def unsupported(self, key: str, supported: Any) -> PretrainError:
        """Return an error about a key with one supported value."""
        return self.error(key, f"this trainer's models have {shorten(supported)}")

    def build(self, cls: type[T], fields: Mapping[str, Any], keys: Mapping[str, str]) -> T:
        """Return a section of our configuration.

        Args:
            keys: keys of config.json by the fields' names, where they differ.

        Raises:
            PretrainError: a value is not allowed; the message has the keys of config.json.
        """
        try:
            return cls(**fields)
        except ValueError as error:
            names = re.compile(rf"\b({'|'.join(keys) or '(?!)'})\b")
            reason = names.sub(lambda match: keys[match[0]], str(error))
            raise PretrainError(f"in config.json, {self.prefix}{reason}") from error

    def section(self, key: str) -> "Section | None":
        """Return an object within this one; None if it is missing, null or empty."""
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "it must be an object")
        return Section(value, f"{self.prefix}{key}.")

    def count(self, key: str, smallest: int = 1, default: int | None = None) -> int:
        """Return a whole number from ``smallest`` to 2**27."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not smallest <= value <= _LARGEST:
            raise self.error(key, f"it must be a whole number from {smallest} to {_LARGEST}")
        return value

    def number(self, key: str, default: float | None = None, low: float | None = None) -> float:
        """Return a finite number: above 0, or at least ``low`` if that is given."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30:
            number = float(value)
            if number > 0 if low is None else number >= low:
                return number
        at_least = "above 0" if low is None else f"of at least {low:g}"
        raise self.error(key, f"it must be a finite number {at_least}")

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise self.error(key, "it must be true or false")
        return value

    def require(self, expected: Mapping[str, Any]) -> None:
        """Raise for a key that is present with another value than the only supported one."""
        for key, value in expected.items():
            if self.values.get(key, value) != value:
                raise self.unsupported(key, value)


def shorten(value: Any) -> str:
    """The value as JSON on one line of at most 80 characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
