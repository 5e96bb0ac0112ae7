"""Sharded tensors of an entry on their way into a checkpoint and back: gathered into a file, or shards in a folder.

What a callback puts into its entry is written by one process. A DTensor there would be pickled as the shard of that
process alone, so that none may stay in it:

file     each is gathered, one at a time, and kept by the process that writes
folder   they leave the entry for a slot of their own, of which every process writes its shards; the entry notes what
         belongs there. Every process also writes the id of the save, since a folder that was being overwritten when a
         run was killed holds shards of two saves

All functions but :func:`in_slot`, :func:`put_back` and :func:`whole` must be called by all processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ema.checkpoint.checks import shown
from lightning_ema.checkpoint.entry import KEYS, check_format, damaged, list_tensors, seal, tensor_sets
from lightning_ema.distributed.base import cut_of
from lightning_ema.distributed.dtensor import one_of_each_process
from lightning_ema.files.reading import load as load_file

Slot = dict[str, Any]
_NOTE = "sharded"  # the key of the entry that says which tensors lie beside it


def note_of(entry: object) -> dict[str, Any] | None:
    """What an entry notes of tensors that lie beside it; None where all are in it.

    It is read before the entry, whose tensors it leads to.

    Raises:
        ValueError: another format, or the note is damaged.
    """
    if not isinstance(entry, dict) or _NOTE not in entry:
        return None
    check_format(entry)
    if problems := [*KEYS[_NOTE].kind.problems(_NOTE, entry[_NOTE])]:
        raise damaged(problems)
    note: dict[str, Any] = entry[_NOTE]
    return note


def gather(entry: dict[str, Any], keep: bool) -> None:
    """Puts whole tensors into an entry in place of sharded ones; without ``keep`` they only leave it."""
    for key, tensors in tensor_sets(entry).items():
        for name, tensor in list(tensors.items()):
            if cut_of(tensor).sharded:
                whole = cut_of(tensor).gathered(tensor)
                if keep:
                    tensors[name] = whole.cpu()
                else:
                    del tensors[name]
                del whole  # before the next one is gathered
        if keep:
            list_tensors(entry, key)
    seal(entry)


def set_apart(entry: dict[str, Any], slot_name: str, save_id: int) -> Slot:
    """Takes the sharded tensors out of an entry and gives them as a slot; the entry notes what is in it.

    Args:
        entry: the callback's entry.
        slot_name: under which key of the checkpoint the slot will be found.
        save_id: the same in all processes, another one in each save.
    """
    slot: Slot = {}
    for kind, tensors in tensor_sets(entry).items():
        slot[kind] = {name: tensor for name, tensor in tensors.items() if cut_of(tensor).sharded}
        for name in slot[kind]:
            del tensors[name]
    dtypes = {kind: {name: str(t.dtype).removeprefix("torch.") for name, t in ts.items()} for kind, ts in slot.items()}
    stamp = one_of_each_process(save_id, [tensor for tensors in slot.values() for tensor in tensors.values()])
    entry[_NOTE] = {"slot": slot_name, "save_id": save_id, "processes": stamp.numel(), "dtypes": dtypes}
    seal(entry)
    return {**slot, "save_id": stamp}


def read(note: dict[str, Any], folder: Path, model: dict[str, Tensor]) -> Slot:
    """Reads the slot of a note, cut as the module's tensors are now.

    Raises:
        ValueError: the folder holds shards of several saves.
    """
    check(note, folder)
    slot: Slot = {
        kind: {
            name: cut_of(model[name]).empty_like(model[name], getattr(torch, dtype), model[name].device)
            for name, dtype in dtypes.items()
            if name in model  # the entry names all averages, and is refused where the module lacks one
        }
        for kind, dtypes in note["dtypes"].items()
    }
    _load({note["slot"]: slot}, folder)
    return slot


def check(note: dict[str, Any], folder: Path) -> None:
    """Refuse a folder in which the shards of several saves lie beside one another.

    Raises:
        ValueError: naming it.
    """
    stamp = torch.zeros(note["processes"], dtype=torch.int64)
    _load({note["slot"]: {"save_id": stamp}}, folder)
    _check_stamp(stamp, note, str(folder))


def _load(tensors: dict[str, Any], folder: str | Path) -> None:
    """Fills the tensors from a folder. What torch does that with takes long to import, and most runs never need it."""
    from torch.distributed.checkpoint.state_dict_loader import load

    from lightning_ema.checkpoint.shard_files import ShardReader, check_tensors

    reader = ShardReader(Path(folder))
    flat = {f"{slot}.{key}" for slot, inside in tensors.items() for key in _keys(inside)}
    check_tensors(reader.read_metadata(), dict.fromkeys(flat), Path(folder))
    load(tensors, storage_reader=reader)


def _keys(tensors: dict[str, Any]) -> Iterator[str]:
    for key, value in tensors.items():
        yield from (f"{key}.{inner}" for inner in _keys(value)) if isinstance(value, dict) else (key,)


def _check_stamp(stamp: Tensor, note: dict[str, Any], where: str) -> None:
    if stamp.ne(note["save_id"]).any():
        raise ValueError(
            f"{where} holds shards of two saves: it was being overwritten when the run ended. Resume from another "
            "checkpoint. ModelCheckpoint(save_top_k=2) keeps one more, and writes each into a folder of its own."
        )


def in_slot(note: dict[str, Any], checkpoint: dict[str, Any]) -> Slot | None:
    """The slot of a note where it stands in the checkpoint itself, as in a consolidated file.

    Raises:
        ValueError: the folder that was consolidated held the shards of several saves.
    """
    slot: Slot | None = checkpoint.get(note["slot"])
    if slot is not None:
        if not isinstance(slot, dict) or not isinstance(slot.get("save_id"), Tensor):
            raise damaged([f"{note['slot']} is {shown(slot)}; accepted are the shards of an average"])
        _check_stamp(slot["save_id"], note, "the checkpoint")
    return slot


def put_back(entry: dict[str, Any], slot: Slot) -> None:
    """Puts the tensors of a slot into the entry that notes them."""
    for kind, tensors in tensor_sets(entry).items():
        tensors.update(slot.get(kind, {}))


def whole(folder: Path, trust: bool = False) -> dict[str, Any]:
    """The content of a folder as that of a file, in this process alone; without the states of optimizers.

    Args:
        folder: the folder.
        trust: allow its ``meta.pt`` to run code while it is read.

    Raises:
        ValueError: the folder is no complete checkpoint.
    """
    from torch.distributed.checkpoint.state_dict_loader import load_state_dict

    from lightning_ema.checkpoint.shard_files import ShardReader, read_index, tensors_in

    missing = [name for name in (_SHARDS, _REST) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is no complete checkpoint: {' and '.join(missing)} missing. Either its save did not end, or it "
            "is no checkpoint of a Trainer."
        )
    content: dict[str, Any] = load_file(folder / _REST, trust=trust)
    notes = [note_of(entry) for entry in content.get("callbacks", {}).values()]
    wanted = {"state_dict", *(note["slot"] for note in notes if note is not None)}
    tensors: dict[str, Any] = {}
    index = read_index(folder)
    stored_tensors = tensors_in(index)
    for key, (first, *rest) in index.planner_data.items():
        stored = stored_tensors.get(key)
        if first in wanted and stored is not None:
            place = tensors.setdefault(first, {})
            for part in rest[:-1]:
                place = place.setdefault(part, {})
            place[rest[-1]] = torch.empty(stored.size, dtype=stored.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process")  # which is meant here
        # deprecated, but in early versions the one public way that waits for no other process of a run
        warnings.filterwarnings("ignore", category=FutureWarning)
        load_state_dict(tensors, ShardReader(folder), no_dist=True)  # type: ignore[no-untyped-call,unused-ignore]
    return {**content, **tensors}


_SHARDS, _REST = ".metadata", "meta.pt"  # what torch and what Lightning writes last
