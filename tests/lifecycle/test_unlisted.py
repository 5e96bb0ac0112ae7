"""Situations of a Trainer that no list of features names, against the promises."""

import gc
from contextlib import suppress

import pytest
import torch
from helpers import BATCHES, clones, equal, fit, loader, seed_everything, seeded, trainer
from lightning.pytorch import Callback, Trainer
from test_teacher import Taught

from lightning_ema import Bema, Constant, EMACallback, Equal, MeanTeacherConfig

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_barebones_trainer_trains_evaluates_and_delivers():
    """It refuses loggers, checkpoints and what is logged; the average is kept all the same."""
    ends = []
    for barebones in (False, True):
        seed_everything(3, verbose=False)
        module = seeded()
        callback = EMACallback([0.9, Equal()], evaluate="both", others="evaluate")
        this = Trainer(barebones=True, accelerator="cpu", max_epochs=2, callbacks=[callback]) if barebones else (
            trainer(callback)
        )  # fmt: skip
        this.fit(module, loader(), loader(2))
        ends.append((clones(module.state_dict()), clones(callback.average.named_live())))
    assert equal(ends[0][0], ends[1][0]) and equal(ends[0][1], ends[1][1])


class ReadsInTheMiddle(Callback):
    """Evaluates an average of its own accord in the middle of training, as a sampler of images does."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ema = next(callback for callback in trainer.callbacks if isinstance(callback, EMACallback))
        for average in ema.averages:
            with average.lent() as lent, torch.no_grad():
                lent.eval()
                lent.net(batch[0])
                lent.train()
            self.seen.append(average.num_updates)


@pytest.mark.parametrize("first", [True, False])
def test_a_callback_that_lends_every_average_in_every_batch_changes_nothing(first):
    ends = []
    for reads in (None, ReadsInTheMiddle()):
        callback = EMACallback([Constant(0.9), Bema()], switch_every=4, after_fit="live")
        callbacks = [callback] if reads is None else [reads, callback] if first else [callback, reads]
        module = seeded()
        fit(module, *callbacks, precision="bf16-mixed")
        averages = [clones(average.named_tensors()) for average in callback.averages]
        ends.append((clones(module.state_dict()), averages))
    assert equal(ends[0][0], ends[1][0])
    assert all(equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))
    assert len(reads.seen) == 2 * 2 * BATCHES


def test_a_teacher_beside_an_average_that_switches_follows_the_switched_student():
    """Callbacks of the trainer run before those of the module: the teacher sees the student that was switched."""
    module = seeded(Taught, mean_teacher=MeanTeacherConfig(decay=Constant(0.0)))
    callback = EMACallback(Constant(0.5), switch_every=1, after_fit="live")
    fit(module, callback)
    students = dict(module.student.named_parameters())
    averages = {n.removeprefix("student."): t for n, t in callback.average.named_tensors()}
    for name, teacher in module.teacher.named_parameters():
        assert torch.equal(teacher, students[name])  # a decay of 0 copies
        assert torch.equal(teacher, averages[name])


class Plain(Callback):
    """What each validation logged."""

    def __init__(self):
        self.logged = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_a_choice_in_the_middle_of_epochs_whose_loaders_are_made_anew():
    callback, plain = EMACallback([Constant(0.2), Constant(0.8)], select="val_loss"), Plain()
    often = {"val_check_interval": 0.5, "reload_dataloaders_every_n_epochs": 1, "limit_val_batches": 1}
    fit(seeded(lr=0.1), callback, plain, max_epochs=3, **often)
    assert len(plain.logged) == 6
    for logged in plain.logged:
        several = [logged[f"val_loss/ema_Constant_{decay}"] for decay in (0.2, 0.8)]
        assert logged["val_loss"] == pytest.approx(min(several), rel=1e-6)
        assert several[0] != several[1]


def test_files_that_are_scored_between_two_fits_change_nothing(tmp_path):
    ends = []
    for scored in (False, True):
        callback, module = EMACallback([Constant(0.2), Constant(0.8)], select="val_loss"), seeded(lr=0.1)
        this = fit(module, callback, max_epochs=2)
        this.save_checkpoint(tmp_path / "x.ckpt")
        if scored:
            this.test(module, loader(2), verbose=False)
            this.validate(module, loader(2), ckpt_path=tmp_path / "x.ckpt", verbose=False)
            this.predict(module, loader(2), ckpt_path=tmp_path / "x.ckpt")
        this.fit_loop.max_epochs = 4
        this.fit(module, loader(), loader(2))
        averages = [clones(average.named_tensors()) for average in callback.averages]
        ends.append((clones(callback.average.named_live()), clones(module.state_dict()), averages))
    (live, carried, averages), (live_too, carried_too, averages_too) = ends
    assert equal(live, live_too) and equal(carried, carried_too)
    assert all(equal(a, b) for a, b in zip(averages, averages_too, strict=True))


class Stops(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            raise ZeroDivisionError


@pytest.mark.parametrize("others", [[], [Stops()]], ids=["to its end", "until an exception"])
def test_a_module_moved_after_a_fit_leaves_its_memory_behind(others):
    """The engine keeps views of large 16-bit weights between updates."""
    module, callback = seeded(norm=False), EMACallback(Constant(0.9), after_fit="live")
    module.large = torch.nn.Linear(1024, 1024, bias=False)
    with suppress(ZeroDivisionError):
        fit(module, callback, *others, precision="bf16-true")
    assert callback.average.num_updates > 0
    places = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    module.double()
    gc.collect()
    narrow = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.dtype == torch.bfloat16]
    assert not [tensor for tensor in narrow if tensor.untyped_storage().data_ptr() in places]
