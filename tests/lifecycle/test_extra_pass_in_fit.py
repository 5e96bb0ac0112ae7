"""Whole runs with a second pass in every evaluation: what they train and log is what they train and log without."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import BATCHES, Regression, clones, equal, fit, loader, seed_everything, seeded, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from torchmetrics import MeanMetric
from twice import GathersFromItsStart, Twice, double

from lightning_ema import Constant, WeightAverage
from lightning_ema.evaluation.extra_pass import begin, check, evaluate_again, log_again

pytestmark = pytest.mark.filterwarnings("ignore")


class Watched(Regression):
    """Steps a scheduler with what it validates, gathers a list, draws random numbers in its validation steps."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mean, self.losses = MeanMetric(), []

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch) + torch.rand(())
        self.losses.append(loss)
        self.mean(loss)
        self.log("mean", self.mean)
        self.log("val_loss", loss, prog_bar=True)

    def on_validation_epoch_end(self):
        self.log("last", self.losses[-1] * len(self.losses))
        self.losses.clear()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss", "strict": False},
        }


class Recorder(Callback):
    """Everything a training goes through, and everything its evaluations give."""

    def __init__(self):
        self.batches, self.metrics = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        state = {**clones(pl_module.state_dict()), "random": torch.get_rng_state(), "batch": batch[0].clone()}
        self.batches.append({**state, "rate": torch.tensor(trainer.optimizers[0].param_groups[0]["lr"])})

    def on_validation_end(self, trainer, pl_module):
        self.metrics.append(clones(trainer.callback_metrics))

    def on_train_end(self, trainer, pl_module):
        self.batches.append(clones(pl_module.state_dict()))


def shuffled(**kwargs):
    return DataLoader(loader().dataset, 8, shuffle=True, **kwargs)


def workers():
    return shuffled(num_workers=1, persistent_workers=True, multiprocessing_context="fork")


def by_batch_sampler():
    rows = loader().dataset
    sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(2))
    return DataLoader(rows, batch_sampler=BatchSampler(sampler, 8, drop_last=False))


SITUATIONS = {
    "plain": ({}, {}),
    "dropout": ({"dropout": 0.5}, {}),
    "no inference mode": ({"dropout": 0.5}, {"inference_mode": False}),
    "validation in mid epoch": ({"dropout": 0.5}, {"val_check_interval": 2}),
    "every second epoch": ({}, {"check_val_every_n_epoch": 2, "max_epochs": 4}),
    "limited": ({}, {"limit_val_batches": 1}),
    "fast_dev_run": ({}, {"fast_dev_run": 2}),
    "overfit_batches": ({"dropout": 0.5}, {"overfit_batches": 2}),
    "bf16-mixed": ({"norm": False}, {"precision": "bf16-mixed"}),
    "bf16-true": ({"norm": False}, {"precision": "bf16-true"}),
    "loaders made anew each epoch": ({"dropout": 0.5}, {"reload_dataloaders_every_n_epochs": 1}),
    "accumulation": ({}, {"accumulate_grad_batches": 4}),
    "fast_dev_run with a logger": ({}, {"fast_dev_run": 2, "logger": True}),
    "profiler": ({}, {"profiler": "simple"}),
    "progress bar": ({}, {"enable_progress_bar": True}),
}
LOADERS = {
    "shuffled": (shuffled, shuffled),
    "shuffled by their own generators": (
        lambda: shuffled(generator=torch.Generator().manual_seed(2)),
        lambda: shuffled(generator=torch.Generator().manual_seed(4)),
    ),
    "shuffled in batch samplers": (by_batch_sampler, by_batch_sampler),
    "workers that stay": (workers, workers),
}


def run(make, data, *callbacks, **kwargs):
    recorder = Recorder()
    seed_everything(3, verbose=False)
    this = trainer(*callbacks, recorder, **{"max_epochs": 3, "num_sanity_val_steps": 1, **kwargs})
    module = make()
    this.fit(module, *data())
    return recorder, this, module


def compare(make, data, **kwargs):
    plain, _, _ = run(make, data, **kwargs)
    twice = Twice()
    beside, _, _ = run(make, data, twice, **kwargs)
    assert len(plain.batches) == len(beside.batches) > 1
    assert all(equal(one, other) for one, other in zip(plain.batches, beside.batches, strict=True))
    assert len(plain.metrics) == len(beside.metrics) > 0
    for one, other in zip(plain.metrics, beside.metrics, strict=True):
        assert equal(one, {name: value for name, value in other.items() if not name.endswith("_live")})
    names = {"mean_live", "val_loss_live", "last_live"}
    assert {name for name in beside.metrics[-1] if name.endswith("_live")} == names
    assert {len(results) for results in twice.passes if results} == {3}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_training_and_first_pass_are_bit_for_bit_those_of_a_run_without(situation):
    module, settings = SITUATIONS[situation]
    compare(lambda: seeded(Watched, **module), lambda: (loader(), loader(2)), **settings)


