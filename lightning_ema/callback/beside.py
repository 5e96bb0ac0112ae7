"""What stands beside a callback in a trainer: other callbacks, a strategy, and the metrics that files are kept by."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer

from lightning_ema.averaging.tracker import Tracker
from lightning_ema.callback.holder import Holder
from lightning_ema.callback.messages import monitors_another
from lightning_ema.callback.settings import CallbackSettings
from lightning_ema.evaluation import extra_pass
from lightning_ema.evaluation.passes import Passes
from lightning_ema.trainer import facts, strategies


def check_beside(trainer: Trainer, evaluating: Sequence[CallbackSettings], shard: bool) -> None:
    """Refuse a trainer beside whose strategy or callbacks an average would be wrong.

    Args:
        trainer: the trainer.
        evaluating: the settings of its EMACallbacks that evaluate an average.
        shard: whether an average is to be partitioned.

    Raises:
        ValueError: naming them and what to do instead.
    """
    strategies.check_strategy(trainer)
    if shard:
        strategies.check_shard(trainer)
    facts.check_callbacks(trainer, evaluated=bool(evaluating))
    for place, settings in enumerate(evaluating):
        for other in evaluating[:place]:
            if _patterns(settings) == _patterns(other):
                raise ValueError(two_evaluate(other.name, settings.name))


def check_no_overlap(tracker: Tracker) -> None:
    """Refuse two callbacks that evaluate averages of the same tensors.

    Raises:
        ValueError: naming both.
    """
    for other in tracker.weights.evaluated_beside(tracker.holds):
        raise ValueError(two_evaluate(other, tracker.holds.evaluated_by))


def two_evaluate(first: str, second: str) -> str:
    """Said where two callbacks evaluate averages of the same tensors."""
    return (
        f"the EMACallbacks {first!r} and {second!r} both evaluate an average of the same tensors, but these can carry "
        "only one average in an evaluation. Write evaluate='live' in one of them, or choose tensors apart by include "
        "and exclude."
    )


def warn_of_monitors(trainer: Trainer, holder: Holder, passes: Passes) -> None:
    """Warns where files are kept by the score of weights that their ``state_dict`` does not hold."""
    select = holder.settings.evaluation.select
    for monitor, mode in facts.monitored(trainer).items():
        if beside := extra_pass.named_beside(monitor, passes.suffixes()):
            holder.warn(monitors_another(monitor, mode, *beside, selects=select is not None))


def _patterns(settings: CallbackSettings) -> tuple[object, ...]:
    return settings.average.include, settings.average.exclude
