"""What an entry is checked for: what may stand under each key, and what must be true of several keys together."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ema.checkpoint.checksum import sum_of, sum_of_plain
from lightning_ema.modules.named_tensors import without_wrappers

Sets = Mapping[str, Mapping[str, Tensor]]
"""Where an entry holds tensors by their names."""

# --- one value ------------------------------------------------------------------------------------------------------

LARGEST = 10**12
"""The largest count. No run comes near it."""


@dataclass(frozen=True)
class Kind:
    """What is accepted under a key.

    Attributes:
        accepted: in words, for messages and for the table of the keys.
        problems: from the name of a place and the value there, a line for each thing that does not fit.
    """

    accepted: str
    problems: Callable[[str, object], Iterable[str]]

    def missing(self, place: str) -> str:
        """The line for a place where there is nothing."""
        return f"{place} is missing; accepted is {self.accepted}"


def simple(accepted: str, fits: Callable[[object], bool]) -> Kind:
    """A kind without parts: a value fits or it does not."""
    return Kind(accepted, lambda place, value: [] if fits(value) else [_refusal(place, value, accepted)])


def _refusal(place: str, value: object, accepted: str) -> str:
    return f"{place} is {shown(value)}; accepted is {accepted}"


def whole(least: int = 0, most: int = LARGEST, accepted: str | None = None) -> Kind:
    """A whole number in a range; True and False are none."""

    def fits(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return simple(accepted or f"a whole number from {least} to 10**12", fits)


def number(least: float, most: float, accepted: str) -> Kind:
    """A finite number in a range; True and False are none."""
    return simple(accepted, lambda value: _is_number(value) and least <= float(value) <= most)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.maxsize if isinstance(value, int) else math.isfinite(value)


def or_none(kind: Kind) -> Kind:
    """The same, or None."""
    return Kind(
        f"{kind.accepted}, or None", lambda place, value: [] if value is None else list(kind.problems(place, value))
    )


def list_of(kind: Kind, accepted: str) -> Kind:
    """A list of values of one kind."""

    def problems(place: str, value: object) -> Iterator[str]:
        if not isinstance(value, (list, tuple)):
            yield _refusal(place, value, accepted)
            return
        for index, item in enumerate(value):
            yield from kind.problems(f"{place}[{index}]", item)

    return Kind(accepted, problems)


def dict_of(kind: Kind, accepted: str) -> Kind:
    """A dictionary from names to values of one kind."""

    def problems(place: str, value: object) -> Iterator[str]:
        if not isinstance(value, Mapping):
            yield _refusal(place, value, accepted)
            return
        for name, item in value.items():
            if isinstance(name, str):
                yield from kind.problems(f"{place}[{name!r}]", item)
            else:
                yield f"{place} has {shown(name)} for a name; accepted is {accepted}"

    return Kind(accepted, problems)


def record(keys: Mapping[str, Kind], optional: Iterable[str] = ()) -> Kind:
    """A dictionary with certain keys and no others, each of a kind of its own."""
    accepted, may_lack = f"a dictionary with {', '.join(keys)}", frozenset(optional)

    def problems(place: str, value: object) -> Iterator[str]:
        if not isinstance(value, Mapping):
            yield _refusal(place, value, accepted)
            return
        yield from record_problems(f"{place}.", value, keys, may_lack)

    return Kind(accepted, problems)


def record_problems(
    prefix: str, value: Mapping[object, object], keys: Mapping[str, Kind], may_lack: frozenset[str]
) -> Iterator[str]:
    """A line for each key that is missing, unknown or of another kind; ``prefix`` stands before its name."""
    for key, kind in keys.items():
        if key in value:
            yield from kind.problems(f"{prefix}{key}", value[key])
        elif key not in may_lack:
            yield kind.missing(f"{prefix}{key}")
    for other in value:
        if other not in keys:
            yield f"{prefix}{_short(repr(other))} is no key that this version knows; accepted are {', '.join(keys)}"


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and value.device.type != "meta"


def _is_averaged(value: object) -> bool:
    return _is_tensor(value) and isinstance(value, Tensor) and kind_of(value) in ("floating-point", "complex")


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(n, str) for n in value) and len({*value}) == len(value)


def _is_dtype(value: object) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _is_steps(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or any(problem for step in value for problem in COUNT.problems("", step)):
        return False
    return all(before < after for before, after in itertools.pairwise(value))


def _is_pace(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    kinds = (or_none(whole(1)), whole(-LARGEST))
    return not any(problem for kind, part in zip(kinds, value, strict=True) for problem in kind.problems("", part))


def kind_of(tensor: Tensor) -> str:
    """The kind of numbers in a tensor. Those of one kind may be of different widths."""
    if tensor.is_floating_point():
        return "floating-point"
    if tensor.is_complex():
        return "complex"
    return "bool" if tensor.dtype == torch.bool else "quantized" if tensor.is_quantized else "integer"


COUNT = whole()
STEPS = simple("a list of whole numbers, ascending", _is_steps)
FLAG = simple("True or False", lambda value: isinstance(value, bool))
TEXT = simple("text", lambda value: isinstance(value, str))
NAMES = simple("a list of names, each once", _is_names)
DTYPE = simple("the name of a dtype", _is_dtype)
PACE = simple("a list of two: the steps in an epoch, or None; and the steps ahead", _is_pace)
SETTINGS = dict_of(
    simple("text, a finite number, True or False", lambda v: isinstance(v, (str, bool)) or _is_number(v)),
    "a dictionary from names to text, numbers, True or False",
)
TENSORS = dict_of(simple("a tensor", _is_tensor), "a dictionary from names to tensors")
AVERAGES = dict_of(
    simple("a tensor of floating-point or complex numbers", _is_averaged),
    "a dictionary from names to tensors of floating-point or complex numbers",
)


def shown(value: object) -> str:
    """A value in a few words, whatever it is; signs that steer a terminal are escaped."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} and shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a whole number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, str)):
        return _short(repr(value))
    length = f" of length {len(value)}" if isinstance(value, (list, tuple, dict)) else ""
    return f"a {type(value).__name__}{length}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:56]} ..."


