"""Run by test_teacher_under_ddp in two processes; each writes what it saw to <folder>/<rank>.json."""

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import clones, equal, loader, seed_everything, trainer
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from taught import Taught
from torch import nn

from lightning_ema import Constant, MeanTeacherConfig


class Plain(Taught):
    def __init__(self, **kwargs):
        super(Taught, self).__init__(**kwargs)
        self.student = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


class ByHand(Callback):
    """The teacher, worked out from the student at the end of each batch."""

    def on_train_start(self, trainer, pl_module):
        self.teacher = clones(pl_module.student.named_parameters())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, student in pl_module.student.named_parameters():
            self.teacher[name].mul_(0.75).add_(student.detach(), alpha=0.25)


def fit(*callbacks, ckpt_path=None, epochs=2):
    seed_everything(3, verbose=False)
    module = Plain(mean_teacher=MeanTeacherConfig(decay=Constant(0.75)))
    strategy = DDPStrategy(process_group_backend="gloo")
    this = trainer(*callbacks, strategy=strategy, devices=2, max_epochs=epochs, num_sanity_val_steps=0)
    this.fit(module, loader(), loader(2), ckpt_path=ckpt_path)
    return this, module


def main(folder):
    by_hand = ByHand()
    this, module = fit(by_hand)
    this.save_checkpoint(Path(folder) / "x.ckpt")
    _, whole = fit(epochs=3)
    _, again = fit(epochs=3, ckpt_path=Path(folder) / "x.ckpt")
    teacher = dict(module.teacher.named_parameters())
    seen = {
        "processes": this.world_size,
        "by hand": all(torch.allclose(teacher[name], value, atol=1e-6) for name, value in by_hand.teacher.items()),
        "teacher": {name: value.flatten().tolist() for name, value in teacher.items()},
        "resumed": equal(whole.state_dict(), again.state_dict()),
        "steps": [m.teacher_callback.num_steps for m in (module, whole, again)],
    }
    (Path(folder) / f"{this.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1])
