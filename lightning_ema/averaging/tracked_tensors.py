"""The tensors of a module beside their averages, paired by name and kept so while the module changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_ema.averaging.pair import Pair
from lightning_ema.averaging.placement import Placement
from lightning_ema.averaging.settings import Settings
from lightning_ema.averaging.update import Updater
from lightning_ema.distributed.base import cut_of, local
from lightning_ema.distributed.processes import Groups
from lightning_ema.modules.memory import is_expanded, overlapping, owns_storage, storage_of
from lightning_ema.modules.named_tensors import BufferPlace, Candidate, Survey, check_patterns, joins, matches_any


class TrackedTensors:
    """Pairs by name what is averaged with its average.

    Modules change under training: layers are unfrozen, materialized, replaced, moved or cast. Every update looks for
    that, at a few tenths of a microsecond a tensor, and pairs again where it finds something.

    Args:
        module: whose tensors are averaged.
        settings: which of them, and how.
        into: the module whose tensors are to be the averages; None to make new ones.
        partitioned: whether averages of whole parameters are split among processes.

    Attributes:
        started: whether averages are stored.
        identities: ``id`` of every averaged live tensor.
        empty: whether no parameter takes part, because none has been trained so far.
    """

    def __init__(self, module: nn.Module, settings: Settings, into: nn.Module | None, partitioned: bool) -> None:
        self.started = False
        self.identities: frozenset[int] = frozenset()
        self.empty = True
        self._module = module
        self._settings = settings
        self._into = None if into is None else Survey(into)
        self._placement = Placement(settings, self._into, partitioned)
        self._updater = Updater()
        self._pairs: dict[str, Pair] = {}
        self._admitted: set[str] = set()
        self._unbounded: set[str] = set()
        self._seen_through = False
        self._refresh()
        check_patterns(self._survey, settings.include, settings.exclude)
        if not any(self._allowed(candidate) for candidate in self._survey.candidates if not candidate.is_buffer):
            raise ValueError(
                f"{type(module).__name__} has nothing to average: no parameter is left by include="
                f"{settings.include!r} and exclude={settings.exclude!r}. Choose patterns that leave some."
            )

    def frozen(self) -> dict[str, Tensor]:
        """The parameters that could take part and do not, by name."""
        return {c.name: c.tensor for c in self._waiting if not c.is_buffer and not is_lazy(c.tensor)}

    def pairs(self) -> Iterable[Pair]:
        """All pairs, in the order of the module, once an update under way is finished."""
        self._updater.finish()
        return self._pairs.values()

    @property
    def waits(self) -> int:
        """How often training had to wait for an update in host memory."""
        return self._updater.waits

    @property
    def groups(self) -> Groups:
        """The processes among which some of the averages are cut. Not kept: they cannot be copied or pickled."""
        return tuple(dict.fromkeys(group for pair in self.pairs() for group in pair.groups))

    def release(self) -> None:
        """No update follows soon: gives up views of the live tensors, once an update under way is finished.

        The views would keep the memory that a module is moved away from, and the update would still read it.
        """
        self._updater.finish()
        self._updater.release()

    def start(self) -> None:
        """Sets every average to the live tensor."""
        self.started = True
        self._refresh()
        with torch.no_grad():
            for pair in self._pairs.values():
                for tensor in pair.stored:
                    tensor.copy_(pair.beside(pair.live))

    def other_buffers(self) -> list[BufferPlace]:
        """Buffers without an average that training and evaluations share, but for those that ``exclude`` names."""
        averaged = {name for pair in self._pairs.values() if pair.averages for name in pair.candidate.names}
        return [
            place
            for place in self._survey.buffers
            if place.name not in averaged and not matches_any([place.name], self._settings.exclude)
        ]

    def take_anew(self, statistics: bool) -> None:
        """Sets every average to the live tensor again: no step was taken up so far.

        Args:
            statistics: running statistics of normalization layers, too.
        """
        resized = [name for name, pair in self._pairs.items() if pair.live.shape != pair.shape]
        for name in resized:
            del self._pairs[name]
        if resized:
            self._refresh()
        else:
            self.refresh_if_stale()
        with torch.no_grad():
            for pair in self.pairs():
                if statistics or not pair.candidate.statistic:
                    for tensor in pair.stored:
                        tensor.copy_(pair.beside(pair.live))

    def forget(self) -> None:
        """Gives the averages up, as before the start."""
        self.started = False
        for pair in self.pairs():
            pair.averages, pair.origin, pair.cut = [], None, cut_of(pair.live)
        self._arrange()

    def update(self, lives: list[Tensor], rates: Sequence[float]) -> None:
        """``average += rate * (live - average)`` for each decay's average, with ``lives`` from :meth:`lives`."""
        self._updater.update(lives, rates)

    def lives(self) -> list[Tensor]:
        """The live tensors as they are now, in the order that :meth:`update` takes."""
        seen_through, self._seen_through = self._seen_through, False
        self.refresh_if_stale(seen_through)
        return self._lives

    def reshard(self) -> None:
        """Makes the modules show the tensors that are paired, where a forward pass left others in their place."""
        self._survey.reshard()
        if self._into is not None:
            self._into.reshard()  # its next forward pass would go on with copies from before the update

    @property
    def resized(self) -> bool:
        """Whether a buffer has changed its shape in place, as those of observers do."""
        return any(live.shape != shape for live, shape in self._resizable)

    def refresh_if_stale(self, seen_through: bool = False) -> None:
        """Pairs again if a tensor was unfrozen, added, replaced, moved or cast since the last time.

        Args:
            seen_through: look only for tensors that were replaced, moved or cast.
        """
        if self._reshards:  # asked at every step
            self.reshard()
        if not seen_through and (not self._survey.holds() or self._someone_joins()):
            self._refresh()
            return
        for cut, live, shard, pointer in self._shards:
            if cut.local(live) is not shard or shard.data_ptr() != pointer:
                self._refresh()
                return
        for live, shape in self._resizable:
            if live.shape != shape:
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

    def lacking(self, averages: Sequence[Mapping[str, Tensor]], buffers_begin: bool = False) -> list[str]:
        """What a state would have to hold besides its tensors that are :meth:`wanted`: the names.

        Args:
            averages: its tensors, for each decay.
            buffers_begin: buffers that are not among them begin with the live ones.
        """
        return [
            name
            for name, pair in self._pairs.items()
            for tensors in averages
            if name not in tensors and not (buffers_begin and pair.candidate.is_buffer)
        ]

    def lacking_origin(self, average: Mapping[str, Tensor], origin: Mapping[str, Tensor]) -> list[str]:
        """Averaged parameters whose value at the start a state does not hold, where a schedule needs it."""
        parameters = [c.name for c in self._survey.candidates if c.name in average and not c.is_buffer]
        return [name for name in parameters if name not in origin] if self._placement.keeps_origin else []

    def leave_live(self, names: Collection[str]) -> None:
        """Buffers of a state's module that had no average there have none here: they held infinities."""
        self._unbounded |= {n for n, pair in self._pairs.items() if pair.candidate.is_buffer and n not in names}
        for name in self._unbounded & self._pairs.keys():
            del self._pairs[name]
        self._refresh()

    def begin_live(self, names: Collection[str], live: Mapping[str, Tensor]) -> None:
        """Sets the averages of these tensors to their live values."""
        with torch.no_grad():
            for pair in (self._pairs[name] for name in names if name in self._pairs):
                for stored in pair.stored:
                    pair.write(stored, live.get(pair.name, pair.live.detach()))

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
        self._updater.finish()
        self._survey = Survey(self._module)
        self.reshard()
        self._reshards = bool(self._survey.reshards or (self._into is not None and self._into.reshards))
        before, taken = self._pairs, {}
        for candidate in self._survey.candidates:
            if candidate.name in before or self._takes(candidate):
                if candidate.name in taken:
                    raise ValueError(
                        f"two tensors are named {candidate.name!r} once wrapper prefixes are left out. Rename one of "
                        "them in the module."
                    )
                taken[candidate.name] = candidate
        if self.started:
            cuts = self._placement.cuts(list(taken.values()), before)
            self._pairs = {n: self._placement.pair(c, cuts[n], before.get(n)) for n, c in taken.items()}
        else:
            self._pairs = {name: Pair(c, [], cut_of(c.tensor)) for name, c in taken.items()}
        self._waiting = [
            candidate
            for candidate in self._survey.candidates
            if candidate.name not in self._pairs.keys() | self._unbounded and self._allowed(candidate)
        ]
        self.empty = all(pair.candidate.is_buffer for pair in self._pairs.values())
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
        if is_expanded(candidate.tensor):
            if candidate.is_buffer:
                return False
            raise ValueError(
                f"{candidate.name} is expanded: several of its elements are one number in memory, and cannot be "
                "averaged apart. Leave it out, exclude=[...], or make it contiguous."
            )
        if candidate.name in self._admitted:
            return True
        if not joins(candidate, self._settings.include_frozen):
            return False
        if not candidate.is_buffer:
            return True
        if candidate.name in self._unbounded:
            return False
        if not bool(local(candidate.tensor).isfinite().all()):
            self._unbounded.add(candidate.name)  # an attention mask: -inf averaged with -inf is NaN
            return False
        return True

    # --- noticing ---------------------------------------------------------------------------------------------------

    def _arrange(self) -> None:
        """Lays pairs of one kind side by side, and keeps what tells later that nothing has changed."""
        tensors = [candidate.tensor for candidate in self._survey.candidates]
        holders, crossed = Counter(map(storage_of, tensors)), overlapping(tensors)
        ordered = self._updater.in_order(list(self._pairs.values()))
        self._ordered = ordered
        self._updated = [pair for pair in ordered if pair.part(pair.live).numel() > 0]
        self._expect()
        for pair in ordered:
            alone = holders[storage_of(pair.live)] == 1 and not pair.candidate.aliases
            pair.exclusive = alone and owns_storage(pair.live)
            pair.crossed = id(pair.live) in crossed
            pair.plain = _is_plain(pair)
        self._updater.arrange(self._updated if self.started else [])

    def _expect(self) -> None:
        self._updater.release()
        self._lives = [pair.part(pair.live) for pair in self._updated]
        self._expected = [(*pair.candidate.slots[0], pair.live, pair.live.data_ptr()) for pair in self._ordered]
        resizable = [pair for pair in self._ordered if pair.candidate.is_buffer and not pair.candidate.statistic]
        self._resizable = [(pair.live, pair.shape) for pair in resizable]  # observers resize theirs in place
        sharded = [(p.cut, p.live, p.cut.local(p.live)) for p in self._ordered if p.cut.sharded]
        self._shards = [(cut, live, shard, shard.data_ptr()) for cut, live, shard in sharded]  # whole ones are the rule

    def _adopt(self) -> bool:
        """Takes over buffers that were assigned anew with the same kind of tensor, as some modules do each step."""
        changed: list[tuple[Pair, Tensor]] = []
        for pair, (table, leaf, old, pointer) in zip(self._ordered, self._expected, strict=True):
            new = table.get(leaf)
            if new is old and old.data_ptr() == pointer:
                continue
            same = new is not None and (new.shape, new.dtype, new.device) == (pair.shape, old.dtype, old.device)
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


def _is_plain(pair: Pair) -> bool:
    candidate = pair.candidate
    if candidate.is_buffer or candidate.rewritten or len(candidate.slots) > 1:
        return False
    alike = all((a.dtype, a.device) == (pair.live.dtype, pair.live.device) for a in pair.averages)
    return alike and pair.exclusive and not pair.crossed and pair.cut.stored_as_live
