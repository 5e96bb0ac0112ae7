"""Promise 4 and 3: errors and signals in every hook, and a process killed at random moments."""

import os
import random
import signal
import time

import pytest
import torch
from helpers import BATCHES, Regression, clones, ema, engine, equal, loader, seed_everything, seeded, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_ema import EMACallback

pytestmark = pytest.mark.filterwarnings("ignore")

FIT_HOOKS = [
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_end",
]


class RaisesIn(Callback):
    """Acts in one hook, from the second epoch on."""

    def __init__(self, hook, act):
        def fail(trainer, *_):
            late = trainer.current_epoch == 1 or hook in ("on_train_start", "on_train_end") or trainer.state.fn != "fit"
            if late and not trainer.sanity_checking:
                act()

        setattr(self, hook, fail)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0)  # gives Python the chance to run the handler


def fail():
    raise ZeroDivisionError


@pytest.fixture(autouse=True)
def signal_handlers():
    """Python's own handlers, which a process started in the background lacks, and which Lightning replaces."""
    kept = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for kind, handler in kept.items():
        signal.signal(kind, handler)


def attempt(module, *callbacks, **kwargs):
    seed_everything(3, verbose=False)
    this = trainer(*callbacks, **kwargs)
    with pytest.raises((ZeroDivisionError, KeyboardInterrupt, SystemExit)):
        this.fit(module, loader(), loader(2))
    return this


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("act", [fail, interrupt])
@pytest.mark.parametrize("hook", FIT_HOOKS)
def test_live_weights_are_back_and_the_exceptions_file_is_right(hook, act, first, tmp_path):
    callback, module, raiser = ema(), seeded(), RaisesIn(hook, act)
    ours = [raiser, callback] if first else [callback, raiser]
    attempt(module, *ours, OnExceptionCheckpoint(tmp_path), enable_checkpointing=True, default_root_dir=tmp_path)
    average = callback.average
    assert not engine(average).weights.held
    live = clones(engine(average).named_live())
    assert equal({name: module.state_dict()[name] for name in live}, live)
    file = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    stored = {name: file["state_dict"][name] for name in live}
    if average.num_updates:
        assert equal(stored, clones(average.named_tensors()))
        assert equal(file["callbacks"][callback.state_key]["live"], live)
    else:
        assert equal(stored, live)


@pytest.mark.parametrize("entry_point", ["validate", "test", "predict"])
@pytest.mark.parametrize("stage", ["start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end"])
@pytest.mark.parametrize("act", [fail, interrupt])
def test_in_other_entry_points(entry_point, stage, act):
    word = {"validate": "validation"}.get(entry_point, entry_point)
    callback, module = ema(after_fit="live"), seeded()
    seed_everything(3, verbose=False)
    trainer(callback).fit(module, loader(), loader(1))
    live = clones(module.state_dict())
    this = trainer(callback, RaisesIn(f"on_{word}_{stage}", act))
    with pytest.raises((ZeroDivisionError, KeyboardInterrupt, SystemExit)):
        getattr(this, entry_point)(module, loader(1))
    assert equal(module.state_dict(), live)
    assert not equal(callback.average.named_tensors(), engine(callback.average).named_live())


