"""The average of one module's weights, for any PyTorch loop. Knows torch, not Lightning."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ema.averaging.report import facts_of, report
from lightning_ema.averaging.settings import Buffers, OnNonfinite, Settings
from lightning_ema.averaging.state_dict import gather, resume
from lightning_ema.averaging.tracker import Tracker
from lightning_ema.checkpoint.entry import AverageState, read, write
from lightning_ema.checks import check_flag
from lightning_ema.ops.step_hooks import as_before_step
from lightning_ema.schedules.base import Schedule


class WeightAverage:
    """An average of one module's weights (EMA weights, shadow), for any PyTorch loop.

    With ``n`` the steps since ``start_step`` and ``d`` the decay, an update after steps ``m + 1 .. n`` computes

        average = D * average + (1 - D) * live,    D = d(m + 1) * ... * d(n)

    Example::

        average = WeightAverage(model, decay=0.999)
        for batch in loader:
            ...
            optimizer.step()
            average.step()
        with average.swapped():
            evaluate(model)

    Args:
        module: whose weights are averaged. It is not copied.
        decay: the share of the old average kept at each step: a number in [0, 1] or a
            :class:`~lightning_ema.Schedule`. A number ``d`` means ``Warmup(d)``; the bare constant is ``Constant(d)``.
            A list keeps one average for each, in one pass over the live weights; this is the first, and all are in
            ``averages``.
        every_n_steps: update at every n-th step, counted from ``start_step``. The product of the decays is kept, so
            that the horizon does not depend on it.
        start_step: up to and including this step the average *is* the live weights, and nothing is stored.
        include: glob patterns over qualified names; only what one of them matches is averaged. None: everything.
        exclude: glob patterns of what is left out, also of what ``include`` matches.
        include_frozen: also average parameters that do not require grad. Without it they join when unfrozen.
        into: write the average into this module's tensors of the same names, a teacher's for instance, instead of
            owning tensors.
        buffers: ``"average"`` averages the floating-point buffers of the ``state_dict`` (BatchNorm statistics);
            ``"copy"`` leaves the live ones in place. Integer buffers, and buffers that hold infinities (attention
            masks), are never averaged.
        dtype: of the average. None: float32 for types of fewer than 32 bits, else the tensor's own.
        device: of the average. None: beside each tensor. ``"cpu"`` saves device memory.
        shard: partition the parameters' averages among the processes of a data-parallel run (DDP): memory and time of
            an update fall with their number. A swap, :meth:`named_tensors` and :meth:`state_dict` gather them again,
            so that all processes must call them. Without several processes it changes nothing.
        on_nonfinite: ``"skip"`` leaves out an update from NaN or infinite weights, ``"raise"`` raises
            FloatingPointError, ``"ignore"`` does not look. Looking reads all weights once more at each update, and
            waits for an accelerator.

    Raises:
        ValueError, TypeError: an argument is out of range, a pattern matches nothing, or there is nothing to average.
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float | Schedule | Sequence[float | Schedule] = 0.999,
        *,
        every_n_steps: int = 1,
        start_step: int = 0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        include_frozen: bool = False,
        into: nn.Module | None = None,
        buffers: Buffers = "average",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        shard: bool = False,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> None:
        settings = Settings.checked(
            decay,
            every_n_steps,
            start_step,
            include,
            exclude,
            include_frozen,
            buffers,
            dtype,
            device,
            on_nonfinite,
        )
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"module is {module!r}; it must be a torch.nn.Module, not its parameters or its state_dict."
            )
        check_flag(shard, "shard")
        if into is not None:
            _check_target(into, module, settings, shard)
        self._tracker = Tracker(module, settings, into, shard)
        self._place = 0
        self._others = tuple(self._beside(place) for place in range(1, len(settings.decays)))

    def _beside(self, place: int) -> WeightAverage:
        other = copying.copy(self)
        other._place, other._others = place, ()
        return other

    def __repr__(self) -> str:
        tracker = self._tracker
        sizes = [pair.live.numel() for pair in tracker.tensors.pairs()]
        schedule = tracker.settings.decays[self._place]
        return (
            f"WeightAverage({schedule!r}, {len(sizes)} tensors, {_short(sum(sizes))} elements, {self.num_steps} steps, "
            f"{self.num_updates} updates)"
        )

    @property
    def averages(self) -> list[WeightAverage]:
        """This average and those of the further decays, in their order. They share counters and swap as one."""
        return [self, *self._others]

    # --- the update ---------------------------------------------------------------------------------------------------

    def step(self, n: int = 1) -> bool:
        """Counts ``n`` steps of the optimizer, and updates the average where that is due.

        Returns:
            Whether it updated.

        Raises:
            RuntimeError: the module carries an average.
            FloatingPointError: the live weights are not finite and ``on_nonfinite="raise"``.
        """
        return self._tracker.step(n)

    def start(self) -> None:
        """Starts the average here: it becomes the live weights, and ``start_step`` this step."""
        self._tracker.start()

    @property
    def decay(self) -> float:
        """The decay per step in force: that of the last step since the start, of the first one before it."""
        return self._tracker.caught_up().decay(self._place)

    @property
    def num_steps(self) -> int:
        """Steps taken."""
        return self._tracker.caught_up().num_steps

    @property
    def num_updates(self) -> int:
        """How often the average was updated."""
        return self._tracker.caught_up().num_updates

    # --- the swap -----------------------------------------------------------------------------------------------------

    @contextmanager
    def swapped(self, copy: bool = False) -> Iterator[nn.Module]:
        """The module carries the average for the length of a ``with`` block; afterwards what it carried before.

        What it carries already stays its owner's: an evaluation of a Trainer, or an outer block, goes on with it.

        Args:
            copy: carry a copy, so that the evaluation may write to the parameters.

        Yields:
            The module.

        Raises:
            RuntimeError: the module carries another average of the same tensors; or something wrote to a parameter
                inside the block. The live weights are back nevertheless.
        """
        with self._tracker.caught_up().holds.swapped(self._place, copy):
            yield self._tracker.module

    def swap_in(self, copy: bool = False) -> None:
        """Lets the module carry the average until :meth:`swap_out`. Nothing changes where it carries it already.

        Where dtype and device agree, tensors exchange storage and no data moves. Storage that something else owns as
        well (shared parameters, views of a flat buffer) has its contents exchanged instead.

        Args:
            copy: carry a copy, so that the evaluation may write to the parameters.

        Raises:
            RuntimeError: the module carries another average of the same tensors.
        """
        self._tracker.caught_up().holds.swap_in(self._place, copy)

    def swap_out(self) -> None:
        """Ends the swap: the module has its live weights again, bit for bit. Without a swap it does nothing.

        Raises:
            RuntimeError: something wrote to a parameter meanwhile, and so into the average. The live weights are back
                nevertheless.
        """
        self._tracker.holds.swap_out()

    def apply(self, keep: bool = False) -> None:
        """Writes the average into the module for good. The average is kept; the live weights are lost.

        Args:
            keep: keep the live weights aside until :meth:`restore`. Averages can be swapped in meanwhile; afterwards
                the module holds again what was applied.

        Raises:
            RuntimeError: the module carries an average.
        """
        if keep:
            self._tracker.caught_up().holds.apply(self._place)
        else:
            as_before_step()  # updates of other averages still read the live weights
            self._tracker.caught_up().holds.apply_for_good(self._place)

    def restore(self) -> None:
        """Brings the live weights back after ``apply(keep=True)``; without it it does nothing.

        Raises:
            RuntimeError: an average is swapped in meanwhile.
        """
        self._tracker.holds.restore()

    # --- what there is ------------------------------------------------------------------------------------------------

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The average, by name: the tensors themselves, not copies. Before the start they are the live ones.

        A schedule that corrects the average gives fresh tensors, from the average and the live weights as they are. So
        does ``shard=True``, and all processes must take as many.
        """
        return self._tracker.caught_up().named_tensors(self._place)

    def distance(self) -> float:
        """``||live - average|| / ||live||`` over all averaged tensors; NaN where they are not finite.

        Waits for an accelerator. Where weights are sharded, all processes must call it: each one sums over its shards.
        """
        return self._tracker.caught_up().distance(self._place)

    def report(self) -> str:
        """One paragraph for a person: steps and updates, how far back the average reaches, what gain to expect.

        It costs as much as :meth:`distance` and, where the decay depends on the step, a pass over the steps that weigh
        in the average. What each sentence rests on is told in ``docs/explanation/report.md``. Where weights are
        sharded, or the average is, all processes must call it.

        Returns:
            Sentences in one line, without any markup.
        """
        return report(facts_of(self._tracker.caught_up(), self._place))

    def state_dict(self) -> dict[str, Any]:
        """Counters, settings and all averages by name: plain numbers, strings and tensors.

        The tensors are the averages' own, not copies; they load under ``torch.load(weights_only=True)``. With
        ``shard=True`` they are gathered, all processes must call this, and only the first one is given them.

        Returns:
            What stands under each key is told in ``docs/how-to/checkpoints.md``.
        """
        return write(gather(self._tracker.caught_up()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a state written by :meth:`state_dict`. Nothing is changed where it does not fit.

        Tensors that the module has but that do not take part yet (layers still to be unfrozen) join.

        Raises:
            ValueError: another format, another number of decays, or tensors that are missing, unknown or of another
                shape: all are listed.
            RuntimeError: the module carries an average, or this is a further one of several averages.
        """
        if self._place > 0:
            raise RuntimeError(
                "load_state_dict() of a further one of several averages, which share one state. Call it on the first "
                "of them, with a state that the first of them gave."
            )
        resume(self._tracker, read(state, AverageState, state_dict={}))


def tracker_of(average: WeightAverage) -> Tracker:
    """The engine behind an average, for the callbacks; the further ones of several averages share it."""
    return average._tracker


def place_of(average: WeightAverage) -> int:
    """The place of an average among those of its tracker."""
    return average._place


def _short(number: int) -> str:
    """A count as people say it.

    >>> [_short(n) for n in (0, 999, 1000, 25_557_032)]
    ['0', '999', '1.0k', '25.6M']
    """
    for factor, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number / factor:.1f}{letter}"
    return str(number)


def _check_target(into: nn.Module, module: nn.Module, settings: Settings, shard: bool) -> None:
    if into is module or settings.dtype is not None or settings.device is not None or shard:
        raise ValueError(
            "into takes another module, whose tensors keep their own dtype and device, and are whole: leave out dtype, "
            "device and shard."
        )
    if len(settings.decays) > 1 or settings.decay.corrects:
        raise ValueError(
            f"into takes one average, as it is; decay={settings.as_arguments()['decay']!r} would need more tensors "
            "than that module has. Leave into out, or write one decay."
        )
