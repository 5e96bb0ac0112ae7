"""One swap: tensors of a module carry an average, and then their live values again. Knows torch, not Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ema.averaging.pair import Pair
from lightning_ema.distributed.base import local
from lightning_ema.distributed.processes import SyncBuffers, sync_buffers_
from lightning_ema.modules.named_tensors import Table, without_wrappers
from lightning_ema.modules.own_loading import like
from lightning_ema.ops.exchange import Exchange
from lightning_ema.ops.step_hooks import as_before_step

Averages = Iterable[tuple[Pair, Tensor]]
"""Each pair with the average that its tensor is to carry."""


class Swap:
    """The tensors of a module carry averages until :meth:`end`.

    Where a tensor owns its storage it is given another one, and no data moves. Elsewhere contents are written:

        storages   the live storage is kept, the tensor carries that of the average or of a copy of it
        contents   the contents of live tensor and average change places, or the live ones are cloned and overwritten

    Args:
        averages: what each pair is to carry; nothing for pairs that have not started.
        copy: carry copies, so that the module may write to what it carries.
        in_place: leave every tensor the storage that it has.
        reshard: makes the module show its own tensors, where a forward pass leaves others in their place.
        sync_buffers: what becomes of buffers that differ among processes, in what is carried.
    """

    def __init__(
        self,
        averages: Averages,
        copy: bool,
        in_place: bool,
        reshard: Callable[[], None],
        sync_buffers: SyncBuffers | None,
    ) -> None:
        self._averages = averages
        self._copy = copy
        self._in_place = in_place
        self._reshard = reshard
        self._sync_buffers = sync_buffers
        self._storages = _Storages([])
        self._contents: dict[str, _Contents] = {}

    def begin(self) -> None:
        """Swaps in. Whoever calls this holds the swap already, so that Ctrl-C right after it leaves it to be ended."""
        averages, self._averages = self._averages, ()
        with _writing():
            as_before_step()  # updates of other averages still read the live weights
            stored = list(averages)
            whole = [each for each in stored if each[0].exclusive and not self._in_place]
            rest = [each for each in stored if not each[0].exclusive or self._in_place]
            self._storages = _Storages([_given(pair, average, self._copies(pair)) for pair, average in whole])
            self._storages.swap_in()
            # where memory is shared in part, all live values are taken before any of it is written to
            kept = {pair.name: pair.live.data.clone() for pair, _ in rest if pair.crossed}
            for pair, average in rest:
                contents = _Contents.of(pair, average, self._copies(pair), kept.get(pair.name))
                self._contents[pair.name] = contents  # noted first, so that an interruption finds it
                contents.swap_in()
            if self._sync_buffers is not None:
                sync_buffers_([pair.live.data for pair, _ in stored if pair.candidate.is_buffer], self._sync_buffers)

    def end(self) -> list[str]:
        """Brings the live values back, bit for bit. A second call does nothing.

        Returns:
            The names of the parameters that were replaced, or written to, since they were swapped in.
        """
        written = self._written()
        self._reshard()
        with _writing():
            while self._contents:  # one by one, so that one interrupted by Ctrl-C can be taken up again
                next(reversed(self._contents.values())).end()  # the last one first: storages may overlap
                self._contents.popitem()
            self._storages.end()
            self._storages = _Storages([])
        return written

    def pause(self) -> None:
        """The tensors carry their live values until :meth:`resume`."""
        self._reshard()
        with _writing():
            self._storages.pause()
            for contents in reversed(self._contents.values()):
                contents.pause()

    def resume(self) -> None:
        """The tensors carry again what they did at :meth:`pause`, and all that was written to it."""
        self._reshard()
        with _writing():
            self._storages.resume()
            for contents in self._contents.values():
                contents.resume()

    def average_of(self, name: str) -> Tensor | None:
        """Where the average is to be found that the tensor of this name carries; None where it carries none."""
        if name in self._storages:
            return self._storages.average_of(name)
        contents = self._contents.get(name)
        return None if contents is None else contents.average_now()

    def live_of(self, name: str) -> Tensor | None:
        """Where the live tensor of this name is to be found; None where it was not swapped."""
        if name in self._storages:
            return self._storages.live_of(name)
        contents = self._contents.get(name)
        return None if contents is None else contents.live

    def live_at(self, tensor: Tensor) -> Tensor | None:
        """The same for this very tensor, which a part of the module knows by another name."""
        if tensor in self._storages.places_of_tensors:
            return self._storages.live_at(tensor)
        return next((each.live for each in self._contents.values() if each.pair.live is tensor), None)

    def returning(self) -> list[Tensor]:
        """The module's tensors whose contents, not their storage, come back: aliases of them change with it."""
        return [contents.pair.live for contents in self._contents.values()]

    def _copies(self, pair: Pair) -> bool:
        # buffers go as copies: an evaluation may write to them (BatchNorm in train mode, DDP's broadcast)
        may_write = pair.candidate.rewritten or (pair.candidate.is_buffer and not self._in_place)
        return self._copy or may_write or (pair.candidate.is_buffer and self._sync_buffers is not None)

    def _written(self) -> list[str]:
        self._reshard()
        contents = [name for name, each in self._contents.items() if each.was_written()]
        return self._storages.written() + contents


