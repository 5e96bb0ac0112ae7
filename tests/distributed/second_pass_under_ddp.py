"""Run by test_second_pass_under_ddp in two processes; each writes what it saw to <folder>/<rank>.json."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import clones, loader, seed_everything, trainer
from lightning.pytorch.strategies import DDPStrategy
from sharded import forked
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from twice import Classes, Twice, double


class Logs(Classes):
    def __init__(self):
        super().__init__(dropout=0.5)
        self.accuracy, self.losses = MulticlassAccuracy(3), []

    def training_step(self, batch, batch_idx):
        scores, targets = self.scores(batch)
        return self.loss(batch) + torch.nn.functional.nll_loss(scores.log(), targets)

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss)
        self.accuracy(*self.scores(batch))
        self.log("accuracy", self.accuracy)
        self.log("synced", loss, sync_dist=True)
        self.log("highest", loss, sync_dist=True, reduce_fx="max")
        self.log("local", loss)

    def on_validation_epoch_end(self):
        self.log("gathered", self.all_gather(torch.stack(self.losses)).sum())
        if self.trainer.is_global_zero:
            self.log("first", float(len(self.losses)), rank_zero_only=True)
        self.losses.clear()


class Keeps(Twice):
    def on_validation_epoch_end(self, trainer, pl_module):
        self.weights = clones(pl_module.state_dict())
        self.wrapped = type(trainer.strategy.model).__name__
        super().on_validation_epoch_end(trainer, pl_module)


def ddp(*callbacks):
    seed_everything(3, verbose=False)
    strategy = DDPStrategy(process_group_backend="gloo")
    return trainer(*callbacks, strategy=strategy, devices=2, max_epochs=2, num_sanity_val_steps=1)


def numbers(metrics):
    return {name: float(value) for name, value in metrics.items()}


def main(folder):
    training = DataLoader(loader().dataset, 8, shuffle=True)
    validation = DataLoader(loader().dataset, 3)  # 24 rows for each process

    plain = ddp()
    module = Logs()
    plain.fit(module, training, validation)

    keeps = Keeps()
    both = ddp(keeps)
    beside = Logs()
    both.fit(beside, training, validation)

    alone = ddp()
    doubled = Logs()
    doubled.load_state_dict(keeps.weights)
    double(doubled)
    alone.validate(doubled, validation, verbose=False)

    state = module.state_dict()
    seen = {
        "wrapped": keeps.wrapped,
        "same training": all(torch.equal(value, state[name]) for name, value in beside.state_dict().items()),
        "plain": numbers(plain.callback_metrics),
        "both": numbers(both.callback_metrics),
        "second": {result.name: float(result.value) for result in keeps.passes[-1]},
        "alone": numbers(alone.callback_metrics),
    }
    (Path(folder) / f"{both.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    sys.exit(any(forked(2, main, sys.argv[1])))
