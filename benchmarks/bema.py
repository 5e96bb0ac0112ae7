"""BEMA beside the plain average on a noisy quadratic: python benchmarks/bema.py (one core, about 20 seconds).

SGD at a constant learning rate on 0.5 * w' diag(h) w in 50 dimensions, h from 0.01 to 1, gradients with unit noise,
started at distance 3 in each. Printed is the mean loss of each average over five seeds.
"""

import statistics

import torch
from torch import nn

from lightning_ema import Bema, Constant, Warmup, WeightAverage

DECAYS = [Warmup(0.999), Bema(eta=0.2), Bema(eta=0.4), Constant(0.0)]
STEPS = (50, 100, 300, 1_000, 3_000, 10_000, 30_000)
DIMENSIONS, LEARNING_RATE = 50, 0.05


def losses(seed: int) -> list[list[float]]:
    noise = torch.Generator().manual_seed(seed)
    curvature = torch.logspace(-2, 0, DIMENSIONS)
    net = nn.Linear(DIMENSIONS, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(3 * torch.randn(1, DIMENSIONS, generator=noise))
    average, found = WeightAverage(net, DECAYS), []
    for step in range(1, STEPS[-1] + 1):
        with torch.no_grad():
            gradient = curvature * net.weight + torch.randn(1, DIMENSIONS, generator=noise)
            net.weight.sub_(LEARNING_RATE * gradient)
        average.step()
        if step in STEPS:
            weights = [dict(each.named_tensors())["weight"] for each in average.averages]
            found.append([0.5 * (curvature * weight.square()).sum().item() for weight in weights])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = [losses(seed) for seed in range(5)]
    print(f"{'step':>7}{'Warmup(0.999)':>15}{'Bema(eta=0.2)':>15}{'Bema(eta=0.4)':>15}{'live':>15}")
    for place, step in enumerate(STEPS):
        means = [statistics.mean(run[place][which] for run in runs) for which in range(len(DECAYS))]
        print(f"{step:>7,}" + "".join(f"{mean:>15.3f}" for mean in means))
