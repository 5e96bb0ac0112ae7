"""In-place arithmetic over lists of tensors: fast paths beside the plain reference they are tested equal to.

All functions expect to be called under ``torch.no_grad()``.
"""

from __future__ import annotations

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


def lerp_cast_(averages: list[Tensor], lives: list[Tensor], rate: float) -> None:
    """The same where dtypes or devices differ: through one small scratch tensor, never a full-size temporary."""
    scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for average, live in zip(averages, lives, strict=True):
        flat_average, flat_live = flat_alike(average, live)
        if flat_average is None or flat_live is None:
            average.lerp_(live.to(average.device, average.dtype), rate)
            continue
        key = (average.device, average.dtype)
        if key not in scratch:
            scratch[key] = torch.empty(CHUNK, device=average.device, dtype=average.dtype)
        for start in range(0, flat_average.numel(), CHUNK):
            part = flat_average[start : start + CHUNK]
            cast = scratch[key][: part.numel()].copy_(flat_live[start : start + CHUNK])
            part.lerp_(cast, rate)


def exchange_(first: Tensor, second: Tensor) -> None:
    """Exchanges the contents of two tensors of one shape and dtype, in place, through a small scratch tensor.

    An interruption (Ctrl-C) half way exchanges back what was done, so that nothing is lost or mixed.
    """
    flat_first, flat_second = flat_alike(first, second)
    if flat_first is None or flat_second is None:
        _exchange_whole(first, second)
        return
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
    distance = norm = 0.0
    for average, live in zip(averages, lives, strict=True):
        cast = live.to(average.device, average.dtype)
        distance += torch.linalg.vector_norm(cast - average).item() ** 2
        norm += torch.linalg.vector_norm(cast).item() ** 2
    return (distance / norm) ** 0.5 if norm > 0 else 0.0


def flat_alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Both tensors as vectors of their elements in one common memory order, without a copy; None where impossible.

    Possible where both have the same strides and fill their memory without gaps or overlaps: contiguous,
    channels_last, transposed.
    """
    if first.stride() != second.stride() or not _is_dense(first):
        return None, None
    return tuple(t.as_strided((t.numel(),), (1,), t.storage_offset()) for t in (first, second))  # type: ignore[return-value]


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
