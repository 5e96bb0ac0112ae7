"""What is written to the module at the end of a fit stays; what is written in training is training."""

import logging

import pytest
import torch
from helpers import Regression, clones, ema, equal, fit, seeded, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_ema import Constant

BEST = 42.0


def fill(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(BEST)


def through_data(module):
    for parameter in module.parameters():
        parameter.data.fill_(BEST)


def other_data(module):
    for parameter in module.parameters():
        parameter.data = torch.full_like(parameter.data, BEST)


def load(module):
    module.load_state_dict({name: torch.full_like(t, BEST) for name, t in module.state_dict().items()})


def load_assigning(module):
    module.load_state_dict({n: torch.full_like(t, BEST) for n, t in module.state_dict().items()}, assign=True)


def replace_parameters(module):
    for layer in module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                setattr(layer, name, nn.Parameter(torch.full_like(parameter, BEST)))


WRITES = [fill, through_data, other_data, load, load_assigning, replace_parameters]


def beside(callback, write, where, module):
    """The callbacks, with one more that writes in on_train_end in this place."""
    if where == "module":
        module.on_train_end = lambda: write(module)
        return [callback]
    writes = Callback()
    writes.on_train_end = lambda trainer, pl_module: write(pl_module)
    return [writes, callback] if where == "before" else [callback, writes]


@pytest.mark.parametrize("settings", [{}, {"after_fit": "live"}, {"evaluate": "live"}, {"dtype": torch.float64}])
@pytest.mark.parametrize("where", ["before", "behind", "module"])
@pytest.mark.parametrize("write", WRITES)
def test_the_best_weights_restored_in_on_train_end_stay(write, where, settings, tmp_path, caplog):
    module = seeded(norm=False)
    callbacks = beside(ema(decay=Constant(0.9), **settings), write, where, module)
    with caplog.at_level(logging.INFO):
        this = fit(module, *callbacks)
    assert all((parameter == BEST).all() for parameter in module.parameters())
    assert "the module's weights were changed since the end of training. They count from here" in caplog.text
    this.save_checkpoint(tmp_path / "file.ckpt")
    file = torch.load(tmp_path / "file.ckpt", weights_only=True)
    assert equal(file["state_dict"], module.state_dict())
    (scores,) = this.validate(module, this.val_dataloaders, verbose=False)
    (expected,) = trainer().validate(module, this.val_dataloaders, verbose=False)
    assert scores["val_loss"] == expected["val_loss"]


@pytest.mark.parametrize("where", ["before", "behind"])
def test_a_further_fit_goes_on_from_them(where):
    module = seeded(norm=False)
    fit(module, *beside(ema(), fill, where, module))
    seen = {}
    looks = Callback()
    looks.on_train_batch_start = lambda trainer, m, batch, n: seen.setdefault("live", clones(m.named_parameters()))
    fit(module, looks, ema())
    assert all((tensor == BEST).all() for tensor in seen["live"].values())


def test_of_two_callbacks_neither_writes_over_them():
    module = seeded(norm=False)
    first, *rest = beside(ema(), fill, "behind", module)
    fit(module, first, ema(evaluate="live", name="other"), *rest)
    assert all((parameter == BEST).all() for parameter in module.parameters())


def test_a_file_saved_after_the_edit_within_on_train_end_holds_it(tmp_path):
    module = seeded(norm=False)

    class Saves(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    fit(module, *beside(ema(), fill, "before", module), Saves())
    file = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert all((tensor == BEST).all() for tensor in file["state_dict"].values())


@pytest.mark.parametrize("buffers", ["average", "recalibrate"])
def test_saves_and_swaps_in_on_train_end_are_no_edits(buffers, tmp_path):
    class Module(Regression):
        def forward(self, x):
            return self.net(x)

    class Scores(Callback):
        def on_train_end(self, trainer, pl_module):
            with callback.average.swapped():
                self.weights = clones(pl_module.named_parameters())

    callback, scores = ema(decay=Constant(0.9), buffers=buffers), Scores()
    kept = ModelCheckpoint(tmp_path, save_last=True, monitor="val_loss")
    module = seeded(Module)
    fit(module, scores, callback, kept, enable_checkpointing=True)
    assert equal(module.named_parameters(), scores.weights)
    assert equal(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], module.state_dict())


def halve(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("order", [1, -1])
def test_what_is_written_in_training_is_training(hook, order):
    modules = [seeded(norm=False), seeded(norm=False)]
    callback = ema(decay=Constant(0.9))
    for module, ours in zip(modules, ([], [callback]), strict=True):
        clips = Callback()
        setattr(clips, hook, lambda trainer, pl_module, *rest: halve(pl_module))
        if hook == "on_validation_end" and order == 1:
            return  # before our turn the module carries the average, which nobody may write to
        fit(module, *[clips, *ours][::order])
    assert equal(modules[1].named_parameters(), callback.average.named_tensors())  # applied: no edit was seen
    with_live = ema(decay=Constant(0.9), after_fit="live")
    module, clips = seeded(norm=False), Callback()
    setattr(clips, hook, lambda trainer, pl_module, *rest: halve(pl_module))
    fit(module, *[clips, with_live][::order])
    assert equal(module.named_parameters(), modules[0].named_parameters())


def test_an_exception_in_on_train_end_leaves_no_hook_behind():
    class Raises(Callback):
        def on_train_end(self, trainer, pl_module):
            raise ArithmeticError

    this = trainer(ema(), Raises())
    with pytest.raises(ArithmeticError):
        this.fit(seeded(), torch.utils.data.DataLoader([(torch.ones(4), torch.ones(1))] * 16, 8))
    assert "on_run_end" not in vars(this.fit_loop)
