"""Run by test_sharded_failures: runs of two processes that are cut short, and what is left of them.

Writes to ``<folder>/cut.json`` how the processes of each ended, None where one had to be killed, and to
``<folder>/<rank>.json`` how each check ended: "" or what was raised.
"""

import inspect
import os
import shutil
import signal
import sys
from pathlib import Path

import lightning.pytorch.strategies.model_parallel as model_parallel
import pytest
import torch
import torch.distributed as dist
from helpers import engine
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from sharded import Sharded, averaging, data, ended, fit, forked, same, trainer_of, write

ON_EXCEPTION = "save_on_exception" in inspect.signature(ModelCheckpoint).parameters
CUTS = ("raise", "kill", "kill in a save", "raise after a step")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Cut(Callback):
    """Ends the run in its second epoch, in one of its processes."""

    def __init__(self, how, folder):
        self.how, self.folder = how, folder

    def on_fit_start(self, trainer, pl_module):
        if self.how == "kill in a save" and trainer.global_rank == 1:
            save = model_parallel._distributed_checkpoint_save
            model_parallel._distributed_checkpoint_save = lambda *given: (
                die() if trainer.current_epoch == 1 else save(*given)
            )

    def on_validation_batch_start(self, trainer, *_):
        if trainer.current_epoch == 1 and self.how == "raise" and trainer.global_rank == 1:
            raise RuntimeError("one process has had enough")
        if trainer.current_epoch == 1 and self.how == "kill" and trainer.global_rank == 0:
            die()

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == 1 and self.how == "raise after a step" and trainer.global_rank == 1:
            raise RuntimeError("one process has had enough")

    def on_exception(self, trainer, pl_module, exception):
        torch.distributed.all_reduce = lambda *_: (self.folder / "waited").touch()  # others may never come


class Saving(Callback):
    """Asks for a checkpoint after the exception."""

    def __init__(self, folder):
        self.folder = folder

    def on_exception(self, trainer, pl_module, exception):
        with pytest.raises(RuntimeError, match="no checkpoint: the weights are sharded"):
            trainer.save_checkpoint(self.folder / "exception.ckpt")
        (self.folder / f"refused-{trainer.global_rank}").touch()


def keeping(folder, **kwargs):
    return ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, **kwargs)


def cut(folder, how):
    own = folder / how
    # where it is raised before the average has taken up the step, all processes would have to look for NaN
    average = averaging(on_nonfinite="skip")
    asked = {"save_on_exception": True} if ON_EXCEPTION else {}
    # who waits for another process here waits longer than this run is given to end
    callbacks = Cut(how, own), average, Saving(own), keeping(own, **asked)
    fit(Sharded(), *callbacks, enable_checkpointing=True, seconds=600)


# --- what is left ---------------------------------------------------------------------------------------------------

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


@check
def what_was_saved_before_resumes(folder):
    whole = averaging(on_nonfinite="skip")
    fit(Sharded(), whole, keeping(folder / "whole"), enable_checkpointing=True)
    for how in CUTS:
        again = averaging(on_nonfinite="skip")
        fit(Sharded(), again, ckpt_path=folder / how / "epoch=0.ckpt")
        same(whole.average.named_tensors(), again.average.named_tensors())
        same(engine(whole.average).named_live(), engine(again.average).named_live())


class Asked(Callback):
    asked = False

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.asked = True


def copied(folder, name, *without):
    if dist.get_rank() == 0:
        shutil.copytree(folder / "whole" / "epoch=0.ckpt", folder / name)
        for file in without:
            (folder / name / file).unlink()
    dist.barrier()
    return folder / name


@check
def a_folder_with_shards_of_two_saves_is_refused(folder):
    mixed = copied(folder, "mixed.ckpt")
    if dist.get_rank() == 0:
        shutil.copy(folder / "whole" / "epoch=1.ckpt" / "__1_0.distcp", mixed)
    dist.barrier()
    with pytest.raises(ValueError, match=r"mixed\.ckpt holds shards of two saves"):
        fit(Sharded(), averaging(), ckpt_path=mixed)
    asked = Asked()
    trainer_of(asked).validate(Sharded(), data(2)[1], ckpt_path=folder / "whole" / "epoch=0.ckpt", verbose=False)
    if asked.asked:  # older versions of Lightning show callbacks no file that is only evaluated
        with pytest.raises(ValueError, match=r"mixed\.ckpt holds shards of two saves"):
            trainer_of(averaging()).validate(Sharded(), data(2)[1], ckpt_path=mixed, verbose=False)


@check
def of_an_incomplete_folder_lightning_or_torch_says_what_is_missing(folder):
    with pytest.raises(ValueError, match="does not point to a valid checkpoint"):
        fit(Sharded(), averaging(), ckpt_path=copied(folder, "without_meta.ckpt", "meta.pt"))
    with pytest.raises(BaseException, match=r"\.metadata"):  # torch's CheckpointException is no Exception
        fit(Sharded(), averaging(), ckpt_path=copied(folder, "without_metadata.ckpt", ".metadata"))


def look(folder):
    write(folder, os.environ["RANK"], ended(CHECKS, folder))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write(root, "cut", {how: forked(2, cut, root, how) for how in CUTS})
    forked(2, look, root)
