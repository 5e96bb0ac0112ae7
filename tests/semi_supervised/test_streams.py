from itertools import chain, islice

import pytest
import torch
from torch.utils.data import Dataset

from lightning_ema.semi_supervised.streams import Draws, Stream, seed_of, seeded


class Noise(Dataset):
    def __getitem__(self, draw):
        with seeded(draw.seed):
            return draw.indices, torch.rand(2).tolist()


def draws(size=10, batch_size=4, num_batches=3, seed="0", rank=0, world_size=1, start=0):
    made = Draws(size, batch_size, num_batches, seed, rank, world_size)
    made.start = start
    return made


def dealt(epochs, **kwargs):
    per_epoch = kwargs.get("num_batches", 3)
    return [draw for epoch in range(epochs) for draw in draws(start=epoch * per_epoch, **kwargs)]


def test_samples_come_again_only_after_all_others():
    samples = [i for draw in dealt(10) for i in draw.indices]  # 30 batches of 4 from 10
    assert [sorted(samples[turn : turn + 10]) for turn in range(0, 120, 10)] == [list(range(10))] * 12
    assert len({str(samples[turn : turn + 10]) for turn in range(0, 120, 10)}) == 12


@pytest.mark.parametrize("size", [1, 3, 30, 31, 33])
def test_batches_are_full_however_few_samples_there_are(size):
    samples = [draw.indices for draw in dealt(2, size=size, batch_size=32)]
    assert [len(batch) for batch in samples] == [32] * 6
    counts = [list(chain(*samples)).count(i) for i in range(size)]
    assert max(counts) - min(counts) <= 1


def test_processes_share_the_samples_of_one_order():
    alone = [i for draw in dealt(4, batch_size=6) for i in draw.indices]
    shared = [dealt(4, batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    together = [i for batches in zip(*shared, strict=True) for draw in batches for i in draw.indices]
    assert together == alone
    seeds = [draw.seed for batches in shared for draw in batches]
    assert len(set(seeds)) == len(seeds)


def test_a_draw_depends_on_its_place_alone():
    whole = dealt(3)
    assert list(draws(start=4)) == whole[4:7] and len(draws(start=4)) == 3
    backwards = draws()
    backwards.start = 6
    list(backwards)
    backwards.start = 0
    assert list(backwards) == whole[:3]
    assert [d.seed for d in draws(seed="1")] != [d.seed for d in whole[:3]] != [d.indices for d in draws(seed="1")]


def test_without_a_place_each_pass_is_the_next_epoch():
    stream = Stream(Noise(), draws(), place=None)
    assert len(stream) == 3
    first, second = list(stream), list(stream)
    expected = [Noise()[draw] for draw in dealt(3)]
    assert first + second == expected[:6]
    next(iter(stream))  # a look into a pass is a pass
    assert list(stream) == [Noise()[draw] for draw in dealt(4)[9:]]


def test_the_place_is_asked_with_the_first_batch():
    place = [0]
    stream = Stream(Noise(), draws(), place=lambda: place[0])
    begun = iter(stream)
    place[0] = 4
    assert list(begun) == [Noise()[draw] for draw in dealt(3)[4:7]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_neither_workers_nor_the_global_random_state_change_a_batch(num_workers):
    torch.manual_seed(num_workers)
    before = torch.get_rng_state()
    stream = Stream(Noise(), draws(), place=None, num_workers=num_workers)
    epochs = [*stream, *stream]
    assert epochs == [Noise()[draw] for draw in dealt(2)]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pass_may_be_left_in_the_middle():
    stream = Stream(Noise(), draws(num_batches=20), place=None, num_workers=1)
    first = iter(stream)
    list(islice(first, 3))
    first.close()
    assert list(stream) == [Noise()[draw] for draw in dealt(2, num_batches=20)[20:]]


def test_seeds_are_the_same_in_every_process():
    # printf 0/labeled/batch/7/1 | b2sum -l 64, read as a little-endian number, halved
    assert seed_of("0/labeled", "batch", 7, 1) == 4095880937983320185
    torch.Generator().manual_seed(seed_of("a"))


def test_a_seeded_block_gives_the_state_back_on_errors():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded(3):
        torch.rand(-1)
    assert torch.equal(torch.get_rng_state(), before)
