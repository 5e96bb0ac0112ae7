"""Taking the average out of a checkpoint, and saying what a checkpoint holds."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ema.checkpoint import entry as entries
from lightning_ema.checkpoint import sharded as sharded_checkpoint
from lightning_ema.checkpoint.entry import CallbackEntry
from lightning_ema.checkpoint.section import STATE_KEY_PREFIX, find, state_key
from lightning_ema.files.reading import load as load_file
from lightning_ema.files.writing import whole_or_not
from lightning_ema.modules.named_tensors import without_wrappers
from lightning_ema.ops.lerp import corrected, relative_distance
from lightning_ema.schedules.base import horizon
from lightning_ema.schedules.text import read_schedule

Checkpoint = str | Path | Mapping[str, Any]


def export_average(
    checkpoint: Checkpoint, path: str | Path, *, name: str = "ema", which: int | None = None, trust: bool = False
) -> Path:
    """Writes the averaged weights of a checkpoint alone, under the model's usual keys.

    Args:
        checkpoint: a file written by a Trainer with an ``EMACallback``, or its content; or a folder of shards, of which
            the weights must fit into memory.
        path: where to; ``.safetensors`` or ``.pt``. Without a suffix, safetensors where it is installed, else ``.pt``.
        name: of the callback whose average is meant.
        which: the place of the average among several, as they were given in ``decay=[...]``; 0 is the first. None: the
            one that evaluations were given, which is the first unless ``select`` chose another.
        trust: allow the file to run code while it is read, as files with custom classes in their hyper-parameters
            need. Only for files from people you trust.

    Returns:
        The path written to.

    Raises:
        ValueError: the checkpoint holds no such average yet, or the suffix is neither of the two.
        ModuleNotFoundError: ``.safetensors`` is asked for and not installed.
    """
    content = read(checkpoint, trust)
    stored = find(content, state_key(name))
    if stored is None:
        raise ValueError(
            "the checkpoint holds no average: it was written without an EMACallback, or it is a weights-only file, "
            "whose state_dict is the averaged model already."
        )
    entry = entries.read(stored, CallbackEntry, content.get("state_dict"))
    if entry.num_updates == 0:
        raise ValueError(f"the average {name!r} has not been updated yet (step {entry.num_steps}).")
    which = entry.selected if which is None else which
    if not 0 <= which <= len(entry.further):
        raise ValueError(
            f"which is {which}; the checkpoint holds {1 + len(entry.further)} averages under {name!r}, of "
            f"decay={entry.config.get('decay')}, and the first is 0."
        )
    if which > 0 and entry.recalibrated is not None and entry.recalibrated[which].at < 0:
        raise ValueError(
            f"BatchNorm statistics were estimated for the first average alone, not for that of place {which}. "
            "evaluate='all' estimates them for all."
        )
    weights = averaged_state_dict(content, entry, which)
    return write_weights(weights, path, {"average": name, **_metadata(entry, which)})


def _metadata(entry: CallbackEntry, which: int) -> dict[str, str]:
    """Counters, the schedule as it was given, and its decay and horizon at the last step, where these are known."""
    told = {"steps": str(entry.num_steps), "updates": str(entry.num_updates)}
    told |= {"decay": str(entry.config["decay"])} if "decay" in entry.config else {}  # an import may not know
    told |= {"which": str(which)} if entry.further else {}
    decay = decay_in_force(entry, which)
    return told if decay is None else told | {"decay_in_force": f"{decay:.6g}", "horizon": f"{horizon(decay):.6g}"}


def decay_in_force(entry: CallbackEntry, which: int = 0) -> float | None:
    """The decay per step of one of an entry's averages at its last step; None where its schedule cannot be read."""
    if which == 0 and entry.decay is not None:
        return entry.decay
    stretches = entry.histories[which].stretches
    if not stretches:
        return None
    with suppress(ValueError):  # a schedule of the user's own, which text does not stand for
        return read_schedule(stretches[-1].decay)(max(1, entry.num_steps - entry.start_step))
    return None


def write_weights(weights: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str]) -> Path:
    """Writes weights alone, with ``metadata`` where the file is of safetensors; gives the path written to.

    Raises:
        ValueError: the suffix is neither ``.safetensors`` nor ``.pt``.
        ModuleNotFoundError: ``.safetensors`` is asked for and not installed.
    """
    target = _with_suffix(Path(path))
    with whole_or_not(target) as temporary:
        if target.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({key: value.contiguous().clone() for key, value in weights.items()}, temporary, metadata)
        else:
            torch.save({key: value.clone() for key, value in weights.items()}, temporary)
    return target


def averaged_state_dict(checkpoint: Mapping[str, Any], entry: CallbackEntry, which: int = 0) -> dict[str, Tensor]:
    """``state_dict`` with one of the averages of an entry in place, in the dtype of the model.

    What the entry does not store is what ``state_dict`` holds already. Where the schedule corrects, an average reads
    ``average + bias * (live - origin)``.
    """
    stored = dict([entry.average, *entry.further][which])
    if which > 0 and entry.recalibrated is not None:
        stored |= entry.recalibrated[which].statistics
    bias = entry.biases[which]
    weights = {}
    for key, value in checkpoint["state_dict"].items():
        name = without_wrappers(key)
        weights[key] = value
        if name in stored:
            average = stored[name]
            if bias and name in entry.origin:
                average = corrected(average, entry.live.get(name, value), entry.origin[name], bias)
            weights[key] = average.to(value.dtype)
    return weights