# --- several keys ---------------------------------------------------------------------------------------------------


def contradictions(e: Mapping[str, Any], sets: Sets, state_dict: Mapping[str, Any] | None) -> Iterator[str]:
    """What in an entry cannot be true at the same time, a line each.

    Args:
        e: an entry in which each key, looked at alone, is as it should be.
        sets: where it holds tensors.
        state_dict: of the same file, in which averages lie that the entry does not hold. None where it is not at hand.
    """
    yield from _unlisted(e, sets)
    yield from _counters(e)
    yield from _places(e)
    yield from _names(e)
    yield from _sums(e)
    yield from _unlike(sets)
    yield from _sums_of_tensors(e, sets)
    if state_dict is not None:
        yield from _misplaced(e, sets, state_dict)
    yield from _sums_of_plain(e)


def _unlisted(e: Mapping[str, Any], sets: Sets) -> Iterator[str]:
    """Tensors that an entry should hold and does not, and the other way round."""
    listed = e["stored"]
    for key in dict.fromkeys([*sets, *listed]):
        there, should = sets.get(key, {}), listed.get(key, {})
        yield from (f"{key}[{name!r}] is missing" for name in should if name not in there)
        for name, tensor in there.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            if name not in should:
                yield f"{key}[{name!r}] is not listed in stored"
            elif should[name]["dtype"] != dtype:
                yield f"{key}[{name!r}] is {shown(tensor)}, and was written as {should[name]['dtype']}"
        if key not in listed:
            yield f"stored[{key!r}] is missing, while there is {key}"
        if key not in sets:
            yield f"stored[{key!r}] is there, while {key} is missing"


def _counters(e: Mapping[str, Any]) -> Iterator[str]:
    steps, start, last = e["num_steps"], e["start_step"], e["last_update_step"]
    updates, skipped = e["num_updates"], e["num_skipped"]
    if not e["started"]:
        empty = ("num_updates", "num_skipped", "last_update_step", "names", "average", "origin")
        yield from (f"{key} is {shown(e[key])}, but started is False" for key in empty if e[key])
        if steps >= start:
            yield f"started is False, but num_steps, {steps}, is not before start_step, {start}"
    elif not start <= last <= steps:
        yield f"last_update_step is {last}; accepted is a step from start_step, {start}, to num_steps, {steps}"
    if updates + skipped > steps:
        yield f"num_updates, {updates}, and num_skipped, {skipped}, are more than num_steps, {steps}"
    if e.get("steps_before", 0) > steps:
        yield f"steps_before is {e['steps_before']}, more than num_steps, {steps}"
    for place, each in enumerate(e.get("recalibrated", ())):
        if each["at"] > updates:
            yield f"recalibrated[{place}].at is {each['at']}, more than num_updates, {updates}"


