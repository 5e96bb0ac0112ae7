"""What a file of another system was found to hold, and the small steps of reading one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Content = Mapping[str, Any]
Weights = dict[str, Tensor]

# names that torch gives to the buffers of its normalization layers
STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


@dataclass(frozen=True, eq=False)
class Imported:
    """The average in a file of another system.

    Attributes:
        system: whose file it is.
        because: what in the file says so.
        weights: the averaged model as a ``state_dict``; what is not averaged (integer buffers) as the file has it.
        live: the live weights under the same names; empty where the file has none.
        unnamed: the averages of parameters in their order, in place of ``weights``, where the file has no names.
        steps: steps that the system counted; None where the file does not say.
        updates: how often the average was updated; None: at each step.
        decay: the setting, as ``EMACallback`` would write it where it has the same; empty where the file does not say.
        checkpoint: a Lightning checkpoint without what belongs to the system, from which training can go on.
        notes: what a reader should know, a sentence each.
    """

    system: str
    because: str
    weights: Weights = field(default_factory=dict)
    live: Weights = field(default_factory=dict)
    unnamed: tuple[Tensor, ...] = ()
    steps: int | None = None
    updates: int | None = None
    decay: str = ""
    checkpoint: Content = field(default_factory=dict)
    notes: tuple[str, ...] = ()


Reader = Callable[[Content], Imported | None]


def state_of(content: Content) -> Content:
    """What a file has under ``state_dict``; all of it where there is no such entry."""
    state = content.get("state_dict")
    return state if isinstance(state, Mapping) else content


def callbacks_of(content: Content) -> dict[str, Any]:
    """The states of a Lightning checkpoint's callbacks; none for other files."""
    states = content.get("callbacks")
    return {str(key): state for key, state in states.items()} if isinstance(states, Mapping) else {}


def tensors(state: Content) -> Weights:
    """The tensors among the entries of a ``state_dict``."""
    return {name: v.detach() for name, v in state.items() if isinstance(name, str) and isinstance(v, Tensor)}


def below(prefix: str, state: Content) -> Weights:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors(state).items() if name.startswith(prefix)}


def is_statistic(name: str, tensor: Tensor) -> bool:
    """Whether this is a buffer, as far as name and dtype tell: a statistic of a normalization layer, or no float."""
    floats = tensor.is_floating_point() or tensor.is_complex()
    return name.rpartition(".")[2] in STATISTICS or not floats


def grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def refuse_ambiguous(candidates: Mapping[str, list[str]]) -> None:
    several = [f"{name}: {' or '.join(names)}" for name, names in candidates.items() if len(names) > 1]
    if several:
        raise ValueError(
            "the file's averages have lost their dots, and these names can be read in several ways:\n  "
            + "\n  ".join(several)
            + "\nWrite them from the system itself, under the model's own names."
        )


def count_of(value: Any) -> int | None:
    return None if value is None else int(value)


def warmup_of(decay: Any, counts: bool) -> str:
    """The schedule ``min(decay, (1 + n) / (10 + n))`` of systems that count, a constant of those that do not."""
    return "" if decay is None else f"{'Warmup' if counts else 'Constant'}({float(decay):.6g})"
