"""What only a GPU can show. Without one every test here is skipped: nothing in it has been seen to pass then."""

import pytest
import torch
from helpers import seeded
from torch import nn

from lightning_ema import Constant, EMACallback, WeightAverage
from lightning_ema.ops.fused import FusedLerp, lerp_of
from lightning_ema.ops.lerp import lerp_reference_

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def trained(steps=20, dtype=torch.float32, **settings):
    """The averages and the live weights after some steps of SGD, computed on the GPU."""
    network = seeded(lambda: nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))).cuda().to(dtype)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    average = WeightAverage(network, Constant(0.9), **settings)
    generator = torch.Generator(device="cuda").manual_seed(0)
    for _ in range(steps):
        inputs = torch.randn(16, 32, generator=generator, device="cuda").to(dtype)
        optimizer.zero_grad()
        network(inputs).pow(2).mean().backward()
        optimizer.step()
        average.step()
    return {name: tensor.clone() for name, tensor in average.named_tensors()}, average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_launch_is_the_plain_update(dtype):
    lives = [torch.randn(shape, device="cuda").to(dtype) for shape in [(3, 5), (), (0,), (4096,), (3, 4097)]]
    averages = [[torch.randn_like(live, dtype=torch.float32) for live in lives] for _ in range(2)]
    expected = [[average.clone() for average in each] for each in averages]
    update = lerp_of(averages, lives)
    assert type(update) is FusedLerp
    for rates in ([0.1, 0.7], [0.0, 1.0]):
        update(rates)
        for each, rate in zip(expected, rates, strict=True):
            lerp_reference_(each, lives, rate)
    torch.testing.assert_close(averages, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"overlap": True}, {"device": "cpu"}], ids=["overlap", "host memory"])
def test_beside_training_it_is_the_same_average(dtype, settings):
    expected, _ = trained(dtype=dtype)
    got, _ = trained(dtype=dtype, **settings)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor.cuda(), expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"overlap": True}], ids=["here", "overlap"])
def test_an_update_never_waits_for_the_gpu(settings):
    _, average = trained(2, torch.bfloat16, **settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        average.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_holds_an_update(dtype):
    lives = [torch.full((5000,), 8.0, device="cuda", dtype=dtype)]
    averages = [[torch.zeros(5000, device="cuda")], [torch.zeros(5000, device="cuda")]]
    update = lerp_of(averages, lives)
    with torch.no_grad():
        update([0.0, 0.0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            update([0.5, 0.25])
        graph.replay()
        lives[0].fill_(16.0)
        graph.replay()
    assert averages[0][0].unique().tolist() == [0.5 * 4 + 0.5 * 16]
    assert averages[1][0].unique().tolist() == [0.75 * 2 + 0.25 * 16]


@pytest.mark.parametrize("settings", [{}, {"overlap": True}, {"device": "cpu"}], ids=["here", "overlap", "host memory"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-mixed"])
def test_a_run_on_the_gpu_swaps_in_and_out(tmp_path, settings, precision):
    from helpers import Regression, fit

    class Watching(Regression):
        def on_validation_start(self):
            self.seen = {name: tensor.clone() for name, tensor in self.named_parameters()}

    callback = EMACallback(Constant(0.5), after_fit="live", **settings)
    module = seeded(Watching)
    fit(module, callback, accelerator="gpu", devices=1, precision=precision, default_root_dir=tmp_path, logger=False)
    averages = dict(callback.average.named_tensors())
    for name, seen in module.seen.items():
        torch.testing.assert_close(seen.float().cpu(), averages[name].float().cpu(), rtol=1e-2, atol=1e-3)
        assert not torch.equal(seen, dict(module.named_parameters())[name].detach())
