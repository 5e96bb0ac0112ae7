"""Evaluating once more within one evaluation, with other weights: the results come under other names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from lightning_ema.evaluation.module_state import ModuleState
from lightning_ema.trainer.evaluation_loop import (
    Result,
    check_loop,
    loaders_of,
    logging_for,
    loop_of,
    metrics_of,
    results_of,
    run_beside,
)
from lightning_ema.trainer.loaders import parts
from lightning_ema.trainer.rng import RandomStates
from lightning_ema.trainer.strategies import check_extra_pass


@dataclass(frozen=True, eq=False)
class Begun:
    """What an evaluation finds when it begins, and a further pass is to find again. Made by :func:`begin`."""

    module: ModuleState
    random: RandomStates
    metrics: Any
    buffers_due: bool


def check(trainer: Trainer, asked: str) -> None:
    """Refuse a trainer under which a second pass cannot be run.

    Args:
        trainer: the trainer.
        asked: the argument that asks for it, as it was written.

    Raises:
        ValueError: naming the strategy, or Lightning's version.
    """
    check_extra_pass(trainer, asked)
    check_loop(trainer, asked)


def begin(trainer: Trainer, pl_module: LightningModule) -> Begun:
    """To be called in ``on_validation_start`` or ``on_test_start``, before other weights are swapped in.

    What the first pass gathers in the module afterwards is kept out of the second one, which begins here, too.

    Raises:
        ValueError: a loader can be iterated only once.
    """
    loaders = loaders_of(trainer)
    for source in map(_used_up, loaders):
        if source is not None:
            raise ValueError(
                f"evaluate='both', 'all' and Select pass over the data several times, and "
                f"{type(source).__name__} is an iterator: its __iter__ gives itself. Give it an __iter__ that begins "
                "anew, or write evaluate='average'."
            )
    owners = [part for loader in loaders for part in parts(loader)]
    lightnings_own = vars(LightningModule()).keys() - vars(nn.Module()).keys()
    wrapper = _ddp(trainer)
    buffers_due = wrapper is not None and wrapper.require_forward_param_sync
    return Begun(ModuleState(pl_module, lightnings_own), RandomStates(owners), metrics_of(trainer), buffers_due)


def evaluate_again(
    trainer: Trainer, pl_module: LightningModule, begun: Begun, carried: AbstractContextManager[None]
) -> list[Result]:
    """Evaluates other weights on the data of the evaluation under way.

    To be called in ``on_validation_epoch_end`` or ``on_test_epoch_end`` of a callback, as often as there are weights.
    All hooks of the module run, none of a callback; nothing reaches loggers; values logged on single steps are
    dropped. It begins from the module's state and random states at ``begun``, so dropout, shuffling and augmentation
    in the main process are those of the first pass. Whatever happens, module, loop, logged values and random states
    are afterwards what they were.

    Args:
        trainer: the trainer.
        pl_module: its module.
        begun: what :func:`begin` gave in this evaluation.
        carried: lets the module carry these weights. It is entered when all that an evaluation writes to, buffers too,
            is what it was at ``begun``, so that nothing of what it hands over is put back with them.

    Returns:
        What a separate ``trainer.validate`` or ``trainer.test`` of these weights would log for the whole evaluation.

    Raises:
        RuntimeError: the loaders gave no batch this time.
    """
    first = loop_of(trainer)
    states = RandomStates([part for loader in loaders_of(trainer) for part in parts(loader)])
    try:
        with (
            begun.module.again(),
            carried,
            _buffers_due(trainer, begun.buffers_due),
            run_beside(trainer, pl_module, begun.metrics, begun.random.put_back) as loop,
        ):
            loop.run()
            if first.batch_progress.current.ready > loop.batch_progress.current.ready == 0:
                raise RuntimeError(
                    "the loaders gave no batch in a further pass over the data. They must give the same batches each "
                    "time they are iterated; or write evaluate='average'."
                )
            return results_of(loop, trainer)
    finally:
        states.put_back()


def log_again(pl_module: LightningModule, results: Sequence[Result], suffix: str) -> None:
    """Logs results once more under other names, from a callback's ``on_validation_epoch_end`` or ``on_test_epoch_end``.

    Args:
        pl_module: the module.
        results: what :func:`evaluate_again` gave.
        suffix: goes behind each name, and before its ``/dataloader_idx_k``.

    Raises:
        ValueError: a new name is one that the module itself logs, or two become one.
    """
    taken = {result.name for result in results}
    for result in results:
        name = _base(result) + suffix + _ending(result)
        if name in taken:
            raise ValueError(
                f"{result.name!r} would be logged once more as {name!r}, and that name is taken by another value that "
                f"{type(pl_module).__name__} logs. Give that one another name in the module."
            )
        taken.add(name)
    for loader, of_loader in groupby(results, key=lambda result: result.loader):
        with logging_for(pl_module.trainer, loader):
            for result in of_loader:
                _log(pl_module, _base(result) + suffix, result)


def named_beside(metric: str, suffixes: Iterable[str]) -> tuple[str, str] | None:
    """The suffix of a metric that :func:`log_again` logs, and the name that it has without; None for another metric.

    >>> named_beside("loss/ema_0.9/dataloader_idx_1", ["_live", "/ema_0.9"])
    ('/ema_0.9', 'loss/dataloader_idx_1')
    """
    base, ending, loader = metric.partition("/dataloader_idx_")
    suffix = next((suffix for suffix in suffixes if base.endswith(suffix)), None)
    return None if suffix is None else (suffix, base.removesuffix(suffix) + ending + loader)


@contextmanager
def _buffers_due(trainer: Trainer, due: bool) -> Iterator[None]:
    """DDP broadcasts buffers in the first forward pass after a training step: the first pass has used that up."""
    wrapper = _ddp(trainer)
    if wrapper is None:
        yield
        return
    before = wrapper.require_forward_param_sync
    wrapper.require_forward_param_sync = due
    try:
        yield
    finally:
        wrapper.require_forward_param_sync = before


def _ddp(trainer: Trainer) -> DistributedDataParallel | None:
    model = trainer.strategy.model
    return model if isinstance(model, DistributedDataParallel) else None


def _log(pl_module: LightningModule, name: str, result: Result) -> None:
    # the class's own method: a module that overrides it has given these names already
    LightningModule.log(
        pl_module,
        name,
        result.value if result.value.is_floating_point() else result.value.float(),
        prog_bar=result.prog_bar,
        logger=None if result.logger else False,
        on_step=False,
        on_epoch=True,
        reduce_fx="max",  # of one value, or of values that are all the same: exact, as no mean is
        sync_dist=result.synced,
        sync_dist_group=result.group,
        add_dataloader_idx=bool(_ending(result)),
        rank_zero_only=result.rank_zero_only,
        batch_size=1,  # not looked for in a batch, which a step with dataloader_iter does not have
    )


def _ending(result: Result) -> str:
    ending = f"/dataloader_idx_{result.loader}"
    return ending if result.name.endswith(ending) else ""


def _base(result: Result) -> str:
    return result.name.removesuffix(_ending(result))


def _used_up(loader: Any) -> object | None:
    """The object behind a loader that is used up by iterating it; None where there is none."""
    source = loader
    if isinstance(loader, DataLoader):  # its workers iterate over copies of their own
        source = loader.dataset if loader.num_workers == 0 and isinstance(loader.dataset, IterableDataset) else None
    return source if isinstance(source, Iterator) else None
