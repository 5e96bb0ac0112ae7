"""The state of an average: gathered from it, and taken up by it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol

from torch import Tensor, nn

from lightning_ema.averaging.pair import Pair
from lightning_ema.averaging.settings import Settings
from lightning_ema.averaging.tracker import Course
from lightning_ema.checkpoint.entry import AverageState, misfits
from lightning_ema.distributed.partition import is_first
from lightning_ema.modules.named_tensors import Survey
from lightning_ema.schedules.basic import Schedule
from lightning_ema.schedules.history import History


class Average(Protocol):
    """What is asked of a :class:`~lightning_ema.WeightAverage` here."""

    module: nn.Module
    settings: Settings
    processes: int
    _course: Course
    _place: int

    @property
    def averages(self) -> Sequence[Average]: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def history(self) -> History: ...
    @property
    def bias(self) -> float: ...
    def named_tensors(self) -> Iterator[tuple[str, Tensor]]: ...
    def _whole(self, pair: Pair, part: Tensor) -> Tensor: ...


def gather(average: Average) -> AverageState:
    """The state of an average and of those beside it. The tensors are the averages' own, not copies.

    Where the average is shared among processes all must call this, and only the first one is given the tensors.
    """
    course = average._course
    if course.running is None and course.delivery is None:
        course.pairing.refresh_if_stale()
    pairs = list(course.pairing.pairs())
    started = course.pairing.started
    first, *further = [_tensors(each, pairs) if started else {} for each in average.averages]
    origins = [(pair, pair.origin) for pair in pairs if pair.origin is not None]
    return AverageState(
        num_steps=course.num_steps,
        num_updates=course.num_updates,
        num_skipped=course.num_skipped,
        last_update_step=course.last_update_step,
        start_step=course.start_step,
        started=started,
        config=average.settings.describe(),
        names=tuple(pair.name for pair in pairs) if started else (),
        average=first,
        further=tuple(further),
        origin=_kept_by_first(average, origins),
        histories=tuple(each.history for each in average.averages),
        biases=tuple(each.bias for each in average.averages),
    )


def _tensors(average: Average, pairs: list[Pair]) -> dict[str, Tensor]:
    if average.schedule.corrects or average.processes > 1:
        return _kept_by_first(average, ((pair, pair.averages[average._place]) for pair in pairs))
    return dict(average.named_tensors())


def _kept_by_first(average: Average, parts: Iterable[tuple[Pair, Tensor]]) -> dict[str, Tensor]:
    whole = ((pair.name, average._whole(pair, part)) for pair, part in parts)  # one at a time
    return dict(whole) if average.processes == 1 else {name: tensor for name, tensor in whole if is_first()}


_NOWHERE: Mapping[str, Tensor] = MappingProxyType({})


def take_up(average: Average, state: AverageState, held: Mapping[str, Tensor] = _NOWHERE) -> None:
    """Makes an average go on from a state. Nothing is changed where it does not fit.

    Tensors that the module has but that do not take part yet (layers still to be unfrozen) join.

    Args:
        average: the first of those of several decays.
        state: what :func:`gather` or :func:`lightning_ema.checkpoint.entry.read` gave.
        held: tensors in which averages lie that the state does not hold.

    Raises:
        ValueError: another number of decays, or tensors that are missing, unknown or of another shape or kind: all are
            listed.
        RuntimeError: the module carries an average, or this is a further one of several averages.
    """
    course, settings, pairing = average._course, average.settings, average._course.pairing
    course.refuse_during_loan("load_state_dict")
    if average._place > 0:
        raise RuntimeError(
            "load_state_dict() of a further one of several averages, which share one state. Call it on the first "
            "of them, with a state that the first of them gave."
        )
    if not state.started:
        pairing.forget()
        course.resume(state)
        return
    _check_decays(settings, state)
    held = {name: held[name] for name in state.names if name in held}
    whole = replace(state, average={**held, **state.average})
    pairing.refresh_if_stale()
    averages = [pairing.wanted(tensors) for tensors in (whole.average, *state.further)]
    origin = pairing.wanted(state.origin)
    asked = replace(whole, average=averages[0], further=tuple(averages[1:]), origin=origin)
    problems = [f"{name}: not in the state" for name in state.names if name not in whole.average]
    problems += misfits(asked, Survey(average.module).tensors)
    problems += pairing.lacking(averages, origin, buffers_begin=state.config.get("buffers") != settings.buffers)
    if problems:
        raise ValueError(
            f"the state does not fit {type(average.module).__name__}:\n  " + "\n  ".join(dict.fromkeys(problems)) + "\n"
            "Build the module as it was when the state was written, or choose the same tensors by include and exclude."
        )
    pairing.load(averages, origin)
    course.resume(state)


def _check_decays(settings: Settings, state: AverageState) -> None:
    count = 1 + len(state.further)
    if count != len(settings.decays):
        raise ValueError(
            f"the state is of decay={state.config.get('decay')}, {count} in all; asked for is "
            f"decay={settings.describe()['decay']}, {len(settings.decays)} in all. Give as many as it holds."
        )
    correcting = [repr(schedule) for schedule in settings.decays if schedule.corrects]
    if correcting and not state.origin:
        raise ValueError(
            f"the state was written without {correcting[0]} and does not hold the weights at the start, which that "
            f"needs. Go on with decay={state.config.get('decay')}, or begin a new run."
        )
