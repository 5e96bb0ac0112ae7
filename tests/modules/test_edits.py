import pytest
import torch
from torch import nn

from lightning_ema.modules.edits import Edits


def assign(net):
    net.weight = nn.Parameter(net.weight.detach().clone())


def step(net):
    net(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()


@pytest.mark.parametrize(
    "edit",
    [
        lambda net: net.load_state_dict(net.state_dict()),
        lambda net: nn.init.zeros_(net.weight),
        lambda net: net.add_module("more", nn.Linear(1, 1)),
        assign,
        step,
    ],
)
def test_edits_are_noticed(edit):
    net = nn.Linear(2, 1)
    edits = Edits(net)
    assert edits.intact()
    edit(net)
    assert not edits.intact()


@pytest.mark.parametrize(
    "harmless", [lambda net: net.double().float(), nn.Module.eval, lambda net: net(torch.ones(1, 2))]
)
def test_moving_and_running_are_no_edits(harmless):
    net = nn.Linear(2, 1)
    edits = Edits(net)
    harmless(net)
    assert edits.intact()
