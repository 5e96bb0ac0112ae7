"""One tester for every system that is followed: the same weights go to both, and all tensors are compared each time."""

from collections.abc import Callable

import torch
from torch import nn

from lightning_ema import WeightAverage

TOLERANCE = 5e-6
STATES = 44


class Net(nn.Module):
    """Trained and frozen parameters, BatchNorm with floating-point and integer buffers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 1)


def net():
    torch.manual_seed(5)
    return Net()


def walk(module, states):
    """Gives the module one state of weights and buffers after the other, as training would; frozen weights stay."""
    generator = torch.Generator().manual_seed(17)
    for n in range(1, states + 1):
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                if not tensor.is_floating_point():
                    tensor.fill_(n)
                elif not name.startswith("frozen"):
                    tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
        yield n


class Reference:
    """A plain loop in float64: ``average += rate(n) * (live - average)``; a rate of 1 copies, None leaves it alone.

    ``rate`` is written in the notation of the system that is followed, with ``n`` counting its calls from 1.
    """

    def __init__(self, rate: Callable[[int], float | None], buffers: bool):
        self.rate, self.buffers, self.calls = rate, buffers, 0

    def begin(self, module):
        self.names = {name for name, t in module.state_dict().items() if t.is_floating_point()}
        if not self.buffers:
            self.names &= {name for name, _ in module.named_parameters()}
        self.average = {name: module.state_dict()[name].double() for name in self.names}

    def update(self, module):
        self.calls += 1
        rate = self.rate(self.calls)
        if rate is not None:
            for name in self.names:
                self.average[name] += rate * (module.state_dict()[name].double() - self.average[name])

    def tensors(self):
        return self.average


def assert_follows(system, recipe, compare_from=1, make=net, walk=walk, counted_before=0):
    """Goes through at least 40 compared states with ``system`` and with ``WeightAverage(**recipe)``.

    ``system`` has ``begin(module)``, ``update(module)`` and ``tensors()``: by name what its average holds now. The
    average is read as evaluations see it, off the module that carries it. ``make`` and ``walk`` give the module and its
    states. ``counted_before``: steps that are counted before the first state, which shifts the interval.
    """
    module = make()
    system.begin(module)
    average = WeightAverage(module, **recipe)
    apart = 0.0
    for n in walk(module, compare_from - 1 + STATES):
        live = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        system.update(module)
        average.step(1 + counted_before if n == 1 else 1)
        if n < compare_from:
            continue
        with average.swapped():
            ours = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        theirs = system.tensors()
        assert theirs.keys() >= {"first.weight", "first.bias", "norm.weight", "frozen.weight", "head.bias"}
        for name, tensor in theirs.items():
            distance = (ours[name].double() - tensor.double()).abs().max().item()
            assert distance <= TOLERANCE, f"{name} after state {n}"
        assert ours["norm.num_batches_tracked"] == n  # integers are the live ones
        if "norm.running_mean" not in theirs:
            assert torch.equal(ours["norm.running_mean"], live["norm.running_mean"])
        apart = max(apart, (ours["first.weight"] - live["first.weight"]).abs().max().item())
    assert apart > 200 * TOLERANCE  # else everything would agree with the live weights too
