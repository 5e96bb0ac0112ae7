"""Where tensors lie in memory: which ones share it, and whether a tensor may be given other storage."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_ema.distributed.base import cut_of, local


def memory_of(tensor: Tensor) -> object:
    """Equal for tensors that show the same memory in the same way."""
    pointer = 0 if is_lazy(tensor) else local(tensor).data_ptr()
    if pointer == 0:  # not there yet, empty, or on the meta device
        return id(tensor)
    return pointer, tensor.dtype, tensor.shape, tensor.stride()


def storage_of(tensor: Tensor) -> int:
    """Where the storage lies; a number of its own for tensors without one (empty, lazy)."""
    pointer = 0 if is_lazy(tensor) else local(tensor).untyped_storage().data_ptr()
    return pointer or -id(tensor)


def owns_storage(tensor: Tensor) -> bool:
    """Whether the tensor is all of its storage, and the storage can be exchanged for another unnoticed.

    It cannot where the tensor is a view into something larger (a user's flat buffer, cuDNN's LSTM weights), where
    other processes read the storage (``share_memory_()``; on CUDA ``is_shared`` is always true and means nothing), or
    where a subclass of Tensor keeps its data elsewhere.
    """
    if cut_of(tensor).sharded:
        return False  # its forward pass reads memory that the shard is a view of
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    shared = tensor.device.type == "cpu" and tensor.is_shared()  # type: ignore[no-untyped-call]
    return whole and not shared and type(tensor) in (Tensor, nn.Parameter)


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements of the tensor are one number in memory."""
    if is_lazy(tensor):
        return False
    tensor = local(tensor)
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def overlapping(tensors: Sequence[Tensor]) -> set[int]:
    """The ``id`` of each tensor that shares part of its memory with another one."""
    spans: dict[int, list[tuple[int, int, int]]] = {}
    for whole in tensors:
        tensor = local(whole)
        if not is_lazy(tensor) and tensor.numel() > 0:
            extent = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            first = int(tensor.storage_offset())
            spans.setdefault(storage_of(whole), []).append((first, first + int(extent), id(whole)))
    found: set[int] = set()
    for span in spans.values():
        reach, longest = -1, 0
        for first, last, one in sorted(span):
            if first <= reach:
                found |= {one, longest}
            if last > reach:
                reach, longest = last, one
    return found
