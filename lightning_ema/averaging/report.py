"""What there is to say about an average after a run: its facts, and pure functions from these to sentences.

Why each threshold is where it is, with the figures measured, is told in ``docs/explanation/report.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from lightning_ema.averaging.tracker import Tracker
from lightning_ema.schedules.base import PerUpdate, horizon
from lightning_ema.schedules.profiles import Ages, Timeline, ages

REACHED = 0.9
"""A horizon counts as reached from this share of the one aimed at.

The noise left in an average falls as the root of its horizon: a horizon a tenth shorter leaves 5% more of it, less than
what two seeds of one training differ by. Schedules that approach their limit without end would never reach it exactly.
"""

LARGE_START = 0.05
"""From this share on, the weights at the start are said to be still in the average.

Measured on digits against the same decay warmed up: at 0.05 the cross-entropy is 7 to 14% higher and the error the
same, at 0.37 the cross-entropy is twice as high or more.
"""

SMALL_DISTANCE = 0.005
"""Up to this distance, relative to the norm of the live weights, hardly any gain is expected.

Measured on digits, with and without label noise, with learning rates that fall by much or little: no nearer average's
error was better than that of the live weights by more than 0.12 points of 4.6 or more, nor its cross-entropy by more
than 1.2%.
"""

SMALLEST_MOVE = 1.0
"""Below this, in halves of the spacing of the dtype's numbers, an update is lost in rounding.

An element is rounded back to where it was when it is moved by less than half of the spacing there. Measured with 16-bit
averages on digits: below 1 the next update left 59% of the elements or more as they were.
"""


@dataclass(frozen=True)
class Facts:
    """What a report is made from.

    Attributes:
        schedule: as it is written.
        num_steps: steps of the run.
        num_updates: how often the average was updated.
        num_skipped: updates left out because of non-finite weights.
        started: whether the average has started.
        start_step: the step at which it started, or would have.
        every_n_steps: steps between updates.
        steps_per_decay: how many steps one reading of the decay covers: ``every_n_steps`` under ``PerUpdate``, else 1.
        decay: in force at the last step.
        limit: the decay that the schedule approaches; 1 where it aims at no horizon.
        ages: how old what is averaged is, before the last step; None where that is not known.
        distance: ``||live - average|| / ||live||``; NaN where they are not finite.
        precision: the relative spacing of the numbers in the average's dtype, the coarsest where there are several.
    """

    schedule: str
    num_steps: int
    num_updates: int
    num_skipped: int
    started: bool
    start_step: int
    every_n_steps: int
    steps_per_decay: int
    decay: float
    limit: float
    ages: Ages | None
    distance: float
    precision: float

    @property
    def horizon(self) -> float:
        """``1 / (1 - decay)`` at the last step, in steps."""
        return self.steps_per_decay * horizon(self.decay)

    @property
    def horizon_wanted(self) -> float:
        """The same at the schedule's limit; infinite where it aims at no horizon."""
        return self.steps_per_decay * horizon(self.limit)

    @property
    def move(self) -> float:
        """How far an update moves the average, in halves of the spacing of its dtype's numbers.

        ``share * distance / (precision / 2)`` with ``share = 1 / (1 + mean age / every_n_steps)``, which for a constant
        decay is the share ``1 - D`` that an update gives the newest state. The mean age stands for it because a decay
        that ends at 1 gives the last state none. NaN where the mean age is not known.
        """
        if self.ages is None:
            return math.nan
        return self.distance / (1 + self.ages.mean / self.every_n_steps) / (self.precision / 2)


def report(facts: Facts) -> str:
    """One paragraph about an average: what it is, and what that lets expect."""
    if facts.num_updates == 0:
        return f"{counts(facts)} {not_updated(facts)}"
    said = (counts(facts), reach(facts), not_reached(facts), start_left(facts), lost_in_rounding(facts) or gap(facts))
    return " ".join(sentence for sentence in said if sentence)


def counts(facts: Facts) -> str:
    """How many steps, updates and updates left out."""
    start = f" since step {facts.start_step:,}" if facts.started and facts.start_step > 0 else ""
    skipped = (
        f", {_many(facts.num_skipped, 'update')} left out because of weights that were not finite"
        if facts.num_skipped
        else ""
    )
    updates = f"{_many(facts.num_updates, 'update')}{start}"
    return f"{_many(facts.num_steps, 'step')}, {updates} with {facts.schedule}{skipped}."


