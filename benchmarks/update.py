"""What an update costs, beside one `lerp_` over a single flat float32 tensor with as many elements.

    python benchmarks/update.py

The flat `lerp_` reads and writes each element once and walks no list: what the memory allows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import Make, Table, Work, arguments, compare
from models import gpt2, resnet50, size, tiny
from peers import PEERS
from torch import nn

from lightning_ema import Constant, WeightAverage

Build = Callable[[], nn.Module]

RATE = 1e-3
DECAYS = [Constant(0.999), Constant(0.99), Constant(0.9999)]


def flat_lerp(module: nn.Module) -> Work:
    elements = sum(p.numel() for p in module.parameters())
    average, live = torch.randn(elements), torch.randn(elements)
    return lambda: average.lerp_(live, RATE)


def bare_foreach(module: nn.Module) -> Callable[[], Work]:
    def make() -> Work:
        lives = [p.detach() for p in module.parameters()]
        averages = [live.clone() for live in lives]
        return lambda: torch._foreach_lerp_(averages, lives, RATE)

    return make


def updates(build: Build, buffers: bool = False, dtype: torch.dtype | None = None) -> dict[str, Make]:
    """The updates of all peers. With ``dtype``, weights are cast to it under an average that began in float32."""

    def making(name: str) -> Make:
        def make() -> Work | str:
            module = build()
            peer = PEERS[name](module, buffers)
            if isinstance(peer, str):
                return peer
            module.to(dtype)
            try:
                peer.update()
                peer.update()  # the first one only copies in several of them
            except RuntimeError:
                return "refuses"
            return peer.update

        return make

    return {name: making(name) for name in PEERS}


def several(module: nn.Module, count: int) -> Make:
    def make() -> Work:
        average = WeightAverage(module, DECAYS[:count])
        return average.step

    return make


def main(rounds: int) -> list[Table]:
    tables = []
    ms, us = ("ms", 1e3), ("us a tensor", 1e6)
    for name, build in (("resnet50", resnet50), ("gpt2", gpt2)):
        module = build()
        reference = ("flat lerp_", flat_lerp(module))
        title = f"update, {name}: {size(module)}, float32"
        candidates = {"bare torch._foreach_lerp_": bare_foreach(module), **updates(lambda m=module: m)}
        tables.append(compare(f"update_{name}", title, ms, reference, candidates, rounds))
        title = f"update, {name}: {size(module)}, bfloat16 weights, float32 average"
        candidates = updates(build, dtype=torch.bfloat16)
        tables.append(compare(f"update_{name}_bf16", title, ms, reference, candidates, rounds))
    module = resnet50(statistics=True)
    title = f"update, resnet50 with its 106 floating-point BatchNorm buffers: {size(module)}"
    reference = ("flat lerp_", flat_lerp(module))
    candidates = updates(lambda: module, buffers=True)
    tables.append(compare("update_buffers", title, ms, reference, candidates, rounds))
    candidates = {
        f"{kind}, {count} decays": several(resnet50().to(dtype), count)
        for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        for count in (1, 2, 3)
    }
    title = f"several decays in one update, resnet50: {size(module)}"
    tables.append(compare("update_several", title, ms, reference, candidates, rounds))
    module = tiny()
    per_tensor = (us[0], us[1] / len(list(module.parameters())))
    bare = ("bare torch._foreach_lerp_", bare_foreach(module)())
    for dtype in (torch.float32, torch.bfloat16):
        title = f"update, many tiny tensors: {size(module)}, {dtype} weights, float32 average"
        name = f"update_tiny_{str(dtype).removeprefix('torch.')}"
        tables.append(compare(name, title, per_tensor, bare, updates(tiny, dtype=dtype), rounds))
    return tables


if __name__ == "__main__":
    main(arguments(__doc__))
