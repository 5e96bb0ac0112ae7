"""Promise 1: a run with the callback is bit for bit the run without it."""

import pytest
import torch
from helpers import Regression, clones, ema, equal, fit, seeded
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from lightning_ema import Constant

SITUATIONS = {
    "plain": ({"norm": False}, {}, {}),
    "batch norm": ({}, {}, {}),
    "dropout": ({"dropout": 0.5}, {}, {}),
    "accumulation": ({}, {"accumulate_grad_batches": 4}, {}),
    "bf16-mixed": ({"norm": False}, {"precision": "bf16-mixed"}, {}),
    "bf16-true": ({"norm": False}, {"precision": "bf16-true"}, {}),
    "64-true": ({}, {"precision": "64-true"}, {}),
    "validation in mid epoch": ({"dropout": 0.5}, {"val_check_interval": 2}, {}),
    "no inference mode": ({"dropout": 0.5}, {"inference_mode": False}, {}),
    "fast_dev_run": ({}, {"fast_dev_run": 3}, {}),
    "loaders made anew each epoch": ({"dropout": 0.5}, {"reload_dataloaders_every_n_epochs": 1}, {}),
    "overfit_batches": ({"dropout": 0.5}, {"overfit_batches": 2}, {}),
    "clipping": ({}, {"gradient_clip_val": 0.1}, {}),
    "live weights after fit": ({}, {}, {"after_fit": "live"}),
    "evaluated live": ({}, {}, {"evaluate": "live"}),
    "delayed start": ({}, {}, {"start_step": 4}),
    "every third step": ({}, {}, {"every_n_steps": 3, "decay": Constant(0.99)}),
    "copied buffers": ({}, {}, {"buffers": "copy"}),
    "skipping": ({}, {}, {"on_nonfinite": "skip"}),
}


class Recorder(Callback):
    """What the live weights, the optimizer and the random generator are at the start of every batch."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((clones(pl_module.state_dict()), torch.get_rng_state()))

    def on_train_end(self, trainer, pl_module):
        self.final = clones(pl_module.state_dict())
        self.optimizers = [clones(state) for state in trainer.optimizers[0].state_dict()["state"].values()]
        self.random = torch.get_rng_state()


def record(module, *callbacks, **kwargs):
    recorder = Recorder()
    fit(module, *callbacks, recorder, **kwargs)
    return recorder


@pytest.mark.filterwarnings("ignore:every_n_steps")
@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_run_is_bit_for_bit_the_run_without(situation):
    module, run, callback = SITUATIONS[situation]
    plain = record(seeded(**module), **run)
    averaged = record(seeded(**module), ema(**callback), **run)
    assert len(plain.batches) == len(averaged.batches) > 0
    for (weights, random), (same_weights, same_random) in zip(plain.batches, averaged.batches, strict=True):
        assert equal(weights, same_weights)
        assert torch.equal(random, same_random)
    assert equal(plain.final, averaged.final)
    assert all(equal(a, b) for a, b in zip(plain.optimizers, averaged.optimizers, strict=True))
    assert torch.equal(plain.random, averaged.random)


def test_manual_optimization_of_two_optimizers_one_of_them_raw():
    class Two(Regression):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for optimizer in (first, second.optimizer):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[4].parameters(), 0.1)]

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    assert equal(record(seeded(Two)).final, record(seeded(Two), ema()).final)


def test_a_dataloader_that_draws_random_numbers_is_made_when_it_always_was():
    order = {}

    class Draws(Regression):
        def on_fit_start(self):
            order.setdefault(id(self), []).append("fit")
            torch.rand(1)

        def on_train_start(self):
            self.drawn = torch.rand(1)

        def train_dataloader(self):
            order.setdefault(id(self), []).append("data")
            torch.rand(3)
            return helpers_loader()

    from helpers import loader as helpers_loader
    from helpers import seed_everything, trainer

    drawn = []
    for callbacks in ([], [ema()]):
        module = seeded(Draws)
        seed_everything(3, verbose=False)
        trainer(*callbacks).fit(module)
        drawn.append((module.drawn, order[id(module)]))
    assert drawn[0] == drawn[1]


def test_early_stopping_sees_the_average():
    stopped = EarlyStopping("val_loss", stopping_threshold=1e9, check_on_train_epoch_end=False)
    assert fit(seeded(), ema(), stopped, max_epochs=9).current_epoch == 1