@contextmanager
def _writing() -> Iterator[None]:
    torch.clear_autocast_cache()  # else an autocast region open across the swap goes on with casts of other weights
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(eq=False, slots=True)
class _Given:
    """What one pair is to carry: the average itself where ``watched``, else a copy of it."""

    pair: Pair
    average: Tensor
    carried: Tensor
    watched: bool


def _given(pair: Pair, average: Tensor, copy: bool) -> _Given:
    if pair.plain and not copy:
        return _Given(pair, average, average, True)
    tensor = pair.live
    if not copy and average.dtype == tensor.dtype and average.device == tensor.device:
        return _Given(pair, average, average, pair.cut.stored_as_live)
    return _Given(pair, average, _copy_like(average, tensor), False)


def _copy_like(average: Tensor, tensor: Tensor) -> Tensor:
    return average.to(device=tensor.device, dtype=tensor.dtype, copy=True, non_blocking=average.is_pinned())


class _Storages:
    """Tensors that are given other storage: most of a swap, in as few calls a tensor as there can be.

    Where Ctrl-C comes in between, :meth:`end` brings back what was swapped in so far.
    """

    def __init__(self, given: Sequence[_Given]) -> None:
        self._given = given
        self._tensors = [each.pair.live for each in given]
        self._lives = [tensor.data for tensor in self._tensors]
        self._carried = [each.carried for each in given]
        self._versions: list[int] = []
        self._written: list[str] = []

    def swap_in(self) -> None:
        self._set(self._carried)
        self._note_versions()

    def end(self) -> None:
        self._set(self._lives)
        for each, tensor in zip(self._given, self._tensors, strict=True):
            for table, leaf in each.pair.candidate.slots:
                if table.get(leaf) is not tensor:
                    _put_back(table, leaf, tensor)

    def pause(self) -> None:
        self._written = self.written()  # what is written from here on goes to others
        self._carried = [tensor.data for tensor in self._tensors]
        self._set(self._lives)

    def resume(self) -> None:
        self._set(self._carried)
        self._note_versions()

    def written(self) -> list[str]:
        now = [
            each.pair.name
            for each, tensor, version_then in zip(self._given, self._tensors, self._versions, strict=False)
            if each.watched and (tensor._version != version_then or _replaced(each.pair))
        ]
        return list(dict.fromkeys([*self._written, *now]))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def average_of(self, name: str) -> Tensor:
        return self._given[self._places[name]].average

    def live_of(self, name: str) -> Tensor:
        return self._lives[self._places[name]]

    def live_at(self, tensor: Tensor) -> Tensor:
        return self._lives[self.places_of_tensors[tensor]]

    @cached_property
    def places_of_tensors(self) -> dict[Tensor, int]:
        return {tensor: place for place, tensor in enumerate(self._tensors)}

    @cached_property
    def _places(self) -> dict[str, int]:
        return {each.pair.name: place for place, each in enumerate(self._given)}

    def _note_versions(self) -> None:
        self._versions = [tensor._version for tensor in self._tensors]

    def _set(self, storages: Sequence[Tensor]) -> None:
        for tensor, storage in zip(self._tensors, storages, strict=True):
            tensor.data = storage


# How the contents of a tensor were swapped, which says how they come back:
#   exchange   the contents of live tensor and average have changed places   -> they change places again
#   overwrite  the live contents were cloned and overwritten                 -> they are copied back
How = Literal["exchange", "overwrite"]


