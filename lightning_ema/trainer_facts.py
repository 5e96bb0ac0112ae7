"""What the callback needs to know of a Trainer. Whatever is private in Lightning is read here and nowhere else."""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ema.schedules import Plan

_Kind = TypeVar("_Kind", bound=type)

_UNSUPPORTED = {
    "FSDPStrategy": "it flattens parameters, so that they have no names of their own",
    "DeepSpeedStrategy": "it keeps the weights in partitions of its own",
    "ModelParallelStrategy": "sharded averages are not available yet",
}


def known_to_pytorch_lightning(kind: _Kind) -> _Kind:
    """Makes a callback class one of ``pytorch_lightning`` too, where that package is older than 2.6.

    Its Trainer refuses there what does not derive from its own ``Callback``, the same class under another name.
    """
    try:
        major, minor = version("pytorch_lightning").split(".")[:2]
    except PackageNotFoundError:
        return kind
    if (int(major), int(minor)) < (2, 6):
        import pytorch_lightning

        kind.__bases__ = (*kind.__bases__, pytorch_lightning.Callback)
    return kind


def is_fitting(trainer: Trainer) -> bool:
    """Whether ``trainer.fit`` is running, its sanity check and validations included."""
    return trainer.state.fn == "fit"


def callbacks(trainer: Trainer) -> list[Callback]:
    """The trainer's callbacks (public, but set by a helper where type checkers do not see it)."""
    return cast("list[Callback]", trainer.callbacks)  # type: ignore[attr-defined]


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies under which an average of the module's parameters would be wrong.

    Raises:
        ValueError: naming the strategy and what to use instead.
    """
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in _UNSUPPORTED:
            raise ValueError(
                f"EMACallback does not work with {kind.__name__}: {_UNSUPPORTED[kind.__name__]}. Use strategy='ddp' "
                "or a single device."
            )


def plan(trainer: Trainer) -> Plan:
    """The length of the run in steps, as far as it is known once the data are set up.

    Under manual optimization a batch counts as one step. Where accumulation changes with the epoch nothing is known.
    """
    batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
    changing = any(type(c).__name__ == "GradientAccumulationScheduler" for c in callbacks(trainer))
    known = not changing and batches != math.inf and batches > 0
    per_epoch = math.ceil(batches / accumulated) if known else None
    ends = [trainer.max_steps] if trainer.max_steps not in (None, -1) else []
    if per_epoch is not None and trainer.max_epochs not in (None, -1):
        ends.append(per_epoch * trainer.max_epochs)
    batch_size = getattr(trainer.train_dataloader, "batch_size", None)
    samples = None if batch_size is None or changing else float(batch_size * accumulated * trainer.world_size)
    return Plan(min(ends) if ends else None, per_epoch, samples)


def logs_this_step(trainer: Trainer) -> bool:
    """Whether what is logged in this ``on_train_batch_end`` reaches the logger: every ``log_every_n_steps``."""
    return bool(trainer.loggers) and trainer._logger_connector.should_update_logs


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer that the module is attached to; None where there is none."""
    return module._trainer
