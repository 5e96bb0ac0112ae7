import pytest
import torch
from helpers import Regression, loader, seed_everything, trainer
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, RandomSampler

from lightning_ema.trainer.training_batches import taken


class Takes(Callback):
    """Takes batches in the middle of an epoch."""

    def __init__(self, count):
        self.count = count

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            with taken(trainer, self.count) as batches:
                self.taken = [x.clone() for x, _ in batches]


class Remembers(Regression):
    def training_step(self, batch, batch_idx):
        self.seen = [*getattr(self, "seen", []), batch[0].clone()]
        torch.rand(1)
        return super().training_step(batch, batch_idx)


def batches_of(make_loader, *callbacks):
    seed_everything(1, verbose=False)
    module = Remembers()
    trainer(*callbacks).fit(module, make_loader(), loader(1))
    return module.seen, torch.get_rng_state()


LOADERS = {
    "in order": loader,
    "shuffled": lambda: DataLoader(loader().dataset, 8, shuffle=True),
    "shuffled by its own generator": lambda: DataLoader(
        loader().dataset, 8, shuffle=True, generator=torch.Generator().manual_seed(2)
    ),
    "a sampler with a generator": lambda: DataLoader(
        loader().dataset, 8, sampler=RandomSampler(loader().dataset, generator=torch.Generator().manual_seed(2))
    ),
    "persistent workers": lambda: DataLoader(
        loader().dataset, 8, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LOADERS)
def test_the_training_sees_the_batches_it_would_have_seen(kind):
    takes = Takes(4)
    plain, random = batches_of(LOADERS[kind])
    beside, random_beside = batches_of(LOADERS[kind], takes)
    assert len(takes.taken) == 4
    assert len(plain) == len(beside)
    assert all(torch.equal(a, b) for a, b in zip(plain, beside, strict=True))
    assert torch.equal(random, random_beside)
