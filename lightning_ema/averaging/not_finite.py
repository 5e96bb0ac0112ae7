"""Averages that are not finite: which of their tensors, and what is said of them. Knows torch, not Lightning."""

from __future__ import annotations

from lightning_ema.averaging.tracker import Tracker
from lightning_ema.distributed.base import local
from lightning_ema.ops.lerp import all_finite


def not_finite(tracker: Tracker) -> list[str]:
    """The names of what is not finite in one of the averages, as far as it lies in this process."""
    stored = [pair for pair in tracker.pairs() if pair.averages]
    if all_finite([local(average) for pair in stored for average in pair.averages]):
        return []
    return [pair.name for pair in stored if not all_finite([local(average) for average in pair.averages])]


def seen_not_finite(names: list[str], step: int) -> str:
    """Said at the first sight of an average that is not finite.

    Args:
        names: of its tensors that are not.
        step: at which it was seen.
    """
    which = f": {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if names else ""
    return (
        f"the average is not finite, seen at step {step}{which}. Live weights that were NaN or infinite were mixed in "
        "at this step or before, and it stays so, whatever the live weights do: so are the scores and the files. Go "
        f"back to a file from before, and write on_nonfinite='skip', which leaves such updates out."
    )
