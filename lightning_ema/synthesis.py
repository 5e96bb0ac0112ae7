"""Other averages from the snapshots of a few: post-hoc EMA (Karras et al. 2024, arXiv 2312.02696).

The synthesized weights are ``sum_k c(k) * snapshot(k)``, with coefficients ``c`` as :mod:`lightning_ema.coefficients`
solves for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ema.coefficients import profiles_and_target, solve
from lightning_ema.compositions import Power
from lightning_ema.history import joined, shortened
from lightning_ema.profiles import Timeline
from lightning_ema.schedules import Schedule
from lightning_ema.snapshot_file import Snapshot, load, read
from lightning_ema.snapshots import files_in

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


@dataclass(frozen=True)
class Coefficient:
    """How much one average of one snapshot contributes.

    Attributes:
        step: of the snapshot, counted as ``WeightAverage.num_steps``.
        decay: the schedule of the average, as text.
        value: the coefficient; all of them sum to 1.
    """

    step: int
    decay: str
    value: float


@dataclass(frozen=True)
class Synthesis:
    """An average put together from snapshots.

    Attributes:
        weights: under the keys of the module's ``state_dict``, in its dtypes.
        schedule: the average that was wanted.
        step: at which step, counted as ``WeightAverage.num_steps``.
        coefficients: of all averages of all snapshots.
        residual: ``|profile reached - profile wanted| / |profile wanted|``, from the schedules alone.
    """

    weights: dict[str, Tensor]
    schedule: Schedule
    step: int
    coefficients: tuple[Coefficient, ...]
    residual: float

    @property
    def amplification(self) -> float:
        """``sum |c|``: by how much rounding errors of the snapshots can grow; 1 where none is negative."""
        return sum(abs(coefficient.value) for coefficient in self.coefficients)


def synthesize(
    snapshots: str | Path | Sequence[str | Path],
    sigma_rel: float | None = None,
    profile: Schedule | None = None,
    at_step: int | None = None,
) -> Synthesis:
    """The average that a schedule would have given, from snapshots of other averages.

    Example::

        model.load_state_dict(synthesize("snapshots", sigma_rel=0.075).weights)

    Args:
        snapshots: a directory that holds those of one run, or files.
        sigma_rel: short for ``profile=Power(sigma_rel=...)``. Give exactly one of the two.
        profile: any schedule. It is read over the very updates that the averages made.
        at_step: the average after the last update until this step, counted as ``WeightAverage.num_steps``. None: at
            the last snapshot.

    Returns:
        The weights, with the residual that says how near they come to the average wanted.

    Raises:
        ValueError: there are no snapshots, they do not belong together (all differences are listed), an argument is
            out of range, the residual is above 0.1, so that the weights would be another average, or rounding errors
            of the snapshots would show.
        FileNotFoundError: there is no such directory or file.
    """
    if (sigma_rel is None) == (profile is None):
        raise ValueError(
            f"synthesize: got sigma_rel={sigma_rel!r} and profile={profile!r}; give exactly one of them, for instance "
            "sigma_rel=0.075 or profile=HalfLife(steps=1000)."
        )
    wanted = Power(sigma_rel=sigma_rel) if profile is None else profile
    if not isinstance(wanted, Schedule):
        raise TypeError(f"synthesize: profile is {wanted!r}; it must be a Schedule, for instance HalfLife(steps=1000).")
    found = _together([read(path) for path in _paths(snapshots)])
    newest = found[-1]
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
    ends = [lines[0].updates_until(snapshot.step - newest.start_step) for snapshot in found]
    end = lines[0].updates_until(step - newest.start_step)
    values, residual = solve(*profiles_and_target(lines, ends, wanted, newest.histories[0][-1].decay_per, end))
    if not residual <= LARGEST_RESIDUAL:
        raise ValueError(_hopeless(found, wanted, residual))
    amplification = float(values.abs().sum())
    if amplification * newest.precision > LARGEST_ROUNDING:
        raise ValueError(
            f"{wanted!r} needs coefficients from these snapshots whose absolute values sum to {amplification:.2g}, so "
            "that rounding errors of the snapshots would show in the weights. In the next run track averages that "
            "differ more, for instance Power(sigma_rel=0.05) and Power(sigma_rel=0.10)."
        )
    return Synthesis(
        weights=_combined(found, values),
        schedule=wanted,
        step=step,
        coefficients=tuple(
            Coefficient(snapshot.step, decay, value)
            for (snapshot, decay), value in zip(_columns(found), values.tolist(), strict=True)
        ),
        residual=residual,
    )


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


def _together(found: list[Snapshot]) -> list[Snapshot]:
    """The snapshots by their steps, each step once.

    Raises:
        ValueError: they are not of one run and one module; all differences are listed.
    """
    once = {(snapshot.run, snapshot.step): snapshot for snapshot in found}
    found = sorted(once.values(), key=lambda snapshot: snapshot.step)
    newest = found[-1]
    differences = [
        f"{snapshot.path.name}: {difference}" for snapshot in found for difference in _differences(snapshot, newest)
    ]
    if differences:
        raise ValueError(
            f"the snapshots do not belong together; measured against {newest.path.name}:\n  "
            + "\n  ".join(differences)
            + "\nGive the files of one run alone."
        )
    return found


def _differences(snapshot: Snapshot, newest: Snapshot) -> list[str]:
    if snapshot.run != newest.run:
        return [f"of the run {snapshot.run}, not {newest.run}"]
    found = []
    if snapshot.start_step != newest.start_step:
        found.append(f"averages that start at step {snapshot.start_step}, not {newest.start_step}")
    if len(snapshot.histories) != len(newest.histories):
        return [*found, f"{len(snapshot.histories)} averages, not {len(newest.histories)}"]
    for number, (history, whole) in enumerate(zip(snapshot.histories, newest.histories, strict=True), 1):
        begun = shortened(whole, sum(joined(history).counts))
        if list(history) != begun:
            decays, others = (", ".join(dict.fromkeys(s.decay for s in h)) for h in (history, begun))
            what = f"follows {decays}, not {others}" if decays != others else "was updated at other steps"
            found.append(f"average {number} {what}")
    found += [
        f"{name}: {snapshot.config.get(name)}, not {newest.config.get(name)}"
        for name in ("include", "exclude", "buffers")
        if snapshot.config.get(name) != newest.config.get(name)
    ]
    keys, others_keys = {e.key for e in snapshot.entries}, {e.key for e in newest.entries}
    found += [f"has no {key}" for key in sorted(others_keys - keys)]
    found += [f"has {key}" for key in sorted(keys - others_keys)]
    shapes = _shapes(snapshot)
    found += [
        f"{key} of shape {shapes[key]}, not {shape}"
        for key, shape in _shapes(newest).items()
        if key in shapes and shapes[key] != shape
    ]
    return found


def _shapes(snapshot: Snapshot) -> dict[str, tuple[int, ...]]:
    return {entry.key: snapshot.shapes[entry.name or entry.key] for entry in snapshot.entries}


def _columns(found: Sequence[Snapshot]) -> list[tuple[Snapshot, str]]:
    """The snapshot and the schedule behind each coefficient."""
    begun = [history[0].decay for history in found[-1].histories]
    return [(s, h[-1].decay if h else begun[j]) for s in found for j, h in enumerate(s.histories)]


def _hopeless(found: Sequence[Snapshot], wanted: Schedule, residual: float) -> str:
    decays = ", ".join(history[-1].decay for history in found[-1].histories)
    return (
        f"{wanted!r} cannot be put together from {len(found)} snapshots of {decays}: the residual, by which the best "
        f"profile differs from the one wanted, is {residual:.2g} of its norm; at most {LARGEST_RESIDUAL} is accepted. "
        "Ask for an average that is neither much narrower than those tracked nor reaches back to the start of the run; "
        "in the next run write snapshots more often and keep more of them."
    )


def _combined(found: Sequence[Snapshot], values: Tensor) -> dict[str, Tensor]:
    """Reads the files one after the other: memory for one model in float64 and one file."""
    newest = found[-1]
    coefficients = iter(values.tolist())
    names = {entry.name for entry in newest.entries if entry.name}
    sums: dict[str, Tensor] = {}
    for snapshot in found:
        content = load(snapshot.path)
        rest = {entry.name: entry.key for entry in newest.entries}
        for average in content["averages"]:
            coefficient = next(coefficients)
            for name in names:
                # a tensor that was still frozen then: an average of what does not change is that
                tensor = average["tensors"].get(name)
                _add(sums, name, content["rest"][rest[name]] if tensor is None else tensor, coefficient)
    kept: Mapping[str, Any] = load(newest.path)["rest"]
    return {
        entry.key: sums[entry.name].to(entry.dtype) if entry.name else kept[entry.key].clone()
        for entry in newest.entries
    }


def _add(sums: dict[str, Tensor], name: str, tensor: Tensor, coefficient: float) -> None:
    wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    if name in sums:
        sums[name].add_(wide, alpha=coefficient)
    else:
        sums[name] = wide * coefficient
