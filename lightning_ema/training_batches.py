"""Training batches for an extra pass over the data that leaves the training as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader


def check(pl_module: LightningModule, trainer: Trainer) -> None:
    """Refuse a module or a loader from which inputs for ``forward`` cannot be taken.

    Raises:
        ValueError: naming what is missing.
    """
    kind = type(pl_module)
    if kind.forward.__module__.startswith(("lightning.", "pytorch_lightning.")):
        raise ValueError(
            f"buffers='recalibrate' runs {kind.__name__}.forward on training batches, and {kind.__name__} has none. "
            "Define forward(self, x), or use buffers='average'."
        )
    if not isinstance(trainer.train_dataloader, DataLoader):
        raise ValueError(
            f"buffers='recalibrate' needs one DataLoader for training, not {type(trainer.train_dataloader).__name__}. "
            "Use buffers='average'."
        )


@contextmanager
def taken(trainer: Trainer, count: int) -> Iterator[Iterator[Any]]:
    """The first ``count`` batches of a fresh pass over the training loader, on the device, under its precision.

    The loader is iterated through a copy, so that a pass under way in the training goes on; random states and the
    generators of loader and samplers are put back at the end.
    """
    loader: Any = copy.copy(trainer.train_dataloader)
    loader._iterator = None  # with persistent workers the copy would otherwise take over the iterator in use
    generators = _generators(loader)
    states = [generator.get_state() for generator in generators]
    try:
        with isolate_rng(), trainer.precision_plugin.forward_context():
            yield (_on_device(trainer, batch) for batch in islice(loader, count))
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _on_device(trainer: Trainer, batch: Any) -> Any:
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


def _generators(loader: Any) -> list[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    return list(found.values())
