"""Lightning's evaluation loop, run once more beside the run under way. What is private of the loop is read here."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import lightning
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from lightning_ema.trainer.loaders import apart

_NEEDED = (
    *("_combined_loader", "_data_fetcher", "_logged_outputs", "_max_batches", "_module_mode", "_results"),
    *("_seen_batches_per_dataloader", "batch_progress", "on_run_start", "run", "setup_data", "trainer"),
)
"""What :func:`run_beside` uses of a loop."""

_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


@dataclass(frozen=True)
class Result:
    """A value that the module logged for the whole evaluation.

    Attributes:
        name: as Lightning has it in ``trainer.callback_metrics``, with ``/dataloader_idx_k`` where there are several
            loaders. What is logged on every step as well is there twice, as ``x_epoch`` for loggers and as ``x``.
        value: of one element.
        loader: for which of several loaders; None for one loader, and for what hooks after the last batch log.
        prog_bar, logger: whether it goes to the progress bar and to loggers.
        synced: whether it is the same in all processes of ``group``.
        group: of processes; None for all of them.
        rank_zero_only: whether it was logged in the first process alone.
    """

    name: str
    value: Tensor
    loader: int | None
    prog_bar: bool
    logger: bool
    synced: bool
    group: Any
    rank_zero_only: bool


def check_loop(trainer: Trainer, asked: str) -> None:
    """Refuse a Lightning whose evaluation loop is another one than :func:`run_beside` knows.

    Args:
        trainer: the trainer.
        asked: the argument that asks for an extra pass, as it was written.

    Raises:
        ValueError: naming the version, and what its loop lacks.
    """
    missing = [name for name in _NEEDED if not hasattr(trainer.validate_loop, name)]
    if missing:
        raise ValueError(
            f"{asked} does not know this version of Lightning, whose evaluation loop has no "
            f"{', '.join(missing)}. Leave {asked} out, or install another Lightning than {lightning.__version__}."
        )


def loop_of(trainer: Trainer) -> Any:
    """The loop of the evaluation under way."""
    owner, name = _place(trainer)
    return getattr(owner, name)


def loaders_of(trainer: Trainer) -> list[Any]:
    """The loaders of the evaluation under way, one by one, however the user has put them together."""
    return list(loop_of(trainer)._combined_loader.flattened)


def metrics_of(trainer: Trainer) -> Any:
    """What the trainer keeps of logged values, copied."""
    return _copied(trainer._logger_connector)


@contextmanager
def run_beside(
    trainer: Trainer, pl_module: LightningModule, metrics: Any, before_hooks: Callable[[], None]
) -> Iterator[Any]:
    """The loop of the evaluation under way, ready to ``run()`` from its start; the one under way goes on afterwards.

    It is Lightning's own code, so hooks, contexts, arguments and reductions are those of any evaluation, except that

    - no hook of a callback is called,
    - loaders are iterated through copies,
    - logged values go to a copy of ``metrics``, and nothing at all goes to loggers,
    - ``before_hooks`` is called when the iterators are made and no hook has run yet.
    """
    owner, name = _place(trainer)
    first = getattr(owner, name)
    again = _beside(first, trainer, before_hooks)
    kept = trainer._logger_connector, trainer.loggers, trainer.should_stop, pl_module._current_fx_name
    try:
        setattr(owner, name, again)
        trainer._logger_connector = _copied(metrics)
        trainer.loggers = [_silent(logger) for logger in trainer.loggers]
        yield again
    finally:
        setattr(owner, name, first)
        trainer._logger_connector, trainer.loggers, trainer.should_stop, pl_module._current_fx_name = kept
        if again._data_fetcher is not None:
            again._data_fetcher.teardown()


def results_of(loop: Any, trainer: Trainer) -> list[Result]:
    """What was logged for the whole evaluation in a run beside, to be asked for before it is over."""
    values = trainer.callback_metrics
    found: dict[str, Result] = {}
    for logged in loop._results.values():
        meta = logged.meta
        if not meta.on_epoch:
            continue
        name, for_loggers = loop._results._forked_name(logged, on_step=False)
        metric = None if logged.is_tensor else logged.value  # it synchronizes itself
        found[for_loggers] = Result(
            name=for_loggers,
            value=values[for_loggers] if for_loggers in values else loop._results._get_cache(logged, on_step=False),
            loader=meta.dataloader_idx,
            prog_bar=meta.prog_bar,
            logger=meta.logger,
            synced=meta.sync.should if metric is None else metric.sync_on_compute,
            group=meta.sync.group if metric is None else metric.process_group,
            rank_zero_only=meta.sync.rank_zero_only,
        )
        if name != for_loggers:
            found[name] = replace(found[for_loggers], name=name, prog_bar=False, logger=False)
    return list(found.values())


@contextmanager
def logging_for(trainer: Trainer, loader: int | None) -> Iterator[None]:
    """What is logged inside, after the last batch, counts as logged in the steps of one of several loaders.

    So it stands with the other values of that loader in what ``trainer.validate`` returns and prints.
    """
    if loader is None:
        yield
        return
    loop = loop_of(trainer)
    try:
        loop._results.dataloader_idx = loader
        yield
        for_loggers = trainer._logger_connector.update_eval_epoch_metrics()
    finally:
        loop._results.dataloader_idx = None
    for one in loop._logged_outputs:
        if one.keys() & for_loggers.keys():  # a name is one loader's alone
            one.update(for_loggers)


def _copied(connector: Any) -> Any:
    copied = copy.copy(connector)
    for name in _METRICS:
        setattr(copied, name, dict(getattr(connector, name)))
    return copied


def _place(trainer: Trainer) -> tuple[Any, str]:
    if trainer.state.fn == "fit":
        return trainer.fit_loop.epoch_loop, "val_loop"
    return trainer, "validate_loop" if trainer.state.fn == "validate" else "test_loop"


def _beside(first: Any, trainer: Trainer, before_hooks: Callable[[], None]) -> Any:
    again = copy.copy(first)

    def on_run_start() -> None:
        before_hooks()
        type(first).on_run_start(again)

    again.on_run_start = on_run_start
    again.trainer = _WithoutCallbacks(trainer)
    again.verbose = False
    again._combined_loader = copy.copy(first._combined_loader)
    again._combined_loader.flattened = [apart(loader) for loader in first._combined_loader.flattened]
    again._data_fetcher = None
    again._results = type(first._results)(training=False)
    again._module_mode = type(first._module_mode)()
    again._seen_batches_per_dataloader = defaultdict(int)
    again.batch_progress = type(first.batch_progress)()
    again.setup_data = _nothing  # it would ask the module for its loaders
    return again


class _WithoutCallbacks:
    """The trainer as the second run sees it. The module goes on seeing the trainer itself, callbacks and all."""

    callbacks: tuple[()] = ()

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __getattr__(self, name: str) -> Any:
        if name == "_trainer":  # of a copy that is being made, in which it is not there yet
            raise AttributeError(name)
        return getattr(self._trainer, name)


class _Silent:
    """Put before a logger's class: the logger's directories and names, and nothing is written."""

    def __getattribute__(self, name: str) -> Any:
        if name == "experiment":
            return DummyLogger().experiment
        if name in ("save", "finalize", "watch") or (name.startswith("log_") and name != "log_dir"):
            return _nothing
        return super().__getattribute__(name)


def _silent(logger: Logger) -> Logger:
    kind = type(logger)
    # not a copy: to be copied, some loggers start a run
    quiet: Any = object.__new__(type(kind.__name__, (_Silent, kind), {}))
    vars(quiet).update(vars(logger))
    return cast(Logger, quiet)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
