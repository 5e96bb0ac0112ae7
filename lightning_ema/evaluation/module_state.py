"""What an evaluation may write to in a module, set aside and put back. Knows torch and torchmetrics, not Lightning."""

from __future__ import annotations

import abc
import argparse
import datetime
import enum
import numbers
import pathlib
import re
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_ema.trainer.rng import is_source, set_state, state_of

_Taken = tuple[Any, Any]
"""An object, and what is needed to make it again what it was."""

# what torch keeps of a module; its buffers and submodules are looked at all the same
_OF_TORCH = frozenset(vars(nn.Module())) - {"training", "_buffers", "_modules"}
# objects of these are the machinery that runs an evaluation: optimizers, loaders, trainers, averages; files, threads
_MACHINERY = {"torch", "lightning", "lightning_fabric", "pytorch_lightning", "lightning_ema", *sys.stdlib_module_names}
_BASES = {object, abc.ABC, Generic, Protocol, types.SimpleNamespace, argparse.Namespace}
_CONTAINERS = (list, dict, set, deque)
_ATOMS = (
    types.NoneType,
    str,
    bytes,
    numbers.Number,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    enum.Enum,
    pathlib.PurePath,
    re.Pattern,
    datetime.date,
    datetime.timedelta,
    torch.dtype,
    torch.device,
    np.generic,
    np.dtype,
    range,
    frozenset,
)


