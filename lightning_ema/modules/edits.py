"""Noticing that the user loaded or edited weights after a fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_ema.distributed.base import cut_of, local
from lightning_ema.modules.named_tensors import Survey

_Left = tuple[Tensor, int, torch.dtype, str]

SAMPLE = 4
"""Elements of each tensor that are compared."""


class Edits:
    """The parameters of a module as they are now, by identity and by how often they were written to.

    Moving a module to another device changes neither; loading weights, an optimizer step and an assignment do. A
    change of dtype counts too. Embeddings with ``max_norm`` write to themselves, and are not looked at.

    Args:
        module: the module.
        contents: compare the first elements of each as well, since what is written through ``data`` is counted nowhere.
    """

    def __init__(self, module: nn.Module, contents: bool = False) -> None:
        self._module = module
        self._contents = contents
        self._left: list[_Left] | None = _versions(module, contents)

    def intact(self, writes: int = 0) -> bool:
        """Whether no parameter was replaced since, and each was written to so many times."""
        now = _versions(self._module, self._contents)
        if self._left is None:  # a copy of an intact one: in it, tensors and their versions are new
            self._left = now
        if len(now) != len(self._left):
            return False
        pairs = zip(now, self._left, strict=True)
        return all(a[0] is b[0] and a[1:] == (b[1] + writes, *b[2:]) for a, b in pairs)

    def __getstate__(self) -> dict[str, Any]:
        return {"_module": self._module, "_contents": self._contents, "_left": None if self.intact() else []}


def _versions(module: nn.Module, contents: bool) -> list[_Left]:
    parameters = [c.tensor for c in Survey(module).candidates if not c.is_buffer and not c.rewritten]
    return [
        (tensor, cut_of(tensor).version(tensor), tensor.dtype, _beginning(tensor) if contents else "")
        for tensor in parameters
    ]


def _beginning(tensor: Tensor) -> str:
    if is_lazy(tensor):
        return ""
    return repr(local(tensor).detach().flatten()[:SAMPLE].tolist())  # as text, in which NaN equals NaN
