"""The state of averages as plain numbers, strings and tensors, and taking it up again."""

from __future__ import annotations

from typing import Any

from lightning_ema.averaging.tracker import Tracker
from lightning_ema.checkpoint.state import FORMAT, check_state
from lightning_ema.schedules.history import History


def state_of(tracker: Tracker) -> dict[str, Any]:
    """Counters, settings and the averages by name.

    The tensors are the averages' own, not copies. Where averages are partitioned they are gathered, all processes must
    call this, and only the first one is given them.
    """
    if not tracker.weights.held:
        tracker.tensors.refresh_if_stale()
    places = range(len(tracker.schedules))
    first, *others = [dict(tracker.named_stored(place)) if tracker.started else {} for place in places]
    return {
        "format": FORMAT,
        **tracker.counters(),
        "started": tracker.started,
        "config": tracker.settings.describe(),
        "average": first,
        "others": others,
        "histories": [history.state_dict() for history in tracker.histories],
        "biases": [tracker.bias(place) for place in places],
        "origin": dict(tracker.named_origin()),
    }


def resume_state(tracker: Tracker, state: dict[str, Any]) -> None:
    """Takes up a state made by :func:`state_of`. Nothing is changed where it does not fit.

    Raises:
        ValueError: a newer format, another number of decays, or tensors that are missing, unknown or of another
            shape: all are listed.
        RuntimeError: the module carries an average.
    """
    tracker.holds.refuse_during_swap("load_state_dict()")
    check_state(state)
    settings, count = tracker.settings, len(tracker.schedules)
    known = state.get("histories") if state["started"] else None
    histories = [History.from_state_dict(one) for one in known or [None] * count]
    averages = [state["average"], *state.get("others", ())]
    if state["started"] and len(averages) != count:
        raise ValueError(
            f"the state is of decay={state['config'].get('decay')}, {len(averages)} in all; asked for is "
            f"decay={settings.describe()['decay']}, {count} in all. Give as many as it holds."
        )
    correcting = [repr(schedule) for schedule in settings.decays if schedule.corrects]
    if state["started"] and correcting and not state.get("origin"):
        raise ValueError(
            f"the state was written without {correcting[0]} and does not hold the weights at the start, which that "
            f"needs. Go on with decay={state['config'].get('decay')}, or begin a new run."
        )
    if state["started"]:
        begin = state["config"].get("buffers") != settings.buffers
        tracker.tensors.load(averages, state.get("origin", {}), buffers_begin=begin)
    else:
        tracker.tensors.forget()
    tracker.resume(state, histories)
