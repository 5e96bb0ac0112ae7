"""Tiny modules, data and trainers that the tests share."""

import warnings

import lightning
import lightning.pytorch.callbacks
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from packaging.version import Version
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ema import EMACallback
from lightning_ema.averaging.weight_average import place_of, tracker_of
from lightning_ema.callback.ema_callback import holder_of

BATCHES = 6
EMAWeightAveraging = getattr(lightning.pytorch.callbacks, "EMAWeightAveraging", None)
needs_weight_averaging = pytest.mark.skipif(
    EMAWeightAveraging is None, reason="Lightning has EMAWeightAveraging from 2.6 on"
)


def widest(kept):
    """Marks for a case of a wide matrix: all are run by ``make test-all``, the ones that are kept by ``make test``."""
    return () if kept else pytest.mark.slow


resumes_at_the_last_batch = pytest.mark.skipif(
    Version(lightning.__version__) < Version("2.5"),
    reason="Lightning 2.4 itself, without any callback, trains one batch more after a save in an epoch's last batch",
)


class Regression(LightningModule):
    """A small network with everything that averaging can get wrong: BatchNorm statistics, dropout, several layers."""

    def __init__(self, dropout: float = 0.0, norm: bool = True, lr: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(4, 8),
            nn.BatchNorm1d(8) if norm else nn.Identity(),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Linear(8, 1),
        )

    def loss(self, batch):
        x, y = batch
        x = x.to(self.net[0].weight.dtype)
        return nn.functional.mse_loss(self.net(x).float(), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)


class TwoOptimizers(Regression):
    """Manual optimization with two optimizers, which step in turn in every batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net[0].parameters(), 0.01), torch.optim.SGD(self.net[4].parameters(), 0.01)]


def loader(batches=BATCHES, batch_size=8):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batches * batch_size, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size)


def trainer(*callbacks, **kwargs):
    settings = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **kwargs})


def fit(module, *callbacks, ckpt_path=None, **kwargs):
    """Fits from a fixed seed and gives the trainer."""
    seed_everything(3, verbose=False)
    this = trainer(*callbacks, **kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|longer than the whole run|isinstance)")
        this.fit(module, loader(), loader(2), ckpt_path=ckpt_path)
    return this


def seeded(make=Regression, **kwargs):
    seed_everything(11, verbose=False)
    return make(**kwargs)


def clones(named):
    return {name: tensor.detach().clone() for name, tensor in dict(named).items()}


def equal(first, second):
    first, second = dict(first), dict(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def ema(**kwargs):
    return EMACallback(**{"decay": 0.9, **kwargs})


def engine(average):
    """What is behind an average, for tests of what callbacks use of it."""
    return tracker_of(average)


def history_of(average):
    return tracker_of(average).histories[place_of(average)]


def schedule_of(average):
    return tracker_of(average).schedules[place_of(average)]


def settings_of(callback):
    return holder_of(callback).settings.average
