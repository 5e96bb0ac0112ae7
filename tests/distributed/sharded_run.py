"""Run by test_sharded_run in two processes: whole runs on sharded weights, with checkpoints in one of the formats.

The folder that is given is called as the format: "file" or "folder". Each process writes to ``<folder>/<rank>.json``
how each check ended: "" or what was raised.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import engine
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from sharded import Sharded, averaging, data, ended, fit, forked, same, trainer_of, whole_of, write

from lightning_ema import Constant

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


class ByHand(Callback):
    """Averages worked out from the gathered live weights at the end of each batch."""

    def __init__(self, *decays):
        self.decays = decays

    def on_train_start(self, trainer, pl_module):
        self.averages = [whole_of(pl_module.named_parameters()) for _ in self.decays]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == getattr(self, "step", 0):
            return  # gradients are being accumulated
        self.step = trainer.global_step
        for module in pl_module.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        self.live = whole_of(pl_module.named_parameters())
        for decay, average in zip(self.decays, self.averages, strict=True):
            for name, live in self.live.items():
                average[name].mul_(decay).add_(live, alpha=1 - decay)


class Look(Callback):
    """Adds the average, the live weights and those in the module at the start of training to ``seen``."""

    def __init__(self, callback, seen):
        self.callback, self.seen = callback, seen

    def on_train_start(self, trainer, pl_module):
        average = self.callback.average
        for named in (average.named_tensors(), engine(average).named_live(), pl_module.named_parameters()):
            self.seen.append(whole_of(named))


def rank_zero(trainer, content, path):
    if trainer.is_global_zero:
        torch.save(content, path)


def plain(weights):
    """A module of one process with these weights."""
    module = Sharded()
    module.configure_model()
    module.load_state_dict(weights)
    return module


def score(weights):
    """The validation loss of these weights, on all validation batches of a run."""
    module = plain(weights)
    with torch.no_grad():
        return torch.stack([module.loss(batch) for batch in data(1)[1]]).mean().item()


@check
def a_run_is_that_of_one_process_and_resumes(folder, folders):
    callback, by_hand = averaging(), ByHand(0.9)
    this = fit(Sharded(), callback, by_hand, folders=folders)
    assert callback.average.num_steps == callback.average.num_updates == 12
    same(callback.average.named_tensors(), by_hand.averages[0], 3e-7)
    same(engine(callback.average).named_live(), by_hand.live)
    assert float(this.callback_metrics["val_loss"]) == pytest.approx(score(by_hand.averages[0]), abs=1e-6)
    this.save_checkpoint(folder / "x.ckpt")
    assert (folder / "x.ckpt").is_dir() == folders
    written = whole_of(callback.average.named_tensors())
    rank_zero(this, (written, by_hand.live), folder / "x.pt")

    entire, again = averaging(), averaging()
    fit(Sharded(), entire, folders=folders, epochs=3)
    fit(Sharded(), again, folders=folders, epochs=3, ckpt_path=folder / "x.ckpt")
    same(entire.average.named_tensors(), again.average.named_tensors())
    same(engine(entire.average).named_live(), engine(again.average).named_live())
    assert entire.average.num_steps == again.average.num_steps == 18
    ends = whole_of(entire.average.named_tensors()), whole_of(engine(entire.average).named_live())
    rank_zero(this, ends, folder / "e.pt")


@check
def several_averages_and_the_live_weights_are_scored_each(folder, folders):
    callback = averaging(decay=[Constant(0.9), Constant(0.5)], evaluate="all")
    by_hand = ByHand(0.9, 0.5)
    this = fit(Sharded(), callback, by_hand, folders=folders)
    for average, expected in zip(callback.averages, by_hand.averages, strict=True):
        same(average.named_tensors(), expected, 3e-7)
    logged = {name: float(value) for name, value in this.callback_metrics.items()}
    expected = {
        "val_loss": score(by_hand.averages[0]),
        "val_loss/ema_Constant_0.5": score(by_hand.averages[1]),
        "val_loss_live": score(by_hand.live),
    }
    assert logged == pytest.approx(expected, abs=1e-6)
    this.save_checkpoint(folder / "several.ckpt")
    averages = [whole_of(average.named_tensors()) for average in callback.averages]
    rank_zero(this, (*averages, by_hand.live), folder / "several.pt")
    alone = Sharded()
    fit(alone, folders=folders)
    same(dict(alone.named_parameters()), engine(callback.average).named_live())
    again = averaging(decay=[Constant(0.9), Constant(0.5)])
    fit(Sharded(), again, folders=folders, epochs=3, ckpt_path=folder / "several.ckpt")
    entire = averaging(decay=[Constant(0.9), Constant(0.5)])
    fit(Sharded(), entire, folders=folders, epochs=3)
    for one, other in zip(entire.averages, again.averages, strict=True):
        same(one.named_tensors(), other.named_tensors())


class Bare(ModelCheckpoint):
    """Under another class's name it can stand beside a ModelCheckpoint."""


