"""A process that trains a mean teacher is killed at a chosen moment, and a new one goes on from its last file."""

import os
import signal
from itertools import product

import lightning
import pytest
import torch
from helpers import equal, widest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from packaging.version import Version
from test_teacher_resume import Calm, CalmManual, run

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks, so that a new process costs no new imports"),
]

# The kind of module, its settings, the trainer's, and every how many steps of optimizers a file is written: never
# after the last batch of an epoch. From there a run goes on exactly, but Lightning itself, without any callback, does
# not resume what that run writes later in the epoch.
SETTINGS = {
    "plain": (Calm, {}, {}, 5),
    "copied buffers, every third step": (Calm, {"buffers": "copy", "every_n_steps": 3}, {}, 5),
    "accumulation": (Calm, {}, {"accumulate_grad_batches": 2}, 5),
    "two optimizers": (CalmManual, {}, {}, 10),
}

# in which hook two processes in turn die, after so many of the 24 batches; the third comes to the end
MOMENTS = {
    "after a batch": ("on_train_batch_end", 10, 19),
    "inside a batch": ("on_after_backward", 13, 14),
    "before a step": ("on_before_optimizer_step", 13, 19),
    "at a validation": ("on_validation_start", 12, 18),
    "while a file is put together": ("on_save_checkpoint", 14, 20),
    "before the first file": ("on_train_batch_start", 2, 15),
}


class Dies(Callback):
    """Kills its process: nothing is flushed, closed or told."""

    def __init__(self, hook, batches):
        def die(trainer, *_):
            if trainer.fit_loop.epoch_loop.total_batch_idx + 1 >= batches:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(self, hook, die)


def newest(folder):
    files = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    return files[-1] if files else None


def what_is_at(end):
    return {"weights": end.weights, "optimizers": end.optimizers, "counts": end.counts}


def go_on(folder, setting, *callbacks):
    """Trains from the newest file to the end, and gives what is there then."""
    kind, config, settings, every = SETTINGS[setting]
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1, enable_version_counter=False)
    path = newest(folder)
    return run(kind, config, *callbacks, saving, ckpt_path=path, enable_checkpointing=True, **settings)


def in_a_process(folder, setting, *callbacks):
    """The signal that ended it, 0 where it came to the end and wrote ``end.pt``."""
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            torch.save(what_is_at(go_on(folder, setting, *callbacks)), folder / "end.pt")
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What is there at the end of an uninterrupted run, by setting."""
    return {setting: what_is_at(go_on(tmp_path_factory.mktemp("whole"), setting)) for setting in SETTINGS}


@pytest.mark.parametrize(
    ("setting", "moment"),
    [
        pytest.param(setting, moment, marks=widest(setting == "plain" or moment == "before a step"))
        for setting, moment in product(SETTINGS, MOMENTS)
    ],
)
def test_it_ends_where_the_uninterrupted_run_does(setting, moment, whole, tmp_path):
    if setting == "accumulation" and Version(lightning.__version__) < Version("2.5"):
        pytest.skip("Lightning 2.4 itself, without any callback, does not resume exactly inside an accumulation")
    hook, *lives = MOMENTS[moment]
    for batches in lives:
        if setting == "accumulation" and newest(tmp_path):
            break  # a resumed ModelCheckpoint soon writes inside an accumulation, whose gradients no file holds
        assert in_a_process(tmp_path, setting, Dies(hook, batches)) == signal.SIGKILL
    assert newest(tmp_path) is not None
    assert in_a_process(tmp_path, setting) == 0
    end, expected = torch.load(tmp_path / "end.pt", weights_only=True), whole[setting]
    assert tuple(end["counts"]) == tuple(expected["counts"])
    assert equal(end["weights"], expected["weights"])
    assert all(equal(one, other) for one, other in zip(end["optimizers"], expected["optimizers"], strict=True))
    student, teacher = (end["weights"][f"{name}.0.weight"] for name in ("student", "teacher"))
    assert not torch.equal(student, teacher)
