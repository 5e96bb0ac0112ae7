"""Promise 6: one tensor for each averaged tensor, and nothing else of that order of size."""

import pytest
import torch
from helpers import Regression, ema, fit, seeded
from torch import nn

TRAINED = 4 * (300 * 300 + 300)  # bytes of the layer that is averaged, in float32


class MostlyFrozen(Regression):
    def __init__(self):
        super().__init__(norm=False)
        self.frozen = nn.Linear(1000, 1000).requires_grad_(False)  # 4 MB
        self.trained = nn.Linear(300, 300)  # 0.36 MB

    def loss(self, batch):
        return super().loss(batch) + self.trained.weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def peak(count_allocations, *callbacks, save_to=None, **kwargs):
    module = seeded(MostlyFrozen)
    with count_allocations() as allocated:
        this = fit(module, *callbacks, **kwargs)
        if save_to:
            this.save_checkpoint(save_to)
    return allocated.peak


def test_the_counter_sees_a_full_copy(count_allocations):
    kept = torch.ones(1000, 1000)
    with count_allocations() as allocated:
        copies = [kept.clone(), kept.clone()]
        assert allocated.peak == 2 * kept.nbytes
        del copies
        assert allocated.alive == 0
        kept.clone()
    assert allocated.peak == 2 * kept.nbytes
    assert allocated.total == 3 * kept.nbytes


@pytest.mark.parametrize("settings", [{}, {"after_fit": "live"}, {"evaluate": "live"}, {"every_n_steps": 2}])
@pytest.mark.filterwarnings("ignore:every_n_steps")
def test_a_whole_run_needs_one_tensor_for_each_averaged_one(settings, count_allocations, tmp_path):
    plain = peak(count_allocations, save_to=tmp_path / "a.ckpt")
    averaged = peak(count_allocations, ema(**settings), save_to=tmp_path / "b.ckpt")
    small = 50_000  # scratch, norms, the small layers beside the one of 361 kB
    assert TRAINED <= averaged - plain <= TRAINED + small


def test_half_precision_pays_for_a_float32_average_and_one_cast_in_a_swap(count_allocations):
    plain = peak(count_allocations, precision="bf16-true")
    averaged = peak(count_allocations, ema(after_fit="live"), precision="bf16-true")
    # the average is twice the size of the bfloat16 layer, its cast once, the chunk of the update at most 1 MB
    assert TRAINED <= averaged - plain <= TRAINED + TRAINED // 2 + 4 * 2**18 + 50_000


def test_nothing_is_allocated_by_a_step_after_the_first(count_allocations):
    from lightning_ema import WeightAverage

    average = WeightAverage(nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300)))
    average.step()
    with count_allocations() as allocated:
        average.step()
    assert allocated.total == 0
