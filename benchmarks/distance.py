"""What `||live - average|| / ||live||` costs.

python benchmarks/distance.py
"""

from __future__ import annotations

import torch
from measure import Table, arguments, compare
from models import gpt2, resnet50, size
from torch import nn

from lightning_ema import Constant, WeightAverage
from lightning_ema.ops.lerp import relative_distance


def pairs(module: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    lives = [p.detach() for p in module.parameters()]
    return [live + 0.01 * torch.randn_like(live) for live in lives], lives


def whole_tensors(averages: list[torch.Tensor], lives: list[torch.Tensor]) -> float:
    """The plain form, with a temporary as large as the largest tensor."""
    difference = sum(float((live - average).square().sum()) for average, live in zip(averages, lives, strict=True))
    return (difference / sum(float(live.square().sum()) for live in lives)) ** 0.5


def main(rounds: int) -> list[Table]:
    tables = []
    for name, build in (("resnet50", resnet50), ("gpt2", gpt2)):
        module = build()
        averages, lives = pairs(module)
        half = [live.bfloat16() for live in lives]
        average = WeightAverage(module, Constant(0.999))
        candidates = {
            "exact": lambda a=averages, b=lives: lambda: relative_distance(a, b),
            "exact, bfloat16 weights": lambda a=averages, b=half: lambda: relative_distance(a, b),
            "whole tensors": lambda a=averages, b=lives: lambda: whole_tensors(a, b),
        }
        title = f"distance, {name}: {size(module)}"
        with torch.no_grad():
            reference = ("update", average.step)
            tables.append(compare(f"distance_{name}", title, ("ms", 1e3), reference, candidates, rounds))
    return tables


if __name__ == "__main__":
    main(arguments(__doc__))
