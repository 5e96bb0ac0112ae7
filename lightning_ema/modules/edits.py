"""Noticing that the user loaded or edited weights after a fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_ema.distributed.base import cut_of
from lightning_ema.modules.named_tensors import Survey


class Edits:
    """The parameters of a module as they are now, by identity and by how often they were written to.

    Moving a module to another device changes neither; loading weights, an optimizer step and an assignment do. A
    change of dtype counts too. Embeddings with ``max_norm`` write to themselves, and are not looked at.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._left: list[tuple[Tensor, int, torch.dtype]] | None = _versions(module)

    def intact(self, writes: int = 0) -> bool:
        """Whether no parameter was replaced since, and each was written to so many times."""
        now = _versions(self._module)
        if self._left is None:  # a copy of an intact one: in it, tensors and their versions are new
            self._left = now
        if len(now) != len(self._left):
            return False
        return all(a[0] is b[0] and a[1:] == (b[1] + writes, b[2]) for a, b in zip(now, self._left, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {"_module": self._module, "_left": None if self.intact() else []}


def _versions(module: nn.Module) -> list[tuple[Tensor, int, torch.dtype]]:
    parameters = [c for c in Survey(module).candidates if not c.is_buffer and not c.rewritten]
    return [(c.tensor, cut_of(c.tensor).version(c.tensor), c.tensor.dtype) for c in parameters]