@check
def what_was_scored_is_what_is_saved(folder, folders):
    keep = {"dirpath": folder / "kept", "monitor": "val_loss", "save_top_k": 2}
    best = ModelCheckpoint(filename="best-{epoch}", **keep)
    bare = Bare(filename="bare-{epoch}", save_weights_only=True, **keep)
    fit(Sharded(), averaging(), best, bare, folders=folders, enable_checkpointing=True)
    validation = data(2)[1]
    for kept in (best, bare):
        assert len(kept.best_k_models) == 2
        for path, loss in kept.best_k_models.items():
            for callbacks in ((), (averaging(),)):
                this = trainer_of(*callbacks, folders=folders)
                (alone,) = this.validate(Sharded(), validation, ckpt_path=path, verbose=False)
                assert alone["val_loss"] == pytest.approx(float(loss), abs=1e-6)


@check
def evaluations_after_fit(folder, folders):
    callback = averaging()
    module = Sharded()
    this = fit(module, callback, folders=folders)
    average = whole_of(callback.average.named_tensors())
    expected, validation = score(average), data(2)[1]
    same(average, dict(module.named_parameters()))
    (validated,) = this.validate(module, validation, verbose=False)
    (tested,) = this.test(module, validation, verbose=False)
    assert [validated["val_loss"], tested["test_loss"]] == pytest.approx([expected] * 2, abs=1e-6)
    predicted = torch.cat(this.predict(module, validation))
    with torch.no_grad():
        inputs = torch.cat([batch[0] for batch in data(1)[1]])[this.global_rank :: 2]
        torch.testing.assert_close(predicted, plain(average)(inputs), rtol=0, atol=1e-6)
    this.save_checkpoint(folder / "after.ckpt")
    live = whole_of(engine(callback.average).named_live())
    begun = []
    kept = Look(callback, begun)
    this.callbacks.append(kept)
    this.fit_loop.max_epochs = 3
    this.fit(module, *data(2))
    same(begun[0], average)
    same(begun[1], live)
    same(begun[2], live)
    average = whole_of(callback.average.named_tensors())
    same(average, dict(module.named_parameters()))

    # the strategy writes a file into the module before anybody is asked: the fit before it is over
    (of_file,) = this.validate(module, validation, ckpt_path=folder / "after.ckpt", verbose=False)
    assert of_file["val_loss"] == pytest.approx(expected, abs=1e-6)
    assert callback.average is None


@check
def after_fit_live(folder, folders):
    callback, module = averaging(after_fit="live"), Sharded()
    fit(module, callback, folders=folders)
    same(dict(module.named_parameters()), engine(callback.average).named_live())
    assert callback.average.distance() > 0.01


@check
def a_followed_average_is_stored_and_resumes(folder, folders):
    callback = averaging(evaluate="live")
    this = fit(Sharded(), callback, folders=folders)
    this.save_checkpoint(folder / "live.ckpt")
    entire, again = averaging(evaluate="live"), averaging(evaluate="live")
    fit(Sharded(), entire, folders=folders, epochs=3)
    fit(Sharded(), again, folders=folders, epochs=3, ckpt_path=folder / "live.ckpt")
    same(entire.average.named_tensors(), again.average.named_tensors())
    same(engine(entire.average).named_live(), engine(again.average).named_live())


@check
def two_callbacks_beside_one_another(folder, folders):
    def both():
        return averaging(), averaging(decay=Constant(0.5), evaluate="live", name="second")

    first, second = both()
    this = fit(Sharded(), first, second, folders=folders)
    this.save_checkpoint(folder / "two.ckpt")
    entire, again = both(), both()
    fit(Sharded(), *entire, folders=folders, epochs=3)
    fit(Sharded(), *again, folders=folders, epochs=3, ckpt_path=folder / "two.ckpt")
    for one, other in zip(entire, again, strict=True):
        same(one.average.named_tensors(), other.average.named_tensors())
        same(engine(one.average).named_live(), engine(other.average).named_live())


@check
def mixed_precision(folder, folders):
    callback, by_hand = averaging(), ByHand(0.9)
    this = fit(Sharded(), callback, by_hand, folders=folders, precision="bf16-mixed")
    assert {tensor.dtype for _, tensor in callback.average.named_tensors()} == {torch.float32}
    same(callback.average.named_tensors(), by_hand.averages[0], 3e-7)
    rank_zero(this, (by_hand.averages[0], by_hand.live), folder / "mixed.pt")


def main(folder, wanted):
    folder.mkdir(exist_ok=True)
    checks = {name: function for name, function in CHECKS.items() if not wanted or name in wanted}
    write(folder, os.environ["RANK"], ended(checks, folder, folder.name == "folder"))


if __name__ == "__main__":
    forked(2, main, Path(sys.argv[1]), sys.argv[2:])
