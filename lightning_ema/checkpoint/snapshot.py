"""The format of a snapshot file: plain tensors, numbers and strings.

    {"format", "run", "step", "start_step",
     "averages": [{"config", "stretches": [{"decay", "gaps", "counts"}], "tensors": {name: tensor}}, ...],
     "entries": [[key of the module's state_dict, name of the average or "", dtype], ...],
     "rest": {key: tensor}, "sums": {key: sum}, "checksum": number}

``entries`` lists the whole ``state_dict`` of the module in its order. What is not averaged (integer buffers, frozen
weights) stands in ``rest``, once. Entries that are not tensors are left out. ``sums`` has a checksum of the bytes of
each tensor, those of an average under ``<place>:<name>``; ``checksum`` is one of all that is no tensor.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ema.checkpoint.checksum import sum_of, sum_of_plain
from lightning_ema.distributed.base import cut_of
from lightning_ema.files.reading import load as load_file
from lightning_ema.files.writing import whole_or_not
from lightning_ema.modules.memory import memory_of
from lightning_ema.modules.named_tensors import Survey, without_wrappers
from lightning_ema.schedules.history import History, Stretch

FORMAT = 1
"""The format that is written, and the only one that is read so far."""

# the keys of a file, of each of its averages, and of the record of an average's updates
_FORMAT, _RUN, _STEP, _START_STEP = "format", "run", "step", "start_step"
_AVERAGES, _ENTRIES, _REST = "averages", "entries", "rest"
_SUMS, _CHECKSUM = "sums", "checksum"
_CONFIG, _STRETCHES, _TENSORS = "config", "stretches", "tensors"


@dataclass(frozen=True)
class Entry:
    """One tensor of a module's ``state_dict``.

    Attributes:
        key: in the ``state_dict``.
        name: under which it is averaged; empty where it is not.
        dtype: in the ``state_dict``.
    """

    key: str
    name: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot file says of itself; the tensors stay in the file.

    Attributes:
        path: of the file.
        run: which run wrote it.
        step: the last update before it, counted as ``WeightAverage.num_steps``.
        start_step: the step at which the averages started.
        histories: the updates of each average.
        config: the settings of the first average, as text.
        shapes: of all tensors, averaged ones by name and others by key.
        precision: of the averages: the largest relative distance of neighbouring numbers in their dtypes.
        entries: the module's ``state_dict``, in its order.
    """

    path: Path
    run: str
    step: int
    start_step: int
    histories: tuple[tuple[Stretch, ...], ...]
    config: dict[str, str | int | bool]
    shapes: dict[str, tuple[int, ...]]
    precision: float
    entries: tuple[Entry, ...]


@dataclass(frozen=True, eq=False)
class Averaged:
    """An average that goes into a snapshot.

    Attributes:
        config: its settings, as text.
        history: its updates.
        tensors: the average by name. They are asked for one at a time, and once.
    """

    config: Mapping[str, str | int | bool]
    history: History
    tensors: Iterable[tuple[str, Tensor]]


def pack(
    module: nn.Module, names: Set[str], step: int, start_step: int, averages: Sequence[Averaged], keep: bool = True
) -> dict[str, Any]:
    """The content of a snapshot of averages of one module.

    Where weights or averages are spread over processes all must call it: each tensor is gathered in its turn.

    Args:
        module: the module.
        names: of what is averaged.
        step: of the last update.
        start_step: at which the averages started.
        averages: at least one.
        keep: whether this process is to have the tensors; without it they are empty.

    Raises:
        ValueError: the module's ``state_dict`` renames and converts what is averaged, so that it cannot be told apart.
    """
    tensors = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    entries = _entries(module, names, tensors)
    content = {
        _FORMAT: FORMAT,
        _RUN: averages[0].history.run,
        _STEP: step,
        _START_STEP: start_step,
        _AVERAGES: [
            {
                _CONFIG: dict(average.config),
                _STRETCHES: average.history.state_dict()[_STRETCHES],
                _TENSORS: {name: _copied(tensor, keep) for name, tensor in average.tensors},
            }
            for average in averages
        ],
        _ENTRIES: [[entry.key, entry.name, str(entry.dtype).removeprefix("torch.")] for entry in entries],
        _REST: {entry.key: _copied(tensors[entry.key], keep) for entry in entries if not entry.name},
    }
    seal(content)
    return content


def seal(content: dict[str, Any]) -> None:
    """Sums up what a snapshot holds, once it holds all of it."""
    content[_SUMS] = {key: sum_of(tensor) for key, tensor in _all_tensors(content).items()}
    content[_CHECKSUM] = sum_of_plain({key: value for key, value in content.items() if key != _CHECKSUM})


