"""Modules and callbacks with a way of their own beside an average: no error where a plain run has none."""

import csv

import pytest
import torch
import torchmetrics
from helpers import BATCHES, Regression, ema, fit, loader, seeded, trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from taught import Taught
from torch import nn

from lightning_ema import Constant
from lightning_ema.teacher import for_both


class TakesIterator(Regression):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


class TakesIteratorInValidation(TakesIterator):
    def validation_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        self.log("val_loss", self.loss(batch), batch_size=8)


class TeachesFromIterator(Taught):
    def training_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


def column(logger, name):
    with open(logger.experiment.metrics_file_path) as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (TakesIterator, {}),
        (TakesIterator, {"decay": [Constant(0.9), Constant(0.5)]}),
        (TakesIteratorInValidation, {"evaluate": "both"}),
    ],
)
def test_a_step_that_takes_the_iterator_is_logged(make, settings, tmp_path):
    logger, callback = CSVLogger(tmp_path), ema(**settings)
    fit(seeded(make), callback, logger=logger, log_every_n_steps=1)
    assert column(logger, "ema/updates") == [float(n) for n in range(1, 2 * BATCHES + 1)]


def test_a_teacher_beside_a_step_that_takes_the_iterator_is_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(seeded(TeachesFromIterator), logger=logger, log_every_n_steps=1)
    assert column(logger, "mean_teacher/decay") == [0.5] * 2 * BATCHES


def test_metrics_of_both_networks_are_logged_where_no_batch_is_at_hand():
    class Scored(Taught):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.scores = for_both(mse=torchmetrics.MeanSquaredError())

        def validation_step(self, dataloader_iter):
            (x, y), _, _ = next(dataloader_iter)
            self.log_both(self.scores, y, lambda network: network(x))

    this = fit(seeded(Scored))
    assert {"teacher/mse", "student/mse"} <= this.callback_metrics.keys()


@pytest.mark.parametrize("name", ["lightning.zoo", "lightning.pytorch.demos.mine", "pytorch_lightning.models"])
def test_a_forward_of_a_package_with_lightnings_name_is_a_forward(name):
    class Base(Regression):
        def forward(self, x):
            return self.net(x)

    class Derived(Base):
        pass

    Base.__module__ = Base.forward.__module__ = name
    module = seeded(Derived)
    fit(module, ema(buffers="recalibrate", decay=Constant(0.5)))
    with torch.no_grad():
        first = nn.functional.linear(torch.cat([x for x, _ in loader()]), module.net[0].weight, module.net[0].bias)
    torch.testing.assert_close(module.net[1].running_mean, first.mean(0), rtol=0, atol=1e-5)


def test_a_module_without_a_forward_cannot_be_recalibrated():
    with pytest.raises(ValueError, match=r"runs Regression\.forward on training batches, and Regression has none"):
        fit(seeded(), ema(buffers="recalibrate"))


class Mine(StochasticWeightAveraging):
    pass


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("kind", "evaluate"),
    [
        (StochasticWeightAveraging, "average"),
        (StochasticWeightAveraging, "both"),
        (StochasticWeightAveraging, "all"),
        (Mine, "average"),
    ],
)
def test_stochastic_weight_averaging_beside_an_evaluated_average_is_refused(kind, evaluate, order):
    callbacks = [kind(0.01), ema(evaluate=evaluate)][::order]
    with pytest.raises(ValueError, match=r"beside StochasticWeightAveraging: .*evaluate='live'.*start_epoch=0\.8"):
        trainer(*callbacks).fit(seeded(), loader(), loader(2))


@pytest.mark.parametrize("order", [1, -1])
def test_its_result_stays_beside_an_average_that_is_only_followed(order):
    swa = lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)  # noqa: E731
    plain, beside = seeded(norm=False), seeded(norm=False)
    fit(plain, swa(), max_epochs=3)
    fit(beside, *[swa(), ema(evaluate="live")][::order], max_epochs=3)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), beside.parameters(), strict=True))
