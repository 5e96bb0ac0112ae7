"""Lightning's strategies: what an average does under each of them, what is refused and why. One table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar, cast

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from lightning_ema.distributed.dtensor import Sharded
from lightning_ema.distributed.processes import SyncBuffers
from lightning_ema.distributed.whole import Whole
from lightning_ema.trainer.facts import is_fitting

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Row:
    """What holds under one strategy.

    Attributes:
        cut: the implementation of :class:`~lightning_ema.distributed.base.Cut` that its weights need, besides that for
            whole ones. None: there is none, so that the strategy is refused.
        refused: why, where it is.
        instead: what to use in its place.
        partitions: whether each process holds the same whole weights, so that averages can be split among processes
            (``shard=True``).
        extra_pass: whether an evaluation can be run once more within one. Not where the strategy runs the module in a
            way of its own, or is not known.
        buffers: what a swap makes of buffers that differ among processes. Where the strategy gives all processes those
            of the first one in each forward pass, that is what was trained with: ``"first"``.
        overwrites: whether it gives all processes the weights of the first one before an evaluation outside of a fit.
        folders: whether a checkpoint may be a folder, into which each process writes its shards.
    """

    cut: type[Whole | Sharded] | None = Whole
    refused: str = ""
    instead: str = "ModelParallelStrategy with fully_shard (FSDP2), or strategy='ddp'"
    partitions: bool = False
    extra_pass: bool = False
    buffers: SyncBuffers = "mean"
    overwrites: bool = False
    folders: bool = False


STRATEGIES: Mapping[str, Row] = MappingProxyType(
    {
        "SingleDeviceStrategy": Row(extra_pass=True),
        "DDPStrategy": Row(partitions=True, extra_pass=True, buffers="first", overwrites=True),
        "ModelParallelStrategy": Row(cut=Sharded, extra_pass=True, folders=True),
        "FSDPStrategy": Row(cut=None, refused="it cuts flattened parameters (FSDP1), of which no average is kept yet"),
        "DeepSpeedStrategy": Row(cut=None, refused="it keeps the weights in partitions of its own"),
    }
)
"""By the name of the class. A subclass has the row of its nearest parent; ``ddp_spawn`` and its like are launchers."""

_OTHER = Row()
"""Any other strategy: nothing is known that forbids an average."""


def row_of(trainer: Trainer) -> Row:
    """What holds under the trainer's strategy."""
    return _named_row(trainer)[1]


def _named_row(trainer: Trainer) -> tuple[str, Row]:
    names = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    return next(((name, STRATEGIES[name]) for name in names if name in STRATEGIES), (names[0], _OTHER))


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies under which an average of the module's parameters would be wrong.

    Raises:
        ValueError: naming the strategy and what to use instead.
    """
    name, row = _named_row(trainer)
    if row.cut is None:
        raise ValueError(f"EMACallback does not work with {name}: {row.refused}. Use {row.instead}.")


def check_shard(trainer: Trainer) -> None:
    """Refuse to partition an average among processes that do not all hold the whole weights.

    Raises:
        ValueError: naming the strategy.
    """
    if trainer.world_size > 1 and not row_of(trainer).partitions:
        raise ValueError(
            f"shard=True does not go with {type(trainer.strategy).__name__}: it is for strategy='ddp', where each "
            "process holds the whole weights. Where they are sharded the average is sharded like them: leave shard out."
        )


def check_extra_pass(trainer: Trainer, asked: str) -> None:
    """Refuse strategies under which an evaluation cannot be run once more within one.

    Args:
        trainer: the trainer.
        asked: the argument that asks for it, as it was written.

    Raises:
        ValueError: naming the strategy.
    """
    if not row_of(trainer).extra_pass:
        raise ValueError(
            f"{asked} does not work with {type(trainer.strategy).__name__}: a second pass over the data is run on a "
            f"single device, under DDP or under ModelParallelStrategy. Use one of these, or leave {asked} out."
        )


def sync_buffers(trainer: Trainer) -> SyncBuffers | None:
    """What a swap does about buffers such as BatchNorm statistics, which differ among processes; None in a single one.

    DDP gives all of them those of the first process in each forward pass, unless ``broadcast_buffers=False``.
    """
    if trainer.world_size == 1:
        return None
    how = row_of(trainer).buffers
    if how == "first":  # not its DistributedDataParallel: evaluations have none, nor has the end of a fit
        broadcasts = cast(DDPStrategy, trainer.strategy)._ddp_kwargs.get("broadcast_buffers", True)
        return "first" if broadcasts else "mean"
    return how


def overwrites_weights(trainer: Trainer) -> bool:
    """Whether the strategy gives all processes the weights of the first one before an evaluation."""
    return trainer.world_size > 1 and row_of(trainer).overwrites and not is_fitting(trainer)


def writes_folders(trainer: Trainer) -> bool:
    """Whether checkpoints are folders into which each process writes its shards."""
    return row_of(trainer).folders and bool(getattr(trainer.strategy, "_save_distributed_checkpoint", False))


def spawns(trainer: Trainer) -> bool:
    """Whether the run happens in processes whose memory the main process never sees again."""
    return getattr(trainer.strategy.launcher, "_start_method", None) in ("spawn", "fork", "forkserver")


def agreed(trainer: Trainer, value: _Value) -> _Value:
    """What the first process gives, in all of them. All must call it."""
    return trainer.strategy.broadcast(value)
