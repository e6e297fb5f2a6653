"""The reference of all settings, which ``python -m pretrain settings`` prints."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from typing import Any, Literal

from pretrain.config.rules import Settings, field_types, is_union, rule_of, type_name
from pretrain.config.schema import Config


def describe() -> str:
    """One line per setting: its name, default, meaning and allowed values."""
    return "\n".join(_describe(Config, ""))


def _describe(cls: type[Any], prefix: str) -> typing.Iterator[str]:
    meanings = _field_docstrings(cls)
    hints = field_types(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if isinstance(hint, type) and issubclass(hint, Settings):
            yield from _describe(hint, f"{prefix}{item.name}.")
        else:
            meaning = " ".join(meanings.get(item.name, "").split())
            allowed = _allowed(hint)
            line = f"{prefix}{item.name}={item.default!r}  {meaning}".rstrip()
            yield f"{line}  ({allowed})" if allowed else line
            for element in typing.get_args(hint)[:1]:  # of a list of sections
                if isinstance(element, type) and issubclass(element, Settings):
                    yield from _describe(element, f"{prefix}{item.name}[].")


def _allowed(hint: Any) -> str:
    """The allowed values of a setting; empty if its type has no rule."""
    if typing.get_origin(hint) is tuple:
        return _allowed(typing.get_args(hint)[0])
    if is_union(hint):
        return " or ".join(filter(None, map(_allowed, typing.get_args(hint))))
    if hint is types.NoneType:
        return "null"
    if typing.get_origin(hint) is Literal:
        return type_name(hint)
    rule = rule_of(hint)
    return "" if rule is None else rule.text


def _field_docstrings(cls: type[Any]) -> dict[str, str]:
    """The docstrings of a dataclass's fields by name; Python does not store them."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        target.target.id: note.value.value
        for target, note in itertools.pairwise(body.body)
        if isinstance(target, ast.AnnAssign)
        and isinstance(target.target, ast.Name)
        and isinstance(note, ast.Expr)
        and isinstance(note.value, ast.Constant)
        and isinstance(note.value.value, str)
    }
