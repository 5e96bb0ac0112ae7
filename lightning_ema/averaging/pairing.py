"""The tensors of a module beside their averages, paired by name and kept so while the module changes."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_ema.averaging.pair import Pair
from lightning_ema.averaging.settings import Settings
from lightning_ema.averaging.update import Absorption
from lightning_ema.distributed.dtensor import Groups, is_sharded, local, same_cut
from lightning_ema.distributed.partition import Share, can_be_shared, shares
from lightning_ema.modules.named_tensors import Candidate, Survey, check_patterns, joins, owns_storage


class Pairing:
    """Pairs by name what is averaged with its average.

    Modules change under training: layers are unfrozen, materialized, replaced, moved or cast. Every update looks for
    that, at a few tenths of a microsecond a tensor, and pairs again where it finds something.

    Attributes:
        started: whether averages are stored.
        identities: ``id`` of every averaged live tensor.
    """

    def __init__(self, module: nn.Module, settings: Settings, into: nn.Module | None, shard: bool) -> None:
        self.started = False
        self.identities: frozenset[int] = frozenset()
        self._module = module
        self._settings = settings
        self._shard = shard
        self._into = None if into is None else Survey(into)
        self._targets = None if self._into is None else {n: c.tensor for c in self._into.candidates for n in c.names}
        self._keeps_origin = any(schedule.corrects for schedule in settings.decays)
        self._absorption = Absorption(settings.overlap)
        self._pairs: dict[str, Pair] = {}
        self._admitted: set[str] = set()
        self._unbounded: set[str] = set()
        self._seen_through = False
        self._refresh()
        check_patterns(self._survey, settings.include, settings.exclude)
        if not any(not pair.candidate.is_buffer for pair in self._pairs.values()) and not self._waiting_lazy():
            raise ValueError(
                f"{type(module).__name__} has nothing to average: no parameter that requires grad"
                f"{' matches include and exclude' if settings.include or settings.exclude else ''}. To average frozen "
                "parameters write include_frozen=True."
            )

    def pairs(self) -> Iterable[Pair]:
        """All pairs, in the order of the module, once an update under way is finished."""
        self._absorption.finish()
        return self._pairs.values()

    @property
    def waits(self) -> int:
        """How often training had to wait for an update in host memory."""
        return self._absorption.waits

    @property
    def groups(self) -> Groups:
        """The processes among which some of the averages are cut. Not kept: they cannot be copied or pickled."""
        return tuple(dict.fromkeys(group for pair in self.pairs() for group in pair.groups))

    def release(self) -> None:
        """No update follows soon: gives up views of the live tensors, once an update under way is finished.

        The views would keep the memory that a module is moved away from, and the update would still read it.
        """
        self._absorption.finish()
        self._absorption.release()

    def start(self) -> None:
        """Sets every average to the live tensor."""
        self.started = True
        self._refresh()
        with torch.no_grad():
            for pair in self._pairs.values():
                for tensor in pair.stored:
                    tensor.copy_(pair.beside(pair.live))

    def forget(self) -> None:
        """Gives the averages up, as before the start."""
        self.started = False
        for pair in self.pairs():
            pair.averages, pair.origin, pair.share = [], None, None
        self._arrange()

    def absorb(self, lives: list[Tensor], rates: Sequence[float]) -> None:
        """``average += rate * (live - average)`` for each decay's average, with ``lives`` from :meth:`lives`."""
        self._absorption.absorb(lives, rates)

    def lives(self) -> list[Tensor]:
        """The live tensors as they are now, in the order that :meth:`absorb` takes."""
        seen_through, self._seen_through = self._seen_through, False
        self.refresh_if_stale(seen_through)
        return self._lives

    def settle(self) -> None:
        """Makes the modules show the tensors that are paired, where a forward pass left others in their place."""
        self._survey.settle()
        if self._into is not None:
            self._into.settle()  # its next forward pass would go on with copies from before the update

    def refresh_if_stale(self, seen_through: bool = False) -> None:
        """Pairs again if a tensor was unfrozen, added, replaced, moved or cast since the last time.

        Args:
            seen_through: look only for tensors that were replaced, moved or cast.
        """
        if self._reshards:  # asked at every step
            self.settle()
        if not seen_through and (not self._survey.holds() or self._someone_joins()):
            self._refresh()
            return
        for live, shard, pointer in self._shards:
            if local(live) is not shard or shard.data_ptr() != pointer:
                self._refresh()
                return
        for table, leaf, live, pointer in self._expected:
            if table.get(leaf) is not live or live.data_ptr() != pointer:
                if not self._adopt():
                    self._refresh()
                return

    def see_through(self) -> None:
        """The same before a step; the next update, and nothing else, trusts that the structure stays as it is."""
        self.refresh_if_stale()
        self._seen_through = True

    def admit(self) -> None:
        """Pairs again if a tensor was unfrozen since the last time. Costs nothing where none is frozen."""
        if self._someone_joins():
            self._refresh()

    def wanted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of a state's tensors that the settings ask for, by the names under which they count here.

        What the settings leave out (``include``, ``exclude``, ``buffers``) stays out: the settings win over the file.
        """
        known = {name: candidate for candidate in self._survey.candidates for name in candidate.names}
        named = {name: tensor for name, tensor in tensors.items() if name in known and self._allowed(known[name])}
        return {known[name].name: tensor for name, tensor in named.items()}

    def lacking(
        self, averages: Sequence[Mapping[str, Tensor]], origin: Mapping[str, Tensor], buffers_begin: bool = False
    ) -> list[str]:
        """What a state would have to hold besides its tensors that are :meth:`wanted`, a line for each name.

        Args:
            averages: its tensors, for each decay.
            origin: the parameters as they were at the start; not asked for where no schedule needs them.
            buffers_begin: buffers that are not among them begin with the live ones.
        """
        lost = [
            f"{name}: not in the state"
            for name, pair in self._pairs.items()
            for tensors in averages
            if name not in tensors and not (buffers_begin and pair.candidate.is_buffer)
        ]
        if self._keeps_origin:
            parameters = [c.name for c in self._survey.candidates if c.name in averages[0] and not c.is_buffer]
            lost += [f"{name}: its value at the start is not in the state" for name in parameters if name not in origin]
        return lost

    def load(self, averages: Sequence[Mapping[str, Tensor]], origin: Mapping[str, Tensor]) -> None:
        """Takes over a state's tensors that are :meth:`wanted`, once they were found to fit.

        Parameters that do not take part yet, such as frozen ones, join.
        """
        self._admitted |= averages[0].keys()
        self.started = True
        self._refresh()
        with torch.no_grad():
            for place, tensors in enumerate(averages):
                for name, value in tensors.items():
                    self._pairs[name].write(self._pairs[name].averages[place], value)
            for name, value in origin.items():
                kept = self._pairs[name].origin
                if kept is not None:
                    self._pairs[name].write(kept, value)

    # --- pairing ----------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        self._absorption.finish()
        self._survey = Survey(self._module)
        self.settle()
        of_both = (self._survey, self._into)
        self._reshards = any(survey is not None and survey.resharding for survey in of_both)
        before, taken = self._pairs, {}
        for candidate in self._survey.candidates:
            if candidate.name in before or self._takes(candidate):
                if candidate.name in taken:
                    raise ValueError(f"two tensors are named {candidate.name!r} once wrapper prefixes are left out.")
                taken[candidate.name] = candidate
        new = self._shares_of_new(taken, before)
        self._pairs = {name: self._pair(c, before.get(name), new.get(name)) for name, c in taken.items()}
        self._waiting = [
            candidate
            for candidate in self._survey.candidates
            if not candidate.is_buffer and candidate.name not in self._pairs and self._allowed(candidate)
        ]
        self.identities = frozenset(
            id(tensor) for p in self._pairs.values() for tensor in (p.live, *p.candidate.aliases)
        )
        self._arrange()

    def _allowed(self, candidate: Candidate) -> bool:
        averaged = not candidate.is_buffer or self._settings.buffers == "average"
        return averaged and candidate.matches(self._settings.include, self._settings.exclude)

    def _takes(self, candidate: Candidate) -> bool:
        if not self._allowed(candidate):
            return False
        if _expanded(candidate.tensor):
            if candidate.is_buffer:
                return False
            raise ValueError(
                f"{candidate.name} is expanded: several of its elements are one number in memory, and cannot be "
                "averaged apart. Leave it out, exclude=[...], or make it contiguous."
            )
        if candidate.name in self._admitted:
            return True
        if not candidate.is_buffer:
            return joins(candidate, self._settings.include_frozen)
        if candidate.name in self._unbounded:
            return False
        if not bool(local(candidate.tensor).isfinite().all()):
            self._unbounded.add(candidate.name)  # an attention mask: -inf averaged with -inf is NaN
            return False
        return True

    def _shares_of_new(self, taken: dict[str, Candidate], before: dict[str, Pair]) -> dict[str, Share]:
        """What each process is to keep of the parameters that join now. Those already there stay where they are."""
        if not self._shard or not self.started:
            return {}
        new = [
            candidate
            for name, candidate in taken.items()
            if not candidate.is_buffer  # small, and other ones in each process
            and can_be_shared(candidate.tensor.detach())
            and (name not in before or not before[name].averages or before[name].shape != candidate.tensor.shape)
        ]
        if not new:
            return {}  # without asking a process group, which may be gone after a run
        return {c.name: share for c, share in zip(new, shares([c.tensor for c in new]), strict=True)}

    def _pair(self, candidate: Candidate, known: Pair | None, new_share: Share | None) -> Pair:
        if not self.started:
            return Pair(candidate, [])
        if self._targets is not None:
            return Pair(candidate, [self._target(candidate)])
        before, share = ([], None) if known is None else (known.stored, known.share)
        if known is not None and before and known.shape != candidate.tensor.shape:
            warnings.warn(
                f"{candidate.name} changed its shape from {tuple(known.shape)} to "
                f"{tuple(candidate.tensor.shape)}: its average starts again from the live tensor.",
                stacklevel=2,
            )
            before = []
        if before and share is not None and share.stride != candidate.tensor.stride():
            raise RuntimeError(
                f"{candidate.name} changed its memory format from strides {share.stride} to "
                f"{candidate.tensor.stride()} while its average is shared among processes. Change it before training."
            )
        keeps_origin = self._keeps_origin and not candidate.is_buffer
        count = len(self._settings.decays) + keeps_origin
        dtype, device = self._home(candidate.tensor)
        pair = Pair(candidate, [], share=share if before else new_share)
        if before:
            tensors = [tensor.to(device=device, dtype=dtype) for tensor in before]
        else:
            tensors = [pair.copy(dtype, device) for _ in range(count)]
        pair.averages = tensors[: len(self._settings.decays)]
        pair.origin = tensors[-1] if keeps_origin else None
        return pair

    def _target(self, candidate: Candidate) -> Tensor:
        target = None if self._targets is None else self._targets.get(candidate.name)
        if target is None or target.shape != candidate.tensor.shape:
            found = "has no such tensor" if target is None else f"has shape {tuple(target.shape)}"
            raise ValueError(
                f"into: {candidate.name} of shape {tuple(candidate.tensor.shape)} is averaged, but the module given "
                f"as into {found}. It must be built like the averaged module; exclude=[...] leaves tensors out."
            )
        if not same_cut(target, candidate.tensor):
            raise ValueError(
                f"into: {candidate.name} is sharded in another way than the tensor of that name in the module given as "
                "into. Apply the same fully_shard and parallelize_module calls to both."
            )
        return target.detach()

    def _home(self, live: Tensor) -> tuple[torch.dtype, torch.device]:
        dtype = self._settings.dtype
        if dtype is None:
            dtype = live.dtype if torch.finfo(live.dtype).bits >= 32 else torch.float32
        elif live.is_complex():
            dtype = dtype.to_complex()
        return dtype, self._settings.device or live.device

    # --- noticing ---------------------------------------------------------------------------------------------------

    def _arrange(self) -> None:
        """Lays pairs of one kind side by side, and keeps what tells later that nothing has changed."""
        holders = Counter(_storage(candidate) for candidate in self._survey.candidates)
        crossed = _crossed(self._survey.candidates)
        ordered = self._absorption.in_order(list(self._pairs.values()))
        self._ordered = ordered
        self._absorbed = [pair for pair in ordered if pair.share is None or not pair.share.empty]
        self._expect()
        for pair in ordered:
            unshared = holders[_storage(pair.candidate)] == 1 and not pair.candidate.aliases
            pair.exclusive = unshared and owns_storage(pair.live)
            pair.crossed = id(pair.candidate) in crossed
            pair.plain = _is_plain(pair)
        self._absorption.arrange(self._absorbed if self.started else [])

    def _expect(self) -> None:
        self._absorption.release()
        self._lives = [pair.part(pair.live) for pair in self._absorbed]
        self._expected = [(*pair.candidate.slots[0], pair.live, pair.live.data_ptr()) for pair in self._ordered]
        sharded = [(pair.live, local(pair.live)) for pair in self._ordered if is_sharded(pair.live)]
        self._shards = [(live, shard, shard.data_ptr()) for live, shard in sharded]  # apart: whole ones are the rule

    def _adopt(self) -> bool:
        """Takes over buffers that were assigned anew with the same kind of tensor, as some modules do each step."""
        changed: list[tuple[Pair, Tensor]] = []
        for pair, (table, leaf, old, pointer) in zip(self._ordered, self._expected, strict=True):
            new = table.get(leaf)
            if new is old and old.data_ptr() == pointer:
                continue
            same = new is not None and (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device)
            if new is None or not same or not pair.candidate.is_buffer or len(pair.candidate.slots) > 1:
                return False
            changed.append((pair, new))
        for pair, new in changed:
            pair.candidate = replace(pair.candidate, tensor=new)
            pair.exclusive = pair.exclusive and owns_storage(new)
        self._expect()
        return True

    def _someone_joins(self) -> bool:
        return bool(self._waiting) and any(joins(c, self._settings.include_frozen) for c in self._waiting)

    def _waiting_lazy(self) -> bool:
        return any(torch.nn.parameter.is_lazy(candidate.tensor) for candidate in self._waiting)


def _expanded(tensor: Tensor) -> bool:
    if torch.nn.parameter.is_lazy(tensor):
        return False
    tensor = local(tensor)
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _storage(candidate: Candidate) -> int:
    """Where the storage lies; a number of its own for tensors without one (empty, lazy)."""
    tensor = candidate.tensor
    pointer = 0 if torch.nn.parameter.is_lazy(tensor) else local(tensor).untyped_storage().data_ptr()
    return pointer or -id(tensor)


def _crossed(candidates: list[Candidate]) -> set[int]:
    """The ``id`` of each candidate that shares part of its memory with another one."""
    spans: dict[int, list[tuple[int, int, Candidate]]] = {}
    for candidate in candidates:
        tensor = local(candidate.tensor)
        if not torch.nn.parameter.is_lazy(tensor) and tensor.numel() > 0:
            extent = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            first = int(tensor.storage_offset())
            spans.setdefault(_storage(candidate), []).append((first, first + int(extent), candidate))
    found: set[int] = set()
    for span in spans.values():
        span.sort(key=lambda item: item[:2])
        for (_, last, one), (first, _, other) in itertools.pairwise(span):
            if first <= last:
                found |= {id(one), id(other)}
    return found


def _is_plain(pair: Pair) -> bool:
    candidate = pair.candidate
    if candidate.is_buffer or candidate.rewritten or len(candidate.slots) > 1:
        return False
    alike = all((a.dtype, a.device) == (pair.live.dtype, pair.live.device) for a in pair.averages)
    return alike and pair.exclusive and not pair.crossed and pair.share is None
