"""Modules of the shapes that are measured. Nothing is trained, so what they compute does not matter."""

from __future__ import annotations

import torch
from torch import nn


def resnet50(statistics: bool = False) -> nn.Module:
    """The 161 parameters of a ResNet-50, 25.6 million elements; with ``statistics`` also its BatchNorm buffers."""
    layers: list[nn.Module] = []

    def add(into: int, out: int, kernel: int) -> None:
        layers.append(nn.Conv2d(into, out, kernel, bias=False))
        layers.append(nn.BatchNorm2d(out, track_running_stats=statistics))

    add(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            add(channels, width, 1)
            add(width, width, 3)
            add(width, 4 * width, 1)
            if block == 0:
                add(channels, 4 * width, 1)
            channels = 4 * width
    return nn.Sequential(*layers, nn.Linear(2048, 1000))


def gpt2(width: int = 768, depth: int = 12) -> nn.Module:
    """The 148 parameters of a GPT-2, 124 million elements."""
    layers: list[nn.Module] = [nn.Embedding(50257, width), nn.Embedding(1024, width)]
    for _ in range(depth):
        layers += [nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)]
        layers += [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)]
    return nn.Sequential(*layers, nn.LayerNorm(width))


def tiny(count: int = 3000) -> nn.Module:
    """Many parameters of 16 elements each."""
    return nn.ParameterList([nn.Parameter(torch.randn(16)) for _ in range(count)])


class _Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(into, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or into != out:
            self.skip = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet18(classes: int = 10) -> nn.Module:
    """A ResNet-18 that trains on images of 32 x 32: 62 parameters, 11.2 million elements."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    channels = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Block(channels, width, stride), _Block(width, width, 1)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def size(module: nn.Module) -> str:
    """How many parameters and elements, in words."""
    parameters = list(module.parameters())
    elements = sum(p.numel() for p in parameters)
    shown = f"{elements / 1e6:.1f} million" if elements > 1e6 else f"{elements:,}"
    return f"{len(parameters):,} tensors, {shown} elements"
