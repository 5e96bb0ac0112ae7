"""The engine: one average of one module's weights. Knows torch, not Lightning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ema.history import History
from lightning_ema.kernels import all_finite, relative_distance
from lightning_ema.loan import Loan, missing
from lightning_ema.pairing import Pairing
from lightning_ema.schedules import Plan, Schedule
from lightning_ema.selection import Survey
from lightning_ema.settings import Buffers, DecayPer, OnNonfinite, Settings
from lightning_ema.state import FORMAT, check_state


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
        on_nonfinite: ``"skip"`` leaves out an update from NaN or infinite weights, ``"raise"`` raises
            FloatingPointError, ``"ignore"`` does not look. Looking reads all weights once more at each update, and
            waits for an accelerator.

    Attributes:
        num_steps: steps taken.
        num_updates: how often the average absorbed the live weights.
        num_skipped: updates left out because of non-finite weights.
        history: at which steps it absorbed the live weights, and under which schedule.

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
            on_nonfinite,
        )
        self.module = module
        self.num_steps = 0
        self.num_updates = 0
        self.num_skipped = 0
        self.last_update_step = 0
        self.history = History()
        self.start_step = start_step
        self._schedule = self.settings.decay
        self._loan: Loan | None = None
        self._delivery: Loan | None = None
        self._no_grad = torch.no_grad()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module is {module!r}; it must be a torch.nn.Module.")
        if into is not None and (into is module or dtype is not None or device is not None):
            raise ValueError(
                "into takes another module, whose tensors keep their own dtype and device: leave out dtype and device."
            )
        self._pairing = Pairing(module, self.settings, into)
        if start_step == 0:
            self.start()

    # --- the update -------------------------------------------------------------------------------------------------

    def step(self, n: int = 1) -> bool:
        """Counts ``n`` steps of the optimizer and absorbs the live weights where an update is due.

        Returns:
            Whether it updated.

        Raises:
            RuntimeError: during a loan.
            FloatingPointError: the live weights are not finite and ``on_nonfinite="raise"``.
        """
        if self._loan is not None or self._delivery is not None:
            self._refuse_during_loan("step")
            self._loan = None  # it has ended
        if not isinstance(n, int) or n < 0:
            raise ValueError(f"step({n!r}): the number of steps since the last call is a whole number, not negative.")
        before = self.num_steps - self.start_step
        self.num_steps += n
        if not self._pairing.started:
            if before + n >= 0:
                self.start()
            return False
        every = self.settings.every_n_steps
        if (before + n) // every == before // every:
            return False
        return self._update()

    def _update(self) -> bool:
        after, upto = self.last_update_step - self.start_step, self.num_steps - self.start_step
        if upto - after == 1 or self.settings.decay_per == "update":
            decay = self._schedule(upto)
        else:
            decay = self._schedule.product(after, upto)
        if not 0 <= decay <= 1:
            raise ValueError(f"{self._schedule!r} gave the decay {decay!r} at step {upto}; it must lie in [0, 1].")
        with self._no_grad:
            lives = self._pairing.lives()
            if self.settings.on_nonfinite != "ignore" and not all_finite(lives):
                if self.settings.on_nonfinite == "raise":
                    raise FloatingPointError(self._nonfinite_message())
                self.num_skipped += 1  # last_update_step stays: the next update covers these steps too
                return False
            self._pairing.absorb(lives, 1 - decay)
        self.num_updates += 1
        self.last_update_step = self.num_steps
        self.history.record(upto - after, self._schedule, self.settings.decay_per)
        return True

    def start(self) -> None:
        """Starts the average here: it becomes the live weights, and ``start_step`` this step."""
        self._refuse_during_loan("start")
        self.start_step = self.last_update_step = self.num_steps
        self.history = History()
        self._pairing.start()

    @property
    def started(self) -> bool:
        """Whether the average is stored; before, it is the live weights."""
        return self._pairing.started

    @property
    def decay(self) -> float:
        """The decay per step in force: that of the last step since the start, of the first one before it."""
        return self._schedule(max(1, self.num_steps - self.start_step))

    @property
    def schedule(self) -> Schedule:
        """The decay as a function of the step, with what the run knows filled in."""
        return self._schedule

    def bind(self, plan: Plan) -> None:
        """Fills in what only the run knows; the plan's steps count from ``start_step``."""
        self._schedule = self.settings.decay.bind(plan)

    def refresh(self) -> None:
        """Looks for tensors that were unfrozen, added, replaced or moved since the last update.

        Every update does this by itself; called before a step, it lets parameters join with the values that they have
        before that step. The next update then trusts that no submodule was exchanged in between.
        """
        if self._delivery is None:
            self._pairing.refresh_if_stale(trust_structure_once=True)

    # --- the loan ---------------------------------------------------------------------------------------------------

    def lend(self, copy: bool = False) -> Loan:
        """Lets the module carry the average until ``recall()`` on the loan that is returned.

        Where dtype and device agree, tensors exchange storage and no data moves. Storage that something else owns as
        well (shared parameters, views of a flat buffer) has its contents exchanged instead.

        Args:
            copy: lend a copy, so that the evaluation may write to the parameters.

        Raises:
            RuntimeError: a loan is running already; loans do not nest.
        """
        self._refuse_during_loan("lend")
        if not self.delivered:
            self._pairing.refresh_if_stale()
        pairs = () if self.delivered else self._pairing.pairs()
        self._loan = Loan(pairs, copy=copy, in_place=False)
        return self._loan

    @contextmanager
    def lent(self, copy: bool = False) -> Iterator[nn.Module]:
        """A loan for the length of a ``with`` block; gives the module. The live weights come back on errors too."""
        loan = self.lend(copy)
        try:
            yield self.module
        finally:
            loan.recall()

    @property
    def loan(self) -> Loan | None:
        """The loan that is running, if one is."""
        return self._loan if self._loan is not None and self._loan.active else None

    def apply(self) -> None:
        """Writes the average into the module for good. The average is kept; the live weights are lost."""
        self._refuse_during_loan("apply")
        with torch.no_grad():
            for pair in self._pairing.pairs():
                if pair.average is not None:
                    pair.live.copy_(pair.average)

    def deliver(self) -> None:
        """Writes the average into the module's own storage, and keeps the live weights aside for :meth:`take_back`.

        Contents change places, so that this needs no memory where average and module are of one dtype.
        """
        self._refuse_during_loan("deliver")
        self._pairing.refresh_if_stale()
        self._delivery = Loan(self._pairing.pairs(), copy=False, in_place=True)

    def take_back(self) -> None:
        """Brings the live weights back after :meth:`deliver`; without one it does nothing."""
        if self._delivery is not None:
            self._delivery.end()
            self._delivery = None

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
        return self._delivery is not None

    # --- what there is ----------------------------------------------------------------------------------------------

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The average, by name: the tensors themselves, not copies. Before the start they are the live ones."""
        loan = self._delivery or self.loan
        for pair in self._pairing.pairs():
            average = pair.average if loan is None else loan.average_of(pair)
            yield pair.name, pair.live.detach() if average is None else average

    def named_live(self) -> Iterator[tuple[str, Tensor]]:
        """The live tensors that are averaged, by name, also while the module carries the average."""
        loan = self._delivery or self.loan
        for pair in self._pairing.pairs():
            yield pair.name, pair.live.detach() if loan is None else loan.live_of(pair)

    def not_held_by(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """The averages that are not among the entries of a ``state_dict`` taken while the module carries them."""
        averages = dict(self.named_tensors())
        return missing(((p.name, p.live, averages[p.name]) for p in self._pairing.pairs()), state_dict)

    def owns(self, optimizer: Any) -> bool:
        """Whether the optimizer trains a tensor that is averaged."""
        owned = self._pairing.identities
        for group in optimizer.param_groups:  # plain loops: this runs at every step, and the first tensor decides
            for parameter in group["params"]:
                if id(parameter) in owned:
                    return True
        return False

    def distance(self) -> float:
        """``||live - average|| / ||live||`` over all averaged tensors. Waits for an accelerator."""
        averages, lives = dict(self.named_tensors()), dict(self.named_live())
        with torch.no_grad():
            return relative_distance(list(averages.values()), list(lives.values()))

    def state_dict(self) -> dict[str, Any]:
        """Counters, settings and the average by name: plain numbers, strings and tensors.

        The tensors are the average's own, not copies; they load under ``torch.load(weights_only=True)``.
        """
        if self.loan is None and self._delivery is None:
            self._pairing.refresh_if_stale()
        return {
            "format": FORMAT,
            "num_steps": self.num_steps,
            "num_updates": self.num_updates,
            "num_skipped": self.num_skipped,
            "last_update_step": self.last_update_step,
            "start_step": self.start_step,
            "started": self.started,
            "history": self.history.state_dict(),
            "config": self.settings.describe(),
            "average": dict(self.named_tensors()) if self.started else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a state written by :meth:`state_dict`. Nothing is changed where it does not fit.

        Tensors that the module has but that do not take part yet (layers still to be unfrozen) join.

        Raises:
            ValueError: a newer format, or tensors that are missing, unknown or of another shape: all are listed.
        """
        self._refuse_during_loan("load_state_dict")
        check_state(state)
        history = History.from_state_dict(state.get("history"))
        if state["started"]:
            self._pairing.load(state["average"], buffers_begin=state["config"].get("buffers") != self.settings.buffers)
        else:
            self._pairing.forget()
        self.num_steps = state["num_steps"]
        self.num_updates = state["num_updates"]
        self.num_skipped = state["num_skipped"]
        self.last_update_step = state["last_update_step"]
        self.history = history
        same_start = state["config"].get("start_step") == self.settings.start_step
        self.start_step = state["start_step"] if state["started"] or same_start else self.settings.start_step
        if not self.started and self.num_steps >= self.start_step:
            self.start()

    def _refuse_during_loan(self, what: str) -> None:
        if self._delivery is not None and what != "lend":
            raise RuntimeError(f"{what}() after deliver(): the module holds the average. Call take_back() first.")
        if self.loan is not None:
            raise RuntimeError(
                f"{what}() during a loan: the module already carries the average. Loans do not nest; call recall() on "
                "the one that is running first."
            )

    def _nonfinite_message(self) -> str:
        names = [name for name, live in self.named_live() if not live.isfinite().all()]
        return (
            f"step {self.num_steps}: the live weights are not finite: {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}. The average was left as it is. Lower the learning rate or clip the "
            "gradients; on_nonfinite='skip' goes on without these updates."
        )
