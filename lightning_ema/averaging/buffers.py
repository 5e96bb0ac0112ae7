"""Buffers that carry no average: what an evaluation of other weights writes to them is put back. Knows torch alone."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ema.distributed.base import local
from lightning_ema.modules.named_tensors import BufferPlace


@dataclass(frozen=True, eq=False)
class Noted:
    """A buffer as it was when a swap began.

    Attributes:
        place: where it hangs.
        tensor: the tensor that hung there.
        contents: a copy of what it held.
    """

    place: BufferPlace
    tensor: Tensor
    contents: Tensor


def note(places: Iterable[BufferPlace], but: Set[int]) -> list[Noted]:
    """Notes buffers before other weights are carried, but for tensors of these ``id``s, which carry an average too."""
    noted = []
    with torch.inference_mode(False), torch.no_grad():
        for place in places:
            tensor = place.table.get(place.leaf)
            if tensor is not None and id(tensor) not in but:
                noted.append(Noted(place, tensor, local(tensor).detach().clone()))
    return noted


def put_back(noted: Iterable[Noted]) -> list[BufferPlace]:
    """Gives them back what they held; gives those that had been written to, or replaced.

    The others are not written: autograd may keep them for a backward pass.
    """
    written = []
    with torch.inference_mode(False), torch.no_grad():
        for each in noted:
            table, leaf, now = each.place.table, each.place.leaf, local(each.tensor)
            replaced = leaf in table and table[leaf] is not each.tensor
            if replaced:
                table[leaf] = each.tensor
            changed = not _alike(now, each.contents)
            if changed and now.shape != each.contents.shape:
                each.tensor.data = each.contents
            elif changed:
                now.copy_(each.contents)
            if replaced or changed:
                written.append(each.place)
    return written


def buffers_put_back(places: Iterable[BufferPlace]) -> str:
    """Said when buffers of no normalization or observer layer are put back for the first time."""
    names = [place.name for place in places]
    return (
        f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}: written to while the module carried the average, "
        f"and put back, so that training goes on as without that. To keep what is written, exclude={names[:4]!r}."
    )


def _alike(now: Tensor, then: Tensor) -> bool:
    if now.shape != then.shape or now.dtype != then.dtype or now.device != then.device:
        return False
    return torch.equal(now, then) or (then.is_floating_point() and torch.equal(now.nan_to_num(), then.nan_to_num()))
