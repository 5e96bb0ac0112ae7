import pytest
import torch
from torch import nn

from lightning_ema.modules.batchnorm import Recalibration, statistics_of

BATCHES = [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])]


def net():
    layer = nn.BatchNorm1d(1)
    layer.running_mean.fill_(50)
    layer.num_batches_tracked.fill_(9)
    return nn.Sequential(layer)


def test_the_statistics_are_the_plain_mean_over_the_batches():
    module = net()
    module.eval()
    recalibration = Recalibration(module)
    recalibration.put_in(BATCHES, made_at=3)
    assert module[0].running_mean.item() == pytest.approx((1 + 6) / 2)
    assert module[0].running_var.item() == pytest.approx((2 + 8) / 2)  # unbiased variances of each batch
    assert module[0].momentum == 0.1
    assert not module.training
    assert recalibration.live()["0.running_mean"].item() == 50
    recalibration.take_out()
    assert (module[0].running_mean.item(), module[0].num_batches_tracked.item()) == (50, 9)
    assert recalibration.made_at == 3


def test_what_was_estimated_for_these_updates_is_used_again():
    module = net()
    recalibration = Recalibration(module)
    recalibration.put_in(BATCHES, made_at=3)
    recalibration.take_out()
    recalibration.put_in([torch.full((2, 1), 1e6)], made_at=3)
    assert module[0].running_mean.item() == pytest.approx(3.5)
    recalibration.take_out()
    recalibration.put_in([torch.full((2, 1), 7.0)], made_at=4)
    assert module[0].running_mean.item() == pytest.approx(7)


def test_an_error_on_the_way_brings_the_live_ones_back():
    def broken():
        yield BATCHES[0]
        raise KeyboardInterrupt

    module = net()
    with pytest.raises(KeyboardInterrupt):
        Recalibration(module).put_in(broken(), made_at=1)
    assert module[0].running_mean.item() == 50


def test_layers_are_found_by_what_update_bn_goes_by():
    module = nn.Sequential(
        nn.BatchNorm2d(1), nn.Linear(1, 1), nn.LayerNorm(1), nn.BatchNorm1d(1, track_running_stats=False)
    )
    assert set(statistics_of(module)) == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
