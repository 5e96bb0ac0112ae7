"""The loan of averages to the module, and the way back. Knows torch, not Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ema.averaging.pair import Pair
from lightning_ema.averaging.storage_swap import StorageLoan
from lightning_ema.distributed.base import cut_of, local
from lightning_ema.distributed.processes import SyncBuffers, sync_buffers_
from lightning_ema.modules.named_tensors import Candidate, without_wrappers
from lightning_ema.ops.lerp import exchange_
from lightning_ema.ops.step_hooks import as_before_step

# How a tensor was lent, which says how it comes back:
#   storage   the live storage is set aside, the tensor carries another one      -> set the live storage again
#   exchange  the contents of live tensor and average have changed places        -> exchange them again
#   contents  the live contents were cloned and overwritten                      -> copy them back
How = Literal["storage", "exchange", "contents"]


@dataclass(eq=False, slots=True)
class _Lent:
    pair: Pair
    average: Tensor
    how: How
    live: Tensor
    watched: bool
    version: int = -1
    exchanged: bool = False
    carried: Tensor | None = None


class Loan:
    """The module carries an average until :meth:`recall`. Made by :meth:`lightning_ema.WeightAverage.lend`.

    Args:
        averages: the average that each pair is lent; nothing for pairs that have not started.
        copy: lend a copy, so that the module may write to what it is lent.
        in_place: leave every tensor the storage that it has.
        settle: makes the module show its own tensors, where a forward pass leaves others in their place.
        reconcile: what becomes of buffers that differ among processes, in what is lent.
    """

    def __init__(
        self,
        averages: Iterable[tuple[Pair, Tensor]],
        copy: bool,
        in_place: bool,
        settle: Callable[[], None],
        reconcile: SyncBuffers | None,
    ) -> None:
        self._averages = averages
        self._copy = copy
        self._in_place = in_place
        self._settle = settle
        self._reconcile = reconcile
        self._plain: StorageLoan | None = None
        self._lent: dict[str, _Lent] = {}  # the rest: what is not plain
        self.active = False

    def begin(self) -> None:
        """Lends. Whoever calls this holds the loan already, so that Ctrl-C right after it leaves it to be recalled."""
        averages, self._averages = self._averages, ()
        self.active = True
        torch.clear_autocast_cache()  # else an autocast region open across the loan goes on with casts of live weights
        try:
            with torch.inference_mode(False), torch.no_grad():
                as_before_step()  # updates of other averages still read the live weights
                stored = list(averages)
                if not self._copy and not self._in_place:
                    self._plain = StorageLoan([each for each in stored if each[0].plain])
                    self._plain.lend()
                    stored = [each for each in stored if not each[0].plain]
                # where memory is shared in part, all live values are taken before any of it is written to
                kept = {pair.name: pair.live.data.clone() for pair, _ in stored if pair.crossed}
                for pair, average in stored:
                    buffers_apart = pair.candidate.is_buffer and self._reconcile is not None
                    self._lend(pair, average, self._copy or buffers_apart, self._in_place, kept.get(pair.name))
                if self._reconcile is not None:
                    sync_buffers_([pair.live.data for pair, _ in stored if pair.candidate.is_buffer], self._reconcile)
        except BaseException:
            self.end()
            raise

    def recall(self) -> None:
        """Brings the live weights back, bit for bit. A second call does nothing.

        Raises:
            RuntimeError: something wrote to a parameter during the loan, and so into the average. The live weights
                are back nevertheless.
        """
        written = self.written()
        self.end()
        if written:
            raise RuntimeError(
                f"{', '.join(written[:4])}{', ...' if len(written) > 4 else ''}: written to while the module carried "
                "the average, so the average itself was changed (test-time adaptation? an optimizer that rewrites "
                "weights for evaluation?). The live weights are back and untouched. To let an evaluation write, lend "
                "a copy, WeightAverage.lend(copy=True); in a Trainer use EMACallback(evaluate='live')."
            )

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside this block the module carries its live weights; then again what it was lent, and all written to it."""
        torch.clear_autocast_cache()
        self._settle()
        with torch.inference_mode(False), torch.no_grad():
            if self._plain is not None:
                self._plain.put_down()
            for lent in reversed(self._lent.values()):
                _put_down(lent)
        try:
            yield
        finally:
            torch.clear_autocast_cache()
            self._settle()
            with torch.inference_mode(False), torch.no_grad():
                if self._plain is not None:
                    self._plain.take_up()
                for lent in self._lent.values():
                    _take_up(lent)

    def end(self) -> None:
        """Brings the live weights back without asking whether anything was written to."""
        if self.active:
            torch.clear_autocast_cache()
            self._settle()
            with torch.inference_mode(False), torch.no_grad():
                while self._lent:  # one by one, so that one interrupted by Ctrl-C can be taken up again
                    _return(next(reversed(self._lent.values())))  # last lent first: storages may overlap
                    self._lent.popitem()
                if self._plain is not None:
                    self._plain.recall()
                    self._plain = None
            self.active = False

    def written(self) -> list[str]:
        """The names of the parameters that were replaced, or written to, since they were lent."""
        self._settle()
        plain = [] if self._plain is None else self._plain.written()
        return plain + [
            name
            for name, lent in self._lent.items()
            if lent.watched and (_replaced(lent.pair.candidate) or lent.pair.version != lent.version)
        ]

    def average_of(self, pair: Pair) -> Tensor | None:
        """Where the average is to be found that was lent; None where none was."""
        if self._plain is not None and pair.name in self._plain:
            return self._plain.average_of(pair.name)
        lent = self._lent.get(pair.name)
        if lent is None:
            return None
        return pair.live.detach() if lent.how == "exchange" else lent.average

    def live_of(self, pair: Pair) -> Tensor:
        """Where the live tensor is to be found during the loan."""
        if self._plain is not None and pair.name in self._plain:
            return self._plain.live_of(pair.name)
        lent = self._lent.get(pair.name)
        return lent.live if lent is not None else pair.live.detach()

    def returning(self) -> list[Tensor]:
        """The module's tensors whose contents, not their storage, come back: aliases of them change with it."""
        return [lent.pair.live for lent in self._lent.values() if lent.how != "storage"]

    def _lend(self, pair: Pair, average: Tensor, copy: bool, in_place: bool, kept: Tensor | None) -> None:
        tensor, buffer = pair.live, pair.candidate.is_buffer
        alike = average.dtype == tensor.dtype and average.device == tensor.device
        # buffers go as copies: an evaluation may write to them (BatchNorm in train mode, DDP's broadcast)
        copy = copy or pair.candidate.rewritten or (buffer and not in_place)
        direct = alike and not copy and kept is None
        if pair.exclusive and not in_place:
            lent = _Lent(pair, average, "storage", tensor.data, watched=direct and pair.cut.stored_as_live)
        elif direct:
            lent = _Lent(pair, average, "exchange", average, watched=not buffer and pair.cut.stored_as_live)
        else:
            lent = _Lent(pair, average, "contents", tensor.data.clone() if kept is None else kept, watched=False)
        self._lent[pair.name] = lent  # noted first, so that an interruption finds it
        if lent.how == "storage":
            tensor.data = average if direct else _copy_like(average, tensor)
        elif lent.how == "exchange":
            _exchange(lent)
            lent.exchanged = True
        else:
            tensor.data.copy_(average)
        lent.version = pair.version


