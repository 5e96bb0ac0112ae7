"""What there is to say about a decay and a run: pure functions from numbers to sentences."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ema.schedules.base import Schedule, horizon
from lightning_ema.schedules.basic import Warmup


def too_long(schedule: Schedule, total_steps: int) -> str | None:
    """A warning where the horizon that the schedule aims at is longer than the whole run."""
    if not total_steps < horizon(schedule.limit) < float("inf"):
        return None
    fitting = 1 - 1 / max(2.0, total_steps / 10)
    return (
        f"{schedule!r} aims at a horizon 1 / (1 - decay) = {horizon(schedule.limit):,.0f} steps, longer than the whole "
        f"run of {total_steps:,} steps. A tenth of the run would be decay={fitting:.4g}."
    )


def still_rising(schedule: Schedule, total_steps: int) -> str | None:
    """A remark where the schedule is still below its limit at the last step."""
    last = schedule(total_steps)
    if not last < schedule.limit < 1:
        return None
    return (
        f"{schedule!r} reaches a decay of {last:.4g} at the last of {total_steps:,} steps, a horizon of "
        f"{horizon(last):,.0f} steps: in this run every decay of {last:.4g} and above gives the same average."
    )


def introduction(schedules: Sequence[Schedule], sizes: Sequence[int]) -> str:
    """What the first fit says: how much is averaged, and how."""
    warm = any(isinstance(schedule, Warmup) for schedule in schedules)
    return (
        f"averaging {len(sizes)} tensors of {sum(sizes):,} elements with {', '.join(map(repr, schedules))}"
        f"{' (a plain number is warmed up; Constant(decay) is not)' if warm else ''}."
    )


def resumed(steps: int, updates: int) -> str:
    """Said where a run is resumed from a file with an average."""
    return f"goes on at step {steps:,}, {updates:,} updates."


def adopted(steps: int, updates: int) -> str:
    """Said where a run is resumed from a file of Lightning's ``WeightAveraging``."""
    if updates == 0:
        return (
            "the file of Lightning's WeightAveraging is from before its first update; the average starts from its live "
            "weights."
        )
    return f"goes on at step {steps:,}, {updates:,} updates, with the average of Lightning's WeightAveraging."


def no_step_seen(global_step: int) -> str:
    """A warning where the trainer counted steps and the average none."""
    return (
        f"the trainer took {global_step} steps, but no optimizer that trains averaged parameters was seen to step, so "
        "there is no average. Optimizers must derive from torch.optim.Optimizer (or step one that does) and step "
        "within training batches."
    )


def nothing_trained() -> str:
    """A warning where all that could have been averaged was frozen to the end of the fit."""
    return (
        "there is no average: every parameter that include and exclude leave was frozen during the whole fit. Unfreeze "
        "what is to be averaged, choose other patterns, or write include_frozen=True."
    )


def frozen_moved(names: Sequence[str]) -> str:
    """Said where frozen parameters were changed in training, by hand."""
    shown = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
    return (
        f"{shown}: frozen, but changed during the fit, as a momentum network is. They are live in evaluations and "
        "files; include_frozen=True averages them, too."
    )


def steps_missed(steps: int) -> str:
    """A remark where optimizers stepped outside training batches."""
    return (
        f"{steps} steps were taken outside training batches, as tuners do, and not counted. Steps of your own belong "
        "into training_step."
    )


def save_needs_all() -> str:
    """Said where a checkpoint is asked for after one process raised, while its weights are sharded among several."""
    return (
        "no checkpoint: the weights are sharded, so that all processes would have to take part, but an exception "
        "ended the run in this one. Resume from the last checkpoint. Leave save_on_exception out of ModelCheckpoint "
        "under ModelParallelStrategy."
    )


def not_returned() -> str:
    """A warning where a checkpoint is saved by a process to which no average returned."""
    return (
        "the averages stayed in the processes that the strategy spawned; only the module's weights returned. This "
        "checkpoint holds these, and no average to resume from. Save during fit, with ModelCheckpoint."
    )


def partitioned_among_others(processes: int, now: int) -> str:
    """Said where a partitioned average is asked for by other processes than those that keep its parts."""
    return (
        f"the average is partitioned among {processes} processes (shard=True), but this trainer has {now}. Fit and "
        "evaluate with as many, or resume from a checkpoint; after_fit='average' leaves the whole one in the module."
    )


def waited(times: int) -> str:
    """A remark where the average lies in host memory and its updates took longer than a step."""
    return (
        f"{times} times a step had to wait for the average's update in host memory. A larger every_n_steps makes that "
        "rarer."
    )


def nothing_selected(metric: str) -> str:
    """A warning where one of several averages was to be selected by a metric, and no validation ran that could."""
    return (
        f"Select({metric!r}) selected nothing: no validation was run after the first update, so that the first average "
        "is what was saved and applied. Give fit validation data, or validate more often (val_check_interval)."
    )


def monitors_another(monitor: str, mode: str, suffix: str, plain: str, selects: bool) -> str:
    """A warning where files are kept by the score of weights that their ``state_dict`` does not hold.

    Args:
        monitor, mode: what a checkpoint callback was given.
        suffix: the end of the monitored name that says which weights are scored.
        plain: the name without it, that of the weights in ``state_dict``.
        selects: whether one of several averages is selected by a metric.
    """
    if suffix == "_live":
        held, remedy = "the average", "or write evaluate='live' for files of the live weights"
    elif selects:
        held, remedy = "the average that is selected", "the score of that one"
    else:
        held = "the first average"
        remedy = f"and put that decay first or let evaluate=Select({plain!r}, mode={mode!r}) choose"
    return (
        f"a ModelCheckpoint monitors {monitor!r}, but state_dict of its files holds {held}, not what is scored under "
        f"that name. Monitor {plain!r}, {remedy}."
    )


def will_not_return() -> str:
    """A warning where a strategy runs the fit in processes whose memory is lost."""
    return (
        "only the module's weights return from the processes that this strategy spawns; resume from a checkpoint, or "
        "use strategy='ddp'."
    )


def selected_last(metric: str, winner: str, place: int, applied: bool) -> str:
    """Said after a fit in which one of several averages was selected by a metric in each validation."""
    holders = "files saved from here on and the module" if applied else "files saved from here on"
    return (
        f"selected last by {metric}: the decay {winner} (place {place}, counted from 0). Evaluations, {holders} have "
        "it; a checkpoint saved before has the one that was selected then."
    )
