"""How an average is to be put together from snapshots: which files, which coefficients, and whether it is worth it.

Nothing here reads a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lightning_ema.checkpoint.snapshot import Snapshot, read
from lightning_ema.posthoc.snapshots import files_in
from lightning_ema.posthoc.solver import profiles_and_target, solve
from lightning_ema.schedules.base import Schedule
from lightning_ema.schedules.history import joined, shortened
from lightning_ema.schedules.profiles import Timeline

LARGEST_RESIDUAL = 0.1
"""A synthesis with a larger residual is refused.

Measured with 19 averages wanted, from 8 to 32 snapshots of sigma_rel 0.05 and 0.10 over 4,096 steps: where the
residual was at most 0.1, the weights missed the average by at most 0.07 of its distance to the live weights; where it
was 0.2 to 0.5, by up to 0.33. For comparison: the nearer of the two tracked averages missed sigma_rel 0.075 by 0.26.
"""

LARGEST_ROUNDING = 1e-3
"""A synthesis is refused in which rounding errors of the snapshots can grow to a larger share of the weights.

Averages that hardly differ need large coefficients of opposite signs: with sigma_rel 0.1 and 0.1001 their absolute
values sum to 1,000 to 80,000, where 0.05 and 0.10 need 1.5. The residual does not show that.
"""


@dataclass(frozen=True, eq=False)
class Combination:
    """How an average is to be put together from snapshots; known before any weight is read.

    Attributes:
        snapshots: the snapshots, by their steps.
        schedule: the average that is wanted.
        step: at which step, counted as ``WeightAverage.num_steps``.
        values: the coefficients, float64, those of a snapshot side by side.
        residual: ``|profile reached - profile wanted| / |profile wanted|``.
    """

    snapshots: tuple[Snapshot, ...]
    schedule: Schedule
    step: int
    values: Tensor
    residual: float

    @property
    def amplification(self) -> float:
        """``sum |c|``."""
        return float(self.values.abs().sum())


def combine(snapshots: Sequence[Snapshot], wanted: Schedule, at_step: int | None = None) -> Combination:
    """Solves for the coefficients, however large the residual.

    Args:
        snapshots: of one run, as :func:`snapshots_of_one_run` gives them.
        wanted: as ``profile`` of :func:`synthesize`.
        at_step: as of :func:`synthesize`.

    Raises:
        ValueError: there is no update yet, or none at ``at_step``.
    """
    newest = snapshots[-1]
    step = newest.step if at_step is None else at_step
    if newest.step == newest.start_step:
        raise ValueError(f"{newest.path} was written before the first update; there is nothing to synthesize yet.")
    first_update = newest.start_step + newest.histories[0][0].gaps[0]
    if not first_update <= step <= newest.step:
        raise ValueError(
            f"synthesize: at_step is {at_step!r}; the snapshots cover the updates from step {first_update} to step "
            f"{newest.step}. Give a step among these, or leave it out for the last one."
        )
    lines = [Timeline(history) for history in newest.histories]
    ends = [lines[0].updates_until(snapshot.step - newest.start_step) for snapshot in snapshots]
    end = lines[0].updates_until(step - newest.start_step)
    values, residual = solve(*profiles_and_target(lines, ends, wanted, end))
    return Combination(tuple(snapshots), wanted, step, values, residual)


def refusal(combination: Combination) -> str | None:
    """Why the weights would not be those of the average wanted; None where they would."""
    if not combination.residual <= LARGEST_RESIDUAL:
        return _hopeless(combination.snapshots, combination.schedule, combination.residual)
    if combination.amplification * combination.snapshots[-1].precision > LARGEST_ROUNDING:
        return (
            f"{combination.schedule!r} needs coefficients from these snapshots whose absolute values sum to "
            f"{combination.amplification:.2g}, so that rounding errors of the snapshots would show in the weights. In "
            "the next run track averages that differ more, for instance Power(sigma_rel=0.05) and "
            "Power(sigma_rel=0.10)."
        )
    return None


def snapshots_of_one_run(snapshots: str | Path | Sequence[str | Path]) -> list[Snapshot]:
    """What the snapshots in a directory, or in files, say of themselves, by their steps.

    Raises:
        ValueError: there are none, or they do not belong together; all differences are listed.
        FileNotFoundError: there is no such directory or file.
    """
    return _together([read(path) for path in _paths(snapshots)])


def _paths(snapshots: str | Path | Sequence[str | Path]) -> list[Path]:
    if not isinstance(snapshots, (str, Path)):
        paths = [Path(path) for path in snapshots]
        if not paths:
            raise ValueError("synthesize: there are no files; give a directory of snapshots, or a list of them.")
        return paths
    directory = Path(snapshots)
    if not directory.is_dir():
        return [directory]
    runs = files_in(directory)
    if not runs:
        raise ValueError(f"{directory} holds no snapshots. They are files named snapshot-<run>-<step>.pt.")
    if len(runs) > 1:
        listed = "; ".join(f"{run}: {len(paths)} files until {paths[-1].name}" for run, paths in runs.items())
        raise ValueError(
            f"{directory} holds the snapshots of {len(runs)} runs ({listed}). Give the files of one of them: "
            f"sorted(Path({str(directory)!r}).glob('snapshot-{next(iter(runs))}-*.pt'))."
        )
    return next(iter(runs.values()))


def _together(snapshots: list[Snapshot]) -> list[Snapshot]:
    """The snapshots by their steps, each step once.

    Raises:
        ValueError: they are not of one run and one module; all differences are listed.
    """
    once = {(snapshot.run, snapshot.step): snapshot for snapshot in snapshots}
    snapshots = sorted(once.values(), key=lambda snapshot: snapshot.step)
    newest = snapshots[-1]
    differences = [
        f"{snapshot.path.name}: {difference}" for snapshot in snapshots for difference in _differences(snapshot, newest)
    ]
    if differences:
        raise ValueError(
            f"the snapshots do not belong together; measured against {newest.path.name}:\n  "
            + "\n  ".join(differences)
            + "\nGive the files of one run alone."
        )
    return snapshots


def _differences(snapshot: Snapshot, newest: Snapshot) -> list[str]:
    if snapshot.run != newest.run:
        return [f"of the run {snapshot.run}, not {newest.run}"]
    differing = []
    if snapshot.start_step != newest.start_step:
        differing.append(f"averages that start at step {snapshot.start_step}, not {newest.start_step}")
    if len(snapshot.histories) != len(newest.histories):
        return [*differing, f"{len(snapshot.histories)} averages, not {len(newest.histories)}"]
    for number, (history, whole) in enumerate(zip(snapshot.histories, newest.histories, strict=True), 1):
        begun = shortened(whole, sum(joined(history).counts))
        if list(history) != begun:
            decays, others = (", ".join(dict.fromkeys(s.decay for s in h)) for h in (history, begun))
            what = f"follows {decays}, not {others}" if decays != others else "was updated at other steps"
            differing.append(f"average {number} {what}")
    differing += [
        f"{name}: {snapshot.config.get(name)}, not {newest.config.get(name)}"
        for name in ("include", "exclude", "buffers")
        if snapshot.config.get(name) != newest.config.get(name)
    ]
    keys, others_keys = {e.key for e in snapshot.entries}, {e.key for e in newest.entries}
    differing += [f"has no {key}" for key in sorted(others_keys - keys)]
    differing += [f"has {key}" for key in sorted(keys - others_keys)]
    shapes = _shapes(snapshot)
    differing += [
        f"{key} of shape {shapes[key]}, not {shape}"
        for key, shape in _shapes(newest).items()
        if key in shapes and shapes[key] != shape
    ]
    return differing


def _shapes(snapshot: Snapshot) -> dict[str, tuple[int, ...]]:
    return {entry.key: snapshot.shapes[entry.name or entry.key] for entry in snapshot.entries}


def _hopeless(snapshots: Sequence[Snapshot], wanted: Schedule, residual: float) -> str:
    decays = ", ".join(history[-1].decay for history in snapshots[-1].histories)
    return (
        f"{wanted!r} cannot be put together from {len(snapshots)} snapshots of {decays}: the residual, by which the "
        f"profile differs from the one wanted, is {residual:.2g} of its norm; at most {LARGEST_RESIDUAL} is accepted. "
        "Ask for an average that is neither much narrower than those tracked nor reaches back to the start of the run; "
        "in the next run write snapshots more often and keep more of them."
    )