@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_train_batch_end", "on_validation_batch_start", "on_validation_end"]
)
def test_sigterm(hook, tmp_path):
    """Lightning turns SIGTERM into an exception at the next batch."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)

    callback, module = ema(), seeded()
    seed_everything(3, verbose=False)
    this = trainer(
        callback,
        RaisesIn(hook, terminate),
        OnExceptionCheckpoint(tmp_path),
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
    with pytest.raises((SIGTERMException, SystemExit)):
        this.fit(module, loader(), loader(2))
    live = clones(engine(callback.average).named_live())
    assert equal({name: module.state_dict()[name] for name in live}, live)
    file = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert equal({name: file["state_dict"][name] for name in live}, clones(callback.average.named_tensors()))


class TestKilled:
    """A child process trains and saves after every epoch; it is killed, and a new one goes on from the last file."""

    EPOCHS = 12

    def child(self, folder):
        """Trains from the newest file that can be read to the end, and writes the final average."""
        callback = ema(after_fit="live")
        files = sorted(folder.glob("epoch=*.ckpt"), key=lambda p: int(p.stem.split("=")[1].split("-")[0]), reverse=True)
        path = next((file for file in files if self.readable(file)), None)
        seed_everything(3, verbose=False)
        saving = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", enable_version_counter=False)
        this = trainer(callback, saving, max_epochs=self.EPOCHS, enable_checkpointing=True)
        this.fit(seeded(Regression), loader(), loader(1), ckpt_path=path)
        state = callback.average.state_dict()
        torch.save({"average": state["average"], "num_steps": state["num_steps"]}, folder / "partial")
        (folder / "partial").rename(folder / "final.pt")

    @staticmethod
    def readable(path):
        try:
            torch.load(path, weights_only=True)
        except Exception:
            return False
        return True

    def run_until(self, folder, deadline):
        """Runs a child for at most ``deadline`` seconds; gives whether it was killed."""
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(1, 2)
                self.child(folder)
            finally:
                os._exit(0)
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return False
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return True

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks, so that a new process costs no new imports")
    @pytest.mark.parametrize("at_least", [4, pytest.param(30, marks=pytest.mark.slow)])
    def test_the_final_average_is_that_of_the_uninterrupted_run(self, at_least, tmp_path):
        whole = tmp_path / "whole"
        whole.mkdir()
        started = time.monotonic()
        assert self.run_until(whole, 120) is False
        length = time.monotonic() - started
        expected = torch.load(whole / "final.pt", weights_only=True)
        assert expected["num_steps"] == self.EPOCHS * BATCHES
        moments, kills, round_ = random.Random(0), 0, 0
        while kills < at_least:
            folder = tmp_path / str(round_)
            folder.mkdir()
            round_, before = round_ + 1, kills
            # later with each kill of a round: on a busy machine a run may not come to its first file so soon
            while self.run_until(folder, moments.uniform(0.05, 0.6) * length * (1 + (kills - before) / 10)):
                kills += 1
                assert kills < 20 * at_least, "no round ever ends"
            result = torch.load(folder / "final.pt", weights_only=True)
            assert result["num_steps"] == expected["num_steps"]
            assert equal(result["average"], expected["average"])


class Worsens(Regression):
    """Its first epoch stays the best one."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(self.global_step))


def settled(folder, every, ckpt_path=None, dies_after=None):
    """Trains four epochs with the two ModelCheckpoints of the documentation, or dies after so many steps."""

    class Dies(Callback):
        def on_train_batch_end(self, this, *_):
            if this.global_step == dies_after:
                os.kill(os.getpid(), signal.SIGKILL)

    best = ModelCheckpoint(folder, monitor="val_loss")
    resume = ModelCheckpoint(folder, filename="resume", enable_version_counter=False, every_n_train_steps=every)
    callback, module = ema(after_fit="live"), seeded(Worsens)
    seed_everything(3, verbose=False)
    this = trainer(callback, Dies(), best, resume, max_epochs=4, enable_checkpointing=True)
    this.fit(module, loader(), loader(1), ckpt_path=ckpt_path)
    return callback.average


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks, so that a new process costs no new imports")
@pytest.mark.parametrize(("every", "found"), [(None, 3 * BATCHES), (4, 20)])
def test_a_killed_run_goes_on_from_the_second_model_checkpoint_and_not_from_the_one_that_monitors(
    every, found, tmp_path
):
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            settled(tmp_path, every, dies_after=3 * BATCHES + 4)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    (best,) = tmp_path.glob("epoch=*.ckpt")
    assert torch.load(best, weights_only=True)["global_step"] == BATCHES
    assert torch.load(tmp_path / "resume.ckpt", weights_only=True)["global_step"] == found
    again = settled(tmp_path, every, ckpt_path=tmp_path / "resume.ckpt")
    if every is None:  # else the loader begins anew inside the epoch, as Lightning warns
        whole = settled(tmp_path / "whole", every)
        assert again.num_steps == whole.num_steps == 4 * BATCHES
        assert equal(engine(again).named_live(), engine(whole).named_live())
        assert equal(again.named_tensors(), whole.named_tensors())


def test_the_callback_under_test_is_ours():
    assert isinstance(ema(), EMACallback)
