"""Acting around a module's own checkpoint hook, where Lightning calls no callback hook."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, ClassVar

from lightning.pytorch import LightningModule
from torch import nn

Hook = Callable[[dict[str, Any]], None]
Around = Callable[[LightningModule, dict[str, Any], Hook], None]


class ModuleHook:
    """Stands in the place of one hook of one module and calls ``around(module, checkpoint, own)`` instead.

    ``own`` is the module's own hook, which ``around`` calls in its turn.

    It is the one public way to see a weights-only save, and a load before it happens. It holds the callback weakly
    and acts only for the module it was installed on: a deep copy or a pickle of the module gets its class's own method
    back.

    Where somebody wrapped it, so that it is there twice, ``around`` is called once.
    """

    _running: ClassVar[set[Around]] = set()

    def __init__(self, module: LightningModule, name: str, around: Around) -> None:
        self._module = weakref.ref(module)
        self._name = name
        self._around = weakref.WeakMethod(around)
        self._own: Hook | None = vars(module).get(name)

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        module, around = self._module(), self._around()
        if module is None:
            return
        own = self._own or _method_of_class(module, self._name)
        if around is None or around in self._running:
            own(checkpoint)
            return
        self._running.add(around)
        try:
            around(module, checkpoint, own)
        finally:
            self._running.discard(around)

    @classmethod
    def install(cls, module: LightningModule, name: str, around: Around) -> None:
        """Installs a hook on the module, unless it is there already, be it below others of this kind."""
        while isinstance(hook := vars(module).get(name), cls) and hook._around() is None:
            hook._take_out(module)  # of a callback that is gone
        while isinstance(hook, cls) and hook._around() != around:
            hook = hook._own
        if not isinstance(hook, cls):
            setattr(module, name, cls(module, name, around))

    @classmethod
    def remove(cls, module: nn.Module, name: str, around: Around) -> None:
        """Removes the hook, from below others of this kind too; what was there before comes back."""
        above: ModuleHook | None = None
        hook = vars(module).get(name)
        while isinstance(hook, cls) and hook._around() != around:
            above, hook = hook, hook._own
        if not isinstance(hook, cls):
            return
        if above is None:
            hook._take_out(module)
        else:
            above._own = hook._own

    def _take_out(self, module: nn.Module) -> None:
        if self._own is None:
            delattr(module, self._name)
        else:
            setattr(module, self._name, self._own)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        return _method_of_class(memo[id(self._module())], self._name)  # the copy of the module, under way

    def __reduce__(self) -> tuple[Any, ...]:
        return _method_of_class, (self._module(), self._name)


def _method_of_class(module: Any, name: str) -> MethodType:
    return MethodType(getattr(type(module), name), module)


def own_hook(module: LightningModule, name: str) -> Hook:
    """The module's own hook, below all that stand in its place."""
    hook = vars(module).get(name)
    while isinstance(hook, ModuleHook):
        hook = hook._own
    return hook or _method_of_class(module, name)
