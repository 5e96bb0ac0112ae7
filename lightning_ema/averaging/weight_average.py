"""The engine: one average of one module's weights. Knows torch, not Lightning."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ema.averaging.pair import Pair
from lightning_ema.averaging.report import Facts, report
from lightning_ema.averaging.settings import Buffers, DecayPer, OnNonfinite, Settings
from lightning_ema.averaging.state_dict import gather, take_up
from lightning_ema.averaging.swap import Loan, missing
from lightning_ema.averaging.tracker import Course
from lightning_ema.checkpoint.entry import AverageState, read, write
from lightning_ema.checks import check_flag
from lightning_ema.distributed.dtensor import Groups, is_sharded, local, sum_across
from lightning_ema.distributed.partition import Reconcile, processes
from lightning_ema.modules.named_tensors import Survey
from lightning_ema.ops.lerp import corrected, ratio, sampled_norms, squared_norms
from lightning_ema.ops.step_hooks import as_before_step
from lightning_ema.schedules.basic import Plan, Schedule
from lightning_ema.schedules.history import History
from lightning_ema.schedules.profiles import Ages, Timeline, ages


class WeightAverage:
    """One average of one module's weights, for any PyTorch loop.

    With ``n`` the steps since ``start_step`` and ``d`` the decay, an update after steps ``m + 1 .. n`` computes

        average = D * average + (1 - D) * live,    D = d(m + 1) * ... * d(n)

    Example::

        average = WeightAverage(model, decay=0.999)
        for batch in loader:
            ...
            optimizer.step()
            average.step()
        with average.lent():
            evaluate(model)

    Args:
        module: whose weights are averaged. It is not copied.
        decay: the share of the old average kept at each step: a number in [0, 1] or a
            :class:`~lightning_ema.Schedule`. A number ``d`` means ``Warmup(d)``; the bare constant is ``Constant(d)``.
            A list keeps one average for each, in one pass over the live weights; this is the first, and all are in
            ``averages``.
        every_n_steps: absorb the live weights at every n-th step, counted from ``start_step``.
        start_step: up to and including this step the average *is* the live weights, and nothing is stored.
        decay_per: ``"step"``: an update that covers several steps keeps the product of their decays, so that the
            horizon does not depend on ``every_n_steps``. ``"update"``: the schedule is read once, at the current
            step, as most other systems do.
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
        shard: keep in each process of a data-parallel run (DDP) only its share of the parameters' averages: memory and
            time of an update fall with their number. A loan, :meth:`named_tensors` and :meth:`state_dict` gather them
            again, so that all processes must call them. Without several processes it changes nothing.
        overlap: on CUDA, update the averages of parameters on a stream of its own, beside the next forward and backward
            pass. Between two steps of the optimizer nothing else may write to parameters then. On other devices it
            changes nothing.
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
        decay_per: DecayPer = "step",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        include_frozen: bool = False,
        into: nn.Module | None = None,
        buffers: Buffers = "average",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        shard: bool = False,
        overlap: bool = False,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> None:
        self.settings = Settings.checked(
            decay,
            every_n_steps,
            start_step,
            decay_per,
            include,
            exclude,
            include_frozen,
            buffers,
            dtype,
            device,
            overlap,
            on_nonfinite,
        )
        if not isinstance(module, nn.Module):
            raise TypeError(f"module is {module!r}; it must be a torch.nn.Module.")
        check_flag(shard, "shard")
        if into is not None:
            _check_target(into, module, self.settings, shard)
        self.module = module
        self.processes = processes() if shard else 1
        self._course = Course(module, self.settings, into, self.processes > 1)
        self._place = 0
        self._others = tuple(self._beside(place) for place in range(1, len(self.settings.decays)))

    def _beside(self, place: int) -> WeightAverage:
        other = copy.copy(self)
        other.settings = self.settings.of(place)
        other._place, other._others = place, ()
        return other

    @property
    def averages(self) -> list[WeightAverage]:
        """This average and those of the further decays, in their order. They share their counters and their loan."""
        return [self, *self._others]

    @property
    def num_steps(self) -> int:
        """Steps taken."""
        return self._course.num_steps

    @property
    def num_updates(self) -> int:
        """How often the average absorbed the live weights."""
        return self._course.num_updates

    @property
    def num_skipped(self) -> int:
        """Updates left out because of non-finite weights."""
        return self._course.num_skipped

    @property
    def last_update_step(self) -> int:
        """The step of the last update; that of the start before the first."""
        return self._course.last_update_step

    @property
    def waits(self) -> int:
        """How often training had to wait for an update in host memory (``device="cpu"`` beside an accelerator)."""
        return self._course.pairing.waits

    @property
    def history(self) -> History:
        """At which steps the average absorbed the live weights, and under which schedule."""
        return self._course.histories[self._place]

    @property
    def start_step(self) -> int:
        """The step at which the average starts or started."""
        return self._course.start_step

    # --- the update -------------------------------------------------------------------------------------------------

    def step(self, n: int = 1) -> bool:
        """Counts ``n`` steps of the optimizer and absorbs the live weights where an update is due.

        Returns:
            Whether it updated.

        Raises:
            RuntimeError: during a loan.
            FloatingPointError: the live weights are not finite and ``on_nonfinite="raise"``.
        """
        return self._course.step(n)

    def start(self) -> None:
        """Starts the average here: it becomes the live weights, and ``start_step`` this step."""
        self._course.start()

    def start_at(self, step: int) -> None:
        """Puts the start off to a later step, or starts here where that step is past."""
        self._course.start_at(step)

    @property
    def started(self) -> bool:
        """Whether the average is stored; before, it is the live weights."""
        return self._course.pairing.started

    @property
    def decay(self) -> float:
        """The decay per step in force: that of the last step since the start, of the first one before it."""
        return self.schedule(max(1, self.num_steps - self.start_step))

    @property
    def schedule(self) -> Schedule:
        """The decay as a function of the step, with what the run knows filled in."""
        return self._course.schedules[self._place]

    def bind(self, plan: Plan) -> None:
        """Fills in what only the run knows; the plan's steps count from ``start_step``."""
        self._course.bind(plan)

    def refresh(self) -> None:
        """Looks for tensors that were unfrozen, added, replaced or moved since the last update.

        Every update does this by itself; called before a step, it lets parameters join with the values that they have
        before that step. The next update then trusts that no submodule was exchanged in between. Before a step that no
        update follows (``every_n_steps``) it looks for unfrozen parameters alone: layers that were added join later.
        """
        if not self.delivered:
            self._course.refresh()

    def release(self) -> None:
        """Says that no update follows soon, as after a fit: then only the module keeps the live tensors' memory."""
        self._course.pairing.release()

    # --- the loan ---------------------------------------------------------------------------------------------------

    def lend(self, copy: bool = False) -> Loan:
        """Lets the module carry the average until ``recall()`` on the loan that is returned.

        Where dtype and device agree, tensors exchange storage and no data moves. Storage that something else owns as
        well (shared parameters, views of a flat buffer) has its contents exchanged instead.

        Args:
            copy: lend a copy, so that the evaluation may write to the parameters.

        Raises:
            RuntimeError: a loan is running already; loans do not nest. Or the module holds another average since
                :meth:`deliver`, as after a fit; :meth:`lent` puts that down meanwhile.
        """
        loan = self._next_loan(copy)
        loan.begin()
        return loan

    def _next_loan(self, copy: bool) -> Loan:
        self._course.refuse_during_loan("lend")
        if self._another_delivered():
            raise RuntimeError(
                "lend() of one average while the module holds another, as after fit. Write `with average.lent():`, or "
                "call take_back() first."
            )
        if not self.delivered:
            self._course.lender = self._place
        self._course.loan = self._loan_of(() if self.delivered else self._to_lend(), copy)
        return self._course.loan

    @contextmanager
    def lent(self, copy: bool = False) -> Iterator[nn.Module]:
        """A loan for the length of a ``with`` block; gives the module. The live weights come back on errors too.

        Where the module holds another average, as after a fit, it holds that one again afterwards.
        """
        with self._put_down("delivery") if self._another_delivered() else nullcontext():
            loan = self._next_loan(copy)
            try:
                loan.begin()
                yield self.module
            finally:
                loan.recall()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside this block the module carries its live weights, or is lent others.

        Afterwards it carries again what it was lent or what was delivered to it, without asking another process.
        """
        with (
            self._put_down("loan") if self.loan is not None else nullcontext(),
            self._put_down("delivery") if self.delivered else nullcontext(),
        ):
            yield

    @contextmanager
    def _put_down(self, what: Literal["loan", "delivery"]) -> Iterator[None]:
        course = self._course
        held, lender = getattr(course, what), course.lender
        with held.suspended():
            setattr(course, what, None)
            try:
                yield
            finally:
                setattr(course, what, held)
                course.lender = lender

    def _another_delivered(self) -> bool:
        return self.delivered and self._course.lender != self._place

    @property
    def loan(self) -> Loan | None:
        """The loan that is running, of this average or of one beside it."""
        return self._course.running

    @property
    def lends(self) -> int:
        """The place, among ``averages``, of the one that was lent or delivered last."""
        return self._course.lender

    def apply(self) -> None:
        """Writes the average into the module for good. The average is kept; the live weights are lost."""
        self._course.refuse_during_loan("apply")
        as_before_step()  # updates of other averages still read the live weights
        with torch.no_grad():
            for pair, average in self._to_lend():
                pair.live.copy_(average)

    def deliver(self) -> None:
        """Writes the average into the module's own storage, and keeps the live weights aside for :meth:`take_back`.

        Contents change places, so that this needs no memory where average and module are of one dtype.
        """
        self._course.refuse_during_loan("deliver")
        self._course.lender = self._place
        self._course.delivery = self._loan_of(self._to_lend(), in_place=True)
        try:
            self._course.delivery.begin()
        except BaseException:
            self.take_back()
            raise

    def take_back(self) -> None:
        """Brings the live weights back after :meth:`deliver`; without one it does nothing."""
        if self._course.delivery is not None:
            self._course.delivery.end()
            self._course.delivery = None

    def put_aside(self) -> dict[str, Tensor]:
        """Ends a delivery because other weights are about to be loaded into the module.

        Returns:
            Copies of the live weights, by name, with all buffers; frozen parameters are left out.
        """
        self.take_back()
        tensors = Survey(self.module).tensors.items()
        return {
            name: tensor.detach().clone()
            for name, tensor in tensors
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
        }

    @property
    def delivered(self) -> bool:
        """Whether the module holds the average since :meth:`deliver`."""
        return self._course.delivery is not None

    def _loan_of(self, averages: Iterable[tuple[Pair, Tensor]], copy: bool = False, in_place: bool = False) -> Loan:
        return Loan(averages, copy, in_place, self._course.pairing.settle, None if self.alone else self.reconcile)

    def _to_lend(self) -> Iterator[tuple[Pair, Tensor]]:
        self._course.pairing.refresh_if_stale()
        corrects = self.schedule.corrects
        for pair in self._course.pairing.pairs():
            if pair.averages:
                as_kept = not corrects and pair.share is None
                yield pair, pair.averages[self._place] if as_kept else self._read(pair, pair.live.detach())

    def _read(self, pair: Pair, live: Tensor) -> Tensor:
        return self._whole(pair, self._part(pair, live))

    def _part(self, pair: Pair, live: Tensor) -> Tensor:
        """``average``, or ``average + bias(n) * (live - origin)`` where the schedule corrects."""
        average = pair.averages[self._place]
        if not self.schedule.corrects or pair.origin is None:
            return average
        with torch.no_grad():
            return corrected(average, pair.beside(live), pair.origin, self.bias)

    def _whole(self, pair: Pair, part: Tensor) -> Tensor:
        if pair.share is None:
            return part
        if self._course.alone:
            raise RuntimeError(
                "the average is shared among processes, so that all of them would have to give their part, but an "
                "exception ended the run in one. Resume from the last checkpoint."
            )
        with torch.no_grad():
            return pair.whole(part)

    @property
    def bias(self) -> float:
        """How much of the way from the start to the live weights is added to the average; 0 for most schedules."""
        return self.schedule.bias(max(1, self.last_update_step - self.start_step))

    # --- what there is ----------------------------------------------------------------------------------------------

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The average, by name: the tensors themselves, not copies. Before the start they are the live ones.

        A schedule that corrects the average gives fresh tensors, from the average and the live weights as they are. So
        does ``shard=True``, and all processes must take as many.
        """
        lent = self._lent_now()
        lives = dict(self.named_live())
        for pair in self._course.pairing.pairs():
            carried = None if lent is None else lent.average_of(pair)
            if carried is not None:
                yield pair.name, carried
            else:
                yield pair.name, self._read(pair, lives[pair.name]) if pair.averages else lives[pair.name]

    def _lent_now(self) -> Loan | None:
        return (self._course.delivery or self.loan) if self._course.lender == self._place else None

    def named_live(self) -> Iterator[tuple[str, Tensor]]:
        """The live tensors that are averaged, by name, also while the module carries the average."""
        loan = self._course.delivery or self.loan
        for pair in self._course.pairing.pairs():
            yield pair.name, pair.live.detach() if loan is None else loan.live_of(pair)

    @property
    def reconcile(self) -> Reconcile | None:
        """What a loan does about buffers that differ among processes, such as BatchNorm statistics.

        ``"first"``: all are lent those of the first process; ``"mean"``: their mean; None: each its own. What is stored
        stays each process's own. All processes must take part in a loan then, and in an update that looks for
        ``on_nonfinite``: where weights or statistics are not finite in one of them, all leave the update out.
        """
        return self._course.reconcile

    @reconcile.setter
    def reconcile(self, how: Reconcile | None) -> None:
        self._course.reconcile = how

    @property
    def alone(self) -> bool:
        """Whether no other process may be waited for, as after an exception in one of them."""
        return self._course.alone

    @alone.setter
    def alone(self, alone: bool) -> None:
        self._course.alone = alone

    @property
    def sharded(self) -> bool:
        """Whether tensors are sharded among processes (FSDP2, tensor parallelism); the average is then, too."""
        return any(is_sharded(pair.live) for pair in self._course.pairing.pairs())

    def not_held_by(self, state_dict: dict[str, Any]) -> list[str]:
        """The names of averages not among the entries of a ``state_dict`` taken while the module carries them.

        None for a schedule that corrects: what the module carries is not the average itself.
        """
        if self.schedule.corrects:
            return []
        averages = dict(self.named_tensors())
        return missing(((p.name, p.live, averages[p.name]) for p in self._course.pairing.pairs()), state_dict)

    def owns(self, optimizer: Any) -> bool:
        """Whether the optimizer trains a tensor that is averaged."""
        if self._trains_any(optimizer):
            return True
        self._course.pairing.refresh_if_stale()  # its tensors may have been replaced since the last update
        return self._trains_any(optimizer)

    def _trains_any(self, optimizer: Any) -> bool:
        owned = self._course.pairing.identities
        for group in optimizer.param_groups:  # plain loops: this runs at every step, and the first tensor decides
            for parameter in group["params"]:
                if id(parameter) in owned:
                    return True
        return False

    def distance(self, share: float = 1.0) -> float:
        """``||live - average|| / ||live||`` over all averaged tensors; NaN where they are not finite.

        Waits for an accelerator. Where weights are sharded, all processes must call it: each one sums over its shards.

        Args:
            share: of the elements of large tensors, in (0, 1]. Less than 1 looks at some of them, the same at each
                call, which is cheaper: ``1 / 128`` was off by 0.5% on a small network.

        Raises:
            ValueError: ``share`` is out of range.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share is {share!r}; it is the part of the elements to look at, in (0, 1].")
        parts: dict[Groups, tuple[list[Tensor], list[Tensor]]] = {}
        lives, lent = dict(self.named_live()), self._lent_now()
        squares = torch.zeros(2, dtype=torch.float64)
        device = torch.device("cpu")
        with torch.no_grad():
            for pair in self._course.pairing.pairs():
                live = lives[pair.name]
                carried = None if lent is None or pair.share is not None else lent.average_of(pair)
                average = carried if carried is not None else self._part(pair, live) if pair.averages else live
                of_average, of_live = parts.setdefault(pair.groups, ([], []))
                of_average.append(local(average))
                of_live.append(pair.part(live))
                device = pair.live.device
            for groups, lists in parts.items():
                norms = squared_norms(*lists) if share == 1 else sampled_norms(*lists, share)
                squares += sum_across(norms, groups, device)
        return ratio(squares) if squares.isfinite().all() else math.nan

    def report(self) -> str:
        """One paragraph for a person: steps and updates, how far back the average reaches, what gain to expect.

        It costs as much as :meth:`distance` and, where the decay depends on the step, a pass over the steps that weigh
        in the average. What each sentence rests on is told in ``docs/explanation/report.md``. Where weights are
        sharded, or the average is, all processes must call it.

        Returns:
            Sentences in one line, without any markup.
        """
        return report(self._facts())

    def _facts(self) -> Facts:
        stored = (average for pair in self._course.pairing.pairs() for average in pair.averages)
        return Facts(
            schedule=repr(self.schedule),
            num_steps=self.num_steps,
            num_updates=self.num_updates,
            num_skipped=self.num_skipped,
            started=self.started,
            start_step=self.start_step,
            every_n_steps=self.settings.every_n_steps,
            decay_per=self.settings.decay_per,
            decay=self.decay,
            limit=self.schedule.limit,
            ages=self._ages(),
            distance=self.distance(),
            precision=max((torch.finfo(average.dtype).eps for average in stored), default=0.0),
        )

    def _ages(self) -> Ages | None:
        history, since = self.history, self.last_update_step - self.start_step
        if self.num_updates == 0 or history.num_steps != since or self.schedule.corrects:
            return None
        one = history.follows(self.schedule, self.settings.decay_per)
        try:
            made_of = ages(Timeline(history.stretches), self.schedule if one else None, self.settings.decay_per)
        except ValueError:  # some updates were made under a schedule of another package, before this run
            return None
        return replace(made_of, mean=made_of.mean + self.num_steps - self.last_update_step)

    def state_dict(self) -> dict[str, Any]:
        """Counters, settings and the averages by name: plain numbers, strings, lists and tensors.

        The tensors are the averages' own, not copies; they load under ``torch.load(weights_only=True)``. With
        ``shard=True`` they are gathered, all processes must call this, and only the first one is given them.

        Returns:
            The keys of :class:`lightning_ema.checkpoint.entry.AverageState`.
        """
        return write(gather(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a state written by :meth:`state_dict`. Nothing is changed where it does not fit.

        Tensors that the module has but that do not take part yet (layers still to be unfrozen) join.

        Raises:
            ValueError: another format, a damaged state, another number of decays, or tensors that are missing, unknown
                or of another shape or kind: all are listed.
            RuntimeError: during a loan, or this is a further one of several averages.
        """
        take_up(self, read(state, AverageState))


def _check_target(into: nn.Module, module: nn.Module, settings: Settings, shard: bool) -> None:
    if into is module or settings.dtype is not None or settings.device is not None or settings.overlap or shard:
        raise ValueError(
            "into takes another module, whose tensors keep their own dtype and device, are whole, and may be read at "
            "once: leave out dtype, device, overlap and shard."
        )
    if len(settings.decays) > 1 or settings.decay.corrects:
        raise ValueError(
            f"into takes one average, as it is; decay={settings.as_arguments()['decay']!r} would need more tensors "
            "than that module has. Leave into out, or write one decay."
        )
