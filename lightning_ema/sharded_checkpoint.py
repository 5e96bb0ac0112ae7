"""Sharded tensors of an entry on their way into a checkpoint and back: gathered into a file, or shards in a folder.

What a callback puts into its entry is written by one process. A DTensor there would be pickled as the shard of that
process alone, so that none may stay in it:

file     each is gathered, one at a time, and kept by the process that writes
folder   they leave the entry for a slot of their own, of which every process writes its shards; the entry notes what
         belongs there. Every process also writes the id of the save, since a folder that was being overwritten when a
         run was killed holds shards of two saves

All functions but :func:`in_slot` must be called by all processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_ema.shards import empty_like, gathered, is_sharded, one_of_each_process
from lightning_ema.state import tensor_sets

Slot = dict[str, Any]


def gather(entry: dict[str, Any], keep: bool) -> None:
    """Puts whole tensors into an entry in place of sharded ones; without ``keep`` they only leave it."""
    for tensors in tensor_sets(entry).values():
        for name, tensor in list(tensors.items()):
            if is_sharded(tensor):
                whole = gathered(tensor)
                if keep:
                    tensors[name] = whole.cpu()
                else:
                    del tensors[name]


def set_apart(entry: dict[str, Any], slot_name: str, save_id: int) -> Slot:
    """Takes the sharded tensors out of an entry and gives them as a slot; the entry notes what is in it.

    Args:
        entry: the callback's entry.
        slot_name: under which key of the checkpoint the slot will be found.
        save_id: the same in all processes, another one in each save.
    """
    slot: Slot = {}
    for kind, tensors in tensor_sets(entry).items():
        slot[kind] = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
        for name in slot[kind]:
            del tensors[name]
    dtypes = {kind: {name: str(t.dtype).removeprefix("torch.") for name, t in ts.items()} for kind, ts in slot.items()}
    stamp = one_of_each_process(save_id, [tensor for tensors in slot.values() for tensor in tensors.values()])
    entry["sharded"] = {"slot": slot_name, "save_id": save_id, "processes": stamp.numel(), "dtypes": dtypes}
    return {**slot, "save_id": stamp}


def read(entry: dict[str, Any], folder: Path, model: dict[str, Tensor]) -> Slot:
    """Reads the slot that an entry notes, cut as the module's tensors are now.

    Raises:
        ValueError: the folder holds shards of several saves, or tensors that the module does not have.
    """
    note = entry["sharded"]
    check(entry, folder)
    unknown = [name for names in note["dtypes"].values() for name in names if name not in model]
    if unknown:
        raise ValueError(
            "the checkpoint does not fit the module:\n  "
            + "\n  ".join(f"{name}: not in the module" for name in dict.fromkeys(unknown))
            + "\nBuild the module as it was when the checkpoint was written."
        )
    slot: Slot = {
        kind: {
            name: empty_like(model[name], getattr(torch, dtype), model[name].device) for name, dtype in dtypes.items()
        }
        for kind, dtypes in note["dtypes"].items()
    }
    load({note["slot"]: slot}, checkpoint_id=folder)
    return slot


def check(entry: dict[str, Any], folder: Path) -> None:
    """Refuse a folder in which the shards of several saves lie beside one another.

    Raises:
        ValueError: naming it.
    """
    note = entry["sharded"]
    stamp = torch.zeros(note["processes"], dtype=torch.int64)
    load({note["slot"]: {"save_id": stamp}}, checkpoint_id=folder)
    if stamp.ne(note["save_id"]).any():
        raise ValueError(
            f"{folder} holds shards of two saves: it was being overwritten when the run ended. Resume from another "
            "checkpoint. ModelCheckpoint(save_top_k=2) keeps one more, and writes each into a folder of its own."
        )


def in_slot(entry: dict[str, Any], checkpoint: dict[str, Any]) -> Slot | None:
    """The slot that an entry notes where it stands in the checkpoint itself, as in a consolidated file."""
    return checkpoint.get(entry["sharded"]["slot"])


def put_back(entry: dict[str, Any], slot: Slot) -> None:
    """Puts the tensors of a slot into the entry that notes them."""
    for kind, tensors in tensor_sets(entry).items():
        tensors.update(slot.get(kind, {}))
