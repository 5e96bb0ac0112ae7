"""What the callback needs to know of a Trainer. What is private in Lightning is read here, or in evaluation_loop."""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, TypeVar, cast

import lightning_utilities.core.rank_zero as rank_zero
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_ema.distributed.partition import Reconcile
from lightning_ema.schedules.base import Plan

_Kind = TypeVar("_Kind", bound=type)
_Value = TypeVar("_Value")

_CONFLICTING = {
    "WeightAveraging": "both would put an average of theirs into evaluations and files. Keep one of them.",
    "ModelPruning": "its masks are buffers, and an average of masks is no mask. Prune the averaged model after fit.",
}

_UNSUPPORTED = {
    "FSDPStrategy": "it flattens parameters, so that they have no names of their own",
    "DeepSpeedStrategy": "it keeps the weights in partitions of its own",
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


def check_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks beside which an average would be wrong.

    Raises:
        ValueError: naming the callback and what to do instead.
    """
    for callback in callbacks(trainer):
        for kind in type(callback).__mro__:
            if kind.__name__ in _CONFLICTING:
                raise ValueError(f"EMACallback does not work beside {kind.__name__}: {_CONFLICTING[kind.__name__]}")


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


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies under which an average of the module's parameters would be wrong.

    Raises:
        ValueError: naming the strategy and what to use instead.
    """
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in _UNSUPPORTED:
            raise ValueError(
                f"EMACallback does not work with {kind.__name__}: {_UNSUPPORTED[kind.__name__]}. Use "
                "ModelParallelStrategy with fully_shard (FSDP2), or strategy='ddp'."
            )


def check_shard(trainer: Trainer) -> None:
    """Refuse to share an average among processes that do not all hold the whole weights.

    Raises:
        ValueError: naming the strategy.
    """
    strategy = trainer.strategy
    if trainer.world_size > 1 and not isinstance(strategy, DDPStrategy):
        raise ValueError(
            f"shard=True does not go with {type(strategy).__name__}: it is for strategy='ddp', where each process "
            "holds the whole weights. Where they are sharded the average is sharded like them: leave shard out."
        )


def reconcile(trainer: Trainer) -> Reconcile | None:
    """What a loan does about BatchNorm statistics, which differ among processes.

    DDP gives all of them those of the first process in each forward pass, unless ``broadcast_buffers=False``.
    """
    if trainer.world_size == 1:
        return None
    strategy = trainer.strategy  # not its DistributedDataParallel: evaluations have none, nor has the end of a fit
    broadcast = isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("broadcast_buffers", True)
    return "first" if broadcast else "mean"


def overwrites_weights(trainer: Trainer) -> bool:
    """Whether the strategy gives all processes the weights of the first one before an evaluation."""
    return trainer.world_size > 1 and isinstance(trainer.strategy, DDPStrategy) and not is_fitting(trainer)


class Pace(NamedTuple):
    """How the steps of a run stand to its epochs, which are longer or shorter after a resume in other processes.

    Attributes:
        steps_per_epoch: of the epochs now; None where that is not known.
        ahead: how many steps the run has taken beyond what epochs of this length would have.
    """

    steps_per_epoch: int | None = None
    ahead: int = 0


def pace(trainer: Trainer, before: Pace, steps: int) -> Pace:
    """The pace of the run from here on: ``ahead = steps - (steps_per_epoch * epoch + within)``, where epochs changed.

    ``within`` are the steps of an epoch that was left in its middle and is gone on with.

    Args:
        trainer: at the start of its training.
        before: the pace up to here.
        steps: those that the run has taken up to here.
    """
    per_epoch = _steps_per_epoch(trainer)
    if per_epoch is None or before.steps_per_epoch is None or before.steps_per_epoch == per_epoch:
        return Pace(per_epoch, before.ahead)
    epoch = trainer.current_epoch
    within = min(max(steps - (before.steps_per_epoch * epoch + before.ahead), 0), per_epoch)
    return Pace(per_epoch, steps - (per_epoch * epoch + within))


def plan(trainer: Trainer, pace: Pace) -> Plan:
    """The length of the run in steps, as far as it is known once the data are set up.

    Under manual optimization a batch counts as one step. Where accumulation changes with the epoch nothing is known.
    """
    # max_steps counts the steps of every optimizer; under automatic optimization there is one
    in_turn = max(1, len(trainer.optimizers))
    ends = [math.ceil(trainer.max_steps / in_turn)] if trainer.max_steps not in (None, -1) else []
    steps_per_epoch = pace.steps_per_epoch
    if steps_per_epoch is not None and trainer.max_epochs is not None and trainer.max_epochs != -1:
        ends.append(steps_per_epoch * trainer.max_epochs + pace.ahead)
    batch_size = getattr(trainer.train_dataloader, "batch_size", None)
    samples = None
    if batch_size is not None and not _accumulation_changes(trainer):
        samples = float(batch_size * trainer.accumulate_grad_batches * trainer.world_size)
    return Plan(min(ends) if ends else None, steps_per_epoch, samples)


def _steps_per_epoch(trainer: Trainer) -> int | None:
    batches = trainer.num_training_batches
    known = not _accumulation_changes(trainer) and batches != math.inf and batches > 0
    return math.ceil(batches / trainer.accumulate_grad_batches) if known else None


def _accumulation_changes(trainer: Trainer) -> bool:
    return any(type(callback).__name__ == "GradientAccumulationScheduler" for callback in callbacks(trainer))


def begins(trainer: Trainer) -> bool:
    """Whether this trainer's first step is still to come: it neither resumes from a file nor goes on with a fit."""
    return trainer.ckpt_path is None and trainer.global_step == 0 and trainer.fit_loop.epoch_loop.total_batch_idx <= 0


def is_trial(trainer: Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, in which nothing is to be logged or saved."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def spawns(trainer: Trainer) -> bool:
    """Whether the run happens in processes whose memory the main process never sees again."""
    return getattr(trainer.strategy.launcher, "_start_method", None) in ("spawn", "fork", "forkserver")


def writes_shards(trainer: Trainer) -> bool:
    """Whether checkpoints are folders into which each process writes its shards."""
    return getattr(trainer.strategy, "_save_distributed_checkpoint", False)


def agreed(trainer: Trainer, value: _Value) -> _Value:
    """What the first process gives, in all of them. All must call it."""
    return trainer.strategy.broadcast(value)


def is_interrupted(trainer: Trainer) -> bool:
    """Whether an exception ended the run, in this process at least: others may be waiting elsewhere, or be gone."""
    return trainer.state.status == "interrupted"


def logs_this_step(trainer: Trainer) -> bool:
    """Whether what is logged in this ``on_train_batch_end`` reaches the logger: every ``log_every_n_steps``."""
    return bool(trainer.loggers) and trainer._logger_connector.should_update_logs


def trainer_of(module: nn.Module) -> Trainer | None:
    """The trainer that the module is attached to; None where there is none."""
    return module._trainer if isinstance(module, LightningModule) else None


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
