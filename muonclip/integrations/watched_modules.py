"""Modules whose forward passes are shown to a QK-Clip, by integration."""

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from muonclip.attachment import Handle
from muonclip.qk_clip import QKClip


class Watched:
    """A module that is watched, as one layer of a clip.

    Args:
        name: the layer.
        undo: functions that remove hooks from the module.

    Attributes:
        clip: a weak reference to the clip: watching ends with it.
    """

    def __init__(self, name: str, undo: Iterable[Callable[[], object]]) -> None:
        self.name, self.undo = name, list(undo)
        self.clip: Callable[[], QKClip | None] = lambda: None


class _Owner:
    """Keeps a clip alive as long as a module, without being copied or pickled with it."""

    def __init__(self, clip: QKClip) -> None:
        self.clip = clip

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return bool, ()


_OWNER = "_qk_clip_owner"
W = TypeVar("W", bound=Watched)


class WatchedModules(Generic[W]):
    """The watched modules of an integration.

    A table apart from the modules, so that models can be copied and pickled: copies are not
    watched. It keeps neither modules nor clips alive; a module keeps the clip that watches it.

    Args:
        when_empty: called when the last module is no longer watched.
    """

    def __init__(self, when_empty: Callable[[], object] = lambda: None) -> None:
        self._table: WeakKeyDictionary[nn.Module, W] = WeakKeyDictionary()
        self._when_empty = when_empty

    def __len__(self) -> int:
        return len(self._table)

    def get(self, module: nn.Module) -> W | None:
        """How a module is watched, if it is."""
        return self._table.get(module)

    def make_room(self, modules: Iterable[nn.Module], clip: QKClip) -> None:
        """End what watches these modules now. Another clip that does is retired as a whole."""
        for module in modules:
            watched = self._table.get(module)
            if watched is None:
                continue
            other = watched.clip()
            if other is not None and other is not clip:
                other._retire("a newer QKClip watches the same model")
            self._end(watched, ref(module))

    def begin(self, watched: Mapping[nn.Module, W], clip: QKClip) -> Handle:
        """Watch modules until the returned handle or the clip is removed."""
        ends = []
        for module, w in watched.items():
            ends.append(partial(self._end, w, ref(module)))
            w.clip = ref(clip, ends[-1])
            self._table[module] = w
            module.__dict__[_OWNER] = _Owner(clip)
        handle = Handle(ends)
        clip._keep(handle)
        torch.compiler.reset()  # code that was compiled before does not run hooks that are new
        return handle

    def _end(self, watched: W, module: Callable[[], nn.Module | None], *_: object) -> None:
        if sys.is_finalizing():  # called because the clip ended with the interpreter
            return
        while watched.undo:
            watched.undo.pop()()
        current = module()
        if current is not None and self._table.get(current) is watched:
            del self._table[current]
            current.__dict__.pop(_OWNER, None)
        if not self._table:
            self._when_empty()
