"""What goes into a checkpoint and what comes out of it: pure functions from dict to dict.

checkpoint["state_dict"]                 the average and the live rest, under the model's usual keys
checkpoint["callbacks"][<state key>]     counters, "config", "live": {name: tensor}, and "average": {name: tensor}
                                         only for what "state_dict" does not hold exactly
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_ema.state import check_state

STATE_KEY_PREFIX = "EMACallback{"


def pack(state: dict[str, Any], live: Mapping[str, Tensor], in_state_dict: bool) -> dict[str, Any]:
    """The callback's entry for an average.

    Args:
        state: the average's own ``state_dict()``.
        live: the live tensors by name.
        in_state_dict: whether the checkpoint's ``state_dict`` holds the average, in the dtype of the live tensors.

    Returns:
        Where it does, the live tensors and only those averages that are kept in another dtype; where it does not,
        every average and no live tensors.
    """
    if not in_state_dict:
        return {**state, "live": {}}
    wider = {name: average for name, average in state["average"].items() if average.dtype != live[name].dtype}
    return {**state, "live": dict(live), "average": wider}


def unpack(entry: dict[str, Any], module_tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The average's own state and the live tensors, from an entry made by :func:`pack`.

    Args:
        entry: the callback's entry.
        module_tensors: the tensors of the module into which the checkpoint's ``state_dict`` was loaded.

    Raises:
        ValueError: the format is newer, or entries are missing.
    """
    check_state(entry)
    live: dict[str, Tensor] = entry.get("live", {})
    held = {name: module_tensors[name] for name in live if name in module_tensors}
    absent = {name: tensor for name, tensor in live.items() if name not in module_tensors}
    return {**entry, "average": {**absent, **held, **entry["average"]}}, live


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
