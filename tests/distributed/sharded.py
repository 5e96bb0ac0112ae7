"""What the scripts on sharded weights share: a module under FSDP2, its trainer, and whole tensors to compare."""

import json
import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from datetime import timedelta
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
    torch.manual_seed(11)
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

    def test_step(self, batch):
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.05)


def whole(tensor):
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def whole_of(named):
    return {name: whole(tensor) for name, tensor in dict(named).items()}


def strategy(processes, distributed_checkpoint, tensor_parallel=1, seconds=60):
    return ModelParallelStrategy(
        data_parallel_size=processes // tensor_parallel,
        tensor_parallel_size=tensor_parallel,
        save_distributed_checkpoint=distributed_checkpoint,
        process_group_backend="gloo",
        timeout=timedelta(seconds=seconds),
    )


def averaging(**kwargs):
    return EMACallback(**{"decay": Constant(0.9), **kwargs})


def trainer_of(*callbacks, processes=2, folders=True, epochs=2, seconds=60, **kwargs):
    seed_everything(SEED, verbose=False)
    settings = {"strategy": strategy(processes, folders, seconds=seconds), "num_sanity_val_steps": 0, **kwargs}
    return trainer(*callbacks, devices=processes, max_epochs=epochs, **settings)


SEED = 3


def data(processes):
    """Loaders for one process of several that give the same global batches, whatever the number of processes."""
    batch_size = 8 // processes
    return loader(6 * processes, batch_size), loader(2 * processes, batch_size)


def fit(module, *callbacks, processes=2, ckpt_path=None, **kwargs):
    """Fits and gives the trainer."""
    this = trainer_of(*callbacks, processes=processes, **kwargs)
    this.fit(module, *data(processes), ckpt_path=ckpt_path)
    return this


def same(first, second, tolerance=0.0):
    first, second = whole_of(first), whole_of(second)
    assert first.keys() == second.keys() and first
    for name, tensor in first.items():
        other = second[name]
        assert tensor.shape == other.shape and tensor.dtype == other.dtype, name
        difference = (tensor - other).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference}"


def ended(checks, *arguments):
    """How each check ended: "" or what was raised. None follows a failure: the other processes may be anywhere."""
    seen = dict.fromkeys(checks, "not run")
    for name, check in checks.items():
        try:
            check(*arguments)
            seen[name] = ""
        except BaseException:  # pytest's own failures are no Exceptions
            seen[name] = traceback.format_exc()
            break
    return seen


def write(folder, name, seen):
    Path(folder, f"{name}.json").write_text(json.dumps(seen))


def forked(processes, function, *arguments):
    """Calls a function in processes that Lightning takes for torchrun's; gives how they ended, None if they did not.

    They are forks, which need not import torch again: nothing may have been calculated before.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_as_rank, args=(rank, processes, port, function, *arguments))
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(200)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def _as_rank(rank, processes, port, function, *arguments):
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in place.items()})
    quiet()
    function(*arguments)
    torch.distributed.destroy_process_group()


def quiet():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
