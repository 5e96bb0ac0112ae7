"""Iterating a loader once more without a trace in the iteration under way. Knows torch, not Lightning."""

from __future__ import annotations

import copy
from typing import Any

from torch.utils.data import DataLoader


def apart(loader: Any) -> Any:
    """A loader over the same data that can be iterated while ``loader`` is; what is no ``DataLoader`` comes back as is.

    With persistent workers a second iteration of the loader itself would take over those in use.
    """
    if not isinstance(loader, DataLoader):
        return loader
    copied: Any = copy.copy(loader)
    copied._iterator = None
    return copied


def parts(loader: Any) -> list[object]:
    """The objects of a loader that may carry a random generator: itself, its samplers and its dataset."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    inner = getattr(batch_sampler, "sampler", None)
    return [loader, getattr(loader, "sampler", None), batch_sampler, inner, getattr(loader, "dataset", None)]
