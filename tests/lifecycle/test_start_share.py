"""start_epoch below 1: the average starts after ``ceil(start_epoch * steps of the run)`` steps."""

import pytest
import torch
from helpers import BATCHES, clones, ema, engine, equal, fit, resumes_at_the_last_batch, seeded
from lightning.pytorch import Callback

from lightning_ema import Constant, Cosine, EMACallback

pytestmark = pytest.mark.filterwarnings("ignore")


class Saves(Callback):
    """Saves a checkpoint after so many steps."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def start_of(callback):
    return engine(callback.average).start_step, callback.average.num_updates


@pytest.mark.parametrize(
    ("share", "epochs", "started_at"),
    [(0.5, 2, 6), (0.8, 2, 10), (0.01, 2, 1), (0.99, 2, 12), (0.75, 3, 14), (0.0, 2, 0)],
)
def test_the_average_starts_after_this_share_of_the_steps(share, epochs, started_at):
    callback = ema(start_epoch=share)
    fit(seeded(), callback, max_epochs=epochs)
    assert start_of(callback) == (started_at, epochs * BATCHES - started_at)


def test_until_then_it_is_the_live_weights_and_from_there_on_an_average_of_them():
    lives = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            lives.append(clones(pl_module.named_parameters()))
            averages = dict(callback.average.named_tensors())
            if trainer.global_step <= 6:
                assert equal({name: averages[name] for name in lives[-1]}, lives[-1])

    callback = EMACallback(Constant(0.5), start_epoch=0.5, after_fit="live")
    fit(seeded(), callback, Watch())
    averages = dict(callback.average.named_tensors())
    for name, expected in lives[5].items():
        for live in lives[6:]:
            expected = 0.5 * expected + 0.5 * live[name]
        torch.testing.assert_close(averages[name], expected)


@pytest.mark.parametrize(("start_step", "started_at"), [(3, 6), (9, 9)])
def test_the_later_of_share_and_step(start_step, started_at):
    callback = ema(start_epoch=0.5, start_step=start_step)
    fit(seeded(), callback)
    assert start_of(callback)[0] == started_at


def test_max_steps_and_accumulation_count_in_the_length():
    callback = ema(start_epoch=0.5)
    fit(seeded(), callback, max_steps=7)
    assert start_of(callback) == (4, 3)
    callback = ema(start_epoch=0.5)
    fit(seeded(), callback, max_epochs=5, accumulate_grad_batches=2)
    assert start_of(callback) == (8, 7)


def test_a_schedule_learns_what_is_left_of_the_run():
    callback = ema(decay=Cosine(0.5, 1.0), start_epoch=0.5)
    fit(seeded(), callback, max_epochs=3)
    assert engine(callback.average).schedules == [Cosine(0.5, 1.0, total_steps=9)]


@pytest.mark.parametrize(("saved_at", "started_at"), [(4, 12), (8, 6)], ids=["before it", "after it"])
def test_a_resume_with_another_length_moves_a_start_that_is_yet_to_come(saved_at, started_at, tmp_path):
    fit(seeded(), ema(start_epoch=0.5), Saves(tmp_path / "x.ckpt", saved_at), max_epochs=2)
    again = ema(start_epoch=0.5)
    this = fit(seeded(), again, max_epochs=4, ckpt_path=tmp_path / "x.ckpt")
    assert start_of(again) == (started_at, again.average.num_steps - started_at)
    assert this.current_epoch == 4


@resumes_at_the_last_batch
@pytest.mark.parametrize("saved_at", [6, 12])
def test_a_resumed_run_ends_where_the_whole_one_does(saved_at, tmp_path):
    whole, again = ema(start_epoch=0.75), ema(start_epoch=0.75)
    fit(seeded(), whole, Saves(tmp_path / "x.ckpt", saved_at), max_epochs=3)
    fit(seeded(), again, max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert start_of(again) == start_of(whole) == (14, 4)
    assert equal(again.average.named_tensors(), whole.average.named_tensors())


def test_a_second_fit_goes_on_with_the_average_that_has_started():
    callback, module = ema(start_epoch=0.5), seeded()
    fit(module, callback)
    fit(module, callback)
    assert start_of(callback) == (6, 18)


def test_a_run_whose_length_is_not_known_is_refused():
    message = (
        r"start_epoch=0.5 is a share of the run's steps, .* not known here. Write a whole number of epochs, or start"
    )
    with pytest.raises(ValueError, match=message):
        fit(seeded(), ema(start_epoch=0.5), max_epochs=-1, max_steps=-1)
