"""Equal weights with a start, an interval and recalibrated statistics, against torch's own AveragedModel."""

import pytest
import torch
from helpers import BATCHES, Regression, fit, loader, seeded
from lightning.pytorch import Callback
from torch.optim.swa_utils import AveragedModel, update_bn

from lightning_ema import EMACallback, Equal, Recalibrate


class Network(Regression):
    def forward(self, x):
        return self.net(x)


class Torch(Callback):
    """Stochastic weight averaging as torch's documentation writes it."""

    def __init__(self, start_epoch, every):
        self.start_epoch, self.every, self.steps = start_epoch, every, 0

    def on_fit_start(self, trainer, pl_module):
        self.averaged = AveragedModel(pl_module.net)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch >= self.start_epoch:
            self.steps += 1
            if self.steps % self.every == 0:
                self.averaged.update_parameters(pl_module.net)


@pytest.mark.parametrize(("start_epoch", "every"), [(0, 1), (1, 1), (1, 3), (2, BATCHES)])
def test_weights_and_statistics_are_those_of_torch(start_epoch, every):
    reference, module = Torch(start_epoch, every), seeded(Network)
    callback = EMACallback(Equal(), start_epoch=start_epoch, every_n_steps=every, buffers=Recalibrate(batches=BATCHES))
    fit(module, callback, reference, max_epochs=4)
    assert callback.average.num_updates == int(reference.averaged.n_averaged) == (4 - start_epoch) * BATCHES // every
    update_bn(loader(), reference.averaged)
    for name, expected in reference.averaged.module.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], expected, rtol=0, atol=2e-6, msg=name)
