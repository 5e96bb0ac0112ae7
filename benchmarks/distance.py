"""What `||live - average|| / ||live||` costs, exact and from a sample, and how far the sample is off.

python benchmarks/distance.py
"""

from __future__ import annotations

import torch
from measure import Table, arguments, compare
from models import gpt2, resnet18, resnet50, size
from torch import nn

from lightning_ema import Constant, WeightAverage
from lightning_ema.ops.lerp import ratio, relative_distance, sampled_norms


def pairs(module: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    lives = [p.detach() for p in module.parameters()]
    return [live + 0.01 * torch.randn_like(live) for live in lives], lives


def whole_tensors(averages: list[torch.Tensor], lives: list[torch.Tensor]) -> float:
    """The plain form, with a temporary as large as the largest tensor."""
    difference = sum(float((live - average).square().sum()) for average, live in zip(averages, lives, strict=True))
    return (difference / sum(float(live.square().sum()) for live in lives)) ** 0.5


def errors() -> Table:
    """On weights that were trained: the average of the last steps beside the last ones."""
    torch.manual_seed(0)
    module = resnet18()
    optimizer = torch.optim.SGD(module.parameters(), 0.02, momentum=0.9)
    average = WeightAverage(module, Constant(0.8))
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    for _ in range(12):
        loss = nn.functional.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.step()
    names = [name for name, _ in module.named_parameters()]
    held = dict(average.named_tensors())
    averages, lives = [held[name] for name in names], [p.detach() for p in module.parameters()]
    with torch.no_grad():
        exact = relative_distance(averages, lives)
    table = Table(
        "distance_error", f"sampled distance of a resnet18 after 12 steps: {size(module)}", ["relative error"]
    )
    for part in (32, 64, 128, 256):
        table.rows[f"1/{part} of the elements"] = [ratio(sampled_norms(averages, lives, 1 / part)) / exact - 1]
    table.show()
    return table


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
            "sampled": lambda a=averages, b=lives: lambda: ratio(sampled_norms(a, b, 1 / 128)),
            "whole tensors": lambda a=averages, b=lives: lambda: whole_tensors(a, b),
        }
        title = f"distance, {name}: {size(module)}"
        with torch.no_grad():
            reference = ("update", average.step)
            tables.append(compare(f"distance_{name}", title, ("ms", 1e3), reference, candidates, rounds))
    return [*tables, errors()]


if __name__ == "__main__":
    main(arguments(__doc__))
