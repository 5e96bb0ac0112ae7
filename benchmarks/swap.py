"""What it costs to swap the average into the module and out again: time and bytes.

python benchmarks/swap.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import Make, Table, Work, arguments, compare
from models import resnet50, size
from peers import OURS, PEERS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ema import Constant, WeightAverage

IN_PLACE = "lightning_ema, in place (memory shared with other processes)"


class _Written(TorchDispatchMode):
    """Adds up the bytes that operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.copy_.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves(result))
        return result


def in_place(module: nn.Module) -> Callable[[], object]:
    average = WeightAverage(module.share_memory(), Constant(0.999))
    return lambda: (average.swap_in(), average.swap_out())


def main(rounds: int) -> list[Table]:
    module = resnet50()
    works: dict[str, Work | str] = {}
    for name, make in PEERS.items():
        peer = make(module, False)
        works[name] = peer if isinstance(peer, str) else (peer.evaluate or "no way to")
    works[IN_PLACE] = in_place(resnet50())
    moved = Table("swap_bytes", f"bytes written by swapping in and out, {size(module)}", ["x the module's bytes"])
    for name, work in works.items():
        with _Written() as written:
            _ = work if isinstance(work, str) else work()
        whole = sum(p.nbytes for p in module.parameters())
        moved.rows[name] = [work if isinstance(work, str) else written.bytes / whole]
    moved.show()
    candidates: dict[str, Make] = {name: (lambda w=work: w) for name, work in works.items()}
    theirs = works["Lightning EMAWeightAveraging"]
    reference = ("Lightning's", theirs) if not isinstance(theirs, str) else (OURS, in_place(resnet50()))
    unit = ("us a tensor", 1e6 / len(list(module.parameters())))
    return [moved, compare("swap", f"swapping in and out, {size(module)}", unit, reference, candidates, rounds)]


if __name__ == "__main__":
    main(arguments(__doc__))
