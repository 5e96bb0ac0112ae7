import pytest
import torch
from torch import nn

from lightning_ema.modules.batchnorm import estimate, statistics_of

BATCHES = [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])]


def net():
    layer = nn.BatchNorm1d(1)
    layer.running_mean.fill_(50)
    layer.num_batches_tracked.fill_(9)
    return nn.Sequential(layer)


def test_the_statistics_are_the_plain_mean_over_the_batches():
    module = net()
    module.eval()
    statistics = estimate(module, BATCHES, together=False)
    assert module[0].running_mean.item() == pytest.approx((1 + 6) / 2)
    assert module[0].running_var.item() == pytest.approx((2 + 8) / 2)  # unbiased variances of each batch
    assert module[0].momentum == 0.1
    assert not module.training
    module[0].running_mean.fill_(7)  # what is given are copies
    assert {name: value.item() for name, value in statistics.items()} == {
        "0.running_mean": 3.5,
        "0.running_var": 5.0,
        "0.num_batches_tracked": 2,
    }


def test_layers_are_found_by_what_update_bn_goes_by():
    module = nn.Sequential(
        nn.BatchNorm2d(1), nn.Linear(1, 1), nn.LayerNorm(1), nn.BatchNorm1d(1, track_running_stats=False)
    )
    statistics = statistics_of(module)
    assert set(statistics) == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    assert statistics["0.running_mean"] is module[0].running_mean
