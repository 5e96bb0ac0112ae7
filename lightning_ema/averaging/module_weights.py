"""Which weights a module holds - its live ones, an average, those of a file - and the way back. Knows torch alone.

    live      what the optimizer trains
    average   one average: swapped in for an evaluation, or applied, as after a fit
    file      what was loaded for an evaluation after a fit; the live weights are stored meanwhile

A module has one :class:`ModuleWeights`, which all its averages and callbacks share, and in it a ``TensorSet`` for each
set of tensors that is averaged. They alone change what the module holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from weakref import WeakSet, WeakValueDictionary

from torch import Tensor, nn

from lightning_ema.averaging.pair import Pair
from lightning_ema.averaging.tensor_set import Batches, Held, TensorSet, Tracked, write
from lightning_ema.modules.batchnorm import Statistics
from lightning_ema.modules.edits import Edits
from lightning_ema.modules.named_tensors import Survey


class ModuleWeights:
    """What one module holds now, for all of its averages and callbacks.

    Attributes:
        module: the module.
        held: the averages that its tensors hold, or will again; the newest last.
        holding: those of all modules, of which one may be a part of another, in which something is held.
        stored: the live weights by name while the module holds those of a file; else empty.
    """

    known: ClassVar[WeakValueDictionary[int, ModuleWeights]] = WeakValueDictionary()
    holding: ClassVar[WeakSet[ModuleWeights]] = WeakSet()

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.held: list[Held] = []
        self.stored: Statistics = {}
        self._sets: WeakSet[TensorSet] = WeakSet()
        self._was_applied: list[tuple[TensorSet, int]] = []
        self._loading = self._expects_broadcast = False
        self._edits: Edits | None = None

    @classmethod
    def of(cls, module: nn.Module) -> ModuleWeights:
        """The one of this module."""
        known = cls.known.get(id(module))
        if known is None:
            known = cls.known[id(module)] = cls(module)
        return known

    def add(self, tracked: Tracked) -> TensorSet:
        """A further set of tensors of this module."""
        tensors = TensorSet(self, tracked)
        self._sets.add(tensors)
        return tensors

    def live_of(self, pair: Pair, tensors: TensorSet) -> Tensor:
        """Where the live tensor of a pair of this set is to be found, whatever the module holds."""
        for held in self.held:
            live = None if held.paused or held.underlies(tensors) else held.swap.live_of(pair.name)
            if live is not None:
                return live
        for held in self.held_anywhere() if self.holding else ():
            live = None if held.underlies(tensors) else held.swap.live_at(pair.live)
            if live is not None:
                return live
        return pair.live.detach()

    def returning(self) -> list[Tensor]:
        """The module's tensors whose contents, not their storage, come back with the live weights."""
        swaps = [held for held in self.held if not held.paused and not held.applied]
        return [tensor for held in swaps for tensor in held.swap.returning()]

    @property
    def recalibrates(self) -> bool:
        """Whether BatchNorm statistics of the module are estimated anew for an average of the present fit."""
        return any(tensors.estimates for tensors in self._sets if not (tensors.over or tensors.left))

    def evaluated_beside(self, tensors: TensorSet) -> list[str]:
        """The names of other callbacks that evaluate averages of some of these tensors."""
        others = [each for each in self._together_with(tensors) if each is not tensors and each.evaluated_by]
        return [each.evaluated_by for each in others if tensors.evaluated_by and each.meets(tensors)]

    def averaged_by_others(self, tensors: TensorSet) -> Set[int]:
        """The ``id`` of each tensor of which another set of the module keeps an average."""
        return {one for each in self._sets if each is not tensors and not each.over for one in each.averaged()}

    def catch_up(self, tensors: TensorSet) -> None:
        """Lets all averages of these tensors take up their steps, which they cannot during a swap."""
        everywhere = [each for weights in list(self.known.values()) for each in list(weights._sets)]
        for other in everywhere:
            if not (other.over or other.left) and (other is tensors or other.meets(tensors)):
                other.catch_up()

    def held_anywhere(self) -> list[Held]:
        """What tensors of this module and of others hold now."""
        return [held for weights in list(self.known.values()) for held in weights.held if not held.paused]

    def hold(self, held: Held) -> None:
        """Notes that tensors of this module hold an average."""
        self.held.append(held)
        self.holding.add(self)

    def let_go(self, held: Held) -> None:
        """Notes that they do so no more."""
        if held in self.held:
            self.held.remove(held)
        if not self.held:
            self.holding.discard(self)

    def _together_with(self, tensors: TensorSet) -> list[TensorSet]:
        """The sets that take part in the fit that this one takes part in, or has been left by."""
        return [each for each in self._sets if each.left == tensors.left and not each.over]

    # --- whole evaluations and files ----------------------------------------------------------------------------------

    @property
    def holds_file(self) -> bool:
        """Whether the module holds the weights of a file that is evaluated after a fit."""
        return bool(self.stored)

    @contextmanager
    def as_evaluated(self, own: TensorSet, batches: Batches | None) -> Iterator[None]:
        """Inside this block the module carries what evaluations and files are given, in all of its sets."""
        with ExitStack() as block:
            for tensors in sorted(self._together_with(own), key=lambda each: each is own):
                block.enter_context(tensors.as_evaluated(batches if tensors is own else None))
            yield

    # --- after a fit --------------------------------------------------------------------------------------------------

    def end_training(self, tensors: TensorSet) -> None:
        """The last step of a fit is over for a set: who writes to the module from here on makes it theirs."""
        tensors.left = True
        self._edits = Edits(self.module, contents=True)

    def leave(self, tensors: TensorSet, apply: bool) -> None:
        """A fit ends for a set: it is left with its live weights or, where there is one, with its average."""
        if apply and tensors.wants_average:
            tensors.apply(tensors.selected)
        tensors.left = True
        self._edits = Edits(self.module)

    def begin(self, tensors: TensorSet) -> None:
        """A fit begins for a set: its live weights come back from wherever they are."""
        tensors.restore()
        self._write_stored()
        tensors.left = False
        self._edits = Edits(self.module) if any(each.left for each in self._sets) else None

    def train(self) -> None:
        """Training begins: what an earlier fit left for sets without a part in this one is over."""
        self._end_of_fit()

    def notice_edits(self) -> None:
        """Whoever wrote to the module since the fit, other than a file under test, made it theirs.

        What was kept of that fit is dropped then: the sets that took part in it are ``over``.
        """
        swapped = any(not held.applied for held in self.held)  # then it has other contents for a while
        if self._edits is not None and not swapped and not self._edits.intact():
            self._end_of_fit()

    def drop(self, tensors: TensorSet) -> None:
        """A set is given up: nothing is kept of it, and nothing asked of it."""
        tensors.over, tensors.left = True, False
        if tensors.before_drop is not None:
            tensors.before_drop()
        for held in [held for held in self.held if held.tensors is tensors]:
            self.let_go(held)

    def _end_of_fit(self) -> None:
        for tensors in [each for each in self._sets if each.left]:
            self.drop(tensors)
        self.stored, self._loading, self._edits = {}, False, None

    def expect_broadcast(self, expected: bool) -> None:
        """A strategy is about to overwrite all weights by the same weights, which is no edit."""
        if expected:
            self.notice_edits()  # as long as it can be told
        self._expects_broadcast = expected

    def accept_broadcast(self) -> None:
        """It has done so."""
        if self._expects_broadcast and self._edits is not None and self._edits.intact(writes=1):
            self._edits = Edits(self.module)
        self._expects_broadcast = False

    def store(self) -> None:
        """A file is about to be loaded for an evaluation: copies of the live weights are stored."""
        if not self.stored:
            self._was_applied = [(held.tensors, held.place) for held in self.held if held.applied]
            for tensors, _ in self._was_applied:
                tensors.restore()
            self.stored = {
                name: tensor.detach().clone()
                for name, tensor in Survey(self.module).tensors.items()
                if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
            }
        self._loading = True

    def accept_file(self) -> None:
        """The file has been loaded: that is no edit."""
        if self.stored:
            self._edits = Edits(self.module)
        self._loading = False

    def reject_file(self) -> None:
        """Loading the file, or what came right after it, failed: the module is left as the fit had left it."""
        if self._loading:
            self._write_stored()
            for tensors, place in self._was_applied:
                tensors.apply(place)
            self._edits = Edits(self.module)

    def _write_stored(self) -> None:
        write(self.stored, self.module)
        self.stored, self._loading = {}, False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sets": list(self._sets)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _sets=WeakSet(state["_sets"]))
        self.known[id(self.module)] = self  # a copy of the module has one of its own
        if self.held:
            self.holding.add(self)
