"""The state of averages: gathered from them, and resumed by them."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lightning_ema.averaging.settings import Settings
from lightning_ema.averaging.tracker import Tracker
from lightning_ema.checkpoint.entry import AverageState, CallbackEntry, misfits
from lightning_ema.modules.named_tensors import Survey
from lightning_ema.schedules.history import History


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


@dataclass(frozen=True)
class Resumed:
    """What became of a state's averages.

    Attributes:
        places: for each average now, the place of the one in the state that it goes on from; None where it begins live.
        dropped: the decays of those in the state that nothing goes on from.
        began: tensors that the state lacks, and that begin with their live value.
        left: tensors of the state that the module has not.
    """

    places: tuple[int | None, ...] = ()
    dropped: tuple[str, ...] = ()
    began: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def said(self, decays: Sequence[str]) -> str | None:
        """What there is to say of it; None where everything goes on as it was."""
        anew = [decay for decay, place in zip(decays, self.places, strict=True) if place is None]
        parts = [
            f"{', '.join(anew)}: not in the file, begins with the live weights" if anew else "",
            f"{', '.join(self.dropped)}: in the file, dropped" if self.dropped else "",
            f"{_few(self.began)}: not in the file, begins with the live value" if self.began else "",
            f"{_few(self.left)}: in the file and not in the module, left out" if self.left else "",
        ]
        return "; ".join(part for part in parts if part) or None


def resume(
    tracker: Tracker,
    state: AverageState,
    held: Mapping[str, Tensor] = _NOWHERE,
    live: Mapping[str, Tensor] = _NOWHERE,
    strict: bool = True,
) -> Resumed:
    """Makes averages go on from a state. Nothing is changed where it does not fit.

    Tensors that the module has but that do not take part yet (layers still to be unfrozen) join. Decays are told by how
    they are written: one that the state has goes on, one that it lacks goes on from the one in its place, if no other
    does, and else begins with the live weights.

    Args:
        tracker: of the averages.
        state: what :func:`gather` or :func:`lightning_ema.checkpoint.entry.read` gave.
        held: tensors in which averages lie that the state does not hold.
        live: live weights where the module holds others at present.
        strict: refuse a state that lacks tensors of the module, or has others.

    Returns:
        What became of the state's averages.

    Raises:
        ValueError: tensors that are missing, unknown or of another shape or kind: all are listed.
        RuntimeError: the module carries an average.
    """
    tracker.holds.refuse_during_swap("load_state_dict()")
    settings, tensors = tracker.settings, tracker.tensors
    if not state.started:
        tensors.forget()
        tracker.resume(state)
        return Resumed(tuple(range(len(settings.decays))))
    places, dropped = _places(settings, state)
    _check_origin(settings, state)
    known = Survey(tracker.module).tensors
    left = () if strict else tuple(name for name in state.names if name not in known)
    if left:
        state = _without(state, frozenset(left))
    names = state.names
    held = {name: held[name] for name in names if name in held}
    whole = replace(state, average={**held, **state.average})
    tensors.refresh_if_stale()
    same_buffers = state.config.get("buffers") == settings.buffers
    if same_buffers:
        tensors.leave_live(names)
    averages = [tensors.wanted(each) for each in (whole.average, *state.further)]
    origin = tensors.wanted(state.origin)
    asked = replace(whole, average=averages[0], further=tuple(averages[1:]), origin=origin)
    problems = [f"{name}: not in the state" for name in names if name not in whole.average]
    problems += misfits(asked, known)
    lacking: list[str] = []
    if names or state.num_updates > 0:  # else nothing had been trained yet: what is trained now begins live
        lacking = tensors.lacking(averages, buffers_begin=not same_buffers)
    problems += [f"{name}: not in the state" for name in lacking] if strict else []
    if problems:
        raise ValueError(
            f"the state does not fit {type(tracker.module).__name__}:\n  " + "\n  ".join(dict.fromkeys(problems)) + "\n"
            "Give the module the tensors that it had when the state was written, let it migrate them where it loads "
            "files, choose the same ones by include and exclude, or write strict_loading = False in a LightningModule."
        )
    if lost := [name for name in tensors.lacking_origin(averages[0], origin) if name not in lacking]:
        raise ValueError(
            f"the state does not hold the values at the start of {', '.join(lost)}, which decay="
            f"{settings.describe()['decay']} needs. Go on with a decay that needs none, or begin a new run."
        )
    now = {**dict(tracker.named_live()), **live}
    begun = {name: now[name] for name in averages[0] if name in now}
    tensors.load([begun if place is None else averages[place] for place in places], origin)
    if lacking:
        tensors.begin_live(lacking, live)
    histories = tuple(History() if place is None else state.histories[place] for place in places)
    tracker.resume(replace(state, histories=histories))
    return Resumed(tuple(places), tuple(dropped), tuple(dict.fromkeys(lacking)), left)


def _without(state: AverageState, left: frozenset[str]) -> AverageState:
    """The state without tensors of these names, in any of its sets."""

    def kept(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if name not in left}

    live: dict[str, Any] = {"live": kept(state.live)} if isinstance(state, CallbackEntry) else {}
    return replace(
        state,
        names=tuple(name for name in state.names if name not in left),
        average=kept(state.average),
        further=tuple(map(kept, state.further)),
        origin=kept(state.origin),
        **live,
    )


def _places(settings: Settings, state: AverageState) -> tuple[list[int | None], list[str]]:
    """For each decay the place of the one in the state that it goes on from, and the decays that none goes on from."""
    count = 1 + len(state.further)
    then, now = decays_in(str(state.config.get("decay"))), decays_in(str(settings.describe()["decay"]))
    if len(then) != count:  # a file that does not say, or says it in a way of its own
        then = [""] * count
    matched = {text: place for place, text in reversed(list(enumerate(then))) if text in now}
    places: list[int | None] = [matched.get(text) for text in now]
    for place in range(min(count, len(places))):
        if places[place] is None and place not in places:
            places[place] = place
    return places, [text or f"place {place}" for place, text in enumerate(then) if place not in places]


def decays_in(text: str) -> list[str]:
    """The decays in a setting as it is written, one or a list of them.

    >>> decays_in("[Constant(0.9), Then(0.5, at=3, second=Constant(0.99))]")
    ['Constant(0.9)', 'Then(0.5, at=3, second=Constant(0.99))']
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a schedule of the user's own
        return [text]
    return [ast.unparse(each) for each in tree.elts] if isinstance(tree, ast.List) else [ast.unparse(tree)]


def _check_origin(settings: Settings, state: AverageState) -> None:
    correcting = [repr(schedule) for schedule in settings.decays if schedule.corrects]
    if correcting and not state.origin:
        raise ValueError(
            f"the state was written without {correcting[0]} and does not hold the weights at the start, which that "
            f"needs. Go on with decay={state.config.get('decay')}, or begin a new run."
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
