"""Averages in host memory, updated beside the training from weights on an accelerator. Knows torch only."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_ema.ops.chunks import chunks, shaped
from lightning_ema.ops.lerp import CHUNK, lerp_alike_, lerp_cast_
from lightning_ema.ops.step_hooks import call_before_step


@dataclass(frozen=True, eq=False)
class Update:
    """``averages[i][k] += rates[i] * (lives[k] - averages[i][k])``.

    Attributes:
        averages: in host memory, for each decay an average of each live tensor.
        lives: on one device, of one dtype.
        rates: one for each decay.
    """

    averages: Sequence[Sequence[Tensor]]
    lives: Sequence[Tensor]
    rates: Sequence[float]


class Offload:
    """Runs ``average += rate * (live - average)`` in a thread of its own, one update at a time.

    The live weights pass through two pinned buffers of ``CHUNK`` elements in turn: while one chunk is copied, the one
    before the update has read it. They must not change meanwhile, so every optimizer of torch waits before its step;
    forward and backward pass do not, so that what a forward pass writes to (buffers) must be given as copies.

    Attributes:
        waits: how often an update, an optimizer, or a swap of another average had to wait for the one before.
    """

    def __init__(self) -> None:
        self.waits = 0
        self._thread: threading.Thread | None = None
        self._hook: RemovableHandle | None = None
        self._error: BaseException | None = None

    def submit(self, updates: Sequence[Update]) -> None:
        """Begins updates with the live weights as they are now; first waits for those before."""
        self._wait()
        ready = [_now(update.lives[0].device) for update in updates]  # behind what the optimizer has put on the queue
        self._thread = threading.Thread(target=self._run, args=(updates, ready), daemon=True)
        self._hook = call_before_step(self._wait)
        self._thread.start()

    def finish(self) -> None:
        """Waits for the update under way, if there is one.

        Raises:
            Whatever it raised.
        """
        if self._thread is None:
            return
        if self._thread.ident is not None:  # else the system had no thread to give, and submit() has said so
            self._thread.join()
        self._thread = None  # after the join, which Ctrl-C may interrupt
        if self._hook is not None:
            self._hook.remove()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _wait(self) -> None:
        self.waits += self._thread is not None and self._thread.is_alive()
        self.finish()

    def _run(self, updates: Sequence[Update], ready: Sequence[Any]) -> None:
        try:
            with torch.no_grad():
                for update, event in zip(updates, ready, strict=True):
                    update_through_buffers_(update, event)
        except BaseException as error:  # for the thread that waits
            self._error = error

    def __getstate__(self) -> dict[str, Any]:
        self.finish()
        return {"waits": self.waits, "_thread": None, "_hook": None, "_error": None}


def update_through_buffers_(update: Update, ready: Any = None) -> None:
    """Makes an update through two buffers beside the averages, once the event ``ready`` of the device has passed."""
    device = update.lives[0].device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    if stream is not None and ready is not None:
        stream.wait_event(ready)
    lives = [live.detach() for live in update.lives]
    buffers = [torch.empty(CHUNK, dtype=lives[0].dtype, pin_memory=stream is not None) for _ in range(2)]
    before: tuple[list[Tensor], Any, list[list[Tensor]]] | None = None
    for number, (here, *averages) in enumerate(chunks([lives, *update.averages], CHUNK)):
        sizes = [live.numel() for live in here]
        parts = torch.split(buffers[number % 2][: sum(sizes)], sizes)
        copies = [shaped(part, average) for part, average in zip(parts, averages[0], strict=True)]
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            torch._foreach_copy_(copies, here, non_blocking=stream is not None)
            copied = _now(device)
        if before is not None:
            _update(*before, update.rates)
        before = copies, copied, averages
    if before is not None:
        _update(*before, update.rates)


def _update(copies: list[Tensor], copied: Any, averages: list[list[Tensor]], rates: Sequence[float]) -> None:
    if copied is not None:
        copied.synchronize()
    alike = copies[0].dtype == averages[0][0].dtype
    (lerp_alike_ if alike else lerp_cast_)(averages, copies, rates)


def _now(device: torch.device) -> Any:
    """An event behind what is on the device's current queue; None where work is done at once."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
