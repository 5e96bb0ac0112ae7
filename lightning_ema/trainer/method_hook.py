"""Acting around a method of a trainer or of its loops, where Lightning calls no hook or calls it too late."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from lightning.pytorch import Trainer

Call = Callable[[], None]
Around = Callable[[Trainer, Call], None]


class MethodHook:
    """Stands in the place of one method of one object and calls ``around(trainer, call)`` instead.

    ``call`` does what the method does, and ``around`` calls it in its turn. It holds the callback weakly; a deep copy
    or a pickle of the object has its class's own method.
    """

    def __init__(self, trainer: Trainer, owner: object, name: str, around: Around) -> None:
        self._trainer = weakref.ref(trainer)
        self._owner = weakref.ref(owner)
        self._name = name
        self._around = weakref.WeakMethod(around)
        self._below: Callable[..., None] | None = vars(owner).get(name)

    def __call__(self, *args: Any, **kwargs: Any) -> None:  # Lightning's versions differ in what they take
        trainer, owner, around = self._trainer(), self._owner(), self._around()
        if owner is None or trainer is None:
            raise RuntimeError(f"{self._name}() of a Trainer that is gone. Keep the Trainer as long as you use it.")
        below = self._below or _method_of_class(owner, self._name)

        def call() -> None:
            below(*args, **kwargs)

        if around is None:
            call()
        else:
            around(trainer, call)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        return _method_of_class(memo[id(self._owner())], self._name)  # the copy of the owner, under way

    def __reduce__(self) -> tuple[Any, ...]:
        return _method_of_class, (self._owner(), self._name)


def around_save(trainer: Trainer, around: Around) -> None:
    """Acts around each ``trainer.save_checkpoint``, through which ModelCheckpoint, exceptions and users all come."""
    _install(trainer, trainer, "save_checkpoint", around)


def around_train_end(trainer: Trainer, around: Around) -> None:
    """Acts around all that runs in ``on_train_end``, callbacks before and behind one's own included."""
    _install(trainer, trainer.fit_loop, "on_run_end", around)


def leave_save(trainer: Trainer, around: Around) -> None:
    """Ends :func:`around_save`."""
    _remove(trainer, "save_checkpoint", around)


def leave_train_end(trainer: Trainer, around: Around) -> None:
    """Ends :func:`around_train_end`."""
    _remove(trainer.fit_loop, "on_run_end", around)


def _install(trainer: Trainer, owner: object, name: str, around: Around) -> None:
    hook = vars(owner).get(name)
    while isinstance(hook, MethodHook) and hook._around() != around:
        hook = hook._below
    if not isinstance(hook, MethodHook):
        setattr(owner, name, MethodHook(trainer, owner, name, around))


def _remove(owner: object, name: str, around: Around) -> None:
    """Takes the hook out, from below others of this kind too; what was there before comes back."""
    above: MethodHook | None = None
    hook = vars(owner).get(name)
    while isinstance(hook, MethodHook) and hook._around() not in (around, None):
        above, hook = hook, hook._below
    if not isinstance(hook, MethodHook):
        return
    if above is not None:
        above._below = hook._below
    elif hook._below is None:
        delattr(owner, name)
    else:
        setattr(owner, name, hook._below)


def _method_of_class(owner: Any, name: str) -> MethodType:
    return MethodType(getattr(type(owner), name), owner)
