"""A file that is evaluated: which of its weights there are, and which of them its ``state_dict`` holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_ema.callback.settings import CallbackSettings
from lightning_ema.checkpoint.entry import CallbackEntry
from lightning_ema.evaluation.file_weights import FileWeights
from lightning_ema.interop.export import averaged_state_dict
from lightning_ema.modules.named_tensors import Survey

_NOTE = "lightning_ema"
"""The key of a weights-only file that says, for each callback, which weights its ``state_dict`` holds."""


def of_entry(module: LightningModule, entry: CallbackEntry) -> FileWeights:
    """The weights of a file, once its ``state_dict`` was loaded into the module.

    Args:
        module: the module.
        entry: of the file, as the module migrates it.
    """
    updated = entry.num_updates > 0
    base = {name: tensor.detach().clone() for name, tensor in Survey(module).tensors.items()} if updated else {}

    def weights(place: int | None) -> Mapping[str, Tensor]:
        if place is None:
            return entry.live
        if place > len(entry.further):
            raise ValueError(
                f"the file holds {1 + len(entry.further)} averages, and that of place {place} is asked for. Give the "
                f"callback the decays that it was written with, decay={entry.config.get('decay')}."
            )
        return averaged_state_dict({"state_dict": {**base, **entry.live}}, entry, place) if place != held else base

    held = entry.selected if updated and entry.live else None
    return FileWeights(module, held, weights, has_average=updated, selected=entry.selected)


def note(checkpoint: dict[str, Any], name: str, average: bool) -> None:
    """Notes in a weights-only file which weights it holds."""
    checkpoint[_NOTE] = {**checkpoint.get(_NOTE, {}), name: "average" if average else "live"}


def check_weights_only(checkpoint: Mapping[str, Any], settings: CallbackSettings) -> None:
    """Refuse a weights-only file whose weights are not those that an evaluation asks for.

    Raises:
        ValueError: naming both, and what to write instead.
    """
    notes = checkpoint.get(_NOTE)
    held = notes.get(settings.name) if isinstance(notes, Mapping) else None
    evaluation = settings.evaluation
    asked = [*(["average"] if evaluation.gives_average else ["live"]), *(["live"] if evaluation.scores_live else [])]
    lacking = [half for half in asked if half != held]
    if held is not None and lacking:
        raise ValueError(
            f"the file holds the {held} weights alone (save_weights_only=True), and evaluate={evaluation.evaluate!r} "
            f"asks for the {lacking[0]} ones. Write evaluate={held!r}, or take a file that has both."
        )