def _all_tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    of_averages = {f"{n}:{name}": t for n, a in enumerate(content[_AVERAGES]) for name, t in a[_TENSORS].items()}
    return {**of_averages, **{f":{key}": tensor for key, tensor in content[_REST].items()}}


def save(content: Mapping[str, Any], path: Path) -> None:
    """Writes a file at once or not at all: to a temporary file beside it, which then takes its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_not(path) as temporary:
        torch.save(dict(content), temporary)


def load(path: Path) -> dict[str, Any]:
    """The content of a snapshot file; tensors are read from the disk where they are used.

    Raises:
        ValueError: this is no snapshot, it is damaged, or a newer version wrote it.
    """
    try:
        content = load_file(path, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no snapshot ({error}). Leave it out or delete it.") from error
    if not isinstance(content, dict) or _AVERAGES not in content or _ENTRIES not in content:
        raise ValueError(f"{path} is no snapshot of averages. Give files that Snapshots wrote.")
    if content.get(_FORMAT) != FORMAT:
        raise ValueError(
            f"{path} has format {content.get('format')!r}; this version of lightning_ema reads format {FORMAT}. Update "
            "lightning_ema to read files that a newer one wrote."
        )
    return content


def read(path: Path) -> Snapshot:
    """What a snapshot file says of itself.

    Raises:
        ValueError: as :func:`load`.
    """
    content = load(path)
    try:
        if sum_of_plain({key: value for key, value in content.items() if key != _CHECKSUM}) != content[_CHECKSUM]:
            raise ValueError("numbers or names in it are not what was written: their checksum differs")
        if _all_tensors(content).keys() != content[_SUMS].keys():
            raise ValueError("it has other tensors than were written")
        averages = content[_AVERAGES]
        kept = {**History().state_dict(), _RUN: content[_RUN]}
        histories = [History.from_state_dict({**kept, _STRETCHES: average[_STRETCHES]}) for average in averages]
        tensors: dict[str, Tensor] = {**content[_REST], **averages[0][_TENSORS]}
        entries = tuple(Entry(key, name, _dtype(dtype)) for key, name, dtype in content[_ENTRIES])
        needed = {entry.name for entry in entries if entry.name}
        if any(not needed <= average[_TENSORS].keys() for average in averages):
            raise ValueError("tensors of an average are missing")
        if any(entry.key not in content[_REST] for entry in entries if not entry.name):
            raise ValueError("tensors that are not averaged are missing")
        return Snapshot(
            path=path,
            run=content[_RUN],
            step=int(content[_STEP]),
            start_step=int(content[_START_STEP]),
            histories=tuple(tuple(history.stretches) for history in histories),
            config=averages[0][_CONFIG],
            shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            precision=max(torch.finfo(tensor.dtype).eps for a in averages for tensor in a[_TENSORS].values()),
            entries=entries,
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Leave it out or delete it.") from error


def tensors_of(path: Path) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors in a snapshot file: of each average by name, and what is not averaged by key.

    Raises:
        ValueError: as :func:`load`.
    """
    content = load(path)
    for key, tensor in _all_tensors(content).items():
        if sum_of(tensor) != content[_SUMS].get(key):
            name = key.partition(":")[2]
            raise ValueError(f"{path} is damaged: {name} does not hold what was written. Leave it out or delete it.")
    return [average[_TENSORS] for average in content[_AVERAGES]], content[_REST]


def _entries(module: nn.Module, averages: Set[str], tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Finds what is averaged by its memory, which tells it also where a hook renamed it, and else by its name."""
    survey = Survey(module)
    averaged = [candidate for candidate in survey.candidates if candidate.name in averages]
    by_name = {name: candidate.name for candidate in averaged for name in candidate.names}
    by_memory = {memory_of(candidate.tensor): candidate.name for candidate in averaged}
    entries = []
    for key, tensor in tensors.items():
        name = by_memory.get(memory_of(tensor)) or by_name.get(without_wrappers(key), "")
        entries.append(Entry(key, name, tensor.dtype))
    floats = [entry.key for entry in entries if not entry.name and entry.dtype.is_floating_point]
    unknown = [key for key in floats if without_wrappers(key) not in survey.tensors]
    lost = averages - {entry.name for entry in entries}
    if lost and unknown:
        raise ValueError(
            f"the state_dict of {type(module).__name__} has no entry for {', '.join(sorted(lost))}, and others that "
            f"are none of its tensors: {', '.join(unknown)}. Whether these are averaged cannot be told: let its hook "
            "keep either the name or the tensor as it is."
        )
    return entries


def _copied(tensor: Tensor, keep: bool) -> Tensor:
    """The whole tensor on the CPU, without the rest of a larger storage that it may be a view into."""
    tensor = cut_of(tensor).gathered(tensor.detach())
    if not keep:
        return torch.empty(0)
    tensor = tensor.cpu()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return dtype
