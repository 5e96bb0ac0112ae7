"""What of ours lies in a file goes into the module the way that the file's own ``state_dict`` goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_ema.checkpoint.entry import CallbackEntry, Recalibrated
from lightning_ema.distributed.base import cut_of
from lightning_ema.modules.named_tensors import Survey, without_wrappers
from lightning_ema.modules.own_loading import like, migrates, put_into, through
from lightning_ema.trainer.checkpoint_hook import own_hook


class FileLoading:
    """A file as it was read, before any hook of the module saw it."""

    def __init__(self) -> None:
        self._file: dict[str, Any] | None = None

    def keep(self, checkpoint: Mapping[str, Any]) -> None:
        """A file is about to be loaded: keeps what is in it; the tensors are not copied."""
        state_dict = checkpoint.get("state_dict")
        if isinstance(state_dict, dict):
            self._file = {**checkpoint, "state_dict": like(state_dict, state_dict)}

    def forget(self) -> None:
        """It has been loaded."""
        self._file = None

    def migrated(self, module: LightningModule, entry: CallbackEntry) -> CallbackEntry:
        """The entry under the names, and with the values, that the module's own loading makes of each of its sets.

        A name that the file did not know is taken for one of what is averaged; whether it is, the settings say.
        """
        file, hook = self._file, own_hook(module, "on_load_checkpoint")
        own = type(module).on_load_checkpoint is not LightningModule.on_load_checkpoint
        sharded = any(cut_of(tensor).sharded for tensor in Survey(module).tensors.values())
        if file is None or sharded or not (own or migrates(module)):
            return entry
        state_dict = file["state_dict"]
        known = {without_wrappers(key) for key in state_dict}
        candidates = {name for candidate in Survey(module).candidates for name in candidate.names}

        def of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            loaded = through(module, file, put_into(state_dict, tensors), hook)
            beside = {name: tensor for name, tensor in tensors.items() if name not in known and name in candidates}
            return {**loaded, **beside}

        def within(tensors: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
            return {name: tensor for name, tensor in of(tensors).items() if name in names or name not in known}

        names = {name for name in candidates if name in entry.names or name not in known}
        average = {name: tensor for name, tensor in of(entry.average).items() if name in names}
        kept = {name for name in (*names, *entry.live) if name in Survey(module).tensors}
        recalibrated = entry.recalibrated and tuple(
            Recalibrated(each.at, within(each.statistics, set(each.statistics)) if each.statistics else {})
            for each in entry.recalibrated
        )
        return replace(
            entry,
            names=tuple(average),
            average=average,
            further=tuple({n: t for n, t in of(each).items() if n in average} for each in entry.further),
            origin={n: t for n, t in of(entry.origin).items() if n in average} if entry.origin else {},
            live={n: t for n, t in of(entry.live).items() if n in kept} if entry.live else {},
            recalibrated=recalibrated,
        )

    def live_of_another(self, module: LightningModule, live: Mapping[str, Any]) -> dict[str, Tensor]:
        """The live weights of a file of Lightning's ``WeightAveraging``, as the module loads them."""
        file = self._file or {}
        known = file.get("state_dict", live)
        return through(module, file, like(known, live), own_hook(module, "on_load_checkpoint"))
