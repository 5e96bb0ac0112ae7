"""Run by test_averages_under_ddp in two processes; each writes what it saw to <folder>/<rank>.json."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import Regression, clones, equal, loader, seed_everything, trainer
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from sharded import forked

from lightning_ema import Constant, EMACallback


class Scored(Regression):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)


class ByHand(Callback):
    """Both averages, worked out from the live weights at the end of each batch."""

    def on_train_start(self, trainer, pl_module):
        self.averages = [clones(pl_module.named_parameters()) for _ in range(2)]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for decay, average in zip((0.9, 0.5), self.averages, strict=True):
            for name, live in pl_module.named_parameters():
                average[name].mul_(decay).add_(live.detach(), alpha=1 - decay)

    def on_train_end(self, trainer, pl_module):
        self.live = clones(pl_module.named_parameters())


def fit(*callbacks, ckpt_path=None, epochs=2):
    seed_everything(3, verbose=False)
    strategy = DDPStrategy(process_group_backend="gloo")
    this = trainer(*callbacks, strategy=strategy, devices=2, max_epochs=epochs, num_sanity_val_steps=0)
    module = Scored(norm=False)
    this.fit(module, loader(), loader(2), ckpt_path=ckpt_path)
    return this, module


def averaging():
    return EMACallback([Constant(0.9), Constant(0.5)], evaluate="all")


def main(folder):
    by_hand, callback = ByHand(), averaging()
    this, module = fit(callback, by_hand)
    logged = {name: float(value) for name, value in this.callback_metrics.items()}
    this.save_checkpoint(Path(folder) / "x.ckpt")
    whole, again = averaging(), averaging()
    fit(whole, epochs=3)
    fit(again, epochs=3, ckpt_path=Path(folder) / "x.ckpt")
    close = [
        all(torch.allclose(value, expected[name], atol=1e-6) for name, value in average.named_tensors())
        for average, expected in zip(callback.averages, by_hand.averages, strict=True)
    ]
    seen = {
        "processes": this.world_size,
        "by hand": close,
        "weights": {name: value.flatten().tolist() for name, value in callback.average.named_tensors()},
        "logged": logged,
        "resumed": [
            equal(a.named_tensors(), b.named_tensors()) for a, b in zip(whole.averages, again.averages, strict=True)
        ],
        "applied": equal(module.state_dict(), callback.average.named_tensors()),
    }
    torch.save([by_hand.averages[0], by_hand.live, by_hand.averages[1]], Path(folder) / f"{this.global_rank}.pt")
    (Path(folder) / f"{this.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    sys.exit(any(forked(2, main, sys.argv[1])))
