"""Weight profiles: how much each state that an update saw weighs in an average. All in float64.

Notation: updates ``i = 1 .. U`` mix the live weights in after the steps ``s(1) < s(2) < ... < s(U)``, counted from the
start; ``D(i)`` is the decay of update ``i``. After the last update, state ``i`` weighs

    w(i) = (1 - D(i)) * D(i + 1) * ... * D(U),    w(0) = D(1) * ... * D(U)

where state 0 is the one at the start. The weights are those of the numbers that the average really computed with, and
sum to 1. Products are taken as products, not as sums of logarithms, so that a decay of 0 needs no special case.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ema.schedules.base import Schedule
from lightning_ema.schedules.history import Stretch
from lightning_ema.schedules.text import read_schedule

CHUNK = 1 << 16
"""Updates handled at once where memory is to be bounded."""

NEGLIGIBLE_AGE = 1e-6
"""In steps: states that cannot change a mean age by more are not read, so that a long run is not read to its start."""


class Timeline:
    """The updates of an average with their steps and decays, read chunk by chunk.

    Args:
        stretches: as recorded by :class:`~lightning_ema.schedules.history.History`.
    """

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        self._stretches = stretches
        self._ends = list(itertools.accumulate(sum(stretch.counts) for stretch in stretches))
        counts = [torch.tensor(stretch.counts, dtype=torch.int64) for stretch in stretches]
        gaps = [torch.tensor(stretch.gaps, dtype=torch.int64) for stretch in stretches]
        empty = torch.zeros(0, dtype=torch.int64)
        self._gaps = torch.cat([empty, *gaps])
        self._run_ends = torch.cat([empty, *counts]).cumsum(0)
        self._run_steps = (self._gaps * torch.cat([empty, *counts])).cumsum(0)

    @property
    def num_updates(self) -> int:
        """``U``."""
        return self._ends[-1] if self._ends else 0

    @property
    def num_steps(self) -> int:
        """``s(U)``."""
        return int(self._run_steps[-1]) if self.num_updates else 0

    def steps(self, after: int, upto: int) -> Tensor:
        """``s(after + 1) .. s(upto)``, whole numbers of shape [upto - after]."""
        return self._steps(torch.arange(after + 1, upto + 1))

    def updates_until(self, step: int) -> int:
        """The number of updates at or before a step, counted from the start."""
        low, high = 0, self.num_updates
        while low < high:
            middle = (low + high + 1) // 2
            if int(self.steps(middle - 1, middle)) <= step:
                low = middle
            else:
                high = middle - 1
        return low

    def decays(self, after: int, upto: int) -> Tensor:
        """``D(after + 1) .. D(upto)`` under the schedules that were in force, float64 of shape [upto - after]."""
        parts, begin = [torch.zeros(0, dtype=torch.float64)], 0
        for stretch, end in zip(self._stretches, self._ends, strict=True):
            first, last = max(after, begin), min(upto, end)
            if first < last:
                parts.append(self.decays_of(read_schedule(stretch.decay), first, last))
            begin = end
        return torch.cat(parts)

    def decays_of(self, schedule: Schedule, after: int, upto: int) -> Tensor:
        """The same as if ``schedule`` had been in force; computed as the update computes them."""
        steps = self.steps(after, upto)
        gaps = self._gaps[self._run_of(torch.arange(after + 1, upto + 1))]
        pairs = zip(steps.tolist(), gaps.tolist(), strict=True)
        values = [schedule(s) if gap == 1 else schedule.product(s - gap, s) for s, gap in pairs]
        return torch.tensor(values, dtype=torch.float64)

    def chunks(self, edges: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Stretches of updates ``(after, upto)``, the last first, that end at every edge and span at most ``CHUNK``."""
        for after, upto in reversed(list(itertools.pairwise(sorted({0, *edges})))):
            for end in range(upto, after, -CHUNK):
                yield max(after, end - CHUNK), end

    def _run_of(self, updates: Tensor) -> Tensor:
        return torch.searchsorted(self._run_ends, updates)

    def _steps(self, updates: Tensor) -> Tensor:
        run = self._run_of(updates)
        return self._run_steps[run] - (self._run_ends[run] - updates) * self._gaps[run]


def weights_of(decays: Tensor) -> tuple[Tensor, Tensor]:
    """``w(1) .. w(U)`` for decays ``D(1) .. D(U)``, and ``w(0)``, their product."""
    tails = torch.cat([decays.new_ones(1), decays.flip(0).cumprod(0)]).flip(0)  # tails[i] = D(i + 1) * ... * D(U)
    return (1 - decays) * tails[1:], tails[0]


def profile(schedule: Schedule, timeline: Timeline) -> Tensor:
    """``w(0) .. w(U)`` of an average under ``schedule``, float64 of shape [U + 1].

    >>> from lightning_ema import Equal
    >>> profile(Equal(), every(5, upto=20)).tolist()
    [0.0, 0.25, 0.25, 0.25, 0.25]
    """
    weights = torch.zeros(timeline.num_updates + 1, dtype=torch.float64)
    share = torch.ones((), dtype=torch.float64)  # of what was there before the chunk at hand
    for after, upto in timeline.chunks([timeline.num_updates]):
        inside, left = weights_of(timeline.decays_of(schedule, after, upto))
        weights[after + 1 : upto + 1] = share * inside
        share *= left
    weights[0] = share
    return weights


def mean_age(weights: Tensor, timeline: Timeline) -> float:
    """``sum_i w(i) * (s(U) - s(i))``: how old, in steps, the states are on average; state 0 is as old as the run."""
    steps = timeline.steps(0, timeline.num_updates)
    ages = timeline.num_steps - torch.cat([steps.new_zeros(1), steps])
    return float(weights @ ages.to(torch.float64))


@dataclass(frozen=True)
class Ages:
    """How an average is made up of old and new states.

    Attributes:
        mean: ``sum_i w(i) * (s(U) - s(i))``, in steps before the last update.
        start: ``w(0)``, the share of the state at the start; 0 where that is below ``NEGLIGIBLE_AGE / s(U)``.
    """

    mean: float
    start: float


def ages(timeline: Timeline, schedule: Schedule | None = None) -> Ages:
    """How old what is averaged is, without keeping the profile; read from the last update back as far as needed.

    Args:
        timeline: of one update or more.
        schedule: that of all updates; None: those recorded.

    Raises:
        ValueError: a schedule recorded is not of this package.
    """
    mean, share = 0.0, 1.0
    for after, upto in timeline.chunks([timeline.num_updates]):
        decays = timeline.decays(after, upto) if schedule is None else timeline.decays_of(schedule, after, upto)
        weights, left = weights_of(decays)
        before = timeline.num_steps - timeline.steps(after, upto)
        mean += share * float(weights @ before.to(torch.float64))
        share *= float(left)
        if share * timeline.num_steps < NEGLIGIBLE_AGE:
            return Ages(mean, 0.0)
    return Ages(mean + share * timeline.num_steps, share)


def every(gap: int, upto: int) -> Timeline:
    """The timeline of an update at every ``gap``-th step up to and including step ``upto``."""
    stretch = Stretch("")
    if upto >= gap:
        stretch.add(gap, upto // gap)
    return Timeline([stretch])
