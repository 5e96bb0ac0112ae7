"""Where a trainer's strategy shards the weights: what becomes of the callback's entry in its checkpoints."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_ema.averaging.tracker import Tracker
from lightning_ema.checkpoint import sharded as sharded_checkpoint
from lightning_ema.modules.named_tensors import Survey
from lightning_ema.trainer import strategies


def store(trainer: Trainer, checkpoint: dict[str, Any], entry: dict[str, Any]) -> None:
    """Makes an entry one that the first process can write alone.

    Of a folder every process writes its shards of ``state_dict`` and of ``optimizer_states``, and of nothing else: the
    slot goes among the latter. Lightning loads as many of them as there are optimizers.
    """
    if strategies.writes_folders(trainer):
        slots = checkpoint["optimizer_states"]
        save_id = strategies.agreed(trainer, secrets.randbits(62))
        slots.append(sharded_checkpoint.set_apart(entry, f"optimizer_{len(slots)}", save_id))
    else:
        sharded_checkpoint.gather(entry, keep=trainer.is_global_zero)


def agreed(trainer: Trainer, tracker: Tracker, missing: list[str]) -> list[str]:
    """What ``state_dict`` does not hold. Of a gathered one only the first process can say, and it alone writes."""
    return strategies.agreed(trainer, missing) if tracker.sharded or tracker.processes > 1 else missing


def fetch(trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any], entry: dict[str, Any]) -> None:
    """Brings the sharded tensors that an entry notes back into it."""
    note = sharded_checkpoint.note_of(entry)
    if note is not None:
        slot = sharded_checkpoint.in_slot(note, checkpoint)
        if slot is None:
            slot = sharded_checkpoint.read(note, _folder(trainer), Survey(module).tensors)
        sharded_checkpoint.put_back(entry, slot)


def is_folder(entry: object) -> bool:
    """Whether tensors of an entry lie beside it, as shards."""
    return sharded_checkpoint.note_of(entry) is not None


def check(trainer: Trainer, checkpoint: dict[str, Any], entry: dict[str, Any] | None) -> None:
    """Refuse a folder in which the shards of several saves lie beside one another."""
    note = sharded_checkpoint.note_of(entry)
    if note is not None and sharded_checkpoint.in_slot(note, checkpoint) is None:
        sharded_checkpoint.check(note, _folder(trainer))


def _folder(trainer: Trainer) -> Path:
    return Path(strategies.agreed(trainer, str(trainer.ckpt_path)))
