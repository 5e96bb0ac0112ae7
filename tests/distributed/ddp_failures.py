"""Run by test_ddp_failures: one of 2 processes raises or is killed; then the run is resumed from the checkpoint before.

How each process of a scenario ended, and what it said, goes to <folder>/ended.json and <folder>/<scenario>-<rank>.txt.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from ddp_runs import ByStep, averaging, ddp, equal, fit, loader, of_all, parameters_of, start, trainer
from forked import fork
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint


class Fails(Callback):
    """In the second epoch something happens to one process."""

    def __init__(self, rank, when, kill):
        self.rank, self.when, self.kill = rank, when, kill

    def happens(self, trainer, when):
        if trainer.current_epoch == 1 and (trainer.global_rank, when) == (self.rank, self.when):
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("a bug")

    def on_validation_batch_end(self, trainer, *_):
        self.happens(trainer, "validation")

    def on_save_checkpoint(self, trainer, *_):
        self.happens(trainer, "save")


class SavesOnException(Callback):
    """As ``ModelCheckpoint(save_on_exception=True)`` does, which Lightning has from 2.6 on."""

    def __init__(self, path):
        self.path = path

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)


SCENARIOS = {
    "raises in validation": (False, Fails(1, "validation", kill=False)),
    "raises in validation, shared": (True, Fails(1, "validation", kill=False)),
    "the first raises in validation, shared": (True, Fails(0, "validation", kill=False)),
    "the first raises in validation": (False, Fails(0, "validation", kill=False)),
    "killed in validation, shared": (True, Fails(1, "validation", kill=True)),
    "the first killed in validation": (False, Fails(0, "validation", kill=True)),
    "killed in a save, shared": (True, Fails(1, "save", kill=True)),
    "the first killed in a save": (False, Fails(0, "save", kill=True)),
}


def keep(folder, scenario):
    return ModelCheckpoint(Path(folder) / scenario, save_top_k=-1, filename="{epoch}")


def scenario_of(rank, processes, folder, scenario):
    torch.set_num_threads(1)
    shard, fails = SCENARIOS[scenario]
    with (Path(folder) / f"{scenario}-{rank}.txt").open("w") as said:
        os.dup2(said.fileno(), 2)  # what the process ends with, too
    start(rank, processes, folder, scenario)
    saves = SavesOnException(Path(folder) / f"{scenario}.ckpt")
    fit(ByStep(), averaging(shard=shard), fails, keep(folder, scenario), saves, enable_checkpointing=True)


def whole_and_resumed(rank, processes, folder):
    """The whole run, which saves at the same steps, and all that were cut off."""
    torch.set_num_threads(1)
    start(rank, processes, folder, "resumed")
    whole, module, same = averaging(), ByStep(), {}
    fit(module, whole)
    for scenario, (shard, _) in SCENARIOS.items():
        again, resumed = averaging(shard=shard), ByStep()
        fit(resumed, again, ckpt_path=Path(folder) / scenario / "epoch=0.ckpt")
        pairs = zip(whole.averages, again.averages, strict=True)
        same[scenario] = [equal(parameters_of(one), parameters_of(other)) for one, other in pairs]
        same[scenario] += of_all([equal(module.state_dict(), resumed.state_dict()), again.average.num_steps])
    saved = torch.load(Path(folder) / "the first raises in validation.ckpt", weights_only=True)
    same["saved on the exception"] = all(
        torch.equal(saved["state_dict"][name], tensor) for name, tensor in parameters_of(whole.average).items()
    )
    again = averaging()
    fit(ByStep(), again, ckpt_path=Path(folder) / "the first raises in validation.ckpt", epochs=3)
    same["steps after the exception"] = again.average.num_steps
    (Path(folder) / f"resumed-{rank}.json").write_text(json.dumps(same))


def launched(folder):
    """The first process starts the other one by itself, as in a script of a user's."""
    torch.set_num_threads(1)
    fails = Fails(1, "validation", kill=False)
    this = trainer(averaging(), fails, strategy=ddp(), devices=2, num_sanity_val_steps=0)
    this.fit(ByStep(), loader(3, 4), loader(2, 4))


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    if rest == ["launched"]:
        launched(folder)
    else:
        ended = {scenario: fork(scenario_of, 2, folder, scenario) for scenario in SCENARIOS}
        ended["resumed"] = fork(whole_and_resumed, 2, folder)
        (Path(folder) / "ended.json").write_text(json.dumps(ended))
