"""What goes into a checkpoint and what comes out of it: pure functions from dict to dict.

checkpoint["state_dict"]                 the average and the live rest, under the model's usual keys
checkpoint["callbacks"][<state key>]     counters, "config", "live": {name: tensor}, and "average": {name: tensor}
                                         only for what "state_dict" does not hold exactly
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_ema.checkpoint.state import check_state
from lightning_ema.schedules.text import as_whole

STATE_KEY_PREFIX = "EMACallback{"


def state_key(name: str) -> str:
    """Under which key of ``checkpoint["callbacks"]`` a callback of this name keeps its entry."""
    return f"{STATE_KEY_PREFIX}'name': {name!r}}}"


def pack(
    state: dict[str, Any], live: Mapping[str, Tensor], model: Mapping[str, Tensor], in_state_dict: bool
) -> dict[str, Any]:
    """The callback's entry for an average.

    Args:
        state: the average's own ``state_dict()``.
        live: the live tensors that ``checkpoint["state_dict"]`` does not hold, by name.
        model: the averaged tensors of the module, for their dtype.
        in_state_dict: whether ``checkpoint["state_dict"]`` holds the average, in the dtype of the model.

    Returns:
        ``state`` with ``live`` and the ``names`` of what is averaged. Where ``state_dict`` holds the average, only
        those averages are left in it that are kept in another dtype.
    """
    average: dict[str, Tensor] = state["average"]
    stored = {name: a for name, a in average.items() if not in_state_dict or a.dtype != model[name].dtype}
    return {**state, "names": list(average), "average": stored, "live": dict(live)}


def unpack(entry: dict[str, Any], model: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The average's own state and the live tensors, from an entry made by :func:`pack`.

    Args:
        entry: the callback's entry.
        model: all tensors of the module into which the checkpoint's ``state_dict`` was loaded.

    Raises:
        ValueError: the format is newer, entries are damaged, or live tensors do not fit the module.
    """
    check_state(entry)
    names, stored, live = entry.get("names"), entry["average"], entry.get("live")
    if not isinstance(names, list) or not isinstance(live, dict):
        raise ValueError("the state is damaged: names or live missing. Take another checkpoint.")
    problems = [f"{name}: not in the module" for name in [*live, *names] if name not in model]
    problems += [
        f"{name}: shape {tuple(value.shape)} in the checkpoint, {tuple(model[name].shape)} in the module"
        for name, value in {**live, **stored}.items()
        if name in model and value.shape != model[name].shape
    ]
    if problems:
        raise ValueError(
            "the checkpoint does not fit the module:\n  " + "\n  ".join(dict.fromkeys(problems)) + "\n"
            "Build the module as it was when the checkpoint was written."
        )
    average = {name: stored.get(name, model[name]) for name in names}
    return {**entry, "average": average}, live


_WHERE = ("device", "overlap")  # settings that change where an update is made, and nothing about the average


def changes(entry: dict[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What differs between the settings in a file and those in force, and matters to the average: a line each.

    Numbers are alike that Python and YAML write differently, 1 and 1.0.
    """
    then = entry["config"]
    both = [(key, then.get(key, now), now) for key, now in config.items() if key not in _WHERE]
    differing = [each for each in both if as_whole(str(each[1])) != as_whole(str(each[2]))]
    return [f"{key}: {was} in the file, {now} now" for key, was, now in differing]


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
    """This callback's entry; None for a checkpoint that holds no averages of ours at all.

    Raises:
        ValueError: the checkpoint holds averages, but none under this name.
    """
    entries: Mapping[str, Any] = checkpoint.get("callbacks", {})
    if state_key in entries:
        entry: dict[str, Any] = entries[state_key]
        return entry
    others = [key for key in entries if key.startswith(STATE_KEY_PREFIX)]
    if others:
        raise ValueError(
            f"the checkpoint holds no average under {state_key}, but under {', '.join(others)}. Give the callback the "
            "name it had when the file was written, EMACallback(name=...)."
        )
    return None
