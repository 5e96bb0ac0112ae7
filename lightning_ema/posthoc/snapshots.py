"""Snapshots of averages during training, from which other averages can be synthesized afterwards."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ema.averaging.weight_average import WeightAverage
from lightning_ema.checkpoint import snapshot as snapshot_file
from lightning_ema.checks import check_count
from lightning_ema.distributed.partition import is_first
from lightning_ema.schedules.basic import Schedule
from lightning_ema.schedules.history import joined
from lightning_ema.schedules.text import write_schedule

_NAME = re.compile(r"snapshot-([0-9a-f]{8})-(\d+)\.pt")
_log = logging.getLogger("lightning_ema")


@dataclass(frozen=True)
class Snapshots:
    """How often to write snapshots of averages, where to, and how many to keep.

    Where there are more than ``keep``, those are removed that do not lie on a grid of 2, 4, 8, ... times
    ``every_n_steps``: what is left covers the run evenly from its start to its end, as a synthesis needs. The newest
    one always stays. In a long run at least half of ``keep`` are left.

    Example::

        snapshots = Snapshots("snapshots", every_n_steps=1000)

    Args:
        dirpath: the directory. ``EMACallback`` fills it in where it is None.
        every_n_steps: a snapshot at the first update at or after each multiple of so many steps, counted from the
            start of the averages.
        keep: the most files to keep of one run.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    dirpath: str | Path | None = None
    every_n_steps: int = field(kw_only=True)
    keep: int = field(default=32, kw_only=True)

    def __post_init__(self) -> None:
        if self.dirpath is not None and not isinstance(self.dirpath, (str, Path)):
            raise TypeError(f"Snapshots: dirpath is {self.dirpath!r}; it must be the path of a directory.")
        check_count(self.every_n_steps, "Snapshots: every_n_steps", at_least=1)
        check_count(self.keep, "Snapshots: keep", at_least=2)


def take(snapshots: Snapshots, averages: Sequence[WeightAverage]) -> Path | None:
    """Writes a snapshot where one is due; to be called after each ``average.step()``, in all processes.

    Args:
        snapshots: how often, where to, how many.
        averages: of one module, updated at the same steps.

    Returns:
        The file; None where none is due, and on all processes but the first.

    Raises:
        ValueError: as :func:`check`.
    """
    if not averages or not averages[0].history.run:
        check(snapshots, averages)
        _begin(averages)
    average = averages[0]
    if not average.started or average.last_update_step != average.num_steps:
        return None
    now, every = average.last_update_step - average.start_step, snapshots.every_n_steps
    if now == 0 or now // every == (now - average.history.last_gap) // every:
        return None
    return write(snapshots, averages)


def write(snapshots: Snapshots, averages: Sequence[WeightAverage]) -> Path | None:
    """Writes a snapshot now, as at the end of a run, and removes what the limit leaves out.

    Returns:
        The file; None on all processes but the first.

    Raises:
        ValueError: as :func:`check`, or the averages have not started.
    """
    directory = check(snapshots, averages)
    first = averages[0]
    if not first.started:
        raise ValueError(f"the averages start at step {first.start_step}; there is nothing to take a snapshot of yet.")
    if not first.history.run:
        _begin(averages)
    writes, together = is_first(), first.sharded or first.processes > 1
    content = _content(averages, keep=writes) if writes or together else {}
    if not writes:
        return None
    path = _path(directory, first.history.run, first.last_update_step)
    snapshot_file.save(content, path)
    first.history.snapshots = sorted({*first.history.snapshots, first.last_update_step})
    discard_future(snapshots, averages)
    start = first.start_step
    counted = [step - start for step in first.history.snapshots]
    kept = [start + step for step in thinned(counted, snapshots.every_n_steps, snapshots.keep)]
    for step in first.history.snapshots:
        if step not in kept:
            _path(directory, first.history.run, step).unlink(missing_ok=True)
    first.history.snapshots = kept
    return path


def _content(averages: Sequence[WeightAverage], keep: bool) -> dict[str, Any]:
    first = averages[0]
    names = {name for name, _ in first.named_live()}
    packed = [snapshot_file.Averaged(a.settings.describe(), a.history, a.named_tensors()) for a in averages]
    return snapshot_file.pack(first.module, names, first.last_update_step, first.start_step, packed, keep)


