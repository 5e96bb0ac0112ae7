"""The moment before an optimizer changes parameters, whatever way it is asked to step."""

import pytest
import torch
from torch import nn

from lightning_ema.ops.step_hooks import call_before_step


class Weights(nn.Module):
    """Parameters, and a note of what happened in which order."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.order = []

    def closure(self):
        self.order.append(f"closure at {self.weight[0].item():g}")
        self.weight.grad = None
        loss = self.weight.square().sum()
        loss.backward()
        return loss

    def note(self):
        self.order.append(f"work at {self.weight[0].item():g}")


class Once:
    """Work that removes itself, as an update that is finished does."""

    def __init__(self, note):
        self.note = note
        self.handle = call_before_step(self.work)

    def work(self):
        self.note()
        self.handle.remove()


class Perturbing(torch.optim.SGD):
    """Moves the weights before it asks for the loss, as SAM does."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(10.0)
        with torch.enable_grad():
            return closure()


@pytest.fixture
def weights():
    weights = Weights()
    handle = call_before_step(weights.note)
    yield weights
    handle.remove()


def test_without_a_closure_it_comes_first(weights):
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.25)
    weights.closure()
    optimizer.step()
    assert weights.order == ["closure at 1", "work at 1"]
    assert weights.weight.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("step", [lambda o, c: o.step(c), lambda o, c: o.step(closure=c)], ids=["placed", "named"])
def test_it_comes_behind_the_closure_and_the_loss_is_handed_on(weights, step):
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.25)
    assert step(optimizer, weights.closure).item() == 2
    assert weights.order == ["closure at 1", "work at 1"]
    assert weights.weight.tolist() == [0.5, 0.5]


def test_an_optimizer_that_asks_for_the_loss_several_times(weights):
    torch.optim.LBFGS(weights.parameters(), lr=0.25, max_iter=2).step(weights.closure)
    assert weights.order[:2] == ["closure at 1", "work at 1"]
    assert len(weights.order) == 4


def test_an_optimizer_that_moves_the_weights_before_the_closure(weights):
    Perturbing(weights.parameters(), lr=0.25).step(weights.closure)
    assert weights.order == ["work at 1", "closure at 11"]


@pytest.mark.parametrize("closure", [False, True])
def test_several_that_remove_themselves(weights, closure):
    for _ in range(2):
        Once(weights.note)
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.25)
    weights.closure()
    weights.order.clear()
    for _ in range(2):
        optimizer.step(weights.closure if closure else None)
    noted = [line.split()[0] for line in weights.order]
    expected = ["closure", *["work"] * 3, "closure", "work"] if closure else ["work"] * 4
    assert noted == expected


OPTIMIZERS = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_of_torch_asks_for_the_loss_first(kind):
    """What ``call_before_step`` rests on."""
    weights = nn.ParameterList([nn.Parameter(torch.ones(2, 2))])
    seen = []

    def closure():
        seen.append(weights[0].detach().clone())
        weights[0].grad = torch.ones(2, 2).to_sparse() if kind is torch.optim.SparseAdam else torch.ones(2, 2)
        return weights[0].sum()

    kind(weights.parameters(), lr=0.5).step(closure)
    assert seen[0].tolist() == [[1, 1], [1, 1]]
