"""Calls functions right before an optimizer changes parameters. Knows torch only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

# One hook hangs for all and for good: torch goes over its hooks as they hang, and one that is taken out meanwhile, as
# by the work itself, ends that with an error.
_works: OrderedDict[int, Callable[[], None]] = OrderedDict()
_hook: list[RemovableHandle] = []


def call_before_step(work: Callable[[], None]) -> RemovableHandle:
    """Calls ``work`` before the moment at which any optimizer of torch changes parameters, until it is removed.

    It may remove itself, or others. A step that is given a closure, as Lightning gives one, makes the forward and the
    backward pass first. The optimizers of ``torch.optim`` all change parameters after that, and so ``work`` waits for
    it too; others (SAM, which moves the weights before the closure) are not trusted in that.
    """
    if not _hook:
        _hook.append(register_optimizer_step_pre_hook(_before))
    handle = RemovableHandle(_works)
    _works[handle.id] = work
    return handle


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if not _works:
        return None
    named = "closure" in kwargs
    closure = kwargs["closure"] if named else args[1] if len(args) > 1 else None
    if closure is None or not type(optimizer).__module__.startswith("torch.optim."):
        as_before_step()
        return None

    def closure_and_work() -> Any:
        loss = closure()
        as_before_step()
        return loss

    if named:
        return args, {**kwargs, "closure": closure_and_work}
    return (args[0], closure_and_work, *args[2:]), kwargs


def as_before_step() -> None:
    """Calls now what waits for a step, because parameters are about to change in another way."""
    for work in tuple(_works.values()):
        work()
