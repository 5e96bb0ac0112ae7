"""Batches as a function of their place in a run. Knows torch, not Lightning."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class Draw(NamedTuple):
    """A batch to be made: the samples in it, and the seed of all that is random about it."""

    indices: list[int]
    seed: int


class Draws(Sampler[Draw]):
    """``num_batches`` batches of one process, from the place ``start`` in the run.

    An endless sequence of random permutations of all samples is dealt out in turn. With ``b`` the batch size and ``w``
    the number of processes, batch ``k`` of the run (from 0, over all epochs) has on process ``r`` the positions

        (k w + r) b, ..., (k w + r) b + b - 1

    of that sequence. So every batch is full, also where there are fewer samples than ``b``; a sample comes again only
    after all others have; and processes share none. ``k`` decides everything: no state is kept.
    """

    def __init__(self, size: int, batch_size: int, num_batches: int, seed: str, rank: int, world_size: int) -> None:
        self.size = size
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = 0
        self._latest: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Draw]:
        for k in range(self.start, self.start + self.num_batches):
            first = (k * self.world_size + self.rank) * self.batch_size
            yield Draw(self._samples(first, first + self.batch_size), seed_of(self.seed, "batch", k, self.rank))

    def _samples(self, first: int, end: int) -> list[int]:
        samples: list[int] = []
        while first < end:
            turn, offset = divmod(first, self.size)
            taken = self._permutation(turn)[offset : offset + end - first]
            samples += taken
            first += len(taken)
        return samples

    def _permutation(self, turn: int) -> list[int]:
        if self._latest[0] != turn:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "order", turn))
            self._latest = turn, torch.randperm(self.size, generator=generator).tolist()
        return self._latest[1]


class Stream:
    """An iterable of batches that starts each pass, an epoch, at the place where the run is.

    It is no ``DataLoader``, so a Trainer puts no sampler of its own in, which would deal out a small labeled part as
    short batches; :class:`Draws` shares the samples among the processes.

    Args:
        batches: makes a batch of a :class:`Draw`.
        draws: says which.
        place: says how many batches of the run are done, asked with the first batch of a pass. None: as many as all
            passes before have.
        num_workers, pin_memory: as in ``DataLoader``. Workers live for one epoch.
    """

    def __init__(
        self,
        batches: Dataset[Any],
        draws: Draws,
        place: Callable[[], int] | None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self._draws = draws
        self._place = place
        self._passes = 0
        self._loader = DataLoader(
            batches,
            batch_size=None,  # a draw is a whole batch
            sampler=draws,
            collate_fn=as_it_is,  # what torch would do otherwise makes lists of tuples
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(seed_of(draws.seed, "workers", draws.rank)),
        )

    def __len__(self) -> int:
        return self._draws.num_batches

    def __iter__(self) -> Iterator[Any]:
        # a generator: it runs when the first batch is asked for, and only then a resumed Trainer knows where it is
        self._draws.start = self._passes * len(self) if self._place is None else self._place()
        self._passes += 1
        yield from self._loader

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the place is the Trainer's to keep. That there is the method tells it that resuming is exact."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do, as there is nothing to keep."""


def as_it_is(batch: Any) -> Any:
    """The batch itself."""
    return batch


def seed_of(*parts: str | int) -> int:
    """A number in ``[0, 2**63)`` that is the same for the same parts in every process.

    >>> seed_of(0, "batch", 1) == seed_of(0, "batch", 1) != seed_of(0, "batch", 2)
    True
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Lets torch's CPU generator start from ``seed`` inside the block; it goes on from where it was after it."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
