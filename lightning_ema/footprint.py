"""Noticing that the user loaded or edited weights after a fit."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_ema.selection import Survey


class Footprint:
    """The parameters of a module as they are now, by identity and by how often they were written to.

    Moving a module to another device changes neither; loading weights, an optimizer step and an assignment do.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._left = _versions(module)

    def intact(self) -> bool:
        """Whether no parameter was replaced or written to since."""
        now, then = _versions(self._module), self._left
        return len(now) == len(then) and all(a is b and v == w for (a, v), (b, w) in zip(now, then, strict=True))


def _versions(module: nn.Module) -> list[tuple[Tensor, int]]:
    return [(c.tensor, c.tensor._version) for c in Survey(module).candidates if not c.is_buffer]
