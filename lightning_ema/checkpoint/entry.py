"""Everything that is stored of an average: the list of its keys, one function that writes them and one that reads them.

    checkpoint["state_dict"]                 the average and the live rest, under the model's usual keys
    checkpoint["callbacks"][<state key>]     an entry: the keys below, as plain numbers, strings, lists and tensors

A class for each writer; its fields are the keys, and each says what is accepted there and what it means. A key that is
added, renamed or dropped is added, renamed or dropped here. What is not plain to see from one key (sums, names, shapes)
stands in :func:`lightning_ema.checkpoint.checks.contradictions`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from torch import Tensor

from lightning_ema.checkpoint.checks import (
    AVERAGES,
    COUNT,
    DTYPE,
    FLAG,
    LARGEST,
    NAMES,
    PACE,
    SETTINGS,
    STEPS,
    TENSORS,
    TEXT,
    Kind,
    contradictions,
    dict_of,
    kind_of,
    list_of,
    number,
    or_none,
    record,
    record_problems,
    shown,
    whole,
)
from lightning_ema.checkpoint.checksum import sum_of, sum_of_plain
from lightning_ema.distributed.base import cut_of
from lightning_ema.schedules.history import History

FORMAT = 2
"""The format that is written, and the only one that is read so far."""


@dataclass(frozen=True)
class Key:
    """A key of an entry.

    Attributes:
        kind: what is accepted there.
        meaning: what stands there.
        since: the first format that has it.
        optional: whether an entry may be without it.
    """

    kind: Kind
    meaning: str
    since: int = 2
    optional: bool = False


def _key(kind: Kind, meaning: str) -> dict[str, Key]:
    return {"key": Key(kind, meaning)}


_STRETCH = record(
    {
        "decay": TEXT,
        "gaps": list_of(whole(1), "a list of whole numbers"),
        "counts": list_of(whole(1), "a list of whole numbers"),
    }
)
_HISTORY = record(
    {
        "run": TEXT,
        "snapshots": STEPS,
        "stretches": list_of(_STRETCH, "a list of stretches"),
        "unrecorded_steps": COUNT,  # of an average that was imported, or that was started again
        "unrecorded_updates": COUNT,
    }
)
_SUM = whole(-(2**63), 2**63 - 1, "a whole number of 64 bits")
_STATISTICS = record({"at": whole(-1), "statistics": TENSORS})
_STEP = whole(0, sys.maxsize, "a whole number from 0 on")  # an average that waits for an epoch starts at the largest


@dataclass(frozen=True, kw_only=True, eq=False)
class AverageState:
    """What ``WeightAverage.state_dict()`` holds, and every other entry, too."""

    num_steps: int = field(metadata=_key(COUNT, "steps of the optimizer"))
    num_updates: int = field(metadata=_key(COUNT, "how often the average was updated"))
    num_skipped: int = field(metadata=_key(COUNT, "updates left out because live weights were not finite"))
    last_update_step: int = field(metadata=_key(COUNT, "the step of the last update; before the first, of the start"))
    start_step: int = field(metadata=_key(_STEP, "the step at which the average starts or started"))
    started: bool = field(metadata=_key(FLAG, "whether there is an average apart from the live weights"))
    config: Mapping[str, str | int | float | bool] = field(metadata=_key(SETTINGS, "the settings, by argument"))
    names: tuple[str, ...] = field(metadata=_key(NAMES, "of what is averaged; none before the start"))
    average: Mapping[str, Tensor] = field(
        metadata=_key(AVERAGES, "the average; a name that is not in it lies in `state_dict`")
    )
    further: tuple[Mapping[str, Tensor], ...] = field(
        metadata=_key(list_of(AVERAGES, f"a list of which each is {AVERAGES.accepted}"), "those of further decays")
    )
    origin: Mapping[str, Tensor] = field(
        metadata=_key(AVERAGES, "the live parameters at the start, where a schedule corrects for them")
    )
    histories: tuple[History, ...] = field(
        metadata=_key(list_of(_HISTORY, "a list of histories"), "of each average: at which steps it was updated")
    )
    biases: tuple[float, ...] = field(
        metadata=_key(
            list_of(number(-LARGEST, LARGEST, "a finite number"), "a list of numbers"),
            "of each average: the share of `live - origin` that is added to it",
        )
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class RunEntry(AverageState):
    """The same with what resumes a run: the entry of a teacher, whose tensors all lie in ``state_dict``."""

    steps_before: int = field(default=0, metadata=_key(COUNT, "steps taken before the run's trainer began"))
    pace: tuple[int | None, int] = field(
        default=(None, 0), metadata=_key(PACE, "how steps stand to epochs, whose length a resume may change")
    )


@dataclass(frozen=True, eq=False)
class Recalibrated:
    """BatchNorm statistics estimated for one average.

    Attributes:
        at: after how many updates; -1 if never.
        statistics: by name; none for the first average, whose statistics lie in ``state_dict``.
    """

    at: int
    statistics: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class CallbackEntry(RunEntry):
    """The entry of an ``EMACallback``."""

    live: Mapping[str, Tensor] = field(metadata=_key(TENSORS, "live tensors that `state_dict` does not hold"))
    selected: int = field(default=0, metadata=_key(COUNT, "the place of the average that evaluations are given"))
    num_selections: int = field(default=0, metadata=_key(COUNT, "validations that ended with a selection"))
    decay: float | None = field(
        default=None, metadata=_key(number(0, 1, "a number from 0 to 1"), "the decay in force, of the first average")
    )
    recalibrated: tuple[Recalibrated, ...] | None = field(
        default=None,
        metadata=_key(list_of(_STATISTICS, "a list of statistics"), "of each average: its BatchNorm statistics"),
    )
    sharded: Mapping[str, Any] | None = field(
        default=None,
        metadata=_key(
            record(
                {
                    "slot": TEXT,
                    "save_id": whole(0, 2**62),
                    "processes": whole(1, 2**20, "a whole number of at least 1"),
                    "dtypes": dict_of(dict_of(DTYPE, "a dictionary of dtypes"), "a dictionary of dtypes by set"),
                }
            ),
            "which tensors lie beside the entry in a folder of shards",
        ),
    )


E = TypeVar("E", bound=AverageState)

_FRAME = {
    "format": Key(whole(FORMAT, FORMAT, str(FORMAT)), "the format of the entry", since=1),
    "stored": Key(
        dict_of(
            dict_of(
                record({"dtype": DTYPE, "sum": or_none(whole(-(2**63), 2**63))}), "a dictionary from names to sums"
            ),
            "a dictionary from sets of tensors to their names",
        ),
        "the tensors in each set of the entry: dtype, and a checksum of the bytes (None for shards in a folder)",
    ),
    "checksums": Key(
        dict_of(whole(0, 2**32 - 1, "a whole number of 32 bits"), "a dictionary from keys to sums"),
        "of what is no tensor under each of the other keys",
    ),
}


def keys_of(kind: type[AverageState]) -> dict[str, Key]:
    """All keys of an entry of a class, by name."""
    found: dict[str, Key] = {each.name: each.metadata["key"] for each in fields(kind)}
    optional = {each.name for each in fields(kind) if each.default is None}
    return _FRAME | {name: replace(key, optional=name in optional) for name, key in found.items()}


KEYS = keys_of(CallbackEntry)
"""Every key there is, by name."""

_AVERAGE, _FURTHER, _RECALIBRATED = "average", "further", "recalibrated"
_SETS = (_AVERAGE, "live", "origin")


def tensor_sets(entry: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Where an entry holds tensors by their names: the dictionaries themselves, as far as they are some."""
    sets = {key: entry.get(key) for key in _SETS}
    for key in (_FURTHER, _RECALIBRATED):
        for place, each in enumerate(entry.get(key) or ()):
            inside = isinstance(each, dict) and key == _RECALIBRATED
            sets[f"{key}[{place}]"] = each.get("statistics") if inside else each
    return {key: tensors for key, tensors in sets.items() if isinstance(tensors, dict)}


