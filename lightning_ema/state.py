"""The format in which an average is stored."""

from __future__ import annotations

from typing import Any

FORMAT = 1
"""The format that is written, and the only one that is read so far."""


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
    needed = {"num_steps", "num_updates", "num_skipped", "last_update_step", "start_step", "started", "average"}
    if missing := sorted(needed - state.keys()):
        raise ValueError(f"the state lacks {', '.join(missing)}; it is damaged or was not written by lightning_ema.")