class ModuleState:
    """All that an evaluation may write to in a module, as it was when this was made.

    That is, for the module and its submodules: buffers, plain attributes (numbers, lists, dicts, sets, deques, tensors,
    NumPy arrays, random generators, None, and whatever these contain), which submodules there are, and thereby the
    states of all torchmetrics objects, their counters, caches and compute groups. Modules that hang in a plain list or
    dict count as well, so do objects all of whose attributes are plain, such as a running mean, and containers that
    are attributes of the user's class.

    Not parameters, nor tensors that share their memory; not objects of torch, Lightning and the standard library, such
    as optimizers, threads, files and iterators, nor objects that hold such; not memory-mapped arrays.

    Objects keep their identity: the *contents* of a container, the *values* of a tensor are put back. A tensor that
    lies in another storage by then belongs to weights that were swapped in meanwhile; it is left as it is.

    Memory: a copy of every buffer and tensor found, as they are when an evaluation begins; what an evaluation gathers
    is not copied.

    Args:
        module: the module.
        leave: names of attributes that are none of an evaluation's business, such as Lightning's own.
    """

    def __init__(self, module: nn.Module, leave: Collection[str] = ()) -> None:
        self._leave = _OF_TORCH | frozenset(leave)
        self._of_parameters = {_memory(p) for p in module.parameters() if not is_lazy(p)}
        self._taken: dict[int, _Taken] = {}
        self._walk(module)
        self._of_parameters.clear()

    def put_back(self) -> None:
        """Makes everything what it was when this was made."""
        _give_all(self._taken.values(), self._leave)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside this block everything is what it was when this was made; after it, what it was before the block.

        What the block can reach of the module is what was there when this was made, so nothing else is copied.
        """
        before = [(target, _take(target, self._leave)) for target, _ in self._taken.values()]
        try:
            self.put_back()
            yield
        finally:
            _give_all(before, self._leave)

    def _walk(self, value: Any) -> None:
        if isinstance(value, _ATOMS) or id(value) in self._taken or not self._concerns(value):
            return
        if isinstance(value, tuple):
            for element in value:
                self._walk(element)
            return
        taken = _take(value, self._leave)
        self._taken[id(value)] = (value, taken)
        if isinstance(value, torch.jit.ScriptModule):
            for buffer in value.buffers():
                self._walk(buffer)
        elif isinstance(value, dict):
            for element in taken.values():
                self._walk(element)
        elif isinstance(value, _CONTAINERS):
            for element in taken:
                self._walk(element)
        elif not isinstance(value, Tensor | np.ndarray) and not is_source(value):
            for element in [*taken.values(), *_of_class(type(value))]:
                self._walk(element)

    def _concerns(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return _is_plain_tensor(value) and _memory(value) not in self._of_parameters
        if isinstance(value, np.ndarray):
            return value.flags.writeable and not isinstance(value, np.memmap)
        return isinstance(value, (*_CONTAINERS, tuple, nn.Module)) or is_source(value) or _is_plain(value, set())


def _take(target: Any, leave: Collection[str]) -> Any:
    if isinstance(target, Tensor):
        return _place(target), target.detach().clone()
    if isinstance(target, np.ndarray):
        return target.copy()
    if isinstance(target, _CONTAINERS):
        return dict(target) if isinstance(target, dict) else list(target)
    if is_source(target):
        return state_of(target)
    if isinstance(target, torch.jit.ScriptModule):
        return {}
    return {name: value for name, value in vars(target).items() if name not in leave}


def _give(target: Any, taken: Any, leave: Collection[str]) -> None:
    if isinstance(target, Tensor):
        place, values = taken
        if _place(target) == place and not torch.equal(target, values):
            target.data.copy_(values)
    elif isinstance(target, np.ndarray):
        if target.dtype == object or not np.array_equal(target, taken):
            target[...] = taken
    elif isinstance(target, _CONTAINERS):
        if not _holds(target, taken):
            _refill(target, taken)
    elif is_source(target):
        set_state(target, taken)
    elif not isinstance(target, torch.jit.ScriptModule):
        table = vars(target)
        for name in [name for name in table if name not in taken and name not in leave]:
            del table[name]
        table.update(taken)


def _holds(container: Any, taken: Any) -> bool:
    """Whether it contains the very same objects, in the same order."""
    if isinstance(container, dict):
        return list(container) == list(taken) and _holds(list(container.values()), list(taken.values()))
    return len(container) == len(taken) and all(one is other for one, other in zip(container, taken, strict=True))


def _refill(container: Any, taken: Any) -> None:
    # by the methods of the container's own kind: subclasses may forbid some of them
    if isinstance(container, list):
        list.__setitem__(container, slice(None), taken)
        return
    kind: Any = next(kind for kind in (OrderedDict, dict, set, deque) if isinstance(container, kind))
    kind.clear(container)
    if isinstance(container, dict):
        for key, value in taken.items():
            kind.__setitem__(container, key, value)
    elif isinstance(container, set):
        set.update(container, taken)
    else:
        deque.extend(container, taken)


def _give_all(all_taken: Iterable[_Taken], leave: Collection[str]) -> None:
    failure = None
    for target, taken in all_taken:
        try:
            _give(target, taken, leave)
        except BaseException as error:  # all the others are put back first
            failure = error
    if failure is not None:
        raise failure


def _is_plain(value: Any, pending: set[int]) -> bool:
    """Whether ``value`` is data, rather than something that runs, is open or belongs to others."""
    if isinstance(value, (*_ATOMS, Tensor, np.ndarray, nn.Module)) or is_source(value) or id(value) in pending:
        return True
    pending.add(id(value))
    if isinstance(value, dict):
        return all(_is_plain(element, pending) for element in value.values())
    if isinstance(value, (*_CONTAINERS, tuple)):
        return all(_is_plain(element, pending) for element in value)
    if any(map(_is_machinery, type(value).__mro__)) or not hasattr(value, "__dict__"):
        return False
    return all(_is_plain(element, pending) for element in vars(value).values())


def _of_class(kind: type) -> list[Any]:
    """The containers and tensors that hang on a user's class, where every object of it writes to them."""
    classes = [base for base in kind.__mro__ if base not in _BASES and not _is_machinery(base)]
    values = [value for base in classes for name, value in vars(base).items() if not name.startswith("__")]
    return [value for value in values if isinstance(value, (*_CONTAINERS, Tensor, np.ndarray))]


def _is_machinery(kind: type) -> bool:
    return (kind not in _BASES and kind.__module__.partition(".")[0] in _MACHINERY) or bool(vars(kind).get("__slots__"))


def _is_plain_tensor(tensor: Tensor) -> bool:
    usual = type(tensor) is Tensor and not is_lazy(tensor) and tensor.layout == torch.strided
    return usual and not tensor.is_meta and not tensor.is_quantized


def _memory(tensor: Tensor) -> object:
    return tensor.untyped_storage().data_ptr() if type(tensor) in (Tensor, nn.Parameter) else None


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
