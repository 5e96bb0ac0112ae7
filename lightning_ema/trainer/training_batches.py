"""Training batches for an extra pass over the data that leaves the training as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_ema.trainer.loaders import apart, parts
from lightning_ema.trainer.rng import RandomStates

_LIGHTNING_MODULE = ("lightning.pytorch.core.module", "pytorch_lightning.core.module")


def check(pl_module: LightningModule, trainer: Trainer) -> None:
    """Refuse a module or a loader from which inputs for ``forward`` cannot be taken.

    Raises:
        ValueError: naming what is missing.
    """
    kind = type(pl_module)
    if _is_lightnings(kind.forward):
        raise ValueError(
            f"buffers='recalibrate' runs {kind.__name__}.forward on training batches, and {kind.__name__} has none. "
            "Define forward(self, x), or use buffers='average'."
        )
    if not isinstance(trainer.train_dataloader, DataLoader):
        raise ValueError(
            f"buffers='recalibrate' needs one DataLoader for training, not {type(trainer.train_dataloader).__name__}. "
            "Use buffers='average'."
        )


def _is_lightnings(forward: Any) -> bool:
    """Whether it is the ``forward`` that every LightningModule inherits, which hands on to torch's refusal."""
    name, where = getattr(forward, "__qualname__", ""), getattr(forward, "__module__", "")
    return name == "LightningModule.forward" and where in _LIGHTNING_MODULE


@contextmanager
def taken(trainer: Trainer, count: int) -> Iterator[Iterator[Any]]:
    """The first ``count`` batches of a fresh pass over the training loader, on the device, under its precision.

    The loader is iterated through a copy, so that a pass under way in the training goes on; random states, also those
    of loader, samplers and dataset, are put back at the end.
    """
    loader = trainer.train_dataloader
    states = RandomStates(parts(loader))
    try:
        with trainer.precision_plugin.forward_context():
            yield (_on_device(trainer, batch) for batch in islice(apart(loader), count))
    finally:
        states.put_back()


def _on_device(trainer: Trainer, batch: Any) -> Any:
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
