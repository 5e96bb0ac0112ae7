"""BatchNorm statistics of an average: estimated once for its updates, in the module as long as that carries it."""

from contextlib import nullcontext

import pytest
import torch
from helpers import clones, engine, equal
from torch import nn

from lightning_ema import Constant, WeightAverage
from lightning_ema.averaging.tensor_set import Estimate

BATCHES = [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])]


def estimating(decays=1):
    """A module with live statistics of 50, whose averages have estimates of their own, and what holds them."""
    layer = nn.BatchNorm1d(1)
    layer.running_mean.fill_(50)
    layer.num_batches_tracked.fill_(9)
    module = nn.Sequential(layer)
    average = WeightAverage(module, [Constant(0.5), Constant(0.75)][:decays], buffers="copy")
    holds = engine(average).holds
    holds.estimates = [Estimate() for _ in range(decays)]
    return module, average, holds


def mean(module):
    return module[0].running_mean.item()


def test_a_swap_carries_estimates_and_the_live_ones_come_back():
    module, average, holds = estimating()
    average.step()
    holds.swap_in(0, batches=nullcontext(BATCHES))
    assert (mean(module), module[0].running_var.item()) == (pytest.approx(3.5), pytest.approx(5.0))
    assert holds.live_statistics()["0.running_mean"].item() == 50
    holds.swap_out()
    assert (mean(module), module[0].num_batches_tracked.item()) == (50, 9)
    assert holds.live_statistics() == {}
    assert holds.estimates[0].made_at == 1


def test_what_was_estimated_for_these_updates_is_used_again():
    module, average, holds = estimating()
    average.step()
    holds.swap_in(0, batches=nullcontext(BATCHES))
    holds.swap_out()
    for batches in (nullcontext([torch.full((2, 1), 1e6)]), None):
        holds.swap_in(0, batches=batches)
        assert mean(module) == pytest.approx(3.5)
        holds.swap_out()
    average.step()
    holds.swap_in(0)  # without batches those of before are the best there are
    assert mean(module) == pytest.approx(3.5)
    holds.swap_out()
    holds.swap_in(0, batches=nullcontext([torch.full((2, 1), 7.0)]))
    assert mean(module) == pytest.approx(7)
    holds.swap_out()
    assert mean(module) == 50


def test_an_error_on_the_way_brings_the_live_ones_back():
    def broken():
        yield BATCHES[0]
        raise KeyboardInterrupt

    module, average, holds = estimating()
    average.step()
    live = clones(module.state_dict())
    with pytest.raises(KeyboardInterrupt):
        holds.swap_in(0, batches=nullcontext(broken()))
    assert equal(module.state_dict(), live)
    assert holds.estimates[0].made_at == -1
    assert not engine(average).weights.held


def test_each_average_has_its_own_and_a_paused_swap_goes_on_with_its_own():
    module, average, holds = estimating(decays=2)
    average.step()
    holds.swap_in(0, batches=nullcontext(BATCHES))
    with holds.instead(1, batches=nullcontext([torch.full((2, 1), 7.0)])):
        assert mean(module) == pytest.approx(7)
    assert mean(module) == pytest.approx(3.5)
    with holds.instead(None):
        assert mean(module) == 50
    assert mean(module) == pytest.approx(3.5)
    holds.swap_out()
    assert mean(module) == 50
    assert [each.made_at for each in holds.estimates] == [1, 1]
