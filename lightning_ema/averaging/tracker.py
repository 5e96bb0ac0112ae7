"""The course of a training as its averages see it: steps counted, updates made when due. Knows torch, not Lightning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_ema.averaging.pairing import Pairing
from lightning_ema.averaging.settings import Settings
from lightning_ema.averaging.swap import Loan
from lightning_ema.checkpoint.entry import AverageState
from lightning_ema.distributed.dtensor import all_across, local
from lightning_ema.distributed.partition import Reconcile, everyone
from lightning_ema.ops.lerp import all_finite
from lightning_ema.schedules.basic import Plan, Schedule
from lightning_ema.schedules.history import History


class Course:
    """What all averages of one module have in common: they start, step and are lent as one.

    With ``n`` the steps since ``start_step`` and ``d`` the decay, an update after steps ``m + 1 .. n`` computes

        average = D * average + (1 - D) * live,    D = d(m + 1) * ... * d(n)

    Attributes:
        num_steps: steps taken.
        num_updates: how often the averages absorbed the live weights.
        num_skipped: updates left out because of non-finite weights.
        last_update_step: the step of the last update; that of the start before the first.
        start_step: the step at which the averages start or started.
        schedules: one for each average, with what the run knows filled in.
        histories: for each average, at which steps it absorbed the live weights, and under which schedule.
        loan: the loan of one of the averages to the module, if there was one.
        delivery: the same for a delivery.
        lender: the place of the average that was lent or delivered last.
        reconcile: what becomes of buffers that differ among processes, in what is lent.
        alone: whether no other process may be waited for, as after an exception in one of them.
    """

    def __init__(self, module: nn.Module, settings: Settings, into: nn.Module | None, shard: bool) -> None:
        self.num_steps = self.num_updates = self.num_skipped = self.last_update_step = 0
        self.lender = 0
        self.start_step = settings.start_step
        self.schedules = list(settings.decays)
        self.histories = [History() for _ in settings.decays]
        self.loan: Loan | None = None
        self.delivery: Loan | None = None
        self.reconcile: Reconcile | None = None
        self.alone = False
        self.pairing = Pairing(module, settings, into, shard)
        self._settings = settings
        self._no_grad = torch.no_grad()
        if self.start_step == 0:
            self.start()

    def step(self, n: int) -> bool:
        """Counts ``n`` steps and updates where that is due; gives whether it did."""
        if self.loan is not None or self.delivery is not None:
            self.refuse_during_loan("step")
            self.loan = None  # it has ended
        if not isinstance(n, int) or n < 0:
            raise ValueError(f"step({n!r}): the number of steps since the last call is a whole number, not negative.")
        before = self.num_steps - self.start_step
        self.num_steps += n
        if not self.pairing.started:
            if before + n >= 0:
                self.start()
            return False
        return passed(self._settings.every_n_steps, before, before + n) and self._update()

    def refresh(self) -> None:
        """Looks for what changed before a step: for everything if an update follows it, else for what was unfrozen."""
        before = self.num_steps - self.start_step
        if self.pairing.started and passed(self._settings.every_n_steps, before, before + 1):
            self.pairing.see_through()
        else:
            self.pairing.admit()

    def _update(self) -> bool:
        after, upto = self.last_update_step - self.start_step, self.num_steps - self.start_step
        rates = [1 - self._decay(schedule, after, upto) for schedule in self.schedules]
        with self._no_grad:
            lives = self.pairing.lives()
            if self._settings.on_nonfinite != "ignore" and not self._finite(lives):
                if self._settings.on_nonfinite == "raise":
                    raise FloatingPointError(self._nonfinite_message())
                self.num_skipped += 1  # last_update_step stays: the next update covers these steps too
                return False
            self.pairing.absorb(lives, rates)
        self.num_updates += 1
        self.last_update_step = self.num_steps
        for place, history in enumerate(self.histories):
            history.record(upto - after, self.schedules[place], self._settings.decay_per)
        return True

    def _finite(self, lives: list[Tensor]) -> bool:
        finite = all_finite(lives)
        device = next(iter(self.pairing.pairs())).live.device
        together = self.pairing.groups or (everyone() if self.reconcile is not None else ())
        return finite if self.alone else all_across(finite, together, device)

    def _decay(self, schedule: Schedule, after: int, upto: int) -> float:
        if upto - after == 1 or self._settings.decay_per == "update":
            decay = schedule(upto)
        else:
            decay = schedule.product(after, upto)
        if not 0 <= decay <= 1:
            raise ValueError(f"{schedule!r} gave the decay {decay!r} at step {upto}; it must lie in [0, 1].")
        return decay

    def start(self) -> None:
        """Starts the averages here: they become the live weights, and ``start_step`` this step."""
        self.refuse_during_loan("start")
        self.start_step = self.last_update_step = self.num_steps
        self.histories = [History() for _ in self.schedules]
        self.pairing.start()

    def start_at(self, step: int) -> None:
        """Puts the start off to a later step, or starts here where that step is past."""
        self.start_step = step
        if self.num_steps >= step:
            self.start()

    def bind(self, plan: Plan) -> None:
        """Fills into the schedules what only the run knows; the plan's steps count from ``start_step``."""
        self.schedules = [schedule.bind(plan) for schedule in self._settings.decays]

    def resume(self, state: AverageState) -> None:
        """Takes counters over from a state, after the averages; the start too, unless it is yet to come and changed."""
        self.num_steps, self.num_updates, self.num_skipped = state.num_steps, state.num_updates, state.num_skipped
        self.last_update_step, self.start_step = state.last_update_step, state.start_step
        self.histories = list(state.histories)
        if not state.started:
            same_start = state.config.get("start_step") == self._settings.start_step
            self.start_at(self.start_step if same_start else self._settings.start_step)

    @property
    def running(self) -> Loan | None:
        """The loan that is running, if one is."""
        return self.loan if self.loan is not None and self.loan.active else None

    def refuse_during_loan(self, what: str) -> None:
        """Refuse to do what would go wrong while the module carries an average."""
        if self.delivery is not None and what != "lend":
            raise RuntimeError(f"{what}() after deliver(): the module holds the average. Call take_back() first.")
        if self.running is not None:
            raise RuntimeError(
                f"{what}() during a loan: the module already carries the average. Loans do not nest; call recall() on "
                "the one that is running first."
            )

    def _nonfinite_message(self) -> str:
        names = [pair.name for pair in self.pairing.pairs() if not local(pair.live).isfinite().all()]
        return (
            f"step {self.num_steps}: the live weights are not finite: {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}. The average was left as it is. Lower the learning rate or clip the "
            "gradients; on_nonfinite='skip' goes on without these updates."
        )


def passed(every: int, before: int, now: int) -> bool:
    """Whether a multiple of ``every`` lies in the steps ``before + 1 .. now``."""
    return before // every < now // every
