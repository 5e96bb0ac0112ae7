"""Updates on a CUDA stream of their own, beside the next forward and backward pass. Knows torch only."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from lightning_ema.ops.step_hooks import call_before_step


class SideStream:
    """Puts updates on a stream of its own: behind the optimizer step before them, ahead of the next one.

    The stream waits for all that the training's stream holds when an update is submitted, and the training's stream
    waits for the update when an optimizer of torch is about to change parameters. The host waits for neither. Until
    then nothing may write to the live weights, so that what a forward pass writes to (buffers) is not to be submitted.

    Args:
        device: on which the weights and their averages lie.
        streams: ``torch.cuda``, or a module with the same streams.
    """

    def __init__(self, device: torch.device, streams: ModuleType = torch.cuda) -> None:
        self._device = device
        self._streams = streams
        self._stream: Any = None
        self._done: Any = None
        self._hook: RemovableHandle | None = None

    def submit(self, update: Callable[[], None]) -> None:
        """Puts ``update`` on the stream, behind all that the training's stream holds now."""
        self.finish()
        if self._stream is None:
            self._stream = self._streams.Stream(self._device)
        self._stream.wait_stream(self._streams.current_stream(self._device))
        try:
            with self._streams.stream(self._stream):
                update()
        finally:  # also a part of an update is waited for
            self._done = self._stream.record_event()
            self._hook = call_before_step(self.finish)

    def finish(self) -> None:
        """All that the training's stream is given from now on comes behind the update under way, if there is one."""
        if self._done is not None:
            self._streams.current_stream(self._device).wait_event(self._done)
            self._done = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def has_streams(device: torch.device) -> bool:
    """Whether :class:`SideStream` knows the streams of this device."""
    return device.type == "cuda"
