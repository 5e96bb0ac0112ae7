"""The average begins with the weights as they are when an optimizer first writes, wherever they came from."""

import pytest
import torch
from helpers import BATCHES, Regression, TwoOptimizers, clones, fit, seeded
from lightning.pytorch import Callback
from taught import Taught
from torch import nn

from lightning_ema import Bema, Constant, EMACallback

RANDOM, PRETRAINED = 1000.0, 7.0


def fill(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


class Still(Regression):
    """Whose parameters are random, large, and not moved by training."""

    def __init__(self, **kwargs):
        super().__init__(lr=0.0, norm=False)
        fill(self, RANDOM)

    def load(self):
        if not getattr(self, "loaded", False):
            self.loaded = True
            fill(self, PRETRAINED)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Loads(Callback):
    """Loads pretrained weights in one hook."""

    def __init__(self, hook):
        setattr(self, hook, lambda trainer, pl_module, *rest: pl_module.load())


def holding_values(callback):
    return {float(t.unique()) for _, t in callback.average.named_tensors()}


HOOKS = ["on_fit_start", "on_sanity_check_end", "on_train_start", "on_train_epoch_start", "on_train_batch_start"]


@pytest.mark.parametrize("schedule", [Constant(0.999), Bema(0.5), [Constant(0.9), Constant(0.99)]])
@pytest.mark.parametrize("where", ["before", "behind", "module"])
@pytest.mark.parametrize("hook", HOOKS)
def test_weights_loaded_before_the_first_step_are_the_start(hook, where, schedule):
    if (hook, where) == ("on_sanity_check_end", "module"):
        return  # a module has no such hook
    module, callback = seeded(Still), EMACallback(schedule, after_fit="live")
    if where == "module":
        setattr(module, hook, lambda *args: module.load())
    beside = {"before": [Loads(hook), callback], "behind": [callback, Loads(hook)], "module": [callback]}[where]
    fit(module, *beside, max_epochs=1)
    assert holding_values(callback) == {PRETRAINED}


@pytest.mark.parametrize("settings", [{"start_step": 2}, {"start_epoch": 1}, {"start_epoch": 0.5}])
def test_at_a_later_start_what_is_loaded_before_its_first_step_counts(settings):
    module, callback = seeded(Still), EMACallback(Constant(0.9), after_fit="live", **settings)
    late = Callback()
    late.on_train_batch_start = lambda trainer, m, *rest: m.load() if callback.average.num_steps >= 2 else None
    fit(module, callback, late, max_epochs=2)
    assert holding_values(callback) == {PRETRAINED}


class AtTheFirstForwardPass(Still):
    """Layers that initialise themselves from data: a scale, a codebook of k-means, a running statistic beside them."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([RANDOM]))
        self.register_buffer("codebook", torch.tensor([RANDOM]))
        self.norm = nn.BatchNorm1d(4, affine=False)

    def loss(self, batch):
        if self.training and self.scale == RANDOM:
            with torch.no_grad():
                self.scale.fill_(2.0)
                self.codebook.fill_(3.0)
        return super().loss([self.norm(batch[0] + 100), batch[1]]) * self.scale


class Manual(AtTheFirstForwardPass):
    """Around Lightning's wrapper."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers().optimizer
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Wrapped(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@pytest.mark.parametrize("make", [AtTheFirstForwardPass, Manual, Wrapped])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_what_a_first_forward_pass_sets_is_the_start_and_running_statistics_are_not(make, accumulated):
    if make is not AtTheFirstForwardPass and accumulated > 1:
        return  # Lightning accumulates under automatic optimization only
    module, callback = seeded(make), EMACallback(Constant(0.75), after_fit="live")
    fit(module, callback, max_epochs=1, limit_train_batches=accumulated, accumulate_grad_batches=accumulated)
    average = dict(callback.average.named_tensors())
    assert (average["scale"].item(), average["codebook"].item()) == (2.0, 3.0)
    torch.testing.assert_close(average["norm.running_mean"], 0.25 * module.norm.running_mean)
    torch.testing.assert_close(average["norm.running_var"], 0.75 + 0.25 * module.norm.running_var)


class Evaluates(Regression):
    """LBFGS makes several passes in a step, and has moved the weights after the first."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3)


class Sharpness(torch.optim.SGD):
    """Moves the weights between two passes, as SAM does."""

    def step(self, closure=None):
        closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(5.0)
        closure()
        return super().step()


class Sharp(Regression):
    def configure_optimizers(self):
        return Sharpness(self.parameters(), 0.1)


class Keeps(Callback):
    """The weights before the first batch, and after it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = clones(pl_module.named_parameters())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after = clones(pl_module.named_parameters())


@pytest.mark.parametrize("make", [Regression, Evaluates, Sharp, TwoOptimizers])
def test_the_start_is_before_the_first_write_of_a_step(make):
    keeps, callback = Keeps(), EMACallback(Constant(0.75), after_fit="live")
    fit(seeded(make), callback, keeps, max_epochs=1, limit_train_batches=1)
    for name, value in callback.average.named_tensors():
        if name in keeps.before:
            expected = 0.75 * keeps.before[name] + 0.25 * keeps.after[name]
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def test_once_a_step_was_counted_the_average_stays_what_it_is():
    module, callback = seeded(Still), EMACallback(Constant(0.5), after_fit="live")
    late = Callback()
    late.on_train_batch_start = lambda trainer, m, batch, batch_idx: m.load() if batch_idx == 1 else None
    fit(module, callback, late, max_epochs=1, limit_train_batches=2)
    assert holding_values(callback) == {(RANDOM + PRETRAINED) / 2}


def test_a_run_resumed_at_the_start_takes_what_is_loaded_then(tmp_path):
    class Saves(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "start.ckpt")

    fit(seeded(Still), EMACallback(Constant(0.9)), Saves(), max_epochs=1)
    callback = EMACallback(Constant(0.9), after_fit="live")
    fit(seeded(Still), callback, Loads("on_train_start"), max_epochs=1, ckpt_path=tmp_path / "start.ckpt")
    assert callback.average.num_steps == BATCHES
    assert holding_values(callback) == {PRETRAINED}


class Pretrained(Taught):
    """Whose student is loaded late, its frozen layer and its statistics included."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.student[0].requires_grad_(False)

    def load(self):
        if not getattr(self, "loaded", False):
            self.loaded = True
            fill(self.student, PRETRAINED)
            self.student[1].running_mean.fill_(PRETRAINED)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.student.parameters() if p.requires_grad], 0.0)

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.seen = {name: float(p.detach().flatten()[0]) for name, p in self.teacher.named_parameters()}
            self.mean_seen = float(self.teacher[1].running_mean[0])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_sanity_check_end", "on_train_start", "on_train_epoch_start"])
def test_a_teacher_is_what_the_student_is_before_its_first_forward_pass(hook):
    module = seeded(Pretrained)
    fit(module, Loads(hook), max_epochs=1, limit_train_batches=1)
    assert set(module.seen.values()) == {PRETRAINED}
    assert module.mean_seen == PRETRAINED


class LoadsStatistics(Regression):
    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 0:
            self.net[1].running_mean.fill_(PRETRAINED)


def test_statistics_loaded_in_the_modules_own_hook_before_the_first_batch_are_the_start():
    callback = EMACallback(Constant(0.75), after_fit="live")
    module = seeded(LoadsStatistics)
    fit(module, callback, max_epochs=1, limit_train_batches=1)
    average = dict(callback.average.named_tensors())["net.1.running_mean"]
    torch.testing.assert_close(average, 0.75 * PRETRAINED + 0.25 * module.net[1].running_mean)


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        ({"start_step": 9}, 9),  # in the second epoch of six steps each
        ({"start_step": 4}, 6),  # is past: it starts where the run goes on
        ({"start_epoch": 2}, 12),
        ({"start_epoch": 1}, 6),
        ({"start_epoch": 0.5}, 9),
        ({}, 6),
    ],
)
def test_after_a_plain_file_steps_are_those_of_the_run(settings, starts, tmp_path):
    fit(seeded(), max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    callback = EMACallback(Constant(0.5), after_fit="live", **settings)
    fit(seeded(), callback, max_epochs=3, ckpt_path=tmp_path / "plain.ckpt")
    assert callback.average.num_steps == 3 * BATCHES
    assert callback.average.num_updates == 3 * BATCHES - starts
