"""Lists of tensors in chunks that a small scratch holds: several small tensors at once, large ones in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

WORTH_CUTTING = 16
"""A tensor is cut to fill the room that is left where it is larger than this part of a chunk: a cut costs time."""


def chunks(lists: Sequence[Sequence[Tensor]], size: int) -> Iterator[list[list[Tensor]]]:
    """Cuts several lists alike, in their order, without a copy.

    Args:
        lists: tensors of the same shapes in each list.
        size: the most elements that the tensors of one list have together in one chunk.

    Yields:
        Lists of views, one for each of ``lists``.
    """
    chunk: list[Sequence[Tensor]] = []
    room = size
    for tensors in zip(*lists, strict=True):
        rest = tensors[0].numel()
        if rest <= room:
            chunk.append(tensors)
            room -= rest
            continue
        flats = flat_alike(*tensors) if rest * WORTH_CUTTING > size else None
        if flats is None:
            if chunk:
                yield _transposed(chunk)
            chunk, room = [], size
            if rest <= size:
                chunk, room = [tensors], size - rest
            else:
                yield from chunks(_split(tensors, size), size)
            continue
        sizes = [room, *[size] * ((rest - room) // size), (rest - room) % size]
        sizes = [count for count in sizes if count > 0]
        for pieces in zip(*(torch.split(flat, sizes) for flat in flats), strict=True):
            if room == 0:
                yield _transposed(chunk)
                chunk, room = [], size
            chunk.append(pieces)
            room -= pieces[0].numel()
    if chunk:
        yield _transposed(chunk)


def flat_alike(*tensors: Tensor) -> list[Tensor] | None:
    """The tensors as vectors of their elements in one common memory order, without a copy; None where impossible.

    Possible where all have the same strides and fill their memory without gaps or overlaps: contiguous,
    channels_last, transposed.
    """
    if any(tensor.stride() != tensors[0].stride() for tensor in tensors) or not is_dense(tensors[0]):
        return None
    return [tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()) for tensor in tensors]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill the memory from the first to the last, in any order, each with memory of its own."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _split(tensors: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    """Parts of at most ``size`` elements, or of one place along the longest dimension."""
    first = tensors[0]
    longest = max(range(first.dim()), key=first.size)
    places = max(1, size * first.size(longest) // first.numel())
    return [torch.split(tensor, places, longest) for tensor in tensors]


def _transposed(chunk: list[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [list(each) for each in zip(*chunk, strict=True)]


def shaped(part: Tensor, tensor: Tensor) -> Tensor:
    """A vector in the shape of a tensor with as many elements, and in its memory order where it has one."""
    if tensor.dim() == 1:
        return part
    if is_dense(tensor):
        return part.as_strided(tensor.shape, tensor.stride(), part.storage_offset())
    return part.view(tensor.shape)
