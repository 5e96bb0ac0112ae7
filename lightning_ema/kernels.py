"""In-place arithmetic over lists of tensors: fast paths beside the plain reference they are tested equal to.

All functions expect to be called under ``torch.no_grad()``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Elements handled at once where a scratch tensor is needed: 1 MiB of float32, whatever the size of the model."""


def lerp_reference_(averages: Sequence[Tensor], lives: Sequence[Tensor], rate: float) -> None:
    """``average += rate * (live - average)``, one tensor at a time, in the average's dtype and on its device."""
    for average, live in zip(averages, lives, strict=True):
        average.lerp_(live.to(average.device, average.dtype), rate)


def lerp_(averages: list[Tensor], lives: list[Tensor], rate: float) -> None:
    """The same for lists of one dtype on one device, in one call.

    ``torch._foreach_lerp_`` is private; torch's own ``AveragedModel`` rests on it too.
    """
    torch._foreach_lerp_(averages, lives, rate)


def lerp_cast_(averages: Sequence[Sequence[Tensor]], lives: Sequence[Tensor], rates: Sequence[float]) -> None:
    """The same where dtypes or devices differ, for several averages of the same live tensors.

    ``averages[i][k] += rates[i] * (lives[k] - averages[i][k])``: each live tensor is read and cast once, through one
    small scratch tensor, never a full-size temporary.
    """
    scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for live, *several in zip(lives, *averages, strict=True):
        first = several[0]
        flats = flat_alike(live, *several)
        if flats is None:
            cast = live.to(first.device, first.dtype)
            for average, rate in zip(several, rates, strict=True):
                average.lerp_(cast, rate)
            continue
        key = (first.device, first.dtype)
        if key not in scratch:
            scratch[key] = torch.empty(CHUNK, device=first.device, dtype=first.dtype)
        flat_live, *flat_averages = flats
        for start in range(0, live.numel(), CHUNK):
            part = flat_live[start : start + CHUNK]
            cast = scratch[key][: part.numel()].copy_(part)
            for average, rate in zip(flat_averages, rates, strict=True):
                average[start : start + CHUNK].lerp_(cast, rate)


def lerp_several_(averages: Sequence[list[Tensor]], lives: list[Tensor], rates: Sequence[float]) -> None:
    """The same for several averages of one dtype and device, in one pass over the live tensors.

    ``averages[i][k] += rates[i] * (lives[k] - averages[i][k])``, a stretch of at most ``CHUNK`` elements at a time,
    so that a live tensor is still in the cache when the next average reads it.
    """
    for stretch in stretches([live.numel() for live in lives]):
        for several, rate in zip(averages, rates, strict=True):
            lerp_(several[stretch], lives[stretch], rate)


def stretches(sizes: Sequence[int]) -> list[slice]:
    """Cuts a list of tensors of these sizes into stretches of at most ``CHUNK`` elements, or of one tensor."""
    cuts, held = [0], 0
    for place, size in enumerate(sizes):
        if held and held + size > CHUNK:
            cuts.append(place)
            held = 0
        held += size
    return [slice(start, end) for start, end in itertools.pairwise([*cuts, len(sizes)])]


def corrected(average: Tensor, live: Tensor, origin: Tensor, bias: float) -> Tensor:
    """``average + bias * (live - origin)`` as a new tensor, in the dtype and on the device of the average."""
    return torch.add(average, live.to(average.device, average.dtype) - origin, alpha=bias)


def exchange_(first: Tensor, second: Tensor) -> None:
    """Exchanges the contents of two tensors of one shape and dtype, in place, through a small scratch tensor.

    An interruption (Ctrl-C) half way exchanges back what was done, so that nothing is lost or mixed.
    """
    flats = flat_alike(first, second)
    if flats is None:
        _exchange_whole(first, second)
        return
    flat_first, flat_second = flats
    done = 0
    try:
        for start in range(0, flat_first.numel(), CHUNK):
            _exchange_whole(flat_first[start : start + CHUNK], flat_second[start : start + CHUNK])
            done = start + CHUNK
    except BaseException:
        for start in range(0, done, CHUNK):
            _exchange_whole(flat_first[start : start + CHUNK], flat_second[start : start + CHUNK])
        raise


def _exchange_whole(first: Tensor, second: Tensor) -> None:
    kept_first, kept_second = first.clone(), second.clone()
    try:
        first.copy_(kept_second)
        second.copy_(kept_first)
    except BaseException:
        first.copy_(kept_first)
        second.copy_(kept_second)
        raise


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
    """``[||live - average||^2, ||live||^2]`` over all tensors together, in float64, on the CPU."""
    sums = torch.zeros(2, dtype=torch.float64)
    for average, live in zip(averages, lives, strict=True):
        cast = live.to(average.device, average.dtype)
        sums[0] += torch.linalg.vector_norm(cast - average).item() ** 2
        sums[1] += torch.linalg.vector_norm(cast).item() ** 2
    return sums


def ratio(squares: Tensor) -> float:
    """The root of the first over the root of the second; 0 where that is 0."""
    difference, norm = squares.sqrt().tolist()
    return float(difference / norm) if norm > 0 else 0.0


def flat_alike(*tensors: Tensor) -> list[Tensor] | None:
    """The tensors as vectors of their elements in one common memory order, without a copy; None where impossible.

    Possible where all have the same strides and fill their memory without gaps or overlaps: contiguous,
    channels_last, transposed.
    """
    if any(tensor.stride() != tensors[0].stride() for tensor in tensors) or not _is_dense(tensors[0]):
        return None
    return [tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()) for tensor in tensors]


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
