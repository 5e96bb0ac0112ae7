"""Averages in host memory, updated beside the training from weights on an accelerator. Knows torch only."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_ema.kernels import CHUNK, flat_alike


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
    before it is absorbed. They must not change meanwhile, so that every optimizer of torch waits before its step;
    forward and backward pass do not.

    Attributes:
        waits: how often an update or an optimizer had to wait for the one before.
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
        self._hook = register_optimizer_step_pre_hook(self._before_step)
        self._thread.start()

    def finish(self) -> None:
        """Waits for the update under way, if there is one.

        Raises:
            Whatever it raised.
        """
        if self._thread is None:
            return
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

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._wait()

    def _run(self, updates: Sequence[Update], ready: Sequence[Any]) -> None:
        try:
            with torch.no_grad():
                for update, event in zip(updates, ready, strict=True):
                    absorb_through_buffers_(update, event)
        except BaseException as error:  # for the thread that waits
            self._error = error

    def __getstate__(self) -> dict[str, Any]:
        self.finish()
        return {"waits": self.waits, "_thread": None, "_hook": None, "_error": None}


@dataclass(frozen=True, eq=False)
class _Chunk:
    live: Tensor
    averages: list[Tensor]


def absorb_through_buffers_(update: Update, ready: Any = None) -> None:
    """Makes an update through two buffers beside the averages, once the event ``ready`` of the device has passed."""
    device = update.lives[0].device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    if stream is not None and ready is not None:
        stream.wait_event(ready)
    buffers = [torch.empty(CHUNK, dtype=update.lives[0].dtype, pin_memory=stream is not None) for _ in range(2)]
    before: tuple[Tensor, Any, _Chunk] | None = None
    for number, chunk in enumerate(_chunks(update)):
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            copy = _room(buffers[number % 2], chunk.live).copy_(chunk.live, non_blocking=stream is not None)
            copied = _now(device)
        if before is not None:
            _absorb(*before, update.rates)
        before = copy, copied, chunk
    if before is not None:
        _absorb(*before, update.rates)


def _absorb(copy: Tensor, copied: Any, chunk: _Chunk, rates: Sequence[float]) -> None:
    if copied is not None:
        copied.synchronize()
    live = copy.to(chunk.averages[0].dtype)
    for average, rate in zip(chunk.averages, rates, strict=True):
        average.lerp_(live, rate)


def _chunks(update: Update) -> Iterator[_Chunk]:
    for live, *several in zip(update.lives, *update.averages, strict=True):
        flats = flat_alike(live.detach(), *several)
        if flats is None:  # memory with gaps: the whole tensor at once
            yield _Chunk(live.detach(), several)
            continue
        flat_live, *flat_averages = flats
        for start in range(0, live.numel(), CHUNK):
            end = start + CHUNK
            yield _Chunk(flat_live[start:end], [average[start:end] for average in flat_averages])


def _room(buffer: Tensor, live: Tensor) -> Tensor:
    fits = live.numel() <= buffer.numel()
    return buffer[: live.numel()].view(live.shape) if fits else torch.empty(live.shape, dtype=live.dtype)


def _now(device: torch.device) -> Any:
    """An event behind what is on the device's current queue; None where work is done at once."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
