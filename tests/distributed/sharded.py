"""What the scripts on sharded weights share: a module under FSDP2, its trainer, and whole tensors to compare."""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import loader, trainer
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_ema import Constant, EMACallback

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6
    from torch.distributed._composable.fsdp import fully_shard


def network():
    seed_everything(11, verbose=False)
    return nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 1))


class Sharded(LightningModule):
    """The LayerNorm and ``scale`` belong to the outermost group; of the last layer's one row a process has nothing."""

    def __init__(self, **fully_shard_arguments):
        super().__init__()
        self.arguments = fully_shard_arguments

    def configure_model(self):
        if hasattr(self, "net"):
            return
        self.net = network()
        self.scale = nn.Parameter(torch.ones(1))
        if self.device_mesh is not None:
            self.shard(self.device_mesh["data_parallel"])

    def shard(self, mesh):
        for part in (self.net[0], self.net[3], self):
            fully_shard(part, mesh=mesh, **self.arguments)

    def forward(self, x):
        return self.net(x) * self.scale

    def loss(self, batch):
        return nn.functional.mse_loss(self(batch[0]).float(), batch[1])

    def training_step(self, batch):
        return self.loss(batch)

    def validation_step(self, batch):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.05)


def whole(tensor):
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def whole_of(named):
    return {name: whole(tensor) for name, tensor in dict(named).items()}


def strategy(processes, distributed_checkpoint):
    return ModelParallelStrategy(
        data_parallel_size=processes,
        tensor_parallel_size=1,
        save_distributed_checkpoint=distributed_checkpoint,
        process_group_backend="gloo",
    )


def averaging(**kwargs):
    return EMACallback(**{"decay": Constant(0.9), **kwargs})


def fit(module, *callbacks, processes=2, folders=True, epochs=2, ckpt_path=None, **kwargs):
    """Fits on the same global batches, whatever the number of processes; gives the trainer."""
    seed_everything(3, verbose=False)
    this = trainer(
        *callbacks,
        strategy=strategy(processes, folders),
        devices=processes,
        max_epochs=epochs,
        **{"num_sanity_val_steps": 0, **kwargs},
    )
    batch_size = 8 // processes
    this.fit(module, loader(6 * processes, batch_size), loader(2 * processes, batch_size), ckpt_path=ckpt_path)
    return this


def quiet():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
