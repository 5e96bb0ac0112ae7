"""Other averages from the snapshots of a few: post-hoc EMA (Karras et al. 2024, arXiv 2312.02696).

The synthesized weights are ``sum_k c(k) * snapshot(k)``, with coefficients ``c`` as :mod:`lightning_ema.coefficients`
solves for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_ema.checkpoint.snapshot import Snapshot, tensors_of
from lightning_ema.posthoc.combination import Combination, combine, refusal, snapshots_of_one_run
from lightning_ema.schedules.base import Schedule
from lightning_ema.schedules.growing import Power


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
    if wanted.corrects:
        raise ValueError(
            f"synthesize: profile={wanted!r} corrects its average by the live weights, which snapshots do not hold. "
            "Ask for a schedule without a correction, for instance Power(sigma_rel=0.075)."
        )
    combination = combine(snapshots_of_one_run(snapshots), wanted, at_step)
    if refused := refusal(combination):
        raise ValueError(refused)
    return put_together(combination)


def put_together(combination: Combination) -> Synthesis:
    """Reads the snapshots and sums them up; refuses nothing."""
    columns = zip(_columns(combination.snapshots), combination.values.tolist(), strict=True)
    return Synthesis(
        weights=_combined(combination.snapshots, combination.values),
        schedule=combination.schedule,
        step=combination.step,
        coefficients=tuple(Coefficient(snapshot.step, decay, value) for (snapshot, decay), value in columns),
        residual=combination.residual,
    )


def _columns(snapshots: Sequence[Snapshot]) -> list[tuple[Snapshot, str]]:
    """The snapshot and the schedule behind each coefficient."""
    begun = [history[0].decay for history in snapshots[-1].histories]
    return [(s, h[-1].decay if h else begun[j]) for s in snapshots for j, h in enumerate(s.histories)]


def _combined(snapshots: Sequence[Snapshot], values: Tensor) -> dict[str, Tensor]:
    """Reads the files one after the other: memory for one model in float64 and one file."""
    newest = snapshots[-1]
    coefficients = iter(values.tolist())
    names = {entry.name for entry in newest.entries if entry.name}
    sums: dict[str, Tensor] = {}
    for snapshot in snapshots:
        averages, live = tensors_of(snapshot.path)
        rest = {entry.name: entry.key for entry in newest.entries}
        for average in averages:
            coefficient = next(coefficients)
            for name in names:
                # a tensor that was still frozen then: an average of what does not change is that
                tensor = average.get(name)
                _add(sums, name, live[rest[name]] if tensor is None else tensor, coefficient)
    kept = tensors_of(newest.path)[1]  # the averages in that file are let go
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