@dataclass(eq=False, slots=True)
class _Contents:
    """A tensor that keeps its storage, since something else owns it as well, while its contents are the average's."""

    pair: Pair
    average: Tensor
    how: How
    live: Tensor
    watched: bool
    version: int = -1
    written: bool = False
    exchange: Exchange | None = None
    carried: Tensor | None = None

    @classmethod
    def of(cls, pair: Pair, average: Tensor, copy: bool, kept: Tensor | None) -> _Contents:
        tensor = pair.live
        alike = average.dtype == tensor.dtype and average.device == tensor.device
        if alike and not copy and kept is None:
            watched = not pair.candidate.is_buffer and pair.cut.stored_as_live
            exchange = Exchange(local(tensor), local(average))
            return cls(pair, average, "exchange", live=average, watched=watched, exchange=exchange)
        return cls(pair, average, "overwrite", live=tensor.data.clone() if kept is None else kept, watched=False)

    def swap_in(self) -> None:
        if self.exchange is not None:
            self.exchange.there()
        else:
            self.pair.live.data.copy_(self.average)
        self.version = self.pair.version

    def end(self) -> None:
        if self.exchange is not None:
            self.exchange.back()
        else:
            self.pair.live.data.copy_(self.live)
        for table, leaf in self.pair.candidate.slots:
            _put_back(table, leaf, self.pair.live)

    def pause(self) -> None:
        self.written = self.was_written()
        if self.exchange is not None:
            self.exchange.back()
        elif self.carried is None:  # else it is paused already, in part
            self.carried = self.pair.live.data.clone()
            self.pair.live.data.copy_(self.live)

    def resume(self) -> None:
        if self.exchange is not None:
            self.exchange.there()
        elif self.carried is not None:
            self.pair.live.data.copy_(self.carried)
            self.carried = None
        self.version = self.pair.version

    def average_now(self) -> Tensor:
        exchanged = self.exchange is not None and self.exchange.exchanged
        return self.pair.live.detach() if exchanged else self.average

    def was_written(self) -> bool:
        return self.written or (self.watched and (_replaced(self.pair) or self.pair.version != self.version))


def _replaced(pair: Pair) -> bool:
    return any(table.get(leaf) is not pair.live for table, leaf in pair.candidate.slots)


def _put_back(table: Table, leaf: str, tensor: Tensor) -> None:
    """An evaluation that assigns to a buffer leaves another tensor in its place."""
    if leaf in table:
        table[leaf] = tensor


def lasting(state_dict: dict[str, Any], returning: Iterable[Tensor]) -> dict[str, Any]:
    """A ``state_dict`` taken during a swap that stays as it is when the swap ends.

    Entries that lie in the storage of ``returning`` are cloned; all others keep the storage that the swap gave them,
    also where an entry is a Parameter itself, which would be live again afterwards.
    """
    storages = {local(tensor).untyped_storage().data_ptr() for tensor in returning}

    def kept(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        inside = local(value).untyped_storage().data_ptr() in storages
        return value.detach().clone() if inside else value.detach()

    return like(state_dict, {key: kept(value) for key, value in state_dict.items()})


def not_held(pairs: Iterable[tuple[Pair, Tensor]], state_dict: dict[str, Any]) -> list[str]:
    """The names of the averages that a ``state_dict``, taken while the module carries them, does not hold exactly.

    Args:
        pairs: each with its average.
        state_dict: under whichever keys a module gives it. Sharded tensors may have been gathered into it: they are
            looked for by name and shape.
    """
    held = {_place(value) for value in state_dict.values() if isinstance(value, Tensor)}
    named = {without_wrappers(key): value for key, value in state_dict.items()}

    def holds(pair: Pair, average: Tensor) -> bool:
        if average.dtype != pair.live.dtype:
            return False
        if pair.cut.sharded:
            value = named.get(pair.name)
            return isinstance(value, Tensor) and (value.dtype, value.shape) == (average.dtype, average.shape)
        return _place(pair.live) in held or _same(state_dict.get(pair.name), average)

    return [pair.name for pair, average in pairs if not holds(pair, average)]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return local(tensor).data_ptr(), tensor.dtype, tensor.shape


def _same(value: Any, average: Tensor) -> bool:
    alike = isinstance(value, Tensor) and value.dtype == average.dtype and value.device == average.device
    return alike and torch.equal(value, average)
