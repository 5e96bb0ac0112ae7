"""``python -m lightning_ema recommend``: which average of a finished run scores best, by a function of the user's."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

from torch import Tensor

from lightning_ema.cli.plot import empty_figure
from lightning_ema.posthoc.combination import combine, refusal, snapshots_of_one_run
from lightning_ema.posthoc.recommendation import Mode, Scored, age_of, best, candidates, conclusions, table
from lightning_ema.posthoc.snapshots import check_schedule
from lightning_ema.posthoc.synthesis import put_together
from lightning_ema.schedules.text import read_schedule

Score = Callable[[dict[str, Tensor]], float]


def add_to(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    command = commands.add_parser("recommend", help="score averages of a finished run and say which is best")
    command.add_argument("snapshots", nargs="+", help="a directory with the snapshots of one run, or the files")
    command.add_argument(
        "--score",
        required=True,
        metavar="MODULE:FUNCTION",
        help="takes a state_dict and gives a number",
    )
    command.add_argument("--mode", choices=get_args(Mode), default="min", help="which score is best (default: min)")
    command.add_argument(
        "--profiles",
        nargs="+",
        help='schedules, such as "HalfLife(steps=1000)" (default: those tracked and others)',
    )
    command.add_argument("--at-step", type=int, help="the averages at this step (default: at the last snapshot)")
    command.add_argument("--plot", help="a picture of the scores over the mean age")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> str:
    """Runs the command; gives what to print."""
    score = read_function(given.score)
    figure = None if given.plot is None else empty_figure(given.plot, (7, 4))
    snapshots = snapshots_of_one_run(given.snapshots[0] if len(given.snapshots) == 1 else given.snapshots)
    wanted = candidates(snapshots) if given.profiles is None else list(map(read_schedule, given.profiles))
    for schedule in wanted:
        check_schedule(schedule)
    combinations = [combine(snapshots, schedule, given.at_step) for schedule in dict.fromkeys(wanted)]
    refusals = [refusal(each) for each in combinations]
    possible = [each for each, refused in zip(combinations, refusals, strict=True) if refused is None]
    left_out = [repr(each.schedule) for each, refused in zip(combinations, refusals, strict=True) if refused]
    if not possible:
        raise ValueError(f"none of these averages can be put together. {refusals[0]}")
    scored = []
    for combination in possible:
        number = score_of(score, given.score, put_together(combination).weights)
        scored.append(Scored(combination.schedule, age_of(combination), combination.residual, number))
        print(f"{combination.schedule!r}: {number:.6g}", file=sys.stderr)  # scoring may take its time
    best_one = best(scored, given.mode)
    lines = table(scored, best_one)
    if left_out:
        lines += ["", f"cannot be put together from these snapshots: {', '.join(left_out)}"]
    lines += ["", *conclusions(scored, best_one, given.mode, snapshots[-1], possible[0].step)]
    if figure is not None:
        draw(figure, scored, best_one, given.score)
        figure.savefig(given.plot, dpi=100)
        lines.append(f"the curve: {given.plot}")
    return "\n".join(lines)


def read_function(text: str) -> Score:
    """The function that ``module:function`` names, which is imported.

    Raises:
        ValueError: the text is not of this form, or there is no such function.
        ModuleNotFoundError: there is no such module.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise ValueError(f"--score is {text!r}; write it as module:function, for instance evaluate:validation_loss.")
    function: Score | None = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise ValueError(f"--score {text!r}: {module} has no function {name}.")
    return function


def score_of(score: Score, name: str, weights: dict[str, Tensor]) -> float:
    """The number that the user's function gives; also from a tensor of one element.

    Raises:
        ValueError: it gives something else.
    """
    given = score(weights)
    try:
        return float(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"--score {name!r} gave {given!r}; it must give one number, such as a loss.") from error


def draw(figure: Any, scored: Sequence[Scored], best_one: Scored, label: str) -> None:
    """The score over the mean age."""
    shown = sorted(scored, key=lambda each: each.mean_age)
    axes = figure.subplots()
    axes.plot([each.mean_age for each in shown], [each.score for each in shown], marker=".", linewidth=1.4)
    axes.plot([best_one.mean_age], [best_one.score], marker="o", label=f"best: {best_one.schedule!r}")
    axes.set(xlabel="mean age of what is averaged, in steps", ylabel=label)
    if shown[0].mean_age > 0:
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
