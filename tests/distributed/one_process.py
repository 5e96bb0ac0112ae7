"""Runs of one process that runs of several are compared with."""

from helpers import engine, trainer
from lightning.pytorch import seed_everything
from sharded import SEED, Sharded, averaging, data
from torch.utils.data import DataLoader, DistributedSampler


def alone(module=None, callbacks=None, **kwargs):
    """The trainer of a run without a strategy, on the same global batches."""
    seed_everything(SEED, verbose=False)
    training, validation = data(1)
    as_shuffled = DataLoader(training.dataset, 8, sampler=DistributedSampler(training.dataset, 1, 0, seed=SEED))
    this = trainer(*(callbacks or []), num_sanity_val_steps=0, **kwargs)
    this.fit(module or Sharded(), as_shuffled, validation)
    return this


def averages_alone(make=Sharded, settings=None, beside=(), **kwargs):
    """Averages and live weights of such a run."""
    callback = averaging(**(settings or {}))
    alone(make(), [callback, *beside], **kwargs)
    averages = [dict(average.named_tensors()) for average in callback.averages]
    return *averages, dict(engine(callback.average).named_live())
