"""New tensors for averages: where they lie, in which dtype, and what of them this process keeps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ema.averaging.pair import Pair
from lightning_ema.averaging.settings import Settings
from lightning_ema.distributed.base import Cut, cut_of, same_cut
from lightning_ema.distributed.partition import can_be_partitioned, partitions
from lightning_ema.distributed.processes import rank, world_size
from lightning_ema.modules.named_tensors import Candidate, Survey


class Placement:
    """Gives tensors their averages, once these have started.

    Args:
        settings: the dtype, the device and how many averages are asked for.
        into: the module whose tensors are to be the averages; None to make new ones.
        partitioned: whether averages of whole parameters are split among processes.

    Attributes:
        keeps_origin: whether the live weights of the start are kept, for schedules that correct for them.
    """

    def __init__(self, settings: Settings, into: Survey | None, partitioned: bool) -> None:
        self.keeps_origin = any(schedule.corrects for schedule in settings.decays)
        self._settings = settings
        self._partitioned = partitioned
        self._targets = None if into is None else {n: c.tensor for c in into.candidates for n in c.names}

    def cuts(self, taken: Sequence[Candidate], before: dict[str, Pair]) -> dict[str, Cut]:
        """How the averages of tensors are cut, by name. Those that have averages already stay as they are.

        Args:
            taken: what is averaged.
            before: the pairs that there were.
        """
        kept = {c.name: before[c.name].cut for c in taken if _goes_on(c, before.get(c.name))}
        new = [candidate for candidate in taken if candidate.name not in kept]
        split = [c for c in new if self._partitioned and self._is_split(c)]
        # a process group is asked only here: it may be gone after a run
        parts = partitions([c.tensor for c in split], rank(), world_size()) if split else ()
        among = {candidate.name: part for candidate, part in zip(split, parts, strict=True)}
        return kept | {candidate.name: cut_of(candidate.tensor, among.get(candidate.name)) for candidate in new}

    def pair(self, candidate: Candidate, cut: Cut, known: Pair | None) -> Pair:
        """A tensor with its averages: those that it has, moved and cast; else copies of the tensor as it is.

        Args:
            candidate: the tensor.
            cut: from :meth:`cuts`.
            known: the pair that there was for it.

        Raises:
            ValueError: the module given as ``into`` has no tensor like it.
            RuntimeError: the tensor lies in memory in another way, and its average is partitioned.
        """
        if self._targets is not None:
            return Pair(candidate, [_target(candidate, self._targets)], cut)
        live, pair = candidate.tensor, Pair(candidate, [], cut)
        if known is not None and known.averages and known.shape != live.shape:
            warnings.warn(
                f"{candidate.name} changed its shape from {tuple(known.shape)} to {tuple(live.shape)}: its average "
                "starts again from the live tensor.",
                stacklevel=2,
            )
        keeps_origin = self.keeps_origin and not candidate.is_buffer
        dtype, device = self._home(live)
        if known is not None and _goes_on(candidate, known):
            cut.check(candidate.name, live)
            tensors = [tensor.to(device=device, dtype=dtype) for tensor in known.stored]
        else:
            tensors = [_copy(pair, dtype, device) for _ in range(len(self._settings.decays) + keeps_origin)]
        pair.averages = tensors[: len(self._settings.decays)]
        pair.origin = tensors[-1] if keeps_origin else None
        return pair

    def _is_split(self, candidate: Candidate) -> bool:
        """Not buffers, which are small, and other ones in each process; nor what is cut already, or has gaps."""
        whole = not candidate.is_buffer and not cut_of(candidate.tensor).sharded
        return whole and can_be_partitioned(candidate.tensor.detach())

    def _home(self, live: Tensor) -> tuple[torch.dtype, torch.device]:
        dtype = self._settings.dtype
        if dtype is None:
            dtype = live.dtype if torch.finfo(live.dtype).bits >= 32 else torch.float32
        elif live.is_complex():
            dtype = dtype.to_complex()
        return dtype, self._settings.device or live.device


def _goes_on(candidate: Candidate, known: Pair | None) -> bool:
    return known is not None and bool(known.averages) and known.shape == candidate.tensor.shape


def _copy(pair: Pair, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy of what this process keeps of the live tensor."""
    with torch.inference_mode(False), torch.no_grad():  # else one made in a validation could not be trained on
        kept = pair.beside(pair.live)
        return pair.cut.empty_like(kept, dtype, device).copy_(kept)


def _target(candidate: Candidate, targets: dict[str, Tensor]) -> Tensor:
    target = targets.get(candidate.name)
    if target is None or target.shape != candidate.tensor.shape:
        found = "has no such tensor" if target is None else f"has shape {tuple(target.shape)}"
        raise ValueError(
            f"into: {candidate.name} of shape {tuple(candidate.tensor.shape)} is averaged, but the module given as "
            f"into {found}. It must be built like the averaged module; exclude=[...] leaves tensors out."
        )
    if not same_cut(target, candidate.tensor):
        raise ValueError(
            f"into: {candidate.name} is sharded in another way than the tensor of that name in the module given as "
            "into. Apply the same fully_shard and parallelize_module calls to both."
        )
    return target.detach()
