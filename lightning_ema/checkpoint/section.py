"""Where entries stand in a checkpoint, those of other systems too, and what differs from one run to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_ema.checkpoint.checks import shown
from lightning_ema.checkpoint.entry import damaged
from lightning_ema.schedules.text import as_whole

STATE_KEY_PREFIX = "EMACallback{"


def state_key(name: str) -> str:
    """Under which key of ``checkpoint["callbacks"]`` a callback of this name keeps its entry."""
    return f"{STATE_KEY_PREFIX}'name': {name!r}}}"


_WHERE = ("device",)  # a setting that changes where an update is made, and nothing about the average


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the settings in a file and those in force, and matters to the average: a line each.

    Numbers are alike that Python and YAML write differently, 1 and 1.0.
    """
    both = [(key, then.get(key, value), value) for key, value in now.items() if key not in _WHERE]
    differing = [each for each in both if as_whole(str(each[1])) != as_whole(str(each[2]))]
    return [f"{key}: {was} in the file, {value} now" for key, was, value in differing]


def other_settings(changed: Sequence[str]) -> str:
    """A warning where a run is resumed with other settings than its file was written with."""
    return f"the checkpoint was written with other settings; those given now hold: {'; '.join(changed)}."


def foreign(checkpoint: Mapping[str, Any]) -> tuple[int, int, dict[str, Tensor]] | None:
    """Steps, updates and live ``state_dict`` from a file of Lightning's ``WeightAveraging``; None for other files.

    In such a file ``state_dict`` is the average, too.
    """
    if "current_model_state" not in checkpoint or "averaging_state" not in checkpoint:
        return None
    updates = int(checkpoint["averaging_state"].get("n_averaged", 0))
    states = [s for k, s in checkpoint.get("callbacks", {}).items() if "WeightAveraging" in k and isinstance(s, dict)]
    steps = max([int(state.get("latest_update_step", 0)) for state in states], default=0)
    live: dict[str, Tensor] = checkpoint["current_model_state"]
    return max(steps, updates), updates, live


def find(checkpoint: Mapping[str, Any], state_key: str) -> dict[str, Any] | None:
    """This callback's entry as it is stored; None for a checkpoint that holds no averages of ours at all.

    Raises:
        ValueError: the checkpoint holds averages, but none under this name.
    """
    entries: Mapping[str, Any] = checkpoint.get("callbacks", {})
    if not isinstance(entries, Mapping):
        raise damaged([f"callbacks is {shown(entries)}; accepted is a dictionary"])
    if state_key in entries:
        entry: dict[str, Any] = entries[state_key]
        if not isinstance(entry, Mapping):
            raise damaged([f"the entry {state_key} is {shown(entry)}; accepted is a dictionary"])
        return entry
    others = [key for key in entries if key.startswith(STATE_KEY_PREFIX)]
    if others:
        raise ValueError(
            f"the checkpoint holds no average under {state_key}, but under {', '.join(others)}. Give the callback the "
            "name it had when the file was written, EMACallback(name=...)."
        )
    return None
