"""When an average was updated, and under which schedule: what its weight profile is computed from."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_ema.schedules.base import Schedule
from lightning_ema.schedules.text import write_schedule


@dataclass
class Stretch:
    """Updates under one schedule.

    Attributes:
        decay: the schedule as text; of a class that is not of this package, text that does not read as a schedule.
        gaps, counts: ``counts[i]`` updates, each ``gaps[i]`` steps after the one before it (the first: after the
            start). Neighbours in ``gaps`` differ. 16 bytes for each pair, also where the gaps never repeat.
    """

    decay: str
    gaps: array[int] = field(default_factory=lambda: array("q"))
    counts: array[int] = field(default_factory=lambda: array("q"))

    def add(self, gap: int, count: int = 1) -> None:
        """Adds ``count`` updates, each ``gap`` steps after the one before it."""
        if self.gaps and self.gaps[-1] == gap:
            self.counts[-1] += count
        else:
            self.gaps.append(gap)
            self.counts.append(count)


def joined(stretches: Sequence[Stretch]) -> Stretch:
    """All gaps and counts in one stretch, whatever the schedules: equal for averages updated at the same steps."""
    whole = Stretch("")
    for stretch in stretches:
        for gap, count in zip(stretch.gaps, stretch.counts, strict=True):
            whole.add(gap, count)
    return whole


def shortened(stretches: Sequence[Stretch], num_updates: int) -> list[Stretch]:
    """The stretches of the first ``num_updates`` updates."""
    cut: list[Stretch] = []
    for stretch in stretches:
        part = Stretch(stretch.decay)
        for gap, count in zip(stretch.gaps, stretch.counts, strict=True):
            if num_updates > 0:
                part.add(gap, min(count, num_updates))
            num_updates -= count
        if part.gaps:
            cut.append(part)
    return cut


class History:
    """The updates of one average since its start, run-length encoded: two numbers for a regular run of any length.

    Attributes:
        stretches: the updates in their order; more than one stretch where a resumed run changed the schedule.
        run: tells the snapshots of one run from those of others; empty until a snapshot is asked for.
        snapshots: the steps of the snapshots that were written and not removed by a limit.
    """

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []
        self.run = ""
        self.snapshots: list[int] = []
        self._schedule: Schedule | None = None

    def record(self, gap: int, schedule: Schedule) -> None:
        """Adds one update, ``gap`` steps after the one before it."""
        if schedule is not self._schedule:  # by identity: this runs at every update
            self._turn_to(schedule)
        self.stretches[-1].add(gap)

    def _turn_to(self, schedule: Schedule) -> None:
        self._schedule = schedule
        decay = _as_text(schedule)
        last = self.stretches[-1] if self.stretches else None
        if last is None or last.decay != decay:
            self.stretches.append(Stretch(decay))

    def follows(self, schedule: Schedule) -> bool:
        """Whether all updates were made under this schedule."""
        return all(stretch.decay == _as_text(schedule) for stretch in self.stretches)

    @property
    def num_steps(self) -> int:
        """The steps from the start to the last update."""
        return sum(gap * count for s in self.stretches for gap, count in zip(s.gaps, s.counts, strict=True))

    @property
    def num_updates(self) -> int:
        """The updates that were recorded."""
        return sum(sum(stretch.counts) for stretch in self.stretches)

    @property
    def last_gap(self) -> int:
        """The steps between the last two updates."""
        return self.stretches[-1].gaps[-1]

    def state_dict(self) -> dict[str, Any]:
        """Plain strings and numbers."""
        return {
            "run": self.run,
            "snapshots": list(self.snapshots),
            "stretches": [
                {"decay": s.decay, "gaps": s.gaps.tolist(), "counts": s.counts.tolist()} for s in self.stretches
            ],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> History:
        """The history in a state.

        Raises:
            ValueError: the state is damaged.
        """
        history = cls()
        try:
            history.run = str(state["run"])
            history.snapshots = [int(step) for step in state["snapshots"]]
            history.stretches = [_stretch(**stretch) for stretch in state["stretches"]]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the history of the updates is damaged: {error!r}. Take another file.") from error
        return history


def _as_text(schedule: Schedule) -> str:
    try:
        return write_schedule(schedule)
    except ValueError:
        return f"{type(schedule).__module__}.{schedule!r}"


def _stretch(decay: str, gaps: list[int], counts: list[int]) -> Stretch:
    if len(gaps) != len(counts) or min(gaps + counts, default=0) < 1:
        raise ValueError("gaps and counts are as many, and at least 1")
    return Stretch(decay, array("q", gaps), array("q", counts))