def describe(checkpoint: Checkpoint, trust: bool = False) -> str:
    """What a checkpoint holds, for a person to read: averages, counters, decay, horizon, sizes, distance."""
    content = read(checkpoint, trust)
    weights = {key: value for key, value in content.get("state_dict", {}).items() if isinstance(value, Tensor)}
    lines = [
        f"epoch {content.get('epoch', '?')}, global step {content.get('global_step', '?')}, "
        f"state_dict: {len(weights)} tensors, {_size(weights)}"
    ]
    stored = {key: e for key, e in content.get("callbacks", {}).items() if key.startswith(STATE_KEY_PREFIX)}
    ours = {key: entries.read(entry, CallbackEntry, content.get("state_dict")) for key, entry in stored.items()}
    if not ours:
        lines.append("no average of lightning_ema (a weights-only file holds the averaged model in state_dict)")
    lives = {name: tensor for entry in ours.values() for name, tensor in entry.live.items()}
    if not lives:  # then state_dict is live
        lives = {without_wrappers(key): tensor for key, tensor in weights.items()}
    for key, entry in ours.items():
        lines += ["", key, *(f"  {line}" for line in _entry_lines(content, entry, lives))]
    return "\n".join(lines)


def read(checkpoint: Checkpoint, trust: bool) -> Mapping[str, Any]:
    """The content of a file or a folder of shards, whole and on the CPU; a content as it is.

    Raises:
        ValueError: a folder is no complete checkpoint, or holds the shards of several saves.
    """
    if isinstance(checkpoint, Mapping):
        return checkpoint
    path = Path(checkpoint)
    content: dict[str, Any] = sharded_checkpoint.whole(path, trust) if path.is_dir() else load_file(path, trust=trust)
    for entry in content.get("callbacks", {}).values():
        note = sharded_checkpoint.note_of(entry)
        slot = None if note is None else sharded_checkpoint.in_slot(note, content)
        if slot is not None:
            sharded_checkpoint.put_back(entry, slot)
    return content


def _entry_lines(content: Mapping[str, Any], entry: CallbackEntry, lives: Mapping[str, Tensor]) -> list[str]:
    live, average = entry.live, entry.average
    lines = [
        f"steps {entry.num_steps}, updates {entry.num_updates}, skipped {entry.num_skipped}, "
        f"start at step {entry.start_step}",
        f"average: {len(entry.names)} tensors, {len(average)} of them stored here ({_size(average)}), the others in "
        "state_dict"
        if entry.started
        else "average: not started, the live weights are it",
        f"live weights: {len(live)} tensors stored here ({_size(live)})",
        *(f"{name}: {value}" for name, value in entry.config.items()),
    ]
    if entry.recalibrated is not None and entry.recalibrated[0].at >= 0:
        lines.append(f"BatchNorm statistics estimated after update {entry.recalibrated[0].at}")
    if not entry.further:
        return [*lines, *_told_of(content, entry, lives, 0)]
    lines.append(f"further averages stored here: {len(entry.further)} ({_size(*entry.further)})")
    for place in range(1 + len(entry.further)):
        told = [*_schedule_of(entry, place), *_told_of(content, entry, lives, place)]
        if live and place == entry.selected:
            told.append(f"in state_dict{', selected by a metric' if entry.num_selections else ''}")
        lines.append(f"place {place}: {'; '.join(told) or 'not started'}")
    return lines


def _schedule_of(entry: CallbackEntry, place: int) -> list[str]:
    """The schedule of one of an entry's averages, where it was updated and the file says under which."""
    stretches = entry.histories[place].stretches
    with suppress(ValueError):  # a schedule of the user's own, which is shown as it is written
        return [repr(read_schedule(stretch.decay)) for stretch in stretches[-1:]]
    return [stretches[-1].decay]


def _told_of(content: Mapping[str, Any], entry: CallbackEntry, lives: Mapping[str, Tensor], place: int) -> list[str]:
    """Decay, horizon and distance of one of an entry's averages, as far as they are known."""
    decay, told = decay_in_force(entry, place), []
    if decay is not None:
        told.append(f"decay in force: {decay:.6g}, a horizon of {horizon(decay):,.0f} steps")
    averages = {without_wrappers(k): v for k, v in averaged_state_dict(content, entry, place).items()}
    averages |= {} if entry.origin else dict([entry.average, *entry.further][place])
    known = [name for name in entry.names if name in lives and name in averages]
    if known and entry.started:
        distance = relative_distance([averages[n].float() for n in known], [lives[n].float() for n in known])
        told.append(f"distance between live weights and average: {distance:.4g} of the live weights' norm")
    return told


def _size(*sets: Mapping[str, Tensor]) -> str:
    nbytes = sum(tensor.nbytes for tensors in sets for tensor in tensors.values())
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


def _with_suffix(path: Path) -> Path:
    installed = importlib.util.find_spec("safetensors") is not None
    if path.suffix == "":
        return path.with_suffix(".safetensors" if installed else ".pt")
    if path.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"{path.name}: the suffix must be .safetensors or .pt.")
    if path.suffix == ".safetensors" and not installed:
        raise ModuleNotFoundError("safetensors is not installed: pip install safetensors, or write to a .pt file.")
    return path