@pytest.mark.parametrize("kind", LOADERS)
def test_whatever_the_loaders_are(kind):
    for_training, for_validation = LOADERS[kind]
    compare(lambda: seeded(Watched), lambda: (for_training(), for_validation()))


@pytest.mark.parametrize("make", [shuffled, workers])
def test_one_loader_for_training_and_validation(make):
    def data():
        both = make()
        return both, both

    compare(lambda: seeded(Watched), data, val_check_interval=2)


def test_a_dataset_that_draws_from_a_generator_of_its_own():
    class Noisy(torch.utils.data.Dataset):
        def __init__(self):
            self.rows, self.random = loader().dataset, np.random.default_rng(1)

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            x, y = self.rows[index]
            return x + self.random.random(), y

    def data():
        noisy = Noisy()
        return DataLoader(noisy, 8), DataLoader(noisy, 8)

    compare(lambda: seeded(Watched), data)


def test_the_second_pass_evaluates_the_other_weights_of_that_moment():
    class Keeps(Callback):
        def __init__(self):
            self.modules = []

        def on_validation_start(self, trainer, pl_module):
            self.modules.append(clones(pl_module.state_dict()))

    twice, keeps = Twice(), Keeps()
    fit(seeded(GathersFromItsStart), twice, keeps, max_epochs=3)
    for results, weights in zip(twice.passes, keeps.modules, strict=True):
        module = seeded(GathersFromItsStart)
        module.load_state_dict(weights)
        double(module)
        alone = trainer()
        alone.validate(module, loader(2), verbose=False)
        assert equal({result.name: result.value for result in results}, alone.callback_metrics)


def test_callbacks_that_monitor_act_once_in_each_evaluation(tmp_path):
    stopping = EarlyStopping("val_loss_live", stopping_threshold=-1.0, patience=99)
    best = ModelCheckpoint(tmp_path, monitor="val_loss_live", save_top_k=-1, filename="{epoch}-{val_loss_live:.4f}")
    counted = []
    evaluate = stopping._evaluate_stopping_criteria
    stopping._evaluate_stopping_criteria = lambda value: (counted.append(value), evaluate(value))[1]
    twice = Twice()
    fit(seeded(), stopping, best, twice, max_epochs=3, enable_checkpointing=True)
    lives = [results[0].value for results in twice.passes[1:]]
    assert counted == lives
    assert len(list(tmp_path.glob("*.ckpt"))) == 3
    assert best.best_model_score == min(lives)


def test_loggers_get_each_value_once_and_nothing_of_the_second_pass_itself(tmp_path):
    class Writes(Regression):
        def validation_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("val_loss", loss, on_step=True, on_epoch=True)
            self.logger.log_metrics({"direct": float(batch_idx)}, step=batch_idx)
            self.logger.experiment.log_metrics({"experiment": 1.0}, step=batch_idx)
            self.logger.save()
            directories.append((self.trainer.log_dir, self.logger.save_dir, self.logger.name, self.logger.version))
            assert isinstance(self.logger, CSVLogger)

    class Counts(CSVLogger):
        def log_metrics(self, metrics, step=None):
            written.append(metrics)
            if "val_loss_step" in metrics:
                steps_logged.append(step)
            super().log_metrics(metrics, step)

    directories, written, steps_logged = [], [], []
    logger = Counts(tmp_path)
    experiment = logger.experiment
    log = experiment.log_metrics
    experiment.log_metrics = lambda metrics, step: (
        written.append(metrics) if "experiment" in metrics else None,
        log(metrics, step),
    )
    fit(seeded(Writes), Twice(), logger=logger, max_epochs=2, num_sanity_val_steps=0)
    names = [name for metrics in written for name in metrics if name != "epoch"]
    steps = 2 * 2
    assert sorted(names) == sorted(
        ["direct", "experiment", "val_loss_step"] * steps + ["val_loss_epoch", "val_loss_epoch_live"] * 2
    )
    assert steps_logged == [0, 1, 2, 3]
    assert len(directories) == 2 * steps and len(set(directories)) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_second_pass_that_fails_ends_the_run_with_the_weights_it_had(error):
    class Fails(Watched):
        def on_validation_epoch_end(self):
            if self.trainer.current_epoch == 1:  # in the second pass: callbacks come before the module
                raise error
            super().on_validation_epoch_end()

    module = seeded(Fails)
    with pytest.raises((error, SystemExit)):  # Lightning turns Ctrl-C into an exit
        fit(module, Twice(), max_epochs=3)
    reference = seeded(Watched)
    fit(reference, max_epochs=2)
    assert equal(module.state_dict(), reference.state_dict())
    assert len(module.losses) == 2  # of the first pass, which its hook was still to consume


