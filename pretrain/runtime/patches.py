"""Replaced attributes of other libraries, which can be reverted."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any


class Patches:
    """Changes of other libraries: applied one by one, reverted together.

    Attributes:
        applied: whether there are any since the last :meth:`undo`.
    """

    def __init__(self) -> None:
        self.applied = False
        self._undo = contextlib.ExitStack()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a module or class, which need not exist, until :meth:`undo`."""
        if name in vars(owner):  # getattr() would bind a static method or one of pybind11
            self._undo.callback(setattr, owner, name, vars(owner)[name])
        elif name in vars(type(owner)):  # such as __defaults__ of a function
            self._undo.callback(setattr, owner, name, getattr(owner, name))
        else:
            self._undo.callback(delattr, owner, name)
        setattr(owner, name, value)
        self.applied = True

    def enter(self, context: AbstractContextManager[Any]) -> None:
        """Enter a context manager, which :meth:`undo` leaves."""
        self._undo.enter_context(context)
        self.applied = True

    def undo(self) -> None:
        """Revert all changes, the last one first."""
        self._undo.close()
        self.applied = False