def _exchange(lent: _Lent) -> None:
    exchange_(local(lent.pair.live).data, local(lent.average))


def _put_down(lent: _Lent) -> None:
    tensor = lent.pair.live
    if lent.how == "storage":
        lent.carried, tensor.data = tensor.data, lent.live
    elif lent.how == "contents":
        lent.carried = tensor.data.clone()
        tensor.data.copy_(lent.live)
    else:
        _exchange(lent)
        lent.exchanged = False


def _take_up(lent: _Lent) -> None:
    tensor, carried = lent.pair.live, lent.carried
    if lent.how == "exchange":
        _exchange(lent)
        lent.exchanged = True
    elif carried is not None:
        if lent.how == "storage":
            tensor.data = carried
        else:
            tensor.data.copy_(carried)
        lent.carried = None


def _return(lent: _Lent) -> None:
    tensor = lent.pair.live
    if lent.how == "storage":
        tensor.data = lent.live
    elif lent.how == "contents":
        tensor.data.copy_(lent.live)
    elif lent.exchanged:
        _exchange(lent)
        lent.exchanged = False
    for table, leaf in lent.pair.candidate.slots:
        if leaf in table and table[leaf] is not tensor:
            table[leaf] = tensor  # an evaluation that assigns to a buffer hangs another tensor there


def _replaced(candidate: Candidate) -> bool:
    return any(table.get(leaf) is not candidate.tensor for table, leaf in candidate.slots)


def _copy_like(average: Tensor, tensor: Tensor) -> Tensor:
    return average.to(device=tensor.device, dtype=tensor.dtype, copy=True, non_blocking=average.is_pinned())


def lasting(state_dict: dict[str, Any], returning: Iterable[Tensor]) -> dict[str, Any]:
    """A ``state_dict`` taken during a loan that stays as it is after the recall.

    Entries that lie in the storage of ``returning`` are cloned; all others keep the storage they were lent, also where
    an entry is a Parameter itself, which the recall would turn live again.
    """
    storages = {local(tensor).untyped_storage().data_ptr() for tensor in returning}

    def kept(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        inside = local(value).untyped_storage().data_ptr() in storages
        return value.detach().clone() if inside else value.detach()

    return {key: kept(value) for key, value in state_dict.items()}


def missing(pairs: Iterable[tuple[str, Tensor, Tensor]], state_dict: dict[str, Any]) -> list[str]:
    """The names of the averages that a ``state_dict``, taken while the module carries them, does not hold exactly.

    Args:
        pairs: name, the module's tensor that carries the average, and the average.
        state_dict: under whichever keys a module gives it. Sharded tensors may have been gathered into it: they are
            looked for by name and shape.
    """
    held = {_place(value) for value in state_dict.values() if isinstance(value, Tensor)}
    named = {without_wrappers(key): value for key, value in state_dict.items()}

    def holds(name: str, tensor: Tensor, average: Tensor) -> bool:
        if average.dtype != tensor.dtype:
            return False
        if cut_of(tensor).sharded:
            value = named.get(name)
            return isinstance(value, Tensor) and (value.dtype, value.shape) == (average.dtype, average.shape)
        return _place(tensor) in held or _same(state_dict.get(name), average)

    return [name for name, tensor, average in pairs if not holds(name, tensor, average)]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return local(tensor).data_ptr(), tensor.dtype, tensor.shape


def _same(value: Any, average: Tensor) -> bool:
    alike = isinstance(value, Tensor) and value.dtype == average.dtype and value.device == average.device
    return alike and torch.equal(value, average)