def test_a_checkpoint_is_the_same(tmp_path):
    files = []
    for callbacks in ([], [Twice()]):
        module = seeded(Watched)
        this = fit(module, *callbacks, max_epochs=2)
        this.save_checkpoint(tmp_path / f"{len(files)}.ckpt")
        files.append(torch.load(tmp_path / f"{len(files)}.ckpt", weights_only=False))
    plain, beside = (copy.copy(file) for file in files)
    assert plain["loops"] == beside["loops"]
    assert equal(plain["state_dict"], beside["state_dict"])
    assert plain["global_step"] == beside["global_step"] == 2 * BATCHES


def test_a_module_that_saves_a_checkpoint_in_its_last_hook(tmp_path):
    class Saves(Watched):
        def on_validation_epoch_end(self):
            super().on_validation_epoch_end()
            self.trainer.save_checkpoint(tmp_path / "last.ckpt")

    module = seeded(Saves)
    fit(module, Twice(), max_epochs=2)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert equal(saved["state_dict"], module.state_dict())  # the first pass saves last


def test_a_compiled_network():
    results = []
    for compiled in (False, True):
        module, twice = seeded(Watched), Twice()
        if compiled:
            module.net.compile(backend="eager")
        run(lambda module=module: module, lambda: (loader(), loader(2)), twice, max_epochs=2)
        results.append({result.name: result.value for result in twice.passes[-1]})
    assert equal(*results)


def test_the_live_weights_beside_an_average_that_is_carried():
    """The order of calls that an averaging callback needs: begin, swap in; swap out, evaluate again, swap in."""

    class Averages(Twice):
        def on_fit_start(self, trainer, pl_module):
            self.average = WeightAverage(pl_module, decay=Constant(0.5), exclude=["seen"])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.average.step()

        def on_validation_start(self, trainer, pl_module):
            self.live = clones(pl_module.state_dict())
            self.begun = begin(trainer, pl_module)
            self.average.swap_in()
            self.averaged = clones(pl_module.state_dict())

        def on_validation_epoch_end(self, trainer, pl_module):
            self.average.swap_out()
            self.passes.append(evaluate_again(trainer, pl_module, self.begun, nullcontext()))
            assert equal(pl_module.state_dict(), self.live | {"seen": pl_module.seen})
            self.average.swap_in()
            log_again(pl_module, self.passes[-1], "_live")

        def on_validation_end(self, trainer, pl_module):
            self.average.swap_out()

    class Counts(Regression):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.tensor(0))

        def validation_step(self, batch, batch_idx):
            self.seen += 1
            super().validation_step(batch, batch_idx)

        def on_validation_epoch_end(self):
            self.log("seen", self.seen.float())
            self.seen.zero_()

    averages = Averages()
    both = fit(seeded(Counts), averages, max_epochs=2, num_sanity_val_steps=0).callback_metrics
    for ending, weights in (("_live", averages.live), ("", averages.averaged)):
        module = seeded(Counts)
        module.load_state_dict(weights)
        alone = trainer()
        alone.validate(module, loader(2), verbose=False)
        assert both[f"val_loss{ending}"] == alone.callback_metrics["val_loss"]
        assert both[f"seen{ending}"] == 2


def test_pytorch_lightning_under_its_other_name():
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.losses = torch.nn.Linear(4, 1), []

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.losses.append(self.layer(batch[0]).sub(batch[1]).square().mean())
            self.log("val_loss", self.losses[-1])

        def on_validation_epoch_end(self):
            self.log("count", float(len(self.losses)))

    class TwiceOfOther(pytorch_lightning.Callback):
        on_validation_start = Twice.on_validation_start

        def on_validation_epoch_end(self, trainer, pl_module):
            check(trainer, "evaluate='both'")
            log_again(pl_module, evaluate_again(trainer, pl_module, self.begun, nullcontext()), "_live")

    this = pytorch_lightning.Trainer(accelerator="cpu", logger=False, callbacks=[TwiceOfOther()])
    first, second = this.validate(Other(), [loader(2), loader(1)], verbose=False)
    assert first["val_loss/dataloader_idx_0"] == first["val_loss_live/dataloader_idx_0"]
    assert second["val_loss/dataloader_idx_1"] == second["val_loss_live/dataloader_idx_1"]
    assert first["count"] == first["count_live"] == 3
