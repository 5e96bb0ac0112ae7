"""How a tensor and its averages are cut among processes: what the engine asks, and the one place that answers for whom.

A further way of cutting is one file in this folder: a class with the methods of :class:`RecognizedCut`, and
``register(TheClass())`` below it. The strategy of Lightning that needs it gets a row in ``trainer/strategies.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_ema.distributed.processes import Groups
from lightning_ema.distributed.whole import Whole


class Cut(Protocol):
    """How one tensor of the module, and an average of it, lie in this process.

    One tensor has three forms, and ``stored`` lies beside ``live`` element by element:

        live      as the module holds it: a plain tensor, a DTensor, ...
        stored    as this process keeps an average of it:         stored = beside(live),  live = whole(stored)
        local     the plain tensor that arithmetic reads and writes; it may be empty:     local(stored), local(live)

    An update is ``lerp_(local(average), local(beside(live)))``: it asks nobody, and no other process. Methods that wait
    for other processes say so; all processes of :meth:`groups` must call them.

    It holds neither tensors nor process groups, so that an average can be copied and pickled.
    """

    @property
    def sharded(self) -> bool:
        """Whether this process holds a part of the module's own tensor.

        A checkpoint of one file then takes :meth:`gathered`; into one that is a folder each process writes its part.
        """

    @property
    def stored_as_live(self) -> bool:
        """Whether ``stored`` has the form of ``live``, so that the module can carry it; else see :meth:`whole`."""

    def groups(self, live: Tensor) -> Groups:
        """The processes among which an average is cut, and which must agree on what they make of it."""

    def local(self, tensor: Tensor) -> Tensor:
        """The plain tensor behind one that is ``live`` or ``stored``: the same object at each call, not a copy."""

    def beside(self, tensor: Tensor) -> Tensor:
        """The elements of a tensor in the form of ``live`` that ``stored`` lies beside: a view where it can be one."""

    def whole(self, stored: Tensor, live: Tensor) -> Tensor:
        """What is ``stored``, in the form of ``live``. Waits for the others where not ``stored_as_live``."""

    def write(self, stored: Tensor, value: Tensor) -> None:
        """Copies a value, as a whole or in the form of ``live``, into ``stored``. May wait for the others."""

    def gathered(self, tensor: Tensor) -> Tensor:
        """All of a tensor in the form of ``live``, for a checkpoint of one file. Waits for the others."""

    def empty_like(self, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new tensor without values in the form of the given one, which does not require grad.

        Raises:
            ValueError: it cannot lie on that device.
        """

    def version(self, live: Tensor) -> int:
        """Grows with each write to the tensor, in whichever of its forms."""

    def alike(self, first: Tensor, second: Tensor) -> bool:
        """Whether two tensors of one shape, both cut in this way, are cut into the same parts."""

    def check(self, name: str, live: Tensor) -> None:
        """Refuse a live tensor that averages under this cut no longer lie beside.

        Raises:
            RuntimeError: naming it, and what to do.
        """


class RecognizedCut(Cut, Protocol):
    """A way in which something else has cut the module's own tensors, and which is recognized by them."""

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor of a module is cut in this way."""

    def reshards(self, module: nn.Module) -> list[Callable[[], None]]:
        """What makes the module show its own tensors again, where a forward pass left others in their place.

        Each is called at every update, before and after a swap, and does nothing where there is nothing to do.
        """


_RECOGNIZED: list[RecognizedCut] = []
_WHOLE: Cut = Whole()


def register(cut: RecognizedCut) -> None:
    """Lets :func:`cut_of` and :func:`reshards_of` ask it, too."""
    _RECOGNIZED.append(cut)


def cut_of(live: Tensor, partition: Cut | None = None) -> Cut:
    """How a tensor is cut. The one place where that is decided.

    Args:
        live: a tensor of a module, or one that was made in its form.
        partition: how the averages of a tensor that is whole in every process are to be split among them
            (``shard=True``); None to keep them whole as well.
    """
    for cut in _RECOGNIZED:
        if cut.takes(live):
            return cut
    return _WHOLE if partition is None else partition


def local(tensor: Tensor) -> Tensor:
    """The plain tensor of which this process holds the memory: a shard, or the tensor itself where it is whole."""
    return cut_of(tensor).local(tensor)


def same_cut(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape are cut into the same parts, or both are whole."""
    one, other = cut_of(first), cut_of(second)
    return one is other and one.alike(first, second)


def reshards_of(module: nn.Module) -> list[Callable[[], None]]:
    """What makes a module show the tensors that an optimizer trains; nothing where it always shows them."""
    return [reshard for cut in _RECOGNIZED for reshard in cut.reshards(module)]
