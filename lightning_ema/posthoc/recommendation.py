"""Which of the averages that snapshots allow scores best, and how to train with it: pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_ema.checkpoint.snapshot import Snapshot
from lightning_ema.checks import check_one_of
from lightning_ema.posthoc.combination import Combination
from lightning_ema.schedules.base import Schedule
from lightning_ema.schedules.growing import Power
from lightning_ema.schedules.history import shortened
from lightning_ema.schedules.profiles import Timeline, ages
from lightning_ema.schedules.text import read_schedule

Mode = Literal["min", "max"]

SIGMA_RELS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.09, 0.1, 0.12, 0.15, 0.2, 0.25)
"""The widths tried where none are given: each 1.1 to 1.5 times the one before.

The usual 0.05 to 0.15 lie in the middle, and closest. Below 0.01 an average is about as short as the distance of 32
snapshots; at 0.2887 it would be the plain mean, whose first steps no snapshots tell apart.
"""

RUN_OVER_HORIZON = 20
"""A plain number is offered in the place of a schedule where the run has at least so many of its horizons.

Its warm-up takes 9 horizons, and after 11 more the states from then weigh ``exp(-11)``.
"""


@dataclass(frozen=True)
class Scored:
    """An average that was put together and scored.

    Attributes:
        schedule: of the average.
        mean_age: how many steps old what is averaged is.
        residual: of the synthesis.
        score: what the user's function gave.
    """

    schedule: Schedule
    mean_age: float
    residual: float
    score: float


def candidates(snapshots: Sequence[Snapshot]) -> list[Schedule]:
    """The averages to try: those tracked, where one schedule made all of their updates, and widths all around."""
    tracked = [read_schedule(h[0].decay) for h in snapshots[-1].histories if len(h) == 1]
    widths = [Power(sigma_rel=sigma_rel) for sigma_rel in SIGMA_RELS]
    return list(dict.fromkeys([*tracked, *widths]))


def age_of(combination: Combination) -> float:
    """How many steps old what is averaged would be on average, before the last update that it covers."""
    newest = combination.snapshots[-1]
    history = newest.histories[0]
    updates = Timeline(history).updates_until(combination.step - newest.start_step)
    return ages(Timeline(shortened(history, updates)), combination.schedule).mean


def best(scored: Sequence[Scored], mode: Mode) -> Scored:
    """The one with the lowest or the highest score; of equal ones the shortest.

    Raises:
        ValueError: no score is a finite number.
    """
    check_one_of(mode, "mode", ("min", "max"))
    finite = [each for each in _by_age(scored) if math.isfinite(each.score)]
    if not finite:
        raise ValueError(
            "no score is a finite number, so none is the best. Let the function give a loss or an accuracy as a number."
        )
    return (min if mode == "min" else max)(finite, key=lambda each: each.score)


def table(scored: Sequence[Scored], best_one: Scored) -> list[str]:
    """The averages by their mean age, with the best one marked; columns of plain text."""
    head = ("average", "mean age", "residual", "score")
    rows = [
        (repr(each.schedule), f"{each.mean_age:,.1f}", f"{each.residual:.2g}", f"{each.score:.6g}")
        for each in _by_age(scored)
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    marks = ["", *("  <- best" if each is best_one else "" for each in _by_age(scored))]
    lines = [
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in (head, *rows)
    ]
    return [line + mark for line, mark in zip(lines, marks, strict=True)]


def conclusions(scored: Sequence[Scored], best_one: Scored, mode: Mode, newest: Snapshot, step: int) -> list[str]:
    """What the scores say, and what to write to train with the best average."""
    lowest_or_highest = {"min": "lowest", "max": "highest"}[mode]
    said = [
        f"best: {best_one.schedule!r}, the {lowest_or_highest} score of {best_one.score:.6g}",
        f"to train with it: EMACallback(decay={best_one.schedule!r}{_arguments(newest)})",
    ]
    steps, own_horizon = step - newest.start_step, best_one.mean_age + 1
    if steps >= RUN_OVER_HORIZON * own_horizon and best_one.mean_age > 0:
        decay = best_one.mean_age / own_horizon
        written = f"EMACallback(decay={decay:.4g}{_arguments(newest)})"
        said.append(f"or, with the same mean age at the end of {steps:,} steps: {written}")
    ages_tried = [each.mean_age for each in _by_age(scored)]
    if len(scored) > 1 and best_one.mean_age == ages_tried[0]:
        said.append("It is the shortest scored. A shorter one may be better still: it needs snapshots more often.")
    if len(scored) > 1 and best_one.mean_age == ages_tried[-1]:
        said.append("It is the longest scored. A longer one may be better still; the longest there is is Equal().")
    return said


def _arguments(newest: Snapshot) -> str:
    """What else the run was given that a second one needs for the same average."""
    config = newest.config
    written = f", start_step={newest.start_step}" if newest.start_step > 0 else ""
    if config.get("every_n_steps", 1) != 1:
        written += f", every_n_steps={config['every_n_steps']}"
    return written


def _by_age(scored: Sequence[Scored]) -> list[Scored]:
    return sorted(scored, key=lambda each: each.mean_age)
