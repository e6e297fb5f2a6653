"""Modules whose forward passes are observed by a QK-Clip, one table per integration."""

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from muonclip.hooks import Handle
from muonclip.qk_clip import QKClip


class Watched:
    """A watched module: the layer ``name`` of a clip.

    ``undo`` are functions that remove hooks from the module.
    """

    def __init__(self, name: str, undo: Iterable[Callable[[], object]]) -> None:
        self.name, self.undo = name, list(undo)
        self.clip: Callable[[], QKClip | None] = lambda: None  # a weak reference

    def observer(self, module: nn.Module) -> QKClip | None:
        """The clip, if it is to observe the current forward pass of the module.

        Passes in eval mode, those that the clip ignores, and the repeated passes of activation
        checkpointing do not count.
        """
        clip = self.clip()
        if clip is None:
            return None
        if torch._C._current_graph_task_id() != -1:  # recomputation runs within the backward pass
            clip._note_backward()
            return None
        if not module.training:
            clip._note_eval_mode(self.name)
            return None
        return None if clip._ignores_forwards else clip


def with_pre_hook(hook: Callable[..., None]) -> Callable[[str, nn.Module], Watched]:
    """A function that watches a module by a hook before its forward pass, with its arguments."""

    def make(name: str, module: nn.Module) -> Watched:
        return Watched(name, [add_pre_hook(module, hook).remove])

    return make


def add_pre_hook(module: nn.Module, hook: Callable[..., None]) -> RemovableHandle:
    """Call a hook before the forward pass of a module, once.

    The copy of a watched module (``copy.deepcopy``, ``torch.load``) has its hooks, which do nothing
    until the copy is watched, too. If an earlier hook removes this one while the module is called,
    torch still calls it, without keyword arguments.
    """
    hooks = module._forward_pre_hooks
    for key in [key for key, other in hooks.items() if other is hook]:
        del hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    return module.register_forward_pre_hook(hook, with_kwargs=True)


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

    The table is separate from the modules, so that models can be copied and pickled: copies are
    not watched. It keeps neither modules nor clips alive; a module keeps the clip that watches it.

    Args:
        make: adds the hooks to a module, given the layer's name and the module.
        when_used: called before modules are watched.
        when_empty: called when no module is watched any more.
    """

    def __init__(
        self,
        make: Callable[[str, nn.Module], W],
        when_used: Callable[[], object] = lambda: None,
        when_empty: Callable[[], object] = lambda: None,
    ) -> None:
        self._table: WeakKeyDictionary[nn.Module, W] = WeakKeyDictionary()
        self._make, self._when_used, self._when_empty = make, when_used, when_empty

    def get(self, module: nn.Module) -> W | None:
        """The entry of a module; None if it is not watched."""
        return self._table.get(module)

    def observer(self, module: nn.Module) -> tuple[str, QKClip] | None:
        """The layer's name and its clip, if it is to observe the module's current forward pass."""
        watched = self._table.get(module)
        clip = None if watched is None else watched.observer(module)
        return None if watched is None or clip is None else (watched.name, clip)

    def watch(self, modules: Mapping[str, nn.Module], clip: QKClip) -> Handle:
        """Watch modules until the returned handle or the clip is removed.

        If another clip watches one of them, that clip ends as a whole, and its next step warns.
        """
        for module in modules.values():
            if (previous := self._table.get(module)) is not None:
                other = previous.clip()
                if other is not None and other is not clip:
                    other._deactivate("a newer QKClip watches the same model", detach=False)
                self._end(previous, ref(module))
        self._when_used()
        undo = []
        for name, module in modules.items():
            watched = self._make(name, module)
            undo.append(partial(self._end, watched, ref(module)))
            watched.clip = ref(clip, undo[-1])  # watching ends with the clip
            self._table[module] = watched
            module.__dict__[_OWNER] = _Owner(clip)
        handle = Handle(undo)
        clip._add_handle(handle)
        torch.compiler.reset()  # code that is compiled already would not run the new hooks
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


def select_layers(
    model: nn.Module, clip: QKClip, layers: Iterable[str] | None
) -> dict[str, nn.Module]:
    """The modules to watch, by layer.

    Raises:
        ValueError: if a layer is not in the clip or not in the model.
    """
    names = list(clip.layouts) if layers is None else list(layers)
    modules = dict(model.named_modules())
    for name in names:
        if name not in clip.layouts:
            raise ValueError(f"layers: the clip has no layer {name!r}")
        if name not in modules:
            raise ValueError(
                f"the clip's layer {name!r} is not in {type(model).__name__}: pass the model whose "
                "attention_layouts the clip was given, or choose with layers"
            )
    return {name: modules[name] for name in names}
