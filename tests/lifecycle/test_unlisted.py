"""Situations of a Trainer that no list of features names, against the promises."""

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
