"""In-place arithmetic over lists of tensors: fast paths beside the plain reference they are tested equal to.

All functions expect to be called under ``torch.no_grad()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_ema.ops.chunks import chunks, shaped

STAGED = 1 << 19
"""Elements of a scratch tensor in updates: 2 MiB of float32, whatever the size of the model. Fewer took longer."""

CHUNK = 1 << 18
"""Elements of a scratch tensor elsewhere: 1 MiB of float32."""


def lerp_reference_(averages: Sequence[Tensor], lives: Sequence[Tensor], rate: float) -> None:
    """``average += rate * (live - average)``, one tensor at a time, in the average's dtype and on its device."""
    for average, live in zip(averages, lives, strict=True):
        average.lerp_(live.to(average.device, average.dtype), rate)


def lerp_(averages: list[Tensor], lives: list[Tensor], rate: float) -> None:
    """The same for lists of one dtype on one device, in one call.

    ``torch._foreach_lerp_`` is private; torch's own ``AveragedModel`` rests on it too.
    """
    torch._foreach_lerp_(averages, lives, rate)


def lerp_alike_(averages: Sequence[Sequence[Tensor]], lives: Sequence[Tensor], rates: Sequence[float]) -> None:
    """The same for several averages: ``averages[i][k] += rates[i] * (lives[k] - averages[i][k])``."""
    AlikeLerp(averages, lives)(rates)


def lerp_cast_(averages: Sequence[Sequence[Tensor]], lives: Sequence[Tensor], rates: Sequence[float]) -> None:
    """The same where the live tensors are of another dtype or on another device than the averages, which share theirs.

    Each live tensor is read and cast once, through one small scratch tensor, never a full-size temporary.
    """
    CastLerp(averages, lives)(rates)


Lerp = Callable[[Sequence[float]], None]
"""An update of lists that it knows: ``averages[i][k] += rates[i] * (lives[k] - averages[i][k])`` for given ``rates``.

It may hold views of the tensors: one that is given other storage asks for a new update."""


class AlikeLerp:
    """:func:`lerp_alike_` for many updates of the same tensors, which are cut into chunks only once.

    Several averages take a chunk of at most ``STAGED`` elements at a time, in one pass over the live tensors, which
    are still in the cache when the next average reads them.

    Args:
        averages: lists of tensors, all of one dtype on one device.
        lives: tensors of the same shapes, dtype and device.
    """

    def __init__(self, averages: Sequence[Sequence[Tensor]], lives: Sequence[Tensor]) -> None:
        lists = [list(each) for each in (lives, *averages)]
        self._chunks = [lists] if len(averages) == 1 else list(chunks(lists, STAGED))

    def __call__(self, rates: Sequence[float]) -> None:
        """``averages[i][k] += rates[i] * (lives[k] - averages[i][k])``."""
        for lives, *averages in self._chunks:
            for part, rate in zip(averages, rates, strict=True):
                lerp_(part, lives, rate)


class CastLerp:
    """:func:`lerp_cast_` for many updates of the same tensors, which are cut into chunks only once.

    Args:
        averages: lists of tensors, all of one dtype on one device.
        lives: tensors of the same shapes.
    """

    def __init__(self, averages: Sequence[Sequence[Tensor]], lives: Sequence[Tensor]) -> None:
        self._chunks = list(_staged([lives, *averages], STAGED, None))

    def __call__(self, rates: Sequence[float]) -> None:
        """``averages[i][k] += rates[i] * (lives[k] - averages[i][k])``."""
        for _, casts, (lives, *averages) in self._chunks:
            torch._foreach_copy_(casts, lives)
            for part, rate in zip(averages, rates, strict=True):
                lerp_(part, casts, rate)


def _staged(
    lists: Sequence[Sequence[Tensor]], size: int, dtype: torch.dtype | None
) -> Iterator[tuple[Tensor, list[Tensor], list[list[Tensor]]]]:
    """Portions with one scratch tensor for all: its used part, views of that like the tensors, and the lists.

    The scratch is of ``dtype``, or that of the second list, on whose device it lies.
    """
    targets = lists[1]
    if not targets:
        return
    count = min(size, sum(tensor.numel() for tensor in targets))
    scratch = torch.empty(count, dtype=dtype or targets[0].dtype, device=targets[0].device)
    for lists_here in chunks(lists, size):
        sizes = [tensor.numel() for tensor in lists_here[1]]
        used = scratch[: sum(sizes)]
        views = [shaped(part, tensor) for part, tensor in zip(torch.split(used, sizes), lists_here[1], strict=True)]
        yield used, views, lists_here


def corrected(average: Tensor, live: Tensor, origin: Tensor, bias: float) -> Tensor:
    """``average + bias * (live - origin)`` as a new tensor, in the dtype and on the device of the average."""
    return torch.add(average, live.to(average.device, average.dtype) - origin, alpha=bias)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is NaN or infinite. Reads every tensor once; on an accelerator the answer is waited for."""
    if not tensors:
        return True
    sums = [tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    device = sums[0].device
    if torch.stack([total.abs().to(device, torch.float64) for total in sums]).isfinite().all():
        return True
    # the sum of large finite numbers can overflow: only now is it worth looking at each element
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def relative_distance(averages: Sequence[Tensor], lives: Sequence[Tensor]) -> float:
    """``||live - average|| / ||live||`` over all tensors together, in float64 from float32 parts; 0 for no tensors."""
    return ratio(squared_norms(averages, lives))


def squared_norms(averages: Sequence[Tensor], lives: Sequence[Tensor]) -> Tensor:
    """``[||live - average||^2, ||live||^2]`` over all tensors together, in float64, on the CPU.

    Each chunk of ``CHUNK`` elements is summed in the averages' dtype, at least float32.
    """
    kinds = [(average.device, average.dtype) for average in averages]
    sums = torch.zeros(2, dtype=torch.float64)
    for kind in dict.fromkeys(kinds):
        places = [place for place, this in enumerate(kinds) if this == kind]
        sums += _squared_norms([averages[place] for place in places], [lives[place] for place in places])
    return sums


def _squared_norms(averages: Sequence[Tensor], lives: Sequence[Tensor]) -> Tensor:
    device, dtype = averages[0].device, torch.promote_types(averages[0].dtype, torch.float32)
    sums: list[Tensor] = []
    for scratch, views, (own, kept) in _staged([lives, averages], CHUNK, dtype):
        first = own[0]
        if len(own) == 1 and first.dim() == 1 and (first.device, first.dtype) == (device, dtype):
            norm = torch.vdot(first, first).real  # read where it lies
            torch.sub(first, kept[0], out=scratch)
        else:
            torch._foreach_copy_(views, own)
            norm = torch.vdot(scratch, scratch).real
            torch._foreach_sub_(views, kept)
        sums.append(torch.stack([torch.vdot(scratch, scratch).real, norm]))
    return torch.stack(sums).cpu().double().sum(0)


def ratio(squares: Tensor) -> float:
    """The root of the first over the root of the second; 0 where that is 0."""
    difference, norm = squares.sqrt().tolist()
    return float(difference / norm) if norm > 0 else 0.0
