"""The format in which an average is stored."""

from __future__ import annotations

from typing import Any

from torch import Tensor

COUNTERS = ("num_steps", "num_updates", "num_skipped", "last_update_step", "start_step")

FORMAT = 1
"""The format that is written, and the only one that is read so far."""


def tensor_sets(state: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Where a state, or a callback's entry made from one, holds tensors by their names: the dictionaries themselves."""
    sets = {key: state.get(key) for key in ("average", "live", "origin")}
    sets |= {f"others[{place}]": tensors for place, tensors in enumerate(state.get("others", ()))}
    return {key: tensors for key, tensors in sets.items() if isinstance(tensors, dict)}


def check_state(state: dict[str, Any]) -> None:
    """Refuse a state that this version cannot read.

    Raises:
        ValueError: naming the format found, or the entries missing.
    """
    if state.get("format") != FORMAT:
        raise ValueError(
            f"the state has format {state.get('format')!r}; this version of lightning_ema reads format {FORMAT}. "
            "Update lightning_ema to read files that a newer one wrote."
        )
    kinds: dict[str, type] = dict.fromkeys(COUNTERS, int) | {"started": bool, "config": dict, "average": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
    wrong += [
        f"{key}[{name!r}]"
        for key, tensors in tensor_sets(state).items()
        for name, value in tensors.items()
        if not isinstance(value, Tensor)
    ]
    if wrong:
        raise ValueError(
            f"the state is damaged, or was not written by lightning_ema: {', '.join(wrong)} missing or of the wrong "
            "kind. Take another checkpoint; its weights can still be loaded without the callback."
        )
