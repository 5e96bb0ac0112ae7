"""Frozen parameters that are changed in training all the same, as those of a momentum network. Knows torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ema.averaging.tracker import Tracker
from lightning_ema.distributed.base import local

SAMPLE = 4
"""Elements of each that are compared: whoever moves a network by hand moves all of it."""

Frozen = dict[str, Tensor]
"""A sample of each frozen parameter, by name."""


def frozen_now(tracker: Tracker) -> Frozen:
    """Samples of the parameters that take no part because they are frozen."""
    return {name: _sample(tensor) for name, tensor in tracker.tensors.frozen().items()}


def moved(tracker: Tracker, before: Frozen) -> list[str]:
    """The names of those that are frozen still and have other values than before."""
    now = tracker.tensors.frozen()
    return [n for n, sample in before.items() if n in now and not _alike(_sample(now[n]), sample)]


def _sample(tensor: Tensor) -> Tensor:
    return local(tensor).detach().flatten()[:SAMPLE].clone()


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first.cpu(), second.cpu().to(first.dtype))
