"""``python -m lightning_ema plot-schedule``: schedules and the weight profiles they lead to, as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_ema.checks import check_count
from lightning_ema.files.writing import whole_or_not
from lightning_ema.schedules.base import Plan, Schedule
from lightning_ema.schedules.profiles import every, mean_age, profile
from lightning_ema.schedules.text import read_schedule

POINTS = 2000
"""The most points drawn of one curve."""


def add_to(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    command = commands.add_parser("plot-schedule", help="draw schedules and their weight profiles")
    command.add_argument("schedules", nargs="+", help='for instance "Warmup(0.999)" "Cosine(0.9, 1, total_steps=1000)"')
    command.add_argument("--steps", type=int, required=True, help="how many steps the run has")
    command.add_argument("--every", type=int, default=1, help="steps between updates (default: 1)")
    command.add_argument("--out", default="schedule.png", help="the picture (default: schedule.png)")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> str:
    """Runs the command; gives what to print."""
    run_of = Plan(total_steps=given.steps)
    schedules = {text: read_schedule(text).bind(run_of) for text in given.schedules}
    return str(plot_schedules(schedules, given.steps, given.out, given.every))


def plot_schedules(
    schedules: Mapping[str, Schedule],
    steps: int,
    path: str | Path,
    gap: int = 1,
    inches: tuple[float, float] = (9, 3.6),
) -> Path:
    """Draws the decay over the step, and how much each step weighs in the average after the last.

    Args:
        schedules: by the text that names each in the picture.
        steps: how many steps the run has.
        path: of the picture; the suffix says of which kind.
        gap: steps between updates.
        inches: width and height.

    Raises:
        ValueError: there is no update in so few steps, or matplotlib does not know the suffix.
        ModuleNotFoundError: matplotlib is not installed.
    """
    check_count(steps, "steps", at_least=1)
    check_count(gap, "every", at_least=1)
    if steps < gap:
        raise ValueError(f"steps={steps} and every={gap}: there is no update in so few steps; take more steps.")
    figure = empty_figure(path, inches)
    timeline = every(gap, steps)
    at = timeline.steps(0, timeline.num_updates)
    shown = torch.linspace(0, len(at) - 1, min(len(at), POINTS)).long()
    left, right = figure.subplots(1, 2)
    highest, shares = 0.0, []
    for text, schedule in schedules.items():
        weights = profile(schedule, timeline)
        start = f", {weights[0]:.0%} from before step 1" if weights[0] >= 0.005 else ""
        label = f"{text}: mean age {mean_age(weights, timeline):,.4g} steps{start}"
        drawn = [1 - schedule(step) for step in at[shown].tolist()]
        left.plot(at[shown], drawn, label=label, linewidth=1.4)
        shares += [share for share in drawn if share > 0]  # a logarithm shows no others
        right.plot(at[shown], weights[1:][shown] / gap, linewidth=1.4)
        highest = max(highest, float(weights[1:][shown].max()) / gap)
    left.set_ylim(min(shares, default=0.1) / 1.5, max(shares, default=0.1) * 1.5)
    left.set(xlabel="step", ylabel="1 - decay", yscale="log", title="share of the live weights")
    right.set(xlabel="step", ylabel="weight per step", title=f"weight profile after step {steps:,}")
    right.set_ylim(0, 1.05 * highest or 1)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", frameon=False)
    target = Path(path)
    with whole_or_not(target) as temporary:
        figure.savefig(temporary, dpi=100, format=target.suffix.removeprefix(".") or None)
    return target


def empty_figure(path: str | Path, inches: tuple[float, float]) -> Any:
    """A figure of matplotlib to be saved under ``path``, so that it is known before any work that it can be.

    Raises:
        ValueError: matplotlib does not know the suffix.
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("drawing needs matplotlib, which is not installed: pip install matplotlib") from error
    figure = Figure(figsize=inches, layout="constrained")
    suffix, known = Path(path).suffix.lstrip("."), figure.canvas.get_supported_filetypes()
    if suffix and suffix.lower() not in known:
        raise ValueError(
            f"{path}: pictures cannot be written as {suffix!r}; the suffixes known are {', '.join(known)}."
        )
    return figure