# --- writing --------------------------------------------------------------------------------------------------------


def write(entry: AverageState) -> dict[str, Any]:
    """The entry as it is stored: plain numbers, strings, lists and tensors. The tensors are not copied."""
    values = {each.name: getattr(entry, each.name) for each in fields(entry)}
    plain = {key: _plain(value) for key, value in values.items() if value is not None}
    plain["histories"] = [_with_sums(history, entry) for history in entry.histories]
    written = {"format": FORMAT, **plain}
    written["stored"] = {key: _listed(tensors) for key, tensors in tensor_sets(plain).items()}
    seal(written)
    return written


def seal(entry: dict[str, Any]) -> None:
    """Sums up anew what is no tensor under each key of an entry, after it was changed."""
    entry["checksums"] = {key: sum_of_plain(value) for key, value in entry.items() if key != "checksums"}


def list_tensors(entry: dict[str, Any], key: str) -> None:
    """Lists anew the tensors in one set of an entry, after they were changed."""
    entry["stored"][key] = _listed(tensor_sets(entry)[key])


def _listed(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "sum": None if cut_of(tensor).sharded else sum_of(tensor),
        }
        for name, tensor in tensors.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Recalibrated):
        return {"at": value.at, "statistics": dict(value.statistics)}
    if isinstance(value, Mapping):
        return dict(value)
    return [_plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def _with_sums(history: History, entry: AverageState) -> dict[str, Any]:
    """The history as it is stored, with what it lacks of the counters, so that a reader can add up."""
    steps = entry.last_update_step - entry.start_step - history.num_steps if entry.started else 0
    updates = entry.num_updates - history.num_updates
    return {**history.state_dict(), "unrecorded_steps": steps, "unrecorded_updates": updates}


def stored_average(average: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of an average an entry has to hold whose ``state_dict`` holds it in the dtypes of the model."""
    return {name: tensor for name, tensor in average.items() if tensor.dtype != model[name].dtype}


def lacking(entry: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Which of these averages an entry that was written does not hold."""
    return [name for name in names if name not in entry[_AVERAGE]]


def add_averages(entry: dict[str, Any], averages: Mapping[str, Tensor]) -> None:
    """Puts averages into an entry that was written: what a user's hook took out of ``state_dict``."""
    entry[_AVERAGE].update(averages)
    list_tensors(entry, _AVERAGE)
    seal(entry)


# --- reading --------------------------------------------------------------------------------------------------------


def read(stored: object, kind: type[E], state_dict: Mapping[str, Any] | None = None) -> E:
    """The entry, believed whole or not at all.

    Args:
        stored: what :func:`write` gave, from wherever it was kept.
        kind: which class of entry it is to be.
        state_dict: of the same file, in which tensors lie that are not in the entry. None where it is not at hand.

    Raises:
        ValueError: another format, or anything in it does not fit: one message names all that was found.
    """
    check_format(stored)
    if not isinstance(stored, Mapping):
        raise damaged([f"it is {shown(stored)}; accepted is a dictionary"])
    keys = keys_of(kind)
    may_lack = frozenset(name for name, key in keys.items() if key.optional)
    problems = list(record_problems("", stored, {name: key.kind for name, key in keys.items()}, may_lack))
    if not problems:  # then what the keys hold can be compared
        problems = list(contradictions(stored, tensor_sets(stored), state_dict))
    if problems:
        raise damaged(problems)
    values: dict[str, Any] = {each.name: stored[each.name] for each in fields(kind) if each.name in stored}
    values["histories"] = [History.from_state_dict(history) for history in stored["histories"]]
    if _RECALIBRATED in values:
        values[_RECALIBRATED] = [Recalibrated(**each) for each in values[_RECALIBRATED]]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return kind(**values)


def damaged(problems: Iterable[str]) -> ValueError:
    """The error that names all that was found."""
    return ValueError(
        "the state is damaged, or was not written by lightning_ema:\n  " + "\n  ".join(dict.fromkeys(problems)) + "\n"
        "Take another checkpoint; its weights can still be loaded without the callback."
    )


def check_format(stored: object) -> None:
    """Refuse an entry of another format. What is no format at all is named with all else that does not fit.

    Raises:
        ValueError: naming the format, and what to do.
    """
    found = stored.get("format") if isinstance(stored, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, int) or found < 1 or found == FORMAT:
        return
    if found < FORMAT:
        raise ValueError(
            f"the state has format {shown(found)}, which versions before the first release wrote; this version of "
            f"lightning_ema reads format {FORMAT}. Begin a new run; the weights in the file can still be loaded "
            "without the callback."
        )
    raise ValueError(
        f"the state has format {shown(found)}; this version of lightning_ema reads format {FORMAT}. Update "
        "lightning_ema to read files that a newer one wrote."
    )


def _named_sets(entry: AverageState) -> dict[str, Mapping[str, Tensor]]:
    sets = {key: getattr(entry, key) for key in _SETS if hasattr(entry, key)}
    sets |= {f"{_FURTHER}[{place}]": each for place, each in enumerate(entry.further)}
    recalibrated = (entry.recalibrated or ()) if isinstance(entry, CallbackEntry) else ()
    return sets | {f"{_RECALIBRATED}[{place}]": each.statistics for place, each in enumerate(recalibrated)}


def misfits(entry: AverageState, tensors: Mapping[str, Tensor]) -> list[str]:
    """What of an entry does not fit a module: a line for each name that it lacks, each shape and kind of numbers.

    Args:
        entry: what :func:`read` gave.
        tensors: all parameters and buffers of the module, by all of their names.
    """
    sets = [each.items() for each in _named_sets(entry).values()]
    named = [(name, tensor) for each in sets for name, tensor in each]
    lost = [name for name in [*entry.names, *(name for name, _ in named)] if name not in tensors]
    found = [f"{name}: not in the module" for name in lost]
    for name, tensor in named:
        if name in tensors and tensor.shape != tensors[name].shape:
            shape = tuple(tensors[name].shape)
            found.append(f"{name}: shape {tuple(tensor.shape)} in the state, {shape} in the module")
        elif name in tensors and kind_of(tensor) != kind_of(tensors[name]):
            found.append(f"{name}: {kind_of(tensor)} numbers in the state, {kind_of(tensors[name])} in the module")
    return list(dict.fromkeys(found))
