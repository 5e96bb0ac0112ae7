"""The engine in a Lightning Fabric loop."""

import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_ema import Constant, WeightAverage


def test_a_fabric_loop():
    fabric = Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    expected = net.weight.detach().clone()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), 0.1))
    average = WeightAverage(model, Constant(0.9))
    assert [name for name, _ in average.named_tensors()] == ["weight", "bias"]
    for _ in range(5):
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(4, 2)).square().mean())
        optimizer.step()
        assert average.step()
        expected = 0.9 * expected + 0.1 * net.weight.detach()
    torch.testing.assert_close(dict(average.named_tensors())["weight"], expected)
    live = net.weight.detach().clone()
    with average.swapped(), torch.no_grad():
        assert torch.allclose(model(torch.eye(2)) - net.bias, expected.t())
    assert torch.equal(net.weight, live)
