"""A further way of cutting is one file: a class, registered, that a toy stands for here."""

import pytest
import torch
from torch import nn

from lightning_ema import Constant, WeightAverage
from lightning_ema.checkpoint.entry import list_tensors, seal
from lightning_ema.distributed import base
from lightning_ema.distributed.whole import Whole


class Padded(nn.Parameter):
    """A parameter of which an average is kept only in part: the last element is padding."""


class WithoutPadding(Whole):
    """Cuts averages of :class:`Padded` parameters, and counts how often the module was made to show its tensors."""

    stored_as_live = False

    def __init__(self):
        self.resharded = 0

    def takes(self, tensor):
        return type(tensor) is Padded

    def reshards(self, module):
        return [self._reshard] if any(self.takes(parameter) for parameter in module.parameters()) else []

    def _reshard(self):
        self.resharded += 1

    def beside(self, tensor):
        return tensor.detach()[:-1]

    def whole(self, stored, live):
        return torch.cat([stored, live[-1:]])

    def write(self, stored, value):
        stored.copy_(self.beside(value))


@pytest.fixture
def padded(monkeypatch):
    monkeypatch.setattr(base, "_RECOGNIZED", list(base._RECOGNIZED))
    base.register(cut := WithoutPadding())
    return cut


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat, self.plain = Padded(torch.tensor([0.0, 0.0, 9.0])), nn.Parameter(torch.zeros(1))


def test_the_engine_asks_what_was_registered_and_nothing_else(padded):
    net = Net()
    average = WeightAverage(net, Constant(0.75))
    with torch.no_grad():
        net.flat.copy_(torch.tensor([4.0, 8.0, 5.0]))
        net.plain.fill_(4.0)
    before = padded.resharded
    average.step()
    assert padded.resharded > before
    held = dict(average.named_tensors())
    assert held["flat"].tolist() == [1.0, 2.0, 5.0]  # a quarter of the way; the padding is the live one's
    assert held["plain"].tolist() == [1.0]
    with average.swapped():
        assert net.flat.tolist() == [1.0, 2.0, 5.0]
    assert net.flat.tolist() == [4.0, 8.0, 5.0]


def test_a_state_is_read_back_as_it_was_kept(padded):
    average = WeightAverage(Net(), Constant(0.75))
    average.step()
    again = WeightAverage(Net(), Constant(0.75))
    state = {**average.state_dict(), "average": {"flat": torch.ones(3), "plain": torch.ones(1)}}
    list_tensors(state, "average"), seal(state)
    again.load_state_dict(state)
    assert dict(again.named_tensors())["flat"].tolist() == [1.0, 1.0, 9.0]


def test_without_it_the_same_tensors_are_whole():
    assert base.cut_of(Net().flat).stored_as_live
    assert base.reshards_of(Net()) == []
