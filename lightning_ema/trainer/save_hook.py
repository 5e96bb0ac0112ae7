"""Acting around a whole save of a trainer, callbacks' and the module's own hooks included."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from lightning.pytorch import Trainer

Save = Callable[[], None]
Around = Callable[[Trainer, Save], None]


class SaveHook:
    """Stands in the place of ``trainer.save_checkpoint`` and calls ``around(trainer, save)`` instead.

    ``save`` writes the file, and ``around`` calls it in its turn. ModelCheckpoint, exceptions and users all come
    through this public method. It holds the callback weakly; a deep copy or a pickle of the trainer has its class's own
    method.
    """

    def __init__(self, trainer: Trainer, around: Around) -> None:
        self._trainer = weakref.ref(trainer)
        self._around = weakref.WeakMethod(around)
        self._below: Callable[..., None] | None = vars(trainer).get("save_checkpoint")

    def __call__(self, *args: Any, **kwargs: Any) -> None:  # Lightning's versions differ in what they take
        trainer, around = self._trainer(), self._around()
        if trainer is None:
            raise RuntimeError("save_checkpoint() of a Trainer that is gone. Keep the Trainer as long as you save.")
        below = self._below or _method_of_class(trainer)

        def save() -> None:
            below(*args, **kwargs)

        if around is None:
            save()
        else:
            around(trainer, save)

    @classmethod
    def install(cls, trainer: Trainer, around: Around) -> None:
        """Installs a hook on the trainer, unless it is there already, be it below others of this kind."""
        hook = vars(trainer).get("save_checkpoint")
        while isinstance(hook, cls) and hook._around() != around:
            hook = hook._below
        if not isinstance(hook, cls):
            trainer.save_checkpoint = cls(trainer, around)  # type: ignore[method-assign]

    @classmethod
    def remove(cls, trainer: Trainer, around: Around) -> None:
        """Removes the hook, from below others of this kind too; what was there before comes back."""
        above: SaveHook | None = None
        hook = vars(trainer).get("save_checkpoint")
        while isinstance(hook, cls) and hook._around() not in (around, None):
            above, hook = hook, hook._below
        if not isinstance(hook, cls):
            return
        if above is not None:
            above._below = hook._below
        elif hook._below is None:
            del trainer.save_checkpoint
        else:
            trainer.save_checkpoint = hook._below  # type: ignore[method-assign]

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        return _method_of_class(memo[id(self._trainer())])  # the copy of the trainer, under way

    def __reduce__(self) -> tuple[Any, ...]:
        return _method_of_class, (self._trainer(),)


def _method_of_class(trainer: Any) -> MethodType:
    return MethodType(type(trainer).save_checkpoint, trainer)
