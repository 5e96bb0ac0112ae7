"""Batches of labeled samples, and of unlabeled ones in two views. Knows torch, not Lightning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_ema.semi_supervised.splits import label_of
from lightning_ema.semi_supervised.streams import Draw, seeded

Transform = Callable[[Any], Any]
Collate = Callable[[list[Any]], Any]

NO_LABEL = -1


class Views(NamedTuple):
    """Two views of the same unlabeled samples, in the same order.

    Attributes:
        weak: what the teacher usually sees, shape ``[N, ...]``.
        strong: what the student usually sees, shape ``[N, ...]``.
        labels: int64, shape ``[N]``, -1 where none is known; None unless ``reveal_labels=True``. For metrics only.
    """

    weak: Any
    strong: Any
    labels: Tensor | None = None


class PerSample:
    """Makes a transform of one sample into one of a batch, as ``weak`` and ``strong`` have to be.

    Slower than a transform that works on the whole batch at once.

    >>> PerSample(lambda image: 2 * image)(torch.tensor([[1], [2], [3]])).tolist()
    [[2], [4], [6]]
    """

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, batch: Any) -> Any:
        return default_collate([self.transform(sample) for sample in batch])


class LabeledBatches(Dataset[tuple[Any, Tensor]]):
    """Makes ``(inputs, labels)`` of a draw from the ``kept`` samples of a dataset of pairs."""

    def __init__(self, dataset: Dataset[Any], kept: Sequence[int], collate: Collate, view: Transform | None) -> None:
        self.dataset = dataset
        self.kept = kept
        self.collate = collate
        self.view = view

    def __getitem__(self, draw: Draw) -> tuple[Any, Tensor]:
        with seeded(draw.seed):
            items = fetch(self.dataset, [self.kept[place] for place in draw.indices])
            labels = torch.tensor([label_of(item) for item in items])
            return seen(self.view, self.collate([given for given, _ in items])), labels


class UnlabeledBatches(Dataset[Views]):
    """Makes :class:`Views` of a draw from the ``rest`` of the labeled dataset followed by all of ``further``."""

    def __init__(
        self,
        dataset: Dataset[Any],
        rest: Sequence[int],
        further: Dataset[Any] | None,
        collate: Collate,
        weak: Transform | None,
        strong: Transform | None,
        reveal_labels: bool,
    ) -> None:
        self.dataset = dataset
        self.rest = rest
        self.further = further
        self.collate = collate
        self.weak = weak
        self.strong = strong
        self.reveal_labels = reveal_labels

    def __getitem__(self, draw: Draw) -> Views:
        with seeded(draw.seed):
            items = self._items(draw.indices)
            inputs = [input_of(item) for item in items]
            weak = seen(self.weak, self.collate(inputs))
            strong = seen(self.strong, self.collate(inputs))  # a batch of its own, as a transform may write to it
            return Views(weak, strong, self._labels(draw.indices, items) if self.reveal_labels else None)

    def _items(self, places: list[int]) -> list[Any]:
        near = [place for place in places if place < len(self.rest)]
        far = [place for place in places if place >= len(self.rest)]
        found = dict(zip(near, fetch(self.dataset, [self.rest[place] for place in near]), strict=True))
        if self.further is not None:
            found |= zip(far, fetch(self.further, [place - len(self.rest) for place in far]), strict=True)
        return [found[place] for place in places]

    def _labels(self, places: list[int], items: list[Any]) -> Tensor:
        pairs = zip(places, items, strict=True)
        return torch.tensor([label_of(item) if place < len(self.rest) else NO_LABEL for place, item in pairs])


def fetch(dataset: Dataset[Any], indices: list[int]) -> list[Any]:
    """The items of these indices; all at once where the dataset can do that, as ``DataLoader`` does."""
    if indices and hasattr(dataset, "__getitems__"):
        return list(dataset.__getitems__(indices))
    return [dataset[index] for index in indices]


def input_of(item: Any) -> Any:
    """The input in an item: the first entry of a tuple or list, otherwise the item."""
    return item[0] if isinstance(item, (tuple, list)) else item


def seen(view: Transform | None, batch: Any) -> Any:
    """The batch under a transform; as it is where there is none."""
    return batch if view is None else view(batch)
