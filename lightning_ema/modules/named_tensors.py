"""Which tensors of a module can be averaged, and under which names.

A tensor is named by its qualified name with the prefixes of wrappers left out, so that the names stay the same when
a model is compiled, wrapped for DDP or checkpoints its activations. A tied tensor counts once, under its first name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torchmetrics
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from lightning_ema.distributed.base import reshards_of
from lightning_ema.modules.memory import memory_of

Table = dict[str, Tensor | None]
"""A module's own dictionary of parameters or of buffers, where ``table[leaf]`` is the tensor in use now."""

# torch.compile, activation checkpointing, FSDP1 and Fabric hang what they wrap under these names
_WRAPPER_LEAVES = frozenset(
    {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module", "_original_module"}
)


_WRITING_LAYERS = frozenset({"_NormBase", "ObserverBase", "FakeQuantizeBase"})  # their classes' names are in torch


@dataclass(frozen=True, eq=False)
class Candidate:
    """A tensor that could be averaged.

    Attributes:
        names: its qualified names, wrapper prefixes left out; several where it is tied.
        slots: where it hangs: ``table[leaf]`` for each of its places in the module.
        tensor: the tensor found there.
        aliases: other tensors of the module on the very same memory, such as a second ``Parameter(first.data)``.
        is_buffer: whether it is a buffer rather than a parameter.
        rewritten: whether a forward pass may write to it, as that of ``nn.Embedding(max_norm=...)`` does.
        companions: of a buffer, the parameters that it goes with: those of its module, or of the nearest one around it
            that has any.
        statistic: whether it is a running mean or variance of a normalization layer.
    """

    names: tuple[str, ...]
    slots: tuple[tuple[Table, str], ...]
    tensor: Tensor
    aliases: tuple[Tensor, ...]
    is_buffer: bool
    rewritten: bool
    companions: Sequence[Tensor] = ()
    statistic: bool = False

    @property
    def name(self) -> str:
        """The first of the names: the one it counts under."""
        return self.names[0]

    def matches(self, include: Sequence[str] | None, exclude: Sequence[str]) -> bool:
        """Whether any of its names matches ``include`` (None: all) and none matches ``exclude``."""
        return (include is None or matches_any(self.names, include)) and not matches_any(self.names, exclude)


@dataclass(frozen=True, eq=False)
class BufferPlace:
    """Where a buffer hangs, whatever its kind of numbers, and whether it is part of the ``state_dict``.

    Attributes:
        name: its qualified name.
        table, leaf: ``table[leaf]`` is the buffer.
        layers: whether it belongs to a normalization layer or an observer, which write to it in any forward pass.
    """

    name: str
    table: Table
    leaf: str
    layers: bool


class Survey:
    """One walk over a module, with what is needed to notice cheaply that it is out of date.

    Attributes:
        candidates: what could be averaged.
        tensors: every parameter and every buffer of the ``state_dict``, integers too, by all of their names.
        buffers: where every buffer hangs, integers and those outside of the ``state_dict`` too.
        reshards: what makes the module show its own tensors, where a forward pass may leave others in their place.
    """

    def __init__(self, module: nn.Module) -> None:
        self.owner = type(module).__name__
        self.reshards: list[Callable[[], None]] = reshards_of(module)
        self.reshard()
        self.tensors: dict[str, Tensor] = {}
        self.buffers: list[BufferPlace] = []
        places: dict[object, list[_Place]] = {}
        parameters_in: dict[str, list[Tensor]] = {}
        self._children: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
        self._tables: list[dict[str, Tensor | None] | dict[str, nn.Module | None]] = []
        for path, owner in _modules(module):
            parameters, buffers, children = tables_of(owner)
            self._tables += [parameters, buffers, children]
            self._children += [(children, leaf, child) for leaf, child in children.items() if child is not None]
            volatile = transient_buffers(owner)
            layers = any(kind.__name__ in _WRITING_LAYERS for kind in type(owner).__mro__)
            self.buffers += [BufferPlace(f"{path}{leaf}", buffers, leaf, layers) for leaf in buffers]
            for around in _around(path):
                parameters_in.setdefault(around, []).extend(t for t in parameters.values() if t is not None)
            for table, is_buffer in ((parameters, False), (buffers, True)):
                for leaf, tensor in table.items():
                    if tensor is None or (is_buffer and leaf in volatile):
                        continue
                    self.tensors.setdefault(f"{path}{leaf}", tensor)
                    if _floats(tensor):  # quantized weights are stored as integers, and stay out like integer buffers
                        rewritten = getattr(owner, "max_norm", None) is not None
                        statistic = is_buffer and _is_statistic(owner, leaf)
                        place = _Place(path, table, leaf, tensor, is_buffer, rewritten, statistic)
                        places.setdefault(memory_of(tensor), []).append(place)
        self._size = sum(map(len, self._tables))
        self.candidates = [_candidate(alike, parameters_in) for alike in places.values()]

    def reshard(self) -> None:
        """Makes the module show the tensors that were found, where a forward pass left others in their place."""
        for reshard in self.reshards:
            reshard()

    def holds(self) -> bool:
        """Whether the module still has the same submodules and as many tensors. About 0.2 us a submodule."""
        for table, leaf, child in self._children:
            if table.get(leaf) is not child:
                return False
        return sum(map(len, self._tables)) == self._size


@dataclass(frozen=True, eq=False)
class _Place:
    path: str
    table: Table
    leaf: str
    tensor: Tensor
    is_buffer: bool
    rewritten: bool
    statistic: bool

    @property
    def name(self) -> str:
        return f"{self.path}{self.leaf}"


def _candidate(places: list[_Place], parameters_in: Mapping[str, Sequence[Tensor]]) -> Candidate:
    """One candidate for all places that show the same memory."""
    tensor = next((place.tensor for place in places if place.tensor.requires_grad), places[0].tensor)
    aliases = {id(place.tensor): place.tensor for place in places if place.tensor is not tensor}
    return Candidate(
        names=tuple(dict.fromkeys(place.name for place in places)),
        slots=tuple((place.table, place.leaf) for place in places if place.tensor is tensor),
        tensor=tensor,
        aliases=tuple(aliases.values()),
        is_buffer=places[0].is_buffer,
        rewritten=any(place.rewritten for place in places),
        companions=_companions(places[0].path, parameters_in) if places[0].is_buffer else (),
        statistic=places[0].statistic,
    )


def _companions(path: str, parameters_in: Mapping[str, Sequence[Tensor]]) -> Sequence[Tensor]:
    return next((inside for around in _around(path) if (inside := parameters_in.get(around))), ())


def _around(path: str) -> Iterator[str]:
    """The path of a module, and those of all around it, the nearest first.

    >>> list(_around("net.0."))
    ['net.0.', 'net.', '']
    """
    yield path
    while path:
        path = path[: path[:-1].rfind(".") + 1]
        yield path


def joins(candidate: Candidate, include_frozen: bool) -> bool:
    """Whether a tensor takes part by itself: it is trained (or frozen ones are asked for) and exists already.

    A buffer is trained where one of the parameters is that it goes with, or where there is none. Lazy tensors have no
    shape before the first forward pass; frozen ones may be unfrozen later. Both are asked again at every update.
    """
    tensor = next((table.get(leaf) for table, leaf in candidate.slots), None)
    if tensor is None or is_lazy(tensor):
        return False
    if candidate.is_buffer:
        companions = candidate.companions
        return include_frozen or not companions or any(parameter.requires_grad for parameter in companions)
    return include_frozen or tensor.requires_grad


def check_patterns(survey: Survey, include: Sequence[str] | None, exclude: Sequence[str]) -> None:
    """Refuse a pattern that matches no tensor at all: most likely it is misspelt.

    Raises:
        ValueError: naming the pattern and some of the names there are.
    """
    names = [name for candidate in survey.candidates for name in candidate.names]
    buffers = [place.name for place in survey.buffers]  # what is written to these in an evaluation can be kept
    for argument, patterns, known in (("include", include or (), names), ("exclude", exclude, names + buffers)):
        for pattern in patterns:
            if not matches_any(known, [pattern]):
                shown = ", ".join(names[:6]) + (f", ... ({len(names)} in all)" if len(names) > 6 else "")
                raise ValueError(
                    f"{argument}={list(patterns)!r}: {pattern!r} matches no tensor of {survey.owner}. "
                    f"The names are {shown or 'none at all'}; '*' stands for any characters, dots included."
                )


def tables_of(module: nn.Module) -> tuple[Table, Table, dict[str, nn.Module | None]]:
    """A module's own parameters, buffers and children: the dictionaries themselves.

    They are not public in torch, but the only way to see in half a microsecond that a tensor was replaced, and to see
    a parametrized module's stored tensors rather than the computed ones.
    """
    return module._parameters, module._buffers, module._modules  # type: ignore[return-value]


def transient_buffers(module: nn.Module) -> set[str]:
    """The names of a module's own buffers that are not part of its ``state_dict``."""
    return module._non_persistent_buffers_set


def _modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules under the prefix of their names, wrappers and metrics left out; shared ones as often as they hang."""
    pending: list[tuple[str, nn.Module]] = [("", module)]
    while pending:
        path, owner = pending.pop()
        yield path, owner
        children = []
        for leaf, child in tables_of(owner)[2].items():
            if child is None or isinstance(child, torchmetrics.Metric):
                continue
            children.append((path if _wraps(owner, leaf) else f"{path}{leaf}.", child))
        pending.extend(reversed(children))


def _wraps(owner: nn.Module, leaf: str) -> bool:
    return leaf in _WRAPPER_LEAVES or (leaf == "module" and isinstance(owner, (DataParallel, DistributedDataParallel)))


def _is_statistic(owner: nn.Module, leaf: str) -> bool:
    """Normalization layers of other libraries name their statistics as torch does."""
    return isinstance(owner, nn.modules.batchnorm._NormBase) or leaf.startswith("running_")


def _floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def without_wrappers(key: str) -> str:
    """A key of a ``state_dict`` without the prefixes that wrappers leave in it."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPER_LEAVES)


def matches_any(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether any of the names matches any of the glob patterns."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
