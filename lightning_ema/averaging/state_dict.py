"""The state of averages: gathered from them, and resumed by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor

from lightning_ema.averaging.settings import Settings
from lightning_ema.averaging.tracker import Tracker
from lightning_ema.checkpoint.entry import AverageState, misfits
from lightning_ema.modules.named_tensors import Survey


def gather(tracker: Tracker) -> AverageState:
    """The state of all averages of a tracker. The tensors are the averages' own, not copies.

    Where averages are partitioned all processes must call this, and only the first one is given the tensors.
    """
    if not tracker.weights.held:
        tracker.tensors.refresh_if_stale()
    places = range(len(tracker.schedules))
    first, *further = [dict(tracker.named_stored(place)) if tracker.started else {} for place in places]
    return AverageState(
        num_steps=tracker.num_steps,
        num_updates=tracker.num_updates,
        num_skipped=tracker.num_skipped,
        last_update_step=tracker.last_update_step,
        start_step=tracker.start_step,
        started=tracker.started,
        config=tracker.settings.describe(),
        names=tuple(pair.name for pair in tracker.pairs()) if tracker.started else (),
        average=first,
        further=tuple(further),
        origin=dict(tracker.named_origin()),
        histories=tuple(tracker.histories),
        biases=tuple(tracker.bias(place) for place in places),
    )


_NOWHERE: Mapping[str, Tensor] = MappingProxyType({})


def resume(tracker: Tracker, state: AverageState, held: Mapping[str, Tensor] = _NOWHERE) -> None:
    """Makes averages go on from a state. Nothing is changed where it does not fit.

    Tensors that the module has but that do not take part yet (layers still to be unfrozen) join.

    Args:
        tracker: of the averages.
        state: what :func:`gather` or :func:`lightning_ema.checkpoint.entry.read` gave.
        held: tensors in which averages lie that the state does not hold.

    Raises:
        ValueError: another number of decays, or tensors that are missing, unknown or of another shape or kind: all are
            listed.
        RuntimeError: the module carries an average.
    """
    tracker.holds.refuse_during_swap("load_state_dict()")
    settings, tensors = tracker.settings, tracker.tensors
    if not state.started:
        tensors.forget()
        tracker.resume(state)
        return
    _check_decays(settings, state)
    held = {name: held[name] for name in state.names if name in held}
    whole = replace(state, average={**held, **state.average})
    tensors.refresh_if_stale()
    same_buffers = state.config.get("buffers") == settings.buffers
    if same_buffers:
        tensors.leave_live(state.names)
    averages = [tensors.wanted(each) for each in (whole.average, *state.further)]
    origin = tensors.wanted(state.origin)
    asked = replace(whole, average=averages[0], further=tuple(averages[1:]), origin=origin)
    problems = [f"{name}: not in the state" for name in state.names if name not in whole.average]
    problems += misfits(asked, Survey(tracker.module).tensors)
    if state.names or state.num_updates > 0:  # else nothing had been trained yet: what is trained now begins live
        problems += tensors.lacking(averages, buffers_begin=not same_buffers)
    if problems:
        raise ValueError(
            f"the state does not fit {type(tracker.module).__name__}:\n  " + "\n  ".join(dict.fromkeys(problems)) + "\n"
            "Build the module as it was when the state was written, or choose the same tensors by include and exclude."
        )
    if lost := tensors.lacking_origin(averages[0], origin):
        raise ValueError(
            f"the state does not hold the values at the start of {', '.join(lost)}, which decay="
            f"{settings.describe()['decay']} needs. Go on with a decay that needs none, or begin a new run."
        )
    tensors.load(averages, origin)
    tracker.resume(state)


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
