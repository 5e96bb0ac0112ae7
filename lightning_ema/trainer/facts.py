"""What the callbacks need to know of a Trainer: its state, its callbacks, its module."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar, cast

import lightning_utilities.core.rank_zero as rank_zero
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

_Kind = TypeVar("_Kind", bound=type)

_CONFLICTING = {
    "WeightAveraging": "both would put an average of theirs into evaluations and files. Keep one of them.",
    "ModelPruning": "its masks are buffers, and an average of masks is no mask. Prune the averaged model after fit.",
}

_CONFLICTING_WHERE_EVALUATED = {
    "StochasticWeightAveraging": "at the end of fit it writes its own average into the module, and that would be lost "
    "under the other. Write evaluate='live' in EMACallback, or EMACallback(Equal(), start_epoch=0.8) in its place.",
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
        logger = rank_zero.log  # the import puts a logger of its own in place of Lightning's
        import pytorch_lightning

        rank_zero.log = logger
        kind.__bases__ = (*kind.__bases__, pytorch_lightning.Callback)
    return kind


def check_callbacks(trainer: Trainer, evaluated: bool) -> None:
    """Refuse callbacks beside which an average would be wrong.

    Args:
        trainer: the trainer.
        evaluated: whether evaluations are given an average, and the module after fit.

    Raises:
        ValueError: naming the callback and what to do instead.
    """
    conflicting = _CONFLICTING | (_CONFLICTING_WHERE_EVALUATED if evaluated else {})
    for callback in callbacks(trainer):
        for kind in type(callback).__mro__:
            if kind.__name__ in conflicting:
                raise ValueError(f"EMACallback does not work beside {kind.__name__}: {conflicting[kind.__name__]}")


def is_fitting(trainer: Trainer) -> bool:
    """Whether ``trainer.fit`` is running, its sanity check and validations included."""
    return trainer.state.fn == "fit"


def callbacks(trainer: Trainer) -> list[Callback]:
    """The trainer's callbacks (public, but set by a helper where type checkers do not see it)."""
    return cast("list[Callback]", trainer.callbacks)  # type: ignore[attr-defined]


def monitored(trainer: Trainer) -> dict[str, str]:
    """The metrics by which checkpoint callbacks keep the best files, each with its mode, ``"min"`` or ``"max"``."""
    keeping = [c for c in callbacks(trainer) if any(k.__name__ == "ModelCheckpoint" for k in type(c).__mro__)]
    return {c.monitor: c.mode for c in keeping if getattr(c, "monitor", None)}  # type: ignore[attr-defined]


def is_trial(trainer: Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, in which nothing is to be logged or saved."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def is_interrupted(trainer: Trainer) -> bool:
    """Whether an exception ended the run, in this process at least: others may be waiting elsewhere, or be gone."""
    return trainer.state.status == "interrupted"


def logs_this_step(trainer: Trainer) -> bool:
    """Whether what is logged in this ``on_train_batch_end`` reaches the logger: every ``log_every_n_steps``."""
    return bool(trainer.loggers) and trainer._logger_connector.should_update_logs


def trainer_of(module: nn.Module) -> Trainer | None:
    """The trainer that the module is attached to; None where there is none."""
    trainer: Trainer | None = getattr(module, "_trainer", None)  # also of pytorch_lightning's LightningModule
    return trainer


def in_training_step(module: LightningModule) -> bool:
    """Whether the module's ``training_step`` is running, called by a trainer."""
    # the name alone would not do: an exception leaves it as it is
    return module._current_fx_name == "training_step" and module._trainer is not None and module._trainer.training


def process_of(trainer: Trainer | None) -> tuple[int, int]:
    """This process among those that share the data: its rank and their number."""
    shared = None if trainer is None else trainer.distributed_sampler_kwargs
    return (0, 1) if shared is None else (shared["rank"], shared["num_replicas"])


def batches_done(trainer: Trainer) -> int:
    """The training batches of the run so far, those before a resume included; those of the epoch under overfitting.

    A batch that a file was saved in counts once its step was taken. Lightning's number of epochs would not do: 2.6
    skips one on resuming a run with ``max_steps`` from the end of an epoch.
    """
    epoch_loop: Any = trainer.fit_loop.epoch_loop  # types that Lightning does not declare
    done = int(epoch_loop.batch_progress.total.processed)
    return done % int(trainer.num_training_batches) if trainer.overfit_batches else done  # type: ignore[attr-defined]