def discard_future(snapshots: Snapshots, averages: Sequence[WeightAverage]) -> list[Path]:
    """Removes the snapshots of this run that a resumed run has not written: they belong to a future it gave up.

    Each ``write`` does so; called once after resuming, it keeps them from being mixed up until then.

    Returns:
        The files removed; the log names their steps.
    """
    directory = check(snapshots, averages)
    history = averages[0].history
    if not history.run or not is_first():
        return []
    present = steps_in(directory, history.run)
    if averages[0].last_update_step in present:  # written after the checkpoint, at the end of the run resumed
        history.snapshots = sorted({*history.snapshots, averages[0].last_update_step})
    future = [step for step in present if step not in history.snapshots]
    history.snapshots = [step for step in history.snapshots if step in present]
    if future:
        _log.warning(
            "%s: the run was resumed at an earlier step, so the snapshots of the steps %s that it had reached before "
            "are removed.",
            directory,
            ", ".join(map(str, future)),
        )
    removed = [_path(directory, history.run, step) for step in future]
    for path in [*removed, *directory.glob(f"snapshot-{history.run}-*.tmp")]:  # the latter of a process that was killed
        path.unlink(missing_ok=True)
    return removed


def check(snapshots: Snapshots, averages: Sequence[WeightAverage]) -> Path:
    """Refuse averages from whose snapshots nothing could be synthesized.

    Returns:
        The directory for the snapshots.

    Raises:
        ValueError: there is no directory, there are no averages, they belong to different modules or were updated at
            different steps, a schedule is not of this package, or the steps of earlier updates are not known.
    """
    if snapshots.dirpath is None:
        raise ValueError("Snapshots: there is no dirpath. Outside of EMACallback write Snapshots('a/directory', ...).")
    if not averages:
        raise ValueError("there are no averages to take a snapshot of; give at least one WeightAverage.")
    for average in averages:
        check_schedule(average.schedule)
    if any(_counters(average) != _counters(averages[0]) for average in averages):
        raise ValueError(
            "the averages belong to different modules, or were not started and updated at the same steps. Give them "
            "the same every_n_steps, start_step, include and exclude, and step them together."
        )
    first = averages[0]
    if first.started and first.history.num_steps != first.last_update_step - first.start_step:
        raise ValueError(
            "the average was taken up from a file that does not say at which steps it was updated, so its weight "
            "profile is unknown. Call start() to let it begin again, or train without snapshots."
        )
    return Path(snapshots.dirpath)


def check_schedule(schedule: Schedule) -> None:
    """Refuse a schedule whose averages have no weight profile that a snapshot could state.

    Raises:
        ValueError: the schedule corrects its average by the live weights, or is not of this package.
    """
    if schedule.corrects:
        raise ValueError(
            f"{schedule!r} corrects its average by the live weights, which has no weight profile. Track "
            "Power(sigma_rel=0.05) and Power(sigma_rel=0.10) for a synthesis."
        )
    try:
        write_schedule(schedule)
    except ValueError as error:
        raise ValueError(
            f"{error} A snapshot must say the exact schedule of its averages: track "
            "Power(sigma_rel=0.05) and Power(sigma_rel=0.10), and give yours to synthesize(profile=...)."
        ) from error


def thinned(steps: Sequence[int], every: int, keep: int) -> list[int]:
    """Which of the steps to keep, counted from the start, in ascending order.

    The last one in each stretch of ``every`` steps, or of 2 ``every``, 4 ``every``, ...: of the shortest stretch of
    which there are no more than ``keep``.

    >>> thinned([100, 200, 300, 400, 500], every=100, keep=4)
    [200, 400, 500]
    """
    kept, stretch = list(steps), every
    while len(kept) > keep:
        kept = list({-(-step // stretch): step for step in steps}.values())
        stretch *= 2
    return kept


def is_named_as_one(path: Path) -> bool:
    """Whether a file has the name of a snapshot."""
    return _NAME.fullmatch(path.name) is not None


def files_in(directory: Path) -> dict[str, list[Path]]:
    """The snapshots in a directory, by run and in the order of their steps."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in directory.iterdir():
        if match := _NAME.fullmatch(path.name):
            found.setdefault(match[1], []).append((int(match[2]), path))
    return {run: [path for _, path in sorted(steps)] for run, steps in sorted(found.items())}


def steps_in(directory: Path, run: str) -> list[int]:
    """The steps of one run's snapshots in a directory."""
    paths = files_in(directory).get(run, []) if directory.is_dir() else []
    return [int(match[2]) for path in paths if (match := _NAME.fullmatch(path.name))]


def _path(directory: Path, run: str, step: int) -> Path:
    return directory / f"snapshot-{run}-{step:09d}.pt"


def _begin(averages: Sequence[WeightAverage]) -> None:
    """Names the run, without touching a random state that training uses."""
    run = secrets.token_hex(4)
    for average in averages:
        average.history.run = run


def _counters(average: WeightAverage) -> tuple[object, ...]:
    updates = joined(average.history.stretches)
    return average.module, average.started, average.start_step, average.last_update_step, updates
