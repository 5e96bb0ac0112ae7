"""The one way into a weights-only checkpoint: its module's ``on_save_checkpoint``."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule

PutAverage = Callable[[LightningModule, dict[str, Any]], None]

_HOOK = "on_save_checkpoint"


class SaveHook:
    """Stands before a module's own ``on_save_checkpoint`` and puts the average into weights-only checkpoints.

    Lightning calls no callback hook for them. The hook acts only for the module it was hung on; a deep copy or a
    pickle of the module gets its class's own method back, so that a copy saves its own weights.
    """

    def __init__(self, module: LightningModule, put_average: PutAverage) -> None:
        self._module = weakref.ref(module)
        self._put_average = weakref.WeakMethod(put_average)
        self._own: Callable[[dict[str, Any]], None] | None = vars(module).get(_HOOK)

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        module, put_average = self._module(), self._put_average()
        if module is None:
            return
        if put_average is not None and "callbacks" not in checkpoint:  # else the callback's own hook has been there
            put_average(module, checkpoint)
        own = self._own or _method_of_class(module)
        own(checkpoint)

    @classmethod
    def hang(cls, module: LightningModule, put_average: PutAverage) -> None:
        """Hangs a hook on the module, unless it hangs there already."""
        hook = vars(module).get(_HOOK)
        if not isinstance(hook, cls) or hook._put_average() != put_average:
            setattr(module, _HOOK, cls(module, put_average))

    @classmethod
    def take_down(cls, module: LightningModule, put_average: PutAverage) -> None:
        """Takes the hook off again; what hung there before comes back."""
        hook = vars(module).get(_HOOK)
        if not isinstance(hook, cls) or hook._put_average() != put_average:
            return
        if hook._own is None:
            delattr(module, _HOOK)
        else:
            setattr(module, _HOOK, hook._own)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        return _method_of_class(memo[id(self._module())])  # the copy of the module, under way

    def __reduce__(self) -> tuple[Any, ...]:
        return _method_of_class, (self._module(),)


def _method_of_class(module: Any) -> MethodType:
    return MethodType(type(module).on_save_checkpoint, module)