def not_updated(facts: Facts) -> str:
    """Why there is no update, and what that means."""
    if not facts.started or facts.num_steps == facts.start_step:
        reason = "the average starts no earlier than the run ends: lower start_step or start_epoch"
    elif facts.num_skipped:
        reason = "the weights were never finite when one was due: lower the learning rate or clip the gradients"
    else:
        reason = f"every_n_steps={facts.every_n_steps} is longer than what was left of the run: lower it"
    return f"Without an update every evaluation and every file has the live weights; {reason}."


def reach(facts: Facts) -> str:
    """How far back the average reaches."""
    age = "" if facts.ages is None else f"; what is averaged is {_number(facts.ages.mean)} steps old on average"
    if math.isinf(facts.horizon):
        return f"The decay ends at 1: the average no longer moves{age}."
    return f"The decay ends at {facts.decay:.6g}, a horizon of {_number(facts.horizon)} steps{age}."


def not_reached(facts: Facts) -> str | None:
    """Where the schedule aims at a horizon that it rises to, and the run ended before."""
    if math.isinf(facts.horizon_wanted) or facts.horizon >= REACHED * facts.horizon_wanted:
        return None
    return (
        f"The horizon of {_number(facts.horizon_wanted)} steps that the schedule aims at was not reached: its warm-up "
        "is longer than the run, and a larger decay would change little or nothing."
    )


def start_left(facts: Facts) -> str | None:
    """Where the average remembers the weights at its start, and these weigh more than the newest ones.

    In an equal mean of a few states the start is one of them.
    """
    newest = 1 - facts.decay
    if facts.ages is None or facts.ages.start < LARGE_START or facts.ages.start <= 1.01 * newest:
        return None
    return (
        f"{facts.ages.start:.0%} of the average is still the weights at its start: the decay is too high for so short "
        "a run. Lower it, or warm it up (a plain number is)."
    )


def lost_in_rounding(facts: Facts) -> str | None:
    """Where updates are too small for the average's dtype, so that it does not move."""
    if not facts.move < SMALLEST_MOVE or facts.distance == 0:
        return None
    return (
        f"The average hardly moves: an update changes it by {facts.move:.1g} of what its dtype rounds away, at a "
        f"distance to the live weights of {facts.distance:.2g} of their norm. Keep it in a wider dtype, or lower "
        "the decay."
    )


def gap(facts: Facts) -> str:
    """How far the average lies from the live weights, and what that lets expect."""
    if not math.isfinite(facts.distance):
        return "The live weights or the average are not finite. on_nonfinite='skip' keeps such weights out of it."
    apart = f"Live weights and average lie {facts.distance:.2g} of the live weights' norm apart"
    if start_left(facts):
        return f"{apart}, which says little while the start weighs so much."
    if facts.distance <= SMALL_DISTANCE:
        return f"{apart}: so near that hardly any gain is to be expected."
    return f"{apart}: far enough for a gain, which only scoring both can tell (with EMACallback: evaluate='both')."


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _number(steps: float) -> str:
    return f"{steps:,.1f}" if steps < 10 else f"{steps:,.0f}"


def facts_of(tracker: Tracker, place: int) -> Facts:
    """The facts about one of the averages."""
    schedule = tracker.schedules[place]
    stored = (average for pair in tracker.pairs() for average in pair.averages)
    return Facts(
        schedule=repr(schedule),
        num_steps=tracker.num_steps,
        num_updates=tracker.num_updates,
        num_skipped=tracker.num_skipped,
        started=tracker.started,
        start_step=tracker.start_step,
        every_n_steps=tracker.settings.every_n_steps,
        steps_per_decay=tracker.settings.every_n_steps if isinstance(schedule, PerUpdate) else 1,
        decay=tracker.decay(place),
        limit=schedule.limit,
        ages=_ages(tracker, place),
        distance=tracker.distance(place),
        precision=max((torch.finfo(average.dtype).eps for average in stored), default=0.0),
    )


def _ages(tracker: Tracker, place: int) -> Ages | None:
    history, schedule = tracker.histories[place], tracker.schedules[place]
    since = tracker.last_update_step - tracker.start_step
    if tracker.num_updates == 0 or history.num_steps != since or schedule.corrects:
        return None
    one = history.follows(schedule)
    try:
        made_of = ages(Timeline(history.stretches), schedule if one else None)
    except ValueError:  # some updates were made under a schedule of another package, before this run
        return None
    return replace(made_of, mean=made_of.mean + tracker.num_steps - tracker.last_update_step)
