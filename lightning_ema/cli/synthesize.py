"""``python -m lightning_ema synthesize``: another average from snapshots, written to a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning_ema.interop.export import write_weights
from lightning_ema.posthoc.snapshots import is_named_as_one
from lightning_ema.posthoc.synthesis import Synthesis, synthesize
from lightning_ema.schedules.text import read_schedule, write_schedule


def add_to(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    command = commands.add_parser("synthesize", help="put another average together from snapshots")
    command.add_argument("snapshots", nargs="+", help="a directory with the snapshots of one run, or the files")
    command.add_argument("out", help="a .safetensors or .pt file")
    wanted = command.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--sigma-rel", type=float, help="width of the power-function average, for instance 0.075")
    wanted.add_argument("--profile", help='a schedule, for instance "HalfLife(steps=1000)"')
    command.add_argument("--at-step", type=int, help="the average at this step (default: at the last snapshot)")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> str:
    """Runs the command; gives what to print."""
    if is_named_as_one(Path(given.out)):  # as a shell writes out snapshots/*.pt
        raise ValueError(f"{given.out} has the name of a snapshot and is not written to. Give another file last.")
    made = synthesize(
        given.snapshots[0] if len(given.snapshots) == 1 else given.snapshots,
        sigma_rel=given.sigma_rel,
        profile=None if given.profile is None else read_schedule(given.profile),
        at_step=given.at_step,
    )
    schedule = write_schedule(made.schedule)
    metadata = {"average": schedule, "steps": str(made.step), "residual": f"{made.residual:.3g}"}
    path = write_weights(made.weights, given.out, metadata)
    return "\n".join([f"{path}: {schedule} at step {made.step}", *summary(made)])


def summary(made: Synthesis) -> list[str]:
    """What there is to say about how a synthesis was put together, line by line."""
    largest = sorted(made.coefficients, key=lambda coefficient: -abs(coefficient.value))[:6]
    steps = sorted({coefficient.step for coefficient in made.coefficients})
    return [
        f"residual of the profile: {made.residual:.2g}",
        f"{len(made.coefficients)} coefficients over {len(steps)} snapshots of the steps {steps[0]} to {steps[-1]}; "
        f"the sum of their absolute values is {made.amplification:.3g}",
        "the largest:",
        *(f"  {c.value:+.4f}  {c.decay} at step {c.step}" for c in largest),
    ]
