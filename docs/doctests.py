"""Extension of griffe: doctests in docstrings become blocks of Python."""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^>>> .*\n(?:.+\n?)*", re.MULTILINE)


def _block(match: re.Match[str]) -> str:
    code = re.sub(r"  # doctest: .*$", "", match[0].rstrip("\n"), flags=re.MULTILINE)
    return f"```pycon\n{code}\n```\n"


class Doctests(griffe.Extension):
    """Puts a fence around each doctest."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring and ">>> " in obj.docstring.value:
            obj.docstring.value = _DOCTEST.sub(_block, obj.docstring.value + "\n").rstrip()