def _places(e: Mapping[str, Any]) -> Iterator[str]:
    """There is one of each for each average."""
    count = 1 + len(e["further"])
    for key in ("histories", "biases", "recalibrated"):
        if len(e.get(key, range(count))) != count:
            yield f"{key} has {len(e[key])} items, where there are {count} averages with those in further"
    if e.get("selected", 0) >= count:
        yield f"selected is {e['selected']}; accepted is the place of one of the {count} averages, from 0 on"


def _names(e: Mapping[str, Any]) -> Iterator[str]:
    names = dict.fromkeys(e["names"])
    further = {f"further[{place}]": tensors for place, tensors in enumerate(e["further"])}
    for key, tensors in {"average": e["average"], "origin": e["origin"], **further}.items():
        yield from (f"{key}[{name!r}] is not among names" for name in tensors if name not in names)
    for key, tensors in further.items():
        yield from (f"{key}[{name!r}] is missing, which is among names" for name in names if name not in tensors)


def _sums(e: Mapping[str, Any]) -> Iterator[str]:
    """The steps and updates of the histories are those of the counters."""
    since = e["last_update_step"] - e["start_step"] if e["started"] else 0
    for place, history in enumerate(e["histories"]):
        for stretch in history["stretches"]:
            if len(stretch["gaps"]) != len(stretch["counts"]):
                yield f"histories[{place}]: {len(stretch['gaps'])} gaps, but {len(stretch['counts'])} counts"
        pairs = [(gap, n) for s in history["stretches"] for gap, n in zip(s["gaps"], s["counts"], strict=False)]
        updates = sum(count for _, count in pairs) + history["unrecorded_updates"]
        steps = sum(gap * count for gap, count in pairs) + history["unrecorded_steps"]
        if updates != e["num_updates"]:
            yield f"histories[{place}] counts {updates} updates, num_updates is {e['num_updates']}"
        if steps != since:
            yield (
                f"histories[{place}] counts {steps} steps, while it is {since} from start_step to last_update_step, "
                f"{e['start_step']} to {e['last_update_step']}"
            )


def _sums_of_tensors(e: Mapping[str, Any], sets: Sets) -> Iterator[str]:
    """Tensors that are not what was written. Shards of a folder have no sum: they are cut anew."""
    for key, tensors in sets.items():
        for name, tensor in tensors.items():
            written = e["stored"].get(key, {}).get(name, {}).get("sum")
            if written is not None and sum_of(tensor) != written:
                yield f"{key}[{name!r}] does not hold what was written: its checksum differs"


def _sums_of_plain(e: Mapping[str, Any]) -> Iterator[str]:
    """Numbers, text and names that are not what was written."""
    sums = e["checksums"]
    for key, value in e.items():
        if key != "checksums" and sums.get(key) != sum_of_plain(value):
            yield f"{key} is not what was written: it differs from checksums[{key!r}]"
    yield from (f"{key} is missing, and is in checksums" for key in sums if key not in e)


def _unlike(sets: Sets) -> Iterator[str]:
    """Tensors of one name have one shape, and numbers of one kind, in all sets."""
    first: dict[str, tuple[str, Tensor]] = {}
    for key, tensors in sets.items():
        for name, tensor in tensors.items():
            where, other = first.setdefault(name, (key, tensor))
            if tensor.shape != other.shape or kind_of(tensor) != kind_of(other):
                yield f"{key}[{name!r}] is {shown(tensor)}, while {where}[{name!r}] is {shown(other)}"


def _misplaced(e: Mapping[str, Any], sets: Sets, state_dict: Mapping[str, Any]) -> Iterator[str]:
    """Averages that should lie in a ``state_dict`` and do not.

    A module's own hook may have renamed them there: a tensor of the same shape under a key that is no name will do.
    """
    held = {without_wrappers(key): value for key, value in state_dict.items() if isinstance(value, Tensor)}
    names = set(e["names"])
    renamed = [tensor.shape for name, tensor in held.items() if name not in names and _is_averaged(tensor)]
    shapes = {name: tensor.shape for tensors in sets.values() for name, tensor in tensors.items()}
    for name in e["names"]:
        shape = shapes.get(name)
        if name in held:
            if shape is not None and held[name].shape != shape:
                yield f"{name} has shape {tuple(held[name].shape)} in state_dict, {tuple(shape)} in the entry"
        elif name not in e["average"]:
            if renamed and (shape is None or shape in renamed):
                renamed.remove(renamed[0] if shape is None else shape)
            else:
                yield f"{name} is neither in average nor in state_dict"
