"""Trains on noisy digits in several processes, with an average of the weights beside them.

    python examples/05_distributed.py                             # DDP: each process holds the whole average
    python examples/05_distributed.py --shard                     # DDP: each process holds its part of the average
    python examples/05_distributed.py --strategy fsdp             # FSDP2: the average is sharded like the weights
    python examples/05_distributed.py --strategy fsdp --folder    # ... and the checkpoint is a folder of shards

The line that matters is again ``EMACallback(decay=0.99)``. ``--resume PATH`` trains one epoch more, also in another
number of ``--processes``; a file, not a folder, also under the other strategy.
"""

import argparse
import logging
import warnings
from pathlib import Path

import torch
from digits import load, network
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_ema import EMACallback

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6
    from torch.distributed._composable.fsdp import fully_shard


class Classifier(LightningModule):
    def configure_model(self):  # ModelParallelStrategy wants layers made here; it is called again before evaluations
        if hasattr(self, "layers"):
            return
        self.layers = network()
        self.accuracy = MulticlassAccuracy(10, average="micro")
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.layers:
                if list(layer.parameters()):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def training_step(self, batch):
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(images), labels)

    def validation_step(self, batch):  # here the module carries the average
        images, labels = batch
        self.accuracy(self.layers(images), labels)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def loaders(processes):
    train, test = load()
    images, labels = train.tensors
    labels = labels.clone()
    labels[:1200] = torch.randint(10, (1200,), generator=torch.Generator().manual_seed(0))  # 40% noise
    train = TensorDataset(images, labels)
    return DataLoader(train, 32 // processes, shuffle=True, drop_last=True), DataLoader(test, 500)


def strategy(args):
    if args.strategy == "ddp":
        return DDPStrategy()
    return ModelParallelStrategy(args.processes, tensor_parallel_size=1, save_distributed_checkpoint=args.folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--shard", action="store_true", help="partition the average among the processes of DDP")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", action="store_true", help="under fsdp: a folder of shards instead of a file")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--resume", type=Path, help="a checkpoint of this script: trains one epoch more")
    parser.add_argument("--out", type=Path, default=Path("runs/distributed"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "EMACallback" in r.getMessage())
    for noise in (".*does not have many workers", ".*isinstance.treespec, LeafSpec", ".*no logger"):
        warnings.filterwarnings("ignore", noise)

    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="gpu" if torch.cuda.device_count() >= args.processes else "cpu",
        devices=args.processes,
        strategy=strategy(args),
        max_epochs=args.epochs + (args.resume is not None),
        callbacks=[EMACallback(decay=0.99, shard=args.shard, evaluate="both")],
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        **{"enable_model_summary": False, "num_sanity_val_steps": 0},
    )
    trainer.fit(Classifier(), *loaders(args.processes), ckpt_path=args.resume)

    path = args.out / f"{args.strategy}.ckpt"
    trainer.save_checkpoint(path, weights_only=False)  # in all processes
    if trainer.is_global_zero:
        average, live = (100 * (1 - trainer.callback_metrics[name].item()) for name in ("accuracy", "accuracy_live"))
        print(f"epoch {trainer.current_epoch}, test error: average {average:.2f}%, live weights {live:.2f}%")
        print(f"resume with --epochs {trainer.current_epoch} --resume {path}", flush=True)


if __name__ == "__main__":
    main()
